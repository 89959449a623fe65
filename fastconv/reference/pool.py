"""Pools by PyTorch's own operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastconv.kernels.ops import pool as kernels
from fastconv.kernels.problem.pool import largest_share


def max_pool_indices(taps: Tensor, input_size: Any, geometry: Any) -> Tensor:
    """`kernels.max_pool_indices` by PyTorch's operators."""
    taps, scale = taps.long(), 1
    indices = torch.zeros_like(taps)
    for h, start, window, dilation in axes(input_size, tuple(taps.shape[2:]), geometry, taps.device):
        indices += (start + taps % window * dilation) * scale
        taps, scale = taps // window, scale * h
    return indices


def axes(input_size: Any, size: Any, geometry: Any, device: torch.device) -> list[tuple[int, Tensor, int, int]]:
    """(input size, where windows begin, window, dilation) of each axis, the last first."""
    found = []
    for axis in reversed(range(len(size))):
        h, p = input_size[axis], torch.arange(size[axis], device=device)
        if geometry == kernels.ADAPTIVE:
            start, window, dilation = p * h // size[axis], largest_share(h, size[axis]), 1
        else:
            window, stride, padding, dilation = (values[axis] for values in geometry)
            start = p * stride - padding
        found.append((h, start.view(-1, *(1,) * (len(size) - 1 - axis)), window, dilation))
    return found
