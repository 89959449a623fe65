"""Pools by PyTorch's own operators. Each function takes the arguments of the function of the same name in
`fastconv.kernels.ops.pool`, and returns the same in the same memory format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastconv.kernels.ops.pool import ADAPTIVE
from fastconv.kernels.problem.layout import is_channels_last
from fastconv.kernels.problem.pool import largest_share
from fastconv.kernels.problem.windows import output_size
from fastconv.reference import in_format


def max_pool(x, size, geometry, index):
    rank = len(size)
    if geometry == ADAPTIVE:
        y, indices = getattr(torch.nn.functional, f"adaptive_max_pool{rank}d")(x, size, return_indices=True)
    else:
        ceil = is_ceiled(tuple(x.shape[2:]), size, geometry)
        function = getattr(torch.nn.functional, f"max_pool{rank}d")
        y, indices = function(x, *geometry, ceil_mode=ceil, return_indices=True)
    taps, scale = torch.zeros_like(indices), 1
    for h, start, window, dilation in _axes(tuple(x.shape[2:]), size, geometry, x.device):
        taps += (indices % h - start) // dilation * scale
        indices, scale = indices // h, scale * window
    channels_last = is_channels_last(x.shape, x.stride())
    return tuple(in_format(t, channels_last) for t in ((y,) if index is None else (y, taps.to(index))))


def max_pool_backward(dy, taps, input_size, geometry, channels_last):
    indices = max_pool_indices(taps, input_size, geometry, channels_last)
    shape = (*dy.shape[:2], *input_size)
    dx = dy.new_zeros(shape).flatten(2).scatter_add_(2, indices.flatten(2), dy.flatten(2))
    return in_format(dx.view(shape), channels_last)


def max_pool_gather(taps, x, geometry, channels_last):
    indices = max_pool_indices(taps, tuple(x.shape[2:]), geometry, channels_last)
    return in_format(x.flatten(2).gather(2, indices.flatten(2)).view(taps.shape), channels_last)


def max_pool_indices(taps, input_size, geometry, channels_last):
    taps, scale = taps.long(), 1
    indices = torch.zeros_like(taps)
    for h, start, window, dilation in _axes(input_size, tuple(taps.shape[2:]), geometry, taps.device):
        indices += (start + taps % window * dilation) * scale
        taps, scale = taps // window, scale * h
    return in_format(indices, channels_last)


def average_pool(x, size, geometry, include_padding, divisor):
    if geometry == ADAPTIVE:
        y = getattr(torch.nn.functional, f"adaptive_avg_pool{len(size)}d")(x, size)
    elif len(size) == 1:
        y = average_pool(x.unsqueeze(2), (1, *size), _as_plane(geometry), include_padding, divisor).squeeze(2)
    else:
        ceil = is_ceiled(tuple(x.shape[2:]), size, geometry)
        function = getattr(torch.nn.functional, f"avg_pool{len(size)}d")
        y = function(x, *geometry[:3], ceil, include_padding, divisor or None)
    return in_format(y, is_channels_last(x.shape, x.stride()))


def average_pool_backward(dy, input_size, geometry, channels_last, include_padding, divisor):
    x, rank = dy.new_empty((*dy.shape[:2], *input_size)), len(input_size)
    if rank == 1:
        geometry = geometry if geometry == ADAPTIVE else _as_plane(geometry)
        arguments = (1, *input_size), geometry, False, include_padding, divisor
        dx = average_pool_backward(dy.unsqueeze(2), *arguments).squeeze(2)
    elif geometry == ADAPTIVE:
        dx = getattr(torch.ops.aten, f"_adaptive_avg_pool{rank}d_backward")(dy, x)
    else:
        ceil = is_ceiled(input_size, tuple(dy.shape[2:]), geometry)
        function = getattr(torch.ops.aten, f"avg_pool{rank}d_backward")
        dx = function(dy, x, *geometry[:3], ceil, include_padding, divisor or None)
    return in_format(dx, channels_last)


def lp_pool(x, size, geometry, norm):
    return in_format(_lp_pool(x, size, geometry, norm), is_channels_last(x.shape, x.stride()))


def lp_pool_backward(dy, y, x, geometry, channels_last, norm):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(_lp_pool(x, tuple(dy.shape[2:]), geometry, norm), x, dy)
    return in_format(dx, channels_last)


def _lp_pool(x, size, geometry, norm):
    window, stride = geometry[:2]
    ceil, rank = is_ceiled(tuple(x.shape[2:]), size, geometry), len(size)
    # PyTorch's lp_pool1d takes no tuples.
    arguments = (window[0], stride[0]) if rank == 1 else (window, stride)
    return getattr(torch.nn.functional, f"lp_pool{rank}d")(x, norm, *arguments, ceil)


def is_ceiled(input_size: Any, size: Any, geometry: Any) -> bool:
    """Whether only ceil_mode gives this output size."""
    return any(
        p != output_size(h, r, stride, 2 * padding, dilation)
        for h, p, r, stride, padding, dilation in zip(input_size, size, *geometry, strict=True)
    )


def _as_plane(geometry: Any) -> Any:
    """A line's geometry as that of a plane one pixel high."""
    return tuple((value, *values) for value, values in zip((1, 1, 0, 1), geometry, strict=True))


def _axes(input_size: Any, size: Any, geometry: Any, device: torch.device) -> list[tuple[int, Tensor, int, int]]:
    """(input size, where windows begin, window, dilation) of each axis, the last first."""
    found = []
    for axis in reversed(range(len(size))):
        h, p = input_size[axis], torch.arange(size[axis], device=device)
        if geometry == ADAPTIVE:
            start, window, dilation = p * h // size[axis], largest_share(h, size[axis]), 1
        else:
            window, stride, padding, dilation = (values[axis] for values in geometry)
            start = p * stride - padding
        found.append((h, start.view(-1, *(1,) * (len(size) - 1 - axis)), window, dilation))
    return found
