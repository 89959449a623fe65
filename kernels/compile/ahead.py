"""Compile launches before they are made, on all cores, for GPUs that need not be here, into Triton's cache.

Triton itself computes the key of its cache (types, alignment, options) from stand-ins for the operands, so that a later
call finds the binary. Pointers count as aligned to 16 bytes, as torch's allocator places them.
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
from fastconv.kernels.launch.device import here
from fastconv.kernels.launch.launch import Launch, last_line, loaded
from fastconv.kernels.problem.layout import INDEX_TYPES, POINTER_TYPES

Result = TypeVar("Result")
Key = tuple[Any, int]  # Launch.compile_key, Gpu.arch
LIMIT = 120.0  # seconds for one binary; the slowest known take about ten on a busy machine
_DTYPES = {name: dtype for dtype, name in (POINTER_TYPES | INDEX_TYPES | {torch.int64: "*i64"}).items()}


class Binary(NamedTuple):
    """A launch's binary. ``kernel``: Triton's, with ``asm`` and ``metadata``."""

    kernel: Any
    arch: int
    cached: bool  # found in Triton's cache


class Binaries(NamedTuple, Generic[Result]):
    """What was made of each distinct binary, or one line that names the launch and says why it does not compile."""

    results: dict[Key, Result]
    failures: dict[Key, str]


class _Driver:
    """The part of a driver that Triton needs to compile without launching."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> str:
        return f"sm_{self._arch}"  # kernels are kept by device, and none has this name

    def get_current_stream(self, device: str) -> int:
        return 0


def operands(launch: Launch) -> tuple[Any, ...]:
    """Stand-ins for the tensors of ``launch``, to compile it."""
    return tuple(
        TensorDescriptor(MockTensor(it.dtype), list(it.shape), list(it.strides), list(it.box))
        if isinstance(it, Descriptor)
        else None
        if it is None
        else MockTensor(_DTYPES[it])
        for it in launch.pointers
    )


def load(launches: Sequence[Launch], device: torch.device) -> None:
    """Load the launches' binaries onto ``device``, a GPU that is here: from Triton's cache, or compiled."""
    with here.device(device):
        for it in launches:
            # Triton loads a binary when its ``run`` is first asked for.
            _ = it.kernel.warmup(*operands(it), *it.scalars, grid=it.grid, **it.arguments).run
        loaded(launches, here.current_device())


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def compile_each(
    wanted: Iterable[tuple[Launch, Gpu]],
    make: Callable[[Binary], Result],
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Binaries[Result]:
    """``make(binary)`` of each distinct binary, compiled once, by (launch.compile_key, gpu.arch).

    ``jobs`` processes (default: one a core) compile and touch no GPU; ``progress(done, all)`` is called after each
    binary. A compiler that crashes or hangs is a failure of its binary. Raises RuntimeError under TRITON_INTERPRET:
    one process cannot both interpret and compile.
    """
    if interpreter.interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process")
    distinct = {(launch.compile_key, gpu.arch): (launch, gpu.arch) for launch, gpu in wanted}
    compiled: Binaries[Result] = Binaries({}, {})
    keys = list(distinct)
    triton_key()  # a hash of the whole compiler, which takes half a second: the processes inherit it
    # Processes inherit the calls, because Triton's functions do not pickle.
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
    """(made, None), or (None, why the launch does not compile)."""
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
