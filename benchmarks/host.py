"""The host's time of one small conv2d, from the call to where the compiled kernel would be launched, part by part.

``python -m fastconv.benchmarks.host [--calls 10000] [--json]`` needs no GPU: the kernel is compiled for an H200, the
tensors lie on the CPU, and what would launch it does nothing. A part is the difference of two medians: of the call cut
off behind it, and cut off before it. The driver's own launch is not in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fastconv import functional
from fastconv.autograd import conv as autograd
from fastconv.autotune.gpus import H200
from fastconv.kernels import call, conv, dispatch, mend
from fastconv.kernels.compile import _Driver

CALLS, ROUNDS, WARM_UP = 10_000, 20, 200
TARGET_US = 20.0


def _ready(binary: CompiledKernel) -> None:
    """In place of loading it onto a GPU."""
    binary.module = binary.function = 0
    binary._run = lambda *_: None


def measure(calls: int = CALLS) -> dict[str, Any]:
    """Median microseconds of the whole call, with and without a graph for backward, and of its parts, in order."""
    x = torch.randn(1, 16, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    w = torch.randn(16, 16, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = torch.empty_like(x)
    # The call cut off at ever later points: where, and what stands for the rest.
    cuts: tuple[tuple[str, Any, str, Any], ...] = (
        ("arguments", functional.autograd, "conv", lambda *_: y),
        ("autograd.Function", autograd, "conv_fprop", lambda *_: y.detach()),
        ("operator boundary", autograd.kernels, "conv_fprop", lambda *_: y.detach()),
        ("look-up of the call", conv, "execute", lambda *_: (y.detach(),)),
        ("allocation of the result", call, "run", lambda *_: None),
    )
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(functional, "served", lambda x, dtype=None: None))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: None))
        stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        stack.enter_context(mock.patch.object(CompiledKernel, "_init_handles", _ready))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(H200.arch)))
        stack.enter_context(dispatch.use_target(H200))

        def once() -> None:
            functional.conv2d(x, w, padding=1)

        samples: dict[str, list[float]] = {name: [] for name in (*(name for name, *_ in cuts), "", "without a graph")}
        for _ in range(ROUNDS):
            for name, owner, attribute, stub in cuts:
                with mock.patch.object(owner, attribute, stub):
                    samples[name] += _times(once, calls // ROUNDS)
            samples[""] += _times(once, calls // ROUNDS)
            with torch.no_grad():
                samples["without a graph"] += _times(once, calls // ROUNDS)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    reached = [medians[name] for name, *_ in cuts] + [medians[""]]
    names = [*(name for name, *_ in cuts), "launch, up to the driver"]
    parts = dict(zip(names, (b - a for a, b in zip([0.0, *reached], reached, strict=False)), strict=True))
    return {
        "calls": calls,
        "target_us": TARGET_US,
        "with_graph_us": medians[""],
        "without_graph_us": medians["without a graph"],
        "parts_us": parts,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }


def _times(call: Callable[[], None], calls: int) -> list[float]:
    """Microseconds of each call."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(calls):
        started = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - started) / 1e3)
    return times


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m fastconv.benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=CALLS, help=f"default {CALLS}")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if mend.interpreting():
        parser.error("TRITON_INTERPRET is set, and one process cannot both interpret and compile")
    result = measure(options.calls)
    if options.json:
        print(json.dumps(result, indent=1))
        return 0
    rows = {
        "conv2d, keeping what backward needs": result["with_graph_us"],
        "conv2d under no_grad": result["without_graph_us"],
        **{f"  {name}": value for name, value in result["parts_us"].items()},
    }
    print(f"Median host time over {result['calls']} calls, 1x16x8x8, 3x3, bfloat16 (target {TARGET_US:.0f} us)")
    for name, value in rows.items():
        print(f"{name:40}{value:8.1f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
