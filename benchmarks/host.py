"""The host's time of a warm call, by the family of kernels that serves it: forward without and with a graph, backward.

``python -m fastconv.benchmarks.host [--json]``; ``PYTHONPATH=CHECKOUT python benchmarks/host.py`` measures another
checkout of any version. Without a GPU kernels are compiled for an H200, PyTorch says that the CPU's tensors are a
GPU's, and launching a binary does nothing. Nothing of fastconv is replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

import fastconv
from fastconv import functional as F
from fastconv.kernels.launch.device import here

ROUNDS, CALLS, WARM_UP = 25, 200, 20  # calls of one round: few enough for a GPU's queue
IMAGES, ROWS = (16, 64, 16, 16), (16, 3, 32, 32)
# By name: the only family that may serve, the function, the input's shape, the weight's, and other arguments.
PROBLEMS: dict[str, tuple[str, str, tuple[int, ...], tuple[int, ...] | None, dict[str, Any]]] = {
    "gemm": ("gemm", "conv2d", IMAGES, (64, 64, 1, 1), {}),
    "pixels": ("pixels", "conv2d", IMAGES, (64, 64, 3, 3), {"padding": 1}),
    "spatial": ("spatial", "conv2d", (1, 16, 8, 8), (16, 16, 3, 3), {"padding": 1}),
    "gather": ("gather", "conv2d", IMAGES, (64, 64, 3, 3), {"padding": 1}),
    "grouped": ("grouped", "conv2d", IMAGES, (64, 8, 3, 3), {"padding": 1, "groups": 8}),
    "depthwise": ("depthwise", "conv2d", IMAGES, (64, 1, 3, 3), {"padding": 1, "groups": 64}),
    "rows": ("rows", "conv2d", ROWS, (64, 3, 7, 7), {"stride": 2, "padding": 3}),
    "row_boxes": ("row_boxes", "conv2d", ROWS, (64, 3, 7, 7), {"stride": 2, "padding": 3}),
    "conv_bn_act": ("gather", "conv2d_bn_act", IMAGES, (64, 64, 3, 3), {"padding": 1}),
    "conv_bn_act, eval": ("gather", "conv2d_bn_act", IMAGES, (64, 64, 3, 3), {"padding": 1, "training": False}),
    "max_pool": ("pool", "max_pool2d", IMAGES, None, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "avg_pool": ("pool", "avg_pool2d", IMAGES, None, {"kernel_size": 3, "stride": 2, "padding": 1}),
}


def call_of(name: str, device: torch.device) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """The call, and the tensors that it has gradients for."""
    _, function, shape, weight, arguments = PROBLEMS[name]
    x, *rest = (
        torch.randn(size, device=device, dtype=torch.bfloat16)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for size in (shape, weight)
        if size
    )
    leaves = [x, *rest]
    if function.endswith("bn_act"):
        mean, var, gamma, beta = torch.tensor([0.0, 1.0, 1.0, 0.0], device=device)[:, None].repeat(1, shape[1])
        leaves += [gamma.requires_grad_(), beta.requires_grad_()]
        arguments = {"training": True, "momentum": 0.1, "eps": 1e-5} | arguments
        return partial(getattr(F, function), x, *rest, None, gamma, beta, mean, var, **arguments), leaves
    return partial(getattr(F, function), *leaves, **arguments), leaves


@contextlib.contextmanager
def standing_in_for_an_h200() -> Iterator[None]:
    """A process whose tensors on the CPU pass for an H200's, as far as the launch."""

    def ready(binary: CompiledKernel) -> None:
        binary.module = binary.function = 0
        binary._run = lambda *_: None

    stand_in = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: "sm_90",
        get_current_stream=lambda device: 0,
    )
    with contextlib.ExitStack() as stack:
        for owner, attribute, value in (
            (torch.Tensor, "is_cuda", True),
            (torch.version, "cuda", "13.0"),
            (here, "current_device", lambda: None),
            (here, "is_current_stream_capturing", lambda: False),
            (CompiledKernel, "_init_handles", ready),
            (driver, "_active", stand_in),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, value, create=True))
        stack.enter_context(override("use_target")(importlib.import_module("fastconv.autotune.gpus").H200))
        yield


def override(name: str) -> Any:
    """A context manager of the kernels, wherever this version keeps it."""
    modules = "fastconv.kernels.launch", "fastconv.kernels.dispatch"
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise ImportError(f"none of {', '.join(modules)} has {name}")


def median_us(call: Callable[[], object]) -> float:
    """Microseconds of one call: the lowest of the rounds' medians, which other processes disturb least."""
    for _ in range(WARM_UP):
        call()
    medians = []
    for _ in range(ROUNDS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times = []
        for _ in range(CALLS):
            started = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - started)
        medians.append(statistics.median(times) / 1e3)
    return min(medians)


def measure(name: str, device: torch.device) -> dict[str, float | None]:
    """Microseconds of each kind of call; None if the family does not serve it."""
    call, leaves = call_of(name, device)
    with override("only_family")(PROBLEMS[name][0]), fastconv.settings(strict=True):
        with torch.no_grad():
            times: dict[str, float | None] = {"forward": median_us(call)}
        times["with a graph"], times["backward"] = median_us(call), None
        y = call()
        dy = torch.ones_like(y)
        with contextlib.suppress(RuntimeError, NotImplementedError):  # a family that has no backward
            times["backward"] = median_us(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True))
    return times


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m fastconv.benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=PROBLEMS, help="only this row; repeat it for more")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.nullcontext() if device.type == "cuda" else standing_in_for_an_h200():
        rows = {name: measure(name, device) for name in options.only or PROBLEMS}
    if options.json:
        print(json.dumps({"fastconv": fastconv.__path__[0], "torch": torch.__version__, "us": rows}))
        return 0
    print(f"Microseconds of the host, {fastconv.__path__[0]}")
    for name, times in rows.items():
        print(f"{name:20}", *(f"{kind} {'-' if us is None else format(us, '.1f'):8}" for kind, us in times.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
