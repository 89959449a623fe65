"""fastconv's second `Cuda`: the emulated GPU under torch.cuda's names. PyTorch's own operators run on the CPU.

Its clock is the host's without the time that emulation takes, plus an estimate of each launch from its counters: it
gives a dry run numbers to go on with, and says nothing about a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastconv.autotune.gpus import EMULATED
from fastconv.kernels.launch.device import Cuda
from tests.emulator.driver import Driver
from tests.emulator.memory import TOTAL_MEMORY

BROKEN = "CUDA error: an illegal memory access was encountered (emulated: {})"


class Emulated(Cuda):
    type = "cpu"
    real = False

    def __init__(self, driver: Driver) -> None:
        gpu = driver.gpu
        self.driver = driver
        # The name is another product's to fastconv, so that no table or record of the true one meets its own.
        self._properties = SimpleNamespace(
            name=gpu.name + EMULATED,
            major=gpu.arch // 10,
            minor=gpu.arch % 10,
            warp_size=32,
            multi_processor_count=gpu.multiprocessors,
            shared_memory_per_block_optin=gpu.shared_memory,
            L2_cache_size=gpu.l2_bytes,
            total_memory=TOTAL_MEMORY,
        )
        self._stream = Stream()
        self._capturing: Graph | None = None
        self._peak = 0

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> None:
        return None  # the index of a CPU tensor's device

    def set_device(self, device: Any) -> None:
        pass

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def get_device_name(self, device: Any = None) -> str:
        return self._properties.name

    def get_device_properties(self, device: Any = None) -> Any:
        return self._properties

    def at(self, index: int | None = None) -> torch.device:
        return torch.device("cpu")

    def fork_rng(self) -> contextlib.AbstractContextManager[None]:
        return torch.random.fork_rng(())

    def synchronize(self, device: Any = None) -> None:
        if self._capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing: a synchronisation")
        if self.driver.fault is not None:
            raise RuntimeError(BROKEN.format(str(self.driver.fault).splitlines()[0]))

    # Time.

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter() - self.driver.emulating + self.driver.estimated

    def Event(self, enable_timing: bool = False) -> Event:
        return Event(self)

    def sleep(self, cycles: int) -> None:
        pass

    # Streams: one, under several names.

    def Stream(self) -> Stream:
        return Stream()

    def current_stream(self) -> Stream:
        return self._stream

    def set_stream(self, stream: Stream) -> None:
        self._stream = stream

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = before

    # Graphs.

    def CUDAGraph(self) -> Graph:
        return Graph(self)

    def MemPool(self) -> Pool:
        return Pool()

    def is_current_stream_capturing(self) -> bool:
        return self._capturing is not None

    def end_allocating(self, pool: Any) -> None:
        pass

    def release_pool(self, pool: Any) -> None:
        pass

    # Memory: what launches have been given and is alive.

    def empty_cache(self) -> None:
        pass

    def memory_reserved(self) -> int:
        return self.memory_allocated()

    def memory_allocated(self) -> int:
        return self.driver.allocations.bytes()

    def max_memory_allocated(self) -> int:
        return self.driver.allocations.peak

    def reset_peak_memory_stats(self) -> None:
        self.driver.allocations.peak = self.memory_allocated()


class Stream:
    device = torch.device("cpu")

    def wait_stream(self, other: Stream) -> None:
        pass


class Event:
    def __init__(self, on: Emulated) -> None:
        self._on, self._at = on, 0.0

    def record(self, stream: Any = None) -> None:
        self._at = self._on.now()

    def synchronize(self) -> None:
        self._on.synchronize()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return (end._at - self._at) * 1e3


class Pool:
    _numbers = itertools.count(1)

    def __init__(self) -> None:
        self.id = (0, next(self._numbers))

    def use_count(self) -> int:
        return 1


class Graph:
    """Launches and PyTorch's operators in their order, run once as they are captured and again by each replay.

    (A GPU runs nothing during a capture. Here results exist after it, which no caller may rely on.)
    """

    def __init__(self, on: Emulated) -> None:
        self._on = on
        self._steps: list[Callable[[], object]] = []
        self._mode: _Noted | None = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if self._on._capturing is not None:
            raise RuntimeError("a CUDA graph is being captured already")
        self._steps = []
        self._mode = _Noted(self._steps)
        self._on._capturing = self
        self._on.driver.noted = self._steps
        self._mode.__enter__()

    def capture_end(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)
        self._mode = self._on._capturing = self._on.driver.noted = None

    def replay(self) -> None:
        # Below what tells an inference tensor from another, and notes what autograd is to do.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            for step in self._steps:
                step()

    def reset(self) -> None:
        self._steps.clear()


class _Noted(TorchDispatchMode):
    """Notes how each operator is made again into the same memory; fastconv's own are made of launches and these."""

    def __init__(self, steps: list[Callable[[], object]]) -> None:
        super().__init__()
        self._steps = steps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from fastconv.traffic import implementations

        kwargs = kwargs or {}
        ours = implementations.get(func)
        if ours is not None:
            with self:
                return ours(*args, **kwargs)
        result = func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: a tensor's value is asked for")
        if func._schema.is_mutable:
            self._steps.append(lambda: func(*args, **kwargs))
        elif not func.is_view and not func.name().startswith(("aten::empty", "aten::new_empty")):
            self._steps.append(lambda: _into(result, func(*args, **kwargs)))
        else:
            self._steps.append(lambda: result)  # keeps the memory
        return result


def _into(kept: Any, fresh: Any) -> None:
    for old, new in zip(tree_iter(kept), tree_iter(fresh), strict=True):
        if isinstance(old, torch.Tensor) and old is not new:
            old.copy_(new)
