"""The process that measures: ``python -m fastconv.measuring.worker [--device N] DESCRIPTOR``; see `process`.

A config's first run is checked: its operands and what it allocates lie between guard bands, what it allocates begins
as NaN, and its result is held against PyTorch's in wider arithmetic. Then it is timed: cold L2, replayed from a CUDA
graph, so that the host's time is not in it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastconv.autotune import Config, Gpu, ProblemKey
from fastconv.kernels import dispatch, mend
from fastconv.measuring.accuracy import PART, YARDSTICK, fp32_convolutions, tolerance
from fastconv.measuring.capture import Captured
from fastconv.measuring.clock import Clock, CudaClock, HostClock, reason
from fastconv.measuring.problem_to_run import Operand, ProblemToRun, Unmeasurable, at_precision, to_run
from fastconv.measuring.process import Measure, Refused, serve

GUARD = 1 << 16  # bytes on either side of a tensor; a multiple of what allocations are aligned to
NAN = 0xFF  # bytes that are NaN in every floating type, and a tap that no window of ours has
SAMPLES = 5  # of one measurement, whose median it is
ALLOCATIONS = ("aten::empty", "aten::new_empty")


class Guarded(TorchDispatchMode):
    """Memory that is allocated inside lies between guard bands and begins as NaN."""

    def __init__(self) -> None:
        super().__init__()
        self._whole: list[tuple[Tensor, int]] = []  # with the bytes between its bands

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return self.guard(out) if func.name().startswith(ALLOCATIONS) else out

    def guard(self, t: Tensor) -> Tensor:
        """A tensor like ``t``, its values left behind."""
        size = t.untyped_storage().nbytes()
        whole = torch.full((2 * GUARD + -(-size // 16) * 16,), NAN, dtype=torch.uint8, device=t.device)
        self._whole.append((whole, size))
        return whole[GUARD : GUARD + size].view(t.dtype).as_strided(t.shape, t.stride())

    def check(self) -> None:
        """Raise Refused where a guard band was written to."""
        for whole, size in self._whole:
            if not bool((whole[:GUARD] == NAN).all() & (whole[GUARD + size :] == NAN).all()):
                raise Refused("wrong", "it writes beside its operands")


class Measuring:
    """A `Measure` on one device. One problem at a time is kept: operands, reference, what was captured."""

    def __init__(self, gpu: Gpu, device: torch.device, clock: Clock) -> None:
        self.gpu, self.device, self.clock = gpu, device, clock
        self._current: _Problem | None = None

    def __call__(self, problem: ProblemKey, config: Config | None) -> float:
        try:
            if self._current is None or self._current.subject.problem != problem:
                self._current = None
                self._release()
                self._current = _Problem(to_run(problem, self.gpu)[0], self)
            return self._current.seconds(config)
        except Unmeasurable as error:
            raise Refused("failed", str(error)) from error
        except torch.OutOfMemoryError as error:
            self._current = None
            self._release()
            raise Refused("out_of_memory", reason(error)) from error
        except Exception as error:
            if isinstance(error, Refused) or self._alive():
                raise
            raise Refused("crashed", reason(error), fatal=True) from error

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _alive(self) -> bool:
        """Whether the GPU still answers: after an illegal access no call of this process does."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True


class _Problem:
    def __init__(self, subject: ProblemToRun, session: Measuring) -> None:
        self.subject, self.session = subject, session
        generator = torch.Generator(session.device).manual_seed(0)
        self.guards = Guarded()
        self.operands = tuple(self._drawn(each, generator) for each in subject.operands)
        self.calls: dict[tuple[tuple[str, int], ...] | None, Callable[[], object]] = {}
        self.pool = torch.cuda.MemPool() if session.device.type == "cuda" else None
        dtype = self.operands[0].dtype
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        with fp32_convolutions("ieee"):
            self.reference = subject.pytorch(tuple(t.to(wide) for t in self.operands))()
        # PyTorch's own error is the yardstick, as far as it has an op for it.
        yardstick = 0.0
        if subject.native:
            with at_precision(self.subject.precision):
                yardstick = worst(subject.pytorch(self.operands)(), self.reference)
        self.allowed = max(YARDSTICK * yardstick, tolerance(torch.finfo(dtype).eps, subject.depth))

    def seconds(self, config: Config | None) -> float:
        """The median of a few samples. Raises Refused where the result is wrong."""
        session = self.session
        with at_precision(self.subject.precision):
            key = None if config is None else tuple(sorted(config.items()))
            if key not in self.calls:
                self.calls[key] = self._checked(config)
            call = self.calls[key]
            cuda = session.device.type == "cuda"
            samples = [session.clock(call, cold=True).device for _ in range(SAMPLES if cuda else 1)]
        return statistics.median(samples) / 1e3

    def _checked(self, config: Config | None) -> Callable[[], object]:
        subject, session = self.subject, self.session
        if config is None:
            if not subject.native:
                raise Refused("failed", "PyTorch has no op of its own for it")
            call = subject.pytorch(self.operands)
            call()
            return self._captured(call)
        with subject.serving(config, session.gpu):
            ours = subject.ours(self.operands, session.gpu)
            self._compare(ours, "its")
            if subject.recalled is not None:
                self._compare(partial(subject.recalled, self.operands), "at what it keeps, the")

        def served() -> object:
            with subject.serving(config, session.gpu):
                return ours()

        return self._captured(served)

    def _compare(self, call: Callable[[], Tensor], whose: str) -> None:
        with Guarded() as guards:
            result = call()
        guards.check()
        self.guards.check()
        error = worst(result, self.reference)
        # A NaN, what no program wrote or what came from beside an operand, compares false.
        if not error <= self.allowed:
            raise Refused("wrong", f"{whose} largest error is {error:.1e} where {self.allowed:.1e} is allowed")

    def _captured(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call as a CUDA graph, whose result nobody reads: all graphs share its memory. As it is, where it cannot
        become one."""
        if self.session.device.type != "cuda":
            return call

        def unread() -> None:
            call()

        try:
            return Captured(unread, self.pool)
        except RuntimeError:
            torch.cuda.synchronize()
            self.pool = torch.cuda.MemPool()
            return call

    def _drawn(self, operand: Operand, generator: torch.Generator) -> Tensor:
        """Random values (zeros run faster) between guard bands."""
        device = self.session.device
        values = torch.randn(operand.shape, generator=generator, device=device) * operand.scale
        t = self.guards.guard(operand.empty(device))
        return t.copy_(values)


def worst(value: Tensor, reference: Tensor) -> float:
    """Largest absolute error over the largest element of the reference; NaN where there is one."""
    rows = max(1, PART * len(reference) // reference.numel())
    parts = zip(value.split(rows), reference.split(rows), strict=True)
    found = [((ours.to(exact.dtype) - exact).abs().max(), exact.abs().max()) for ours, exact in parts]
    error, scale = (torch.stack(each).max().item() for each in zip(*found, strict=True))
    return error / scale if scale > 0 else error


def on_device(index: int) -> tuple[Gpu, Measure]:
    """The GPU of this index; Triton's interpreter where the process has been told to use it."""
    if mend.interpreting():
        device = torch.device("cpu")
        return dispatch.target(device), Measuring(dispatch.target(device), device, HostClock())
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    torch.cuda.set_device(index)
    # The side it is compared with is PyTorch at its best.
    torch.backends.cudnn.benchmark = True
    # No graph is captured on the default stream.
    torch.cuda.set_stream(torch.cuda.Stream())
    device = torch.device("cuda", index)
    # What PyTorch loads at its first convolution takes seconds, which are no config's.
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(1, 8, 8, 8, dtype=dtype, device=device)
        torch.nn.functional.conv2d(x, x[:, :, :3, :3].contiguous())
    torch.cuda.synchronize(device)
    gpu = dispatch.target(device)
    return gpu, Measuring(gpu, device, CudaClock())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("descriptor", type=int)
    given = parser.parse_args()
    serve(given.descriptor, lambda: on_device(given.device))
