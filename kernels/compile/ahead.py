"""Launches compiled before they are made, on all cores, for GPUs that need not be here, into Triton's cache.

Each goes the way that a call with its arguments goes, so that the call finds its binary: what Triton looks up, types,
alignment and options, is computed by Triton. Pointers count as aligned to 16 bytes, as torch's allocator places them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import triton_key
from triton.runtime.driver import driver
from triton.runtime.jit import MockTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastconv.autotune import Gpu
from fastconv.kernels.compile.workers import Ended, results_of
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.descriptor import Descriptor
from fastconv.kernels.launch.launch import Launch, last_line, loaded
from fastconv.kernels.problem.layout import INDEX_TYPES, POINTER_TYPES

Result = TypeVar("Result")
Key = tuple[Any, int]  # Launch.compile_key, Gpu.arch
LIMIT = 120.0  # seconds for one binary: the slowest known take some ten on a busy machine
_DTYPES = {name: dtype for dtype, name in (POINTER_TYPES | INDEX_TYPES | {torch.int64: "*i64"}).items()}


class Binary(NamedTuple):
    """What a launch will run. ``kernel``: Triton's, with its ``asm`` and ``metadata``."""

    kernel: Any
    arch: int
    cached: bool  # found in Triton's cache


class Binaries(NamedTuple, Generic[Result]):
    """Of each distinct binary what was made of it, or why it does not compile: one line that names the launch."""

    results: dict[Key, Result]
    failures: dict[Key, str]


class _Driver:
    """What Triton asks of a driver when it compiles and does not launch."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> str:
        return f"sm_{self._arch}"  # kernels are kept by device, and none has this name

    def get_current_stream(self, device: str) -> int:
        return 0


def operands(launch: Launch) -> tuple[Any, ...]:
    """What stands for the tensors of ``launch`` where nothing is launched."""
    return tuple(
        TensorDescriptor(MockTensor(it.dtype), list(it.shape), list(it.strides), list(it.box))
        if isinstance(it, Descriptor)
        else None
        if it is None
        else MockTensor(_DTYPES[it])
        for it in launch.pointers
    )


def load(launches: Sequence[Launch], device: torch.device) -> None:
    """Put onto ``device``, a GPU that is here, what the launches run: from Triton's cache, else it is compiled."""
    with torch.cuda.device(device):
        for it in launches:
            # Triton loads a binary when it is first asked how to run it.
            _ = it.kernel.warmup(*operands(it), *it.scalars, grid=it.grid, **it.arguments).run
        loaded(launches, torch.cuda.current_device())


def cores() -> int:
    """Of this machine, those that this process may use."""
    return len(os.sched_getaffinity(0))


def compile_each(
    wanted: Iterable[tuple[Launch, Gpu]],
    make: Callable[[Binary], Result],
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Binaries[Result]:
    """``make(binary)`` of each distinct binary, compiled once: by (launch.compile_key, gpu.arch).

    In ``jobs`` processes (one a core unless given) that touch no GPU; ``progress(done, all)`` after each. A compiler
    that crashes or hangs is a failure of its binary. Raises RuntimeError under TRITON_INTERPRET: one process cannot
    both interpret and compile.
    """
    if interpreter.interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    distinct = {(launch.compile_key, gpu.arch): (launch, gpu.arch) for launch, gpu in wanted}
    compiled: Binaries[Result] = Binaries({}, {})
    keys = list(distinct)
    triton_key()  # a hash of the whole compiler, which takes half a second: the processes inherit it
    # Calls are inherited, because Triton's functions do not pickle.
    calls = [partial(_compile_one, *each, make) for each in distinct.values()]
    with closing(results_of(calls, jobs or cores(), LIMIT)) as results:
        for done, (index, found) in enumerate(results, 1):
            key = keys[index]
            if isinstance(found, Ended):
                found = None, f"the compiler {found.how}"
            made, why = found
            if why is None:
                compiled.results[key] = made
            else:
                compiled.failures[key] = _failure(*distinct[key], why)
            if progress is not None:
                progress(done, len(distinct))
    return compiled


def _compile_one(launch: Launch, arch: int, make: Callable[[Binary], Any]) -> tuple[Any, str | None]:
    """What is made of the binary, or why there is none."""
    driver.set_active(_Driver(arch))
    found: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
    try:
        kernel = launch.kernel.warmup(*operands(launch), *launch.scalars, grid=launch.grid, **launch.arguments)
        return make(Binary(kernel, arch, found == [True])), None
    except Exception as error:
        return None, last_line(error)


def _failure(launch: Launch, arch: int, why: str) -> str:
    return (
        f"{launch.name} does not compile for sm_{arch} with {dict(launch.constants)}, {launch.num_warps} warps, "
        f"{launch.num_stages} stages: {why}"
    )
