"""What the machine at hand can do at most, measured in the run that its figures are held against."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from fastconv.measuring.clock import Clock, Thunk

SAMPLES, UNCOUNTED = 12, 2


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a copy, read and written, too large for any cache; operations a second of a large product of
    bf16 matrices."""

    bandwidth: float
    matrix: float

    def floor_ms(self, moved: int, flops: int) -> float:
        """The least milliseconds in which so many bytes are moved and operations done, one beside the other."""
        return max(moved / self.bandwidth, flops / self.matrix) * 1e3


def measure(device: torch.device, clock: Clock) -> Ceilings:
    """A GPU's; on the CPU of arrays so small that they say nothing."""
    size, side = (2**30, 8192) if device.type == "cuda" else (2**20, 64)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Not of zeros or ones: a GPU's clock rate depends on how many bits change.
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    return Ceilings(
        bandwidth=2 * size / _seconds(lambda: target.copy_(source), clock),
        matrix=2 * side**3 / _seconds(lambda: torch.matmul(a, b, out=product), clock),
    )


def _seconds(call: Thunk, clock: Clock) -> float:
    samples = [clock(call, cold=True).device for _ in range(SAMPLES)]
    return statistics.median(samples[UNCOUNTED:]) / 1e3
