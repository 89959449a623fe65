"""The GPU of this process: what fastconv asks of it besides compiling and launching, under torch.cuda's names.

``FASTCONV_DEVICE=module:argument`` puts a stand-in there, ``module.device(argument)``, in every process that inherits
the variable. It is for tests: its results are no GPU's.
"""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager

import torch

VARIABLE = "FASTCONV_DEVICE"


class Cuda:
    """NVIDIA's GPUs, by PyTorch."""

    type = "cuda"  # of the devices that its tensors are on
    real = True

    is_available = staticmethod(torch.cuda.is_available)
    device_count = staticmethod(torch.cuda.device_count)
    current_device = staticmethod(torch.cuda.current_device)
    set_device = staticmethod(torch.cuda.set_device)
    device = staticmethod(torch.cuda.device)
    get_device_name = staticmethod(torch.cuda.get_device_name)
    get_device_properties = staticmethod(torch.cuda.get_device_properties)

    synchronize = staticmethod(torch.cuda.synchronize)
    Event = staticmethod(torch.cuda.Event)
    Stream = staticmethod(torch.cuda.Stream)
    stream = staticmethod(torch.cuda.stream)
    current_stream = staticmethod(torch.cuda.current_stream)
    set_stream = staticmethod(torch.cuda.set_stream)
    sleep = staticmethod(torch.cuda._sleep)

    CUDAGraph = staticmethod(torch.cuda.CUDAGraph)
    MemPool = staticmethod(torch.cuda.MemPool)
    is_current_stream_capturing = staticmethod(torch.cuda.is_current_stream_capturing)

    empty_cache = staticmethod(torch.cuda.empty_cache)
    memory_reserved = staticmethod(torch.cuda.memory_reserved)
    memory_allocated = staticmethod(torch.cuda.memory_allocated)
    max_memory_allocated = staticmethod(torch.cuda.max_memory_allocated)
    reset_peak_memory_stats = staticmethod(torch.cuda.reset_peak_memory_stats)

    def at(self, index: int | None = None) -> torch.device:
        """PyTorch's name of the GPU of this index; None: of the current one."""
        return torch.device(self.type, index)  # type: ignore[arg-type]  # missing in torch's own stub

    def holds(self, device: torch.device) -> bool:
        """Whether what is on ``device`` is on a GPU."""
        return device.type == self.type

    def fork_rng(self) -> AbstractContextManager[None]:
        """Leaves the random numbers of the CPU and of every GPU as they were."""
        return torch.random.fork_rng(range(self.device_count()))

    def end_allocating(self, pool: torch.cuda.MemPool) -> None:
        """Take no more memory for a capture from ``pool``."""
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool.id)

    def release_pool(self, pool: torch.cuda.MemPool) -> None:
        """Give up one use of ``pool``."""
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool.id)


def _found() -> Cuda:
    named = os.environ.get(VARIABLE)
    if not named:
        return Cuda()
    module, _, argument = named.partition(":")
    return importlib.import_module(module).device(argument)


here = _found()
