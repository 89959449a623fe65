"""The one place where a kernel is launched, and the description of a launch that needs neither tensors nor a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver as triton_driver

from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.descriptor import Descriptor
from fastconv.kernels.launch.device import here

if interpreter.interpreting():
    interpreter.apply()


@dataclass(frozen=True)
class Launch:
    """One kernel launch that lacks only its tensors. ``kernel`` takes pointers, runtime scalars, constexprs, in this
    order."""

    kernel: Any  # a triton.jit function
    grid: tuple[int, int, int]
    pointers: tuple[str | Descriptor | None, ...]  # "*bf16"; None: no operand
    scalars: tuple[int | float, ...]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    tiles: int = 0  # count of those whose statistics it writes
    arguments: dict[str, Any] = field(init=False, repr=False, compare=False)
    # A GPU's index -> what makes the launch there again, without Triton's look at each argument.
    again: dict[int, Callable[[Sequence[Any]], None]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Fused products and sums are Triton's default, which may change.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        object.__setattr__(self, "arguments", {**self.constants, **options})
        object.__setattr__(self, "again", {})

    @cached_property
    def values(self) -> tuple[Any, ...]:
        """The arguments after the pointers, in the kernel's order."""
        names = self.kernel.arg_names[len(self.pointers) + len(self.scalars) :]
        return (*self.scalars, *(self.constants[name] for name in names))

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @cached_property
    def compile_key(self) -> tuple[Any, ...]:
        """All that decides the binary: launches with equal keys share one."""
        widths = tuple(isinstance(value, float) or -(2**31) <= value < 2**31 for value in self.scalars)
        constants = tuple((name, getattr(value, "__name__", value)) for name, value in self.constants.items())
        return (self.name, self.pointer_types, widths, constants, self.num_warps, self.num_stages)

    @property
    def pointer_types(self) -> tuple[str | None, ...]:
        """The operands' types as the compiler knows them."""
        return tuple(None if pointer is None else str(pointer) for pointer in self.pointers)

    @cached_property
    def described(self) -> tuple[tuple[int, Descriptor], ...]:
        """(index, descriptor) of each operand that bulk copies move."""
        return tuple((i, pointer) for i, pointer in enumerate(self.pointers) if isinstance(pointer, Descriptor))


Launches = tuple[Launch, ...]


@dataclass(frozen=True)
class LaunchRecord:
    """A launch as it happened, with its operands' shapes, dtypes and bytes."""

    launch: Launch
    shapes: tuple[tuple[int, ...] | None, ...]
    dtypes: tuple[torch.dtype | None, ...]
    bytes: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.launch.name


# No context variable: autograd runs backward on other threads.
_recorders: list[list[LaunchRecord]] = []


@contextlib.contextmanager
def record() -> Iterator[list[LaunchRecord]]:
    """Collect every launch made inside the block, on any thread, in order."""
    records: list[LaunchRecord] = []
    _recorders.append(records)
    try:
        yield records
    finally:
        _recorders[:] = [other for other in _recorders if other is not records]


Decision = TypeVar("Decision")
_decisions: ContextVar[list[Any] | None] = ContextVar("fastconv.decisions", default=None)


@contextlib.contextmanager
def decisions() -> Iterator[list[Any]]:
    """Collect every plan and every choice of a tile made inside the block, on this thread, in order."""
    found: list[Any] = []
    token = _decisions.set(found)
    try:
        yield found
    finally:
        _decisions.reset(token)


def decided(decision: Decision) -> Decision:
    """Add ``decision`` to `decisions` if they are collected; return it."""
    found = _decisions.get()
    if found is not None:
        found.append(decision)
    return decision


def deciding() -> bool:
    """Whether `decisions` are collected: then kept ones are made again."""
    return _decisions.get() is not None


class Uncovered(NotImplementedError):
    """No kernel serves the call; the message says why."""


class Failed(Uncovered):
    """The kernel that serves the call does not compile here or cannot be loaded. ``why``: the error in one line."""

    def __init__(self, launch: Launch, why: str) -> None:
        super().__init__(f"{launch.name} cannot be launched: {why}")
        self.why = why


# (Launch.compile_key, a GPU's index) of each binary loaded there, by a launch or a warm-up.
_loaded: set[tuple[Any, int]] = set()
# The same key -> why that binary failed: to compile it again at each call would take seconds.
_failed: dict[tuple[Any, int], str] = {}


def loaded(launches: Iterable[Launch], device: int) -> None:
    """Note that the binaries of ``launches`` are on the GPU of this index."""
    _loaded.update((launch.compile_key, device) for launch in launches)


def _first(launch: Launch, device: int, operands: Sequence[Any]) -> None:
    """Make a launch on the current GPU for the first time, and keep the compiled binary for repeats.

    Keeping it is safe because pointer alignment is part of the call's key. Raises RuntimeError if the binary would be
    compiled while a CUDA graph is captured, Failed if it cannot be compiled or loaded.
    """
    key = launch.compile_key, device
    if key in _failed:
        raise Failed(launch, _failed[key])
    if key not in _loaded and here.is_current_stream_capturing():
        raise RuntimeError(
            f"{launch.name} is not compiled for this call, and a CUDA graph is being captured: "
            "call fastconv.warmup(model, *inputs), for training with train=True, before the capture"
        )
    try:
        binary = launch.kernel[launch.grid](*operands, *launch.scalars, **launch.arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's, its compilers', the file system's
        _failed[key] = f"{last_line(error)} (Triton's cache: {knobs.cache.dir})"
        raise Failed(launch, _failed[key]) from error
    loaded([launch], device)
    if isinstance(binary, CompiledKernel):
        launch.again[device] = _repeat(launch, binary, device)


def last_line(error: Exception) -> str:
    """An error's type and the last line of its message, where compilers say what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


def _repeat(launch: Launch, binary: CompiledKernel, device: int) -> Callable[[Sequence[Any]], None]:
    """A function of the operands that makes ``launch`` on the GPU's current stream as Triton does, without the metadata
    that only a profiler's hooks need."""
    hooked, run, driver = binary[launch.grid], binary.run, triton_driver.active
    function, metadata, runtime = binary.function, binary.packed_metadata, knobs.runtime
    (x, y, z), values = launch.grid, launch.values

    def again(operands: Sequence[Any]) -> None:
        if runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
            hooked(*operands, *values)
        else:
            stream = driver.get_current_stream(device)
            run(x, y, z, stream, function, metadata, None, None, None, *operands, *values)

    return again


def run(launch: Launch, *tensors: torch.Tensor | None) -> None:
    """Launch on the current stream of the tensors' device; ``tensors`` follow ``launch.pointers``.

    Tensors without data (``FakeTensor``) are recorded, nothing is launched.
    """
    for records in _recorders:
        records.append(
            LaunchRecord(
                launch,
                tuple(None if t is None else tuple(t.shape) for t in tensors),
                tuple(None if t is None else t.dtype for t in tensors),
                tuple(0 if t is None else t.numel() * t.element_size() for t in tensors),
            )
        )
    first = tensors[0]
    if isinstance(first, FakeTensor):
        return
    device = first.device if first is not None else next(t for t in tensors if t is not None).device
    operands: Sequence[Any] = tensors
    if launch.described:
        operands = list(tensors)
        for at, descriptor in launch.described:
            operands[at] = descriptor.of(operands[at])
    index = device.index
    make = launch.again.get(index)
    if make is None:
        if interpreter.interpreting():
            # The interpreter copies operands by PyTorch's operators: modes must not take them for the computation's.
            with interpreter.LOCK, _disable_current_modes():
                launch.kernel[launch.grid](*operands, *launch.scalars, **launch.arguments)
            return
        make = partial(_first, launch, index)
    if index != here.current_device():
        with here.device(device):
            return make(operands)
    make(operands)
