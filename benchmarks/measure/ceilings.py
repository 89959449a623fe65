"""The most that the machine can do, measured in the same run as the figures that are held against it."""

from __future__ import annotations

import statistics

import torch

from fastconv.benchmarks.report.targets import Ceilings
from fastconv.kernels.launch.device import here
from fastconv.measuring.clock import Clock, Thunk

SAMPLES, UNCOUNTED = 12, 2


def measure(device: torch.device, clock: Clock) -> Ceilings:
    """A GPU's ceilings. On the CPU and on an emulated GPU the arrays are tiny and say nothing."""
    size, side = (2**30, 8192) if here.real and here.holds(device) else (2**20, 64)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Random numbers, because a GPU's clock rate depends on how many bits change.
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    return Ceilings(
        bandwidth=2 * size / _seconds(lambda: target.copy_(source), clock),
        matrix=2 * side**3 / _seconds(lambda: torch.matmul(a, b, out=product), clock),
    )


def _seconds(call: Thunk, clock: Clock) -> float:
    samples = [clock(call, cold=True).device for _ in range(SAMPLES)]
    return statistics.median(samples[UNCOUNTED:]) / 1e3
