"""Emulates an NVIDIA GPU (sm_80, sm_90) under Triton and fastconv: the compiled PTX runs on the host's memory.

``FASTCONV_DEVICE=tests.emulator:H200`` gives a process that imports fastconv an emulated H200, and its children too;
``activate("H200")`` one that uses Triton alone. Tensors are the CPU's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tests.emulator.driver import Driver, Launched, gpu_to_emulate
from tests.emulator.engine import Options
from tests.emulator.memory import Fault
from tests.emulator.ptx import PtxError

if TYPE_CHECKING:
    from tests.emulator.device import Emulated

__all__ = ["Fault", "Options", "PtxError", "activate", "current", "device", "launches", "options", "patched_ptx"]

_driver: Driver | None = None
# What may follow the GPU's name in FASTCONV_DEVICE, after commas.
_WORDS: dict[str, dict[str, Any]] = {
    "early": {"late": False},  # asynchronous copies and products happen at once
    "no-races": {"races": False},
    "counters": {"counters": True},
    "poison": {"poison": True},  # new tensors of PyTorch hold NaN
}


def device(argument: str) -> Emulated:
    """What ``FASTCONV_DEVICE=tests.emulator:argument`` puts in the GPU's place: "H200", "A100,early,counters"."""
    name, *words = argument.split(",")
    unknown = [word for word in words if word not in _WORDS]
    if unknown:
        raise ValueError(f"FASTCONV_DEVICE: no {unknown[0]!r} beside the GPU; there are: {', '.join(_WORDS)}")
    given: dict[str, Any] = {}
    for word in words:
        given |= _WORDS[word]
    # Imported here because it is fastconv's, which may be about to ask for it.
    from tests.emulator.device import Emulated

    return Emulated(activate(name, **given))


def activate(gpu: str, *, poison: bool = False, **given: Any) -> Driver:
    """Emulate ``gpu`` in this process from now on. ``given``: fields of `Options`.

    Raises ValueError on a GPU that is not emulated, RuntimeError under TRITON_INTERPRET, without a C compiler, and the
    second time.
    """
    global _driver
    known = gpu_to_emulate(gpu)
    if os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError("TRITON_INTERPRET is set: an emulated GPU runs compiled kernels")
    if _driver is not None:
        raise RuntimeError(f"this process emulates an {_driver.gpu.name} already")
    _driver = Driver(known, Options(**given))
    _register_tensors(_driver, poison)
    _drive_triton(_driver)
    return _driver


def _register_tensors(it: Driver, poison: bool) -> None:
    """Let every tensor whose address is asked for be an allocation of the GPU, as long as it lives."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

    plain = torch.Tensor.data_ptr
    seen: dict[int, tuple[int, StorageWeakRef]] = {}

    def data_ptr(self: torch.Tensor) -> int:
        address = plain(self)
        if address:
            storage = self.untyped_storage()
            start, size = storage.data_ptr(), storage.nbytes()
            known = seen.get(start)
            if known is None or known[0] != size or known[1].expired():
                weak = StorageWeakRef(storage)
                seen[start] = size, weak
                what = f"storage of {tuple(self.shape)} {self.dtype}"
                try:
                    it.allocations.add(start, size, what, lambda: not weak.expired())
                except MemoryError as error:
                    raise torch.OutOfMemoryError(str(error)) from None
        return address

    torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
    if poison:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True


def _drive_triton(it: Driver) -> None:
    """Let Triton's own launcher load and launch by ``it``."""
    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver
    from triton.compiler import CompiledKernel
    from triton.runtime import driver as active

    cuda = CudaDriver()
    cuda.get_current_device = lambda: 0
    cuda.set_current_device = lambda device: None
    cuda.get_current_stream = lambda device=None: 0
    cuda.get_device_capability = lambda device=None: divmod(it.gpu.arch, 10)

    class Launcher(cuda.launcher_cls):  # type: ignore[misc, name-defined]
        """Raises what went wrong in an emulated kernel, not what Triton makes of it."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            before = it.fault
            try:
                return super().__call__(*args, **kwargs)
            except RuntimeError as error:
                if it.fault is before or it.fault is None:
                    raise
                raise it.fault from error

    def stages(*given: Any) -> tuple[str, str] | None:
        """Leaves ptxas out, which takes longest, for what this process launches; not for what it only compiles."""
        launches = active.active is cuda
        if not given:
            return ("emulated",) * 2 if launches else ("",) * 2
        if launches:
            given[1]["cubin"] = lambda source, metadata: b""
        return None

    cuda.launcher_cls = Launcher
    active.set_active(cuda)
    knobs.runtime.add_stages_inspection_hook = stages
    plain = CompiledKernel._init_handles

    def load(self: Any) -> None:
        if self.module is None:
            it.loading(self.asm["ptx"])
        plain(self)

    CompiledKernel._init_handles = load


def current() -> Driver:
    """The emulated GPU of this process."""
    if _driver is None:
        raise RuntimeError("no GPU is emulated in this process")
    return _driver


def launches() -> list[Launched]:
    """What was launched so far."""
    return current().launches


@contextlib.contextmanager
def options(**given: Any) -> Iterator[None]:
    """Other `Options` inside the block."""
    it = current()
    before, it.options = it.options, replace(it.options, **given)
    try:
        yield
    finally:
        it.options = before


@contextlib.contextmanager
def patched_ptx(edit: Callable[[str, str], str]) -> Iterator[None]:
    """Kernels run as ``edit(name, text)`` makes them of their PTX: to plant faults."""
    it = current()
    before, it.edit = it.edit, edit
    try:
        yield
    finally:
        it.edit, it.fault = before, None
