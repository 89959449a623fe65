"""The process that measures: ``python -m fastconv.measuring.worker [--device N] DESCRIPTOR``; see `process`.

A config's first run is checked. Its operands and what it allocates lie between guard bands, what it allocates begins as
NaN, and its result is held against PyTorch's in wider arithmetic. Then it is timed: cold L2, replayed from a CUDA
graph, which leaves the host's time out.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastconv.autotune import Config, Gpu, ProblemKey
from fastconv.autotune.search import Key, key_of
from fastconv.kernels import dispatch
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.device import here
from fastconv.measuring import reason
from fastconv.measuring.accuracy import YARDSTICK, fp32_convolutions, max_error, tolerance
from fastconv.measuring.capture import Captured
from fastconv.measuring.clock import Clock, CudaClock, HostClock, Thunk, release, synchronize
from fastconv.measuring.problem_to_run import Computation, Operand, ProblemToRun, Unmeasurable, to_run
from fastconv.measuring.process import Measure, Refused, serve

GUARD = 1 << 16  # bytes on either side of a tensor; a multiple of what allocations are aligned to
NAN = 0xFF  # the byte of a NaN in every floating type, and of a tap that no window has
SAMPLES = 5  # a measurement is their median
ALLOCATIONS = ("aten::empty", "aten::new_empty")


class Guarded(TorchDispatchMode):
    """Memory that is allocated inside lies between guard bands and begins as NaN."""

    def __init__(self) -> None:
        super().__init__()
        self._whole: list[tuple[Tensor, int]] = []  # each with the bytes between its bands

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return self.guard(out) if func.name().startswith(ALLOCATIONS) else out

    def guard(self, t: Tensor) -> Tensor:
        """A tensor like ``t`` without its values."""
        size = t.untyped_storage().nbytes()
        whole = torch.full((2 * GUARD + -(-size // 16) * 16,), NAN, dtype=torch.uint8, device=t.device)
        self._whole.append((whole, size))
        return whole[GUARD : GUARD + size].view(t.dtype).as_strided(t.shape, t.stride())

    def check(self) -> None:
        """Raise Refused if a guard band was written to."""
        for whole, size in self._whole:
            if not bool((whole[:GUARD] == NAN).all() & (whole[GUARD + size :] == NAN).all()):
                raise Refused("wrong", "it writes beside its operands")


class Measuring:
    """A `Measure` on one device. It keeps one problem at a time: operands, reference, captured calls."""

    def __init__(self, gpu: Gpu, device: torch.device, clock: Clock) -> None:
        self.gpu, self.device, self.clock = gpu, device, clock
        self._current: _Prepared | None = None

    def __call__(self, problem: ProblemKey, config: Config | None) -> float:
        try:
            if self._current is None or self._current.problem.key != problem:
                self._current = None
                release(self.device)
                self._current = _Prepared(to_run(problem, self.gpu)[0], self)
            return self._current.seconds(config)
        except Unmeasurable as error:
            raise Refused("failed", str(error)) from error
        except torch.OutOfMemoryError as error:
            self._current = None
            release(self.device)
            raise Refused("out_of_memory", reason(error)) from error
        except Exception as error:
            if isinstance(error, Refused) or self._alive():
                raise
            raise Refused("crashed", reason(error), fatal=True) from error

    def _alive(self) -> bool:
        """Whether the GPU still answers: after an illegal access it does no more."""
        try:
            synchronize(self.device)
        except RuntimeError:
            return False
        return True


class _Prepared:
    """A problem with its operands and its reference on the device."""

    def __init__(self, problem: ProblemToRun, measuring: Measuring) -> None:
        self.problem, self.measuring = problem, measuring
        self.cuda = here.holds(measuring.device)
        generator = torch.Generator(measuring.device).manual_seed(0)
        self.guards = Guarded()
        self.operands = tuple(self._drawn(each, generator) for each in problem.operands)
        self.calls: dict[Key | None, Thunk] = {}
        self.pool = here.MemPool() if self.cuda else None
        dtype = self.operands[0].dtype
        wide = torch.float64 if dtype == torch.float32 else torch.float32
        with fp32_convolutions("ieee"):
            self.reference = problem.pytorch(tuple(t.to(wide) for t in self.operands))()
        # PyTorch's own error is the yardstick if it has an op for the problem.
        yardstick = 0.0
        if problem.native:
            with fp32_convolutions(problem.precision, timed=True):
                yardstick = max_error(problem.pytorch(self.operands)(), self.reference)
        self.allowed = max(YARDSTICK * yardstick, tolerance(torch.finfo(dtype).eps, problem.depth))

    def seconds(self, config: Config | None) -> float:
        """The median of a few samples. Raises Refused if the result is wrong."""
        with fp32_convolutions(self.problem.precision, timed=True):
            key = None if config is None else key_of(config)
            if key not in self.calls:
                self.calls[key] = self._checked(config)
            call, clock = self.calls[key], self.measuring.clock
            samples = [clock(call, cold=True).device for _ in range(SAMPLES if self.cuda else 1)]
        return statistics.median(samples) / 1e3

    def _checked(self, config: Config | None) -> Thunk:
        problem, gpu = self.problem, self.measuring.gpu
        if config is None:
            if not problem.native:
                raise Refused("failed", "PyTorch has no op of its own for it")
            call = problem.pytorch(self.operands)
            call()
            return self._captured(call)
        with problem.serving(config, gpu):
            ours = problem.ours(self.operands, gpu)
            self._compare(ours, "its")
            if problem.recalled is not None:
                self._compare(partial(problem.recalled, self.operands), "at what it keeps, the")

        def served() -> object:
            with problem.serving(config, gpu):
                return ours()

        return self._captured(served)

    def _compare(self, call: Computation, whose: str) -> None:
        with Guarded() as guards:
            result = call()
        guards.check()
        self.guards.check()
        error = max_error(result, self.reference)
        # A NaN compares false. It is what no program wrote, or came from beside an operand.
        if not error <= self.allowed:
            raise Refused("wrong", f"{whose} largest error is {error:.1e} where {self.allowed:.1e} is allowed")

    def _captured(self, call: Thunk) -> Thunk:
        """The call as a CUDA graph, or the call itself if it cannot become one. Nobody reads the results of graphs, so
        all share one memory."""
        if not self.cuda:
            return call

        def unread() -> None:
            call()

        try:
            return Captured(unread, self.pool)
        except RuntimeError:
            here.synchronize()
            self.pool = here.MemPool()
            return call

    def _drawn(self, operand: Operand, generator: torch.Generator) -> Tensor:
        """Random values between guard bands; zeros would run faster."""
        device = self.measuring.device
        values = torch.randn(operand.shape, generator=generator, device=device) * operand.scale
        t = self.guards.guard(operand.empty(device))
        return t.copy_(values)


def on_device(index: int) -> tuple[Gpu, Measure]:
    """The GPU of this index, or Triton's interpreter in a process that uses it."""
    if interpreter.interpreting():
        device = torch.device("cpu")
        return dispatch.target(device), Measuring(dispatch.target(device), device, HostClock())
    if not here.is_available():
        raise RuntimeError("PyTorch sees no GPU")
    here.set_device(index)
    # Configs are compared with PyTorch at its best.
    torch.backends.cudnn.benchmark = True
    # No graph can be captured on the default stream.
    here.set_stream(here.Stream())
    device = here.at(index)
    # At its first convolution PyTorch loads libraries for seconds, which are no config's.
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(1, 8, 8, 8, dtype=dtype, device=device)
        torch.nn.functional.conv2d(x, x[:, :, :3, :3].contiguous())
    here.synchronize(device)
    gpu = dispatch.target(device)
    return gpu, Measuring(gpu, device, CudaClock())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("descriptor", type=int)
    given = parser.parse_args()
    serve(given.descriptor, lambda: on_device(given.device))
