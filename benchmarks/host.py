"""The host's time of small calls, one for each family of kernels, from the call to where the compiled kernel would be
launched, part by part.

``python -m fastconv.benchmarks.host [--family NAME ...] [--calls 10000] [--json]`` needs no GPU: kernels are compiled
for an H200 and the tensors lie on the CPU. Three things stand in for the GPU: `fastconv.functional.served`, which runs,
is told that the CPU's tensors may be taken, as under the interpreter; CUDA is not asked which GPU is the current one
and whether it captures a graph; what would launch a binary does nothing. So the driver's launch is not in it, nor what
Triton makes of descriptors there.

A part is the difference of two medians: of the call cut off behind it, and cut off before it. The look-up of what was
decided for a call is timed in whole calls: making the key, and beyond it the hit.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from rich.table import Table
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fastconv import arguments, functional, functional_pool
from fastconv.autograd import conv as autograd_conv
from fastconv.autograd import pool as autograd_pool
from fastconv.autotune.gpus import H200
from fastconv.cli.measure.screen import console
from fastconv.kernels import call, dispatch, mend, pool, tiles, tuned
from fastconv.kernels.compile import _Driver
from fastconv.kernels.problem import conv_problem

chooser = import_module("fastconv.autotune.choose")  # whose name the package gives to its function

CALLS, ROUNDS, WARM_UP = 10_000, 20, 20
TARGET_US, HIT_TARGET_US = 20.0, 1.0
PARTS = ("arguments", "autograd.Function", "operator boundary", "key", "hit", "allocation, copies", "launch")
IMAGES, ROW = (16, 64, 16, 16), (16, 3, 32, 32)
# By family, which is to serve alone: the input's shape, the weight's (of a pool its window), and other arguments.
PROBLEMS: dict[str, tuple[tuple[int, ...], tuple[int, ...] | int, dict[str, Any]]] = {
    "gemm": (IMAGES, (64, 64, 1, 1), {}),
    "pixels": (IMAGES, (64, 64, 3, 3), {"padding": 1}),
    "spatial": ((1, 16, 8, 8), (16, 16, 3, 3), {"padding": 1}),
    "gather": (IMAGES, (64, 64, 3, 3), {"padding": 1}),
    "depthwise": (IMAGES, (64, 1, 3, 3), {"padding": 1, "groups": 64}),
    "grouped": (IMAGES, (64, 8, 3, 3), {"padding": 1, "groups": 8}),
    "rows": (ROW, (64, 3, 7, 7), {"stride": 2, "padding": 3}),
    "row_boxes": (ROW, (64, 3, 7, 7), {"stride": 2, "padding": 3}),
    "pool": (IMAGES, 3, {"stride": 2, "padding": 1}),
}


@dataclass(frozen=True)
class Subject:
    """A call, and where it is cut off at ever later points, at last before the launch: an attribute and what stands for
    the rest of the call."""

    call: Callable[[], object]
    cuts: tuple[tuple[Any, str, Callable[..., object]], ...]


def _subject(family: str) -> Subject:
    shape, weight, keywords = PROBLEMS[family]
    x = torch.randn(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    if isinstance(weight, int):
        return _pool(x.requires_grad_(), weight, keywords)
    w = torch.randn(weight, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = torch.nn.functional.conv2d(x, w.detach(), **keywords)

    def rest(*_: Any) -> torch.Tensor:
        return y.detach()  # (what a function of autograd's returns must not be what it returned before)

    cuts = (
        (functional.autograd, "conv", lambda *_: y),
        (autograd_conv, "conv_fprop", rest),
        (autograd_conv.kernels, "conv_fprop", rest),
        (call, "run", lambda *_: None),
    )
    return Subject(lambda: functional.conv2d(x, w, **keywords), cuts)


def _pool(x: torch.Tensor, window: int, keywords: dict[str, Any]) -> Subject:
    y = torch.nn.functional.max_pool2d(x.detach(), window, **keywords)
    taps = torch.empty_like(y, dtype=torch.uint8)

    def rest(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return y.detach(), taps.detach()

    cuts = (
        (functional_pool.autograd, "max_pool", lambda *_: (y, None)),
        (autograd_pool, "max_pool_op", rest),
        (autograd_pool.kernels, "max_pool", rest),
        (pool, "run", lambda *_: None),
    )
    return Subject(lambda: functional.max_pool2d(x, window, **keywords), cuts)


class _Clocked(dict[Any, Any]):
    """Calls by their keys, with how many nanoseconds each look took."""

    def __init__(self, calls: dict[Any, Any]) -> None:
        super().__init__(calls)
        self.taken: list[int] = []

    def get(self, key: Any, default: Any = None) -> Any:
        started = time.perf_counter_ns()
        found = dict.get(self, key, default)
        self.taken.append(time.perf_counter_ns() - started)
        return found


@contextmanager
def _on_an_h200() -> Iterator[None]:
    """A process that takes the CPU's tensors for an H200's, as far as the launch."""

    def ready(binary: CompiledKernel) -> None:
        binary.module = binary.function = 0
        binary._run = lambda *_: None

    with ExitStack() as stack:
        for owner, attribute, value in (
            (arguments, "_INTERPRETING", True),
            (torch.cuda, "current_device", lambda: None),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (CompiledKernel, "_init_handles", ready),
            (driver, "_active", _Driver(H200.arch)),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, value))
        stack.enter_context(dispatch.use_target(H200))
        yield


def measure(family: str, gradient: bool, calls: int = CALLS) -> dict[str, Any]:
    """Median microseconds of a family's whole call, with or without a graph for backward, and of its parts, in
    order."""
    with _on_an_h200(), dispatch.only_family(family), torch.set_grad_enabled(gradient):
        subject = _subject(family)
        subject.call()
        stubs = [statistics.median(_times(rest, calls // ROUNDS)) for _, _, rest in subject.cuts]
        samples: list[list[float]] = [[] for _ in range(len(subject.cuts) + 1)]
        looks: list[int] = []
        hits, prepared = _Clocked(call._calls), call.prepared

        def looked(*given: Any) -> Any:
            started = time.perf_counter_ns()
            found = prepared(*given)
            looks.append(time.perf_counter_ns() - started)
            return found

        for _ in range(ROUNDS):
            for (owner, attribute, rest), times in zip(subject.cuts, samples, strict=False):
                with mock.patch.object(owner, attribute, rest):
                    times += _times(subject.call, calls // ROUNDS)
            samples[-1] += _times(subject.call, calls // ROUNDS)
            with mock.patch.object(call, "prepared", looked):
                _times(subject.call, calls // ROUNDS)
            with mock.patch.object(call, "_calls", hits):
                _times(subject.call, calls // ROUNDS)
    whole = statistics.median(samples[-1])
    reached = [statistics.median(times) - stub for times, stub in zip(samples, stubs, strict=False)]
    parts = [b - a for a, b in zip([0.0, *reached], [*reached, whole], strict=True)]
    look, hit = (statistics.median(taken) / 1e3 for taken in (looks, hits.taken))
    parts[3:4] = [look - hit, hit, parts[3] - look]
    return {"family": family, "gradient": gradient, "us": whole, "parts_us": dict(zip(PARTS, parts, strict=True))}


def choosing(calls: int = CALLS) -> tuple[float, float]:
    """Median microseconds in which the autotuner answers for a problem that it knows, and of them in its dictionary."""
    questions: list[tuple[Any, ...]] = []

    def listen(*question: Any) -> Any:
        questions.append(question[:-1])
        return question[-1]

    shape, weight, _ = PROBLEMS["gather"]
    assert isinstance(weight, tuple)
    problem = conv_problem(shape, weight, None, (1, 1), (1,) * 4, (1, 1), 1, torch.bfloat16)
    with tiles.considering(listen):
        dispatch.plan("fprop", problem, H200)
    (question,) = questions
    whole = _times(lambda: tuned.choose(*question), calls)
    hits = _Clocked(chooser._choices)
    with mock.patch.object(chooser, "_choices", hits):
        _times(lambda: tuned.choose(*question), calls)
    return statistics.median(whole), statistics.median(hits.taken) / 1e3


def _times(call: Callable[[], object], calls: int) -> list[float]:
    """Microseconds of each call."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(calls):
        started = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - started) / 1e3)
    return times


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m fastconv.benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--family", action="append", choices=PROBLEMS, help="only this; repeat it for more")
    parser.add_argument("--calls", type=int, default=CALLS, help=f"default {CALLS}")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(given)
    if options.calls < ROUNDS:
        parser.error(f"--calls {options.calls}: at least {ROUNDS} are needed")
    if mend.interpreting():
        parser.error("TRITON_INTERPRET is set, and one process cannot both interpret and compile")
    families = options.family or PROBLEMS
    rows = [measure(family, gradient, options.calls) for family in families for gradient in (True, False)]
    known, hit = choosing(options.calls)
    if options.json:
        facts = {"calls": options.calls, "target_us": TARGET_US, "hit_target_us": HIT_TARGET_US}
        facts |= {"choose_us": known, "choose_hit_us": hit}
        print(json.dumps({**facts, "python": platform.python_version(), "torch": torch.__version__, "rows": rows}))
        return 0
    table = Table(title=f"Microseconds of the host, medians of {options.calls} calls")
    for column in ("family", "whole", *PARTS):
        table.add_column(column, justify="left" if column == "family" else "right")
    for row in rows:
        numbers = (row["us"], *row["parts_us"].values())
        name = f"{row['family']}, {'with' if row['gradient'] else 'no'} gradient"
        table.add_row(name, *(f"{number:.1f}" for number in numbers))
    targets = f"Targets: the whole {TARGET_US:.0f} with a gradient, the hit {HIT_TARGET_US:.0f}."
    chosen = (
        f"A call that is new asks for its tile; of a known problem: {known:.1f}, its dictionary's hit {hit:.1f} of it."
    )
    console().print(table, targets)
    console().print(chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
