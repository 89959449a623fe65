"""A call's host time, beside PyTorch's."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product

import torch
from torch.nn import functional as F

import fastconv.functional
from fastconv.benchmarks.report.results import Part
from fastconv.kernels.launch.device import here
from fastconv.measuring.clock import Sample, Thunk, interleave, spread, synchronize

HOST_CALLS = 200  # few enough for the driver's queue, so that the host never waits for the GPU
HOST_TARGET_US = 30.0
# Images, channels in and out, side of a map and type of 3x3 calls. The second is the pixel GEMM's, whose operands need
# descriptors; the first needs none.
CALLS = ((1, 16, 8, torch.float32), (16, 64, 16, torch.bfloat16))


def host_time(device: torch.device, deadline: float) -> Part:
    """Microseconds of the host for small ``conv2d`` calls, without and with a graph for backward: ours and PyTorch's.

    Without a GPU only the first is called: there are no descriptors, and an interpreter takes seconds for the second.
    """
    functions: dict[str, Callable[..., torch.Tensor]] = {"fastconv": fastconv.functional.conv2d, "PyTorch": F.conv2d}
    rows = []
    chosen = CALLS if here.holds(device) else CALLS[:1]
    for (images, channels, side, dtype), gradient in product(chosen, (False, True)):
        x, w = (
            torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for shape in ((images, channels, side, side), (channels, channels, 3, 3))
        )
        calls = {name: _called(conv, x, w.requires_grad_(), gradient) for name, conv in functions.items()}
        for call in calls.values():
            call()
        most = 20 if here.real else 3
        rounds = interleave(calls, lambda call: _host_sample(call, device), deadline=deadline, most=most)
        for name, samples in rounds.samples.items():
            times = {"host_us": spread([sample.host * 1e3 for sample in samples])} if samples else {}
            problem = f"{images}x{channels}x{side}x{side} {str(dtype).removeprefix('torch.')}"
            row = {"function": name, "problem": problem, "gradient": gradient, "reason": rounds.failures.get(name)}
            rows.append(row | times)
    failed = [row["reason"] for row in rows if row["reason"]]
    return {
        "id": "host",
        "kind": "host",
        "title": "Host time of one conv2d call, 3x3",
        "verdict": "failed" if failed else "right",
        "reason": failed[0] if failed else None,
        "target_us": HOST_TARGET_US,
        "rows": rows,
    }


def _called(conv: Callable[..., torch.Tensor], x: torch.Tensor, w: torch.Tensor, gradient: bool) -> Thunk:
    def call() -> None:
        with torch.set_grad_enabled(gradient):
            conv(x, w, padding=1)

    return call


def _host_sample(call: Thunk, device: torch.device) -> Sample:
    # Interpreted or emulated, a call takes ten thousand times as long.
    calls = HOST_CALLS if here.real and here.holds(device) else 1
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    host = (time.perf_counter() - started) * 1e3 / calls
    synchronize(device)
    return Sample(float("nan"), host)
