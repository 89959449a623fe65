"""Pools as library operators, and as autograd Functions over them.

All except the lp norms are linear once the winners' taps are known, so that an operator and its backward are each
other's gradients: `average_pool` and `average_pool_backward`, `max_pool_gather` and `max_pool_backward`. Gradients of
any order exist; an lp norm's second gradient is composed of the average's and PyTorch's powers.

A geometry is (window, stride, padding, dilation); four empty tuples mean an adaptive pool. Choices that depend on sizes
are made inside the operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastconv.autograd.operators import Function, fall_back, operator, tracked
from fastconv.kernels.launch.launch import Uncovered
from fastconv.kernels.ops import pool as pool_ops
from fastconv.kernels.problem.layout import is_channels_last, strides_like
from fastconv.kernels.problem.windows import output_size
from fastconv.reference.pool import axes, max_pool_indices

Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]
_GEOMETRY = "SymInt[] window, SymInt[] stride, SymInt[] padding, SymInt[] dilation"


def _tuples(*values: Sequence[int]) -> Any:
    return tuple(tuple(value) for value in values)


def _max_pool(
    x: Tensor, output_size: list[int], window: list[int], stride: list[int], padding: list[int],
    dilation: list[int], indexed: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    size, geometry = tuple(output_size), _tuples(window, stride, padding, dilation)
    index = pool_ops.tap_type(tuple(x.shape[2:]), size, geometry[0]) if indexed else None
    try:
        found = pool_ops.max_pool(x, size, geometry, index)
    except Uncovered as reason:
        fall_back("max_pool", reason)
        found = _pytorch_max_pool(x, size, geometry, index)
    return found[0], found[1] if indexed else x.new_empty(0, dtype=torch.uint8)


def _max_pool_fake(x, output_size, window, stride, padding, dilation, indexed):
    shape = (*x.shape[:2], *output_size)
    strides = strides_like(shape, is_channels_last(x.shape, x.stride()))
    y = x.new_empty_strided(shape, strides)
    if not indexed:
        return y, x.new_empty(0, dtype=torch.uint8)
    return y, x.new_empty_strided(shape, strides, dtype=pool_ops.tap_type(x.shape[2:], output_size, window))


def _max_pool_backward(
    dy: Tensor, taps: Tensor, input_size: list[int], window: list[int], stride: list[int], padding: list[int],
    dilation: list[int], channels_last: bool,
) -> Tensor:  # fmt: skip
    size, geometry = tuple(input_size), _tuples(window, stride, padding, dilation)
    try:
        return pool_ops.max_pool_backward(dy, taps, size, geometry, channels_last)
    except Uncovered as reason:
        fall_back("max_pool_backward", reason)
    indices = max_pool_indices(taps, size, geometry)
    shape = (*dy.shape[:2], *size)
    dx = dy.new_zeros(shape).flatten(2).scatter_add_(2, indices.flatten(2), dy.flatten(2)).view(shape)
    return dx.new_empty_strided(shape, strides_like(shape, channels_last)).copy_(dx)


def _backward_fake(dy, input_size, channels_last):
    shape = (*dy.shape[:2], *input_size)
    return dy.new_empty_strided(shape, strides_like(shape, channels_last))


def _max_pool_gather(
    taps: Tensor, x: Tensor, window: list[int], stride: list[int], padding: list[int],
    dilation: list[int], channels_last: bool,
) -> Tensor:  # fmt: skip
    geometry = _tuples(window, stride, padding, dilation)
    try:
        return pool_ops.max_pool_gather(taps, x, geometry, channels_last)
    except Uncovered as reason:
        fall_back("max_pool_gather", reason)
    indices = max_pool_indices(taps, tuple(x.shape[2:]), geometry)
    y = x.flatten(2).gather(2, indices.flatten(2)).view(taps.shape)
    return y.new_empty_strided(y.shape, strides_like(y.shape, channels_last)).copy_(y)


def _max_pool_indices(
    taps: Tensor, input_size: list[int], window: list[int], stride: list[int], padding: list[int],
    dilation: list[int], channels_last: bool,
) -> Tensor:  # fmt: skip
    size, geometry = tuple(input_size), _tuples(window, stride, padding, dilation)
    try:
        return pool_ops.max_pool_indices(taps, size, geometry, channels_last)
    except Uncovered as reason:
        fall_back("max_pool_indices", reason)
    indices = max_pool_indices(taps, size, geometry)
    return indices.new_empty_strided(taps.shape, strides_like(taps.shape, channels_last)).copy_(indices)


def _average_pool(
    x: Tensor, output_size: list[int], window: list[int], stride: list[int], padding: list[int],
    include_padding: bool, divisor: int,
) -> Tensor:  # fmt: skip
    size, geometry = tuple(output_size), _tuples(window, stride, padding, [1] * len(window))
    try:
        return pool_ops.average_pool(x, size, geometry, include_padding, divisor)
    except Uncovered as reason:
        fall_back("average_pool", reason)
    y = _pytorch_average_pool(x, size, geometry, include_padding, divisor)
    return y.new_empty_strided(y.shape, strides_like(y.shape, is_channels_last(x.shape, x.stride()))).copy_(y)


def _average_pool_fake(x, output_size, window, stride, padding, include_padding, divisor):
    shape = (*x.shape[:2], *output_size)
    return x.new_empty_strided(shape, strides_like(shape, is_channels_last(x.shape, x.stride())))


def _average_pool_backward(
    dy: Tensor, input_size: list[int], window: list[int], stride: list[int], padding: list[int],
    include_padding: bool, divisor: int, channels_last: bool,
) -> Tensor:  # fmt: skip
    size, geometry = tuple(input_size), _tuples(window, stride, padding, [1] * len(window))
    try:
        return pool_ops.average_pool_backward(dy, size, geometry, channels_last, include_padding, divisor)
    except Uncovered as reason:
        fall_back("average_pool_backward", reason)
    shape = (*dy.shape[:2], *size)
    dx = _pytorch_average_pool_backward(dy, size, geometry, include_padding, divisor)
    return dx.new_empty_strided(shape, strides_like(shape, channels_last)).copy_(dx)


def _lp_pool(
    x: Tensor, output_size: list[int], window: list[int], stride: list[int], norm: float
) -> Tensor:  # fmt: skip
    size = tuple(output_size)
    try:
        return pool_ops.lp_pool(x, size, _lp_geometry(window, stride), norm)
    except Uncovered as reason:
        fall_back("lp_pool", reason)
    y = _pytorch_lp_pool(x, size, window, stride, norm)
    return y.new_empty_strided(y.shape, strides_like(y.shape, is_channels_last(x.shape, x.stride()))).copy_(y)


def _lp_pool_fake(x, output_size, window, stride, norm):
    return _average_pool_fake(x, output_size, window, stride, (), True, 0)


def _lp_pool_backward(
    dy: Tensor, y: Tensor, x: Tensor, window: list[int], stride: list[int], norm: float, channels_last: bool
) -> Tensor:
    try:
        return pool_ops.lp_pool_backward(dy, y, x, _lp_geometry(window, stride), channels_last, norm)
    except Uncovered as reason:
        fall_back("lp_pool_backward", reason)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(_pytorch_lp_pool(x, tuple(dy.shape[2:]), window, stride, norm), x, dy)
    return dx.new_empty_strided(x.shape, strides_like(x.shape, channels_last)).copy_(dx)


def _lp_geometry(window: Sequence[int], stride: Sequence[int]) -> Any:
    return _tuples(window, stride, [0] * len(window), [1] * len(window))


def _pytorch_lp_pool(x: Tensor, size: Any, window: Sequence[int], stride: Sequence[int], norm: float) -> Tensor:
    ceil = _is_ceiled(tuple(x.shape[2:]), size, _lp_geometry(window, stride))
    rank = len(size)
    # PyTorch's lp_pool1d takes no tuples.
    arguments = (window[0], stride[0]) if rank == 1 else (window, stride)
    return getattr(torch.nn.functional, f"lp_pool{rank}d")(x, norm, *arguments, ceil)


def _pytorch_max_pool(x: Tensor, size: Any, geometry: Any, index: torch.dtype | None) -> tuple[Tensor, ...]:
    """`pool_ops.max_pool` by PyTorch's operators."""
    rank = len(size)
    if geometry == pool_ops.ADAPTIVE:
        y, indices = getattr(torch.nn.functional, f"adaptive_max_pool{rank}d")(x, size, return_indices=True)
    else:
        ceil = _is_ceiled(tuple(x.shape[2:]), size, geometry)
        function = getattr(torch.nn.functional, f"max_pool{rank}d")
        y, indices = function(x, *geometry, ceil_mode=ceil, return_indices=True)
    taps, scale = torch.zeros_like(indices), 1
    for h, start, window, dilation in axes(tuple(x.shape[2:]), size, geometry, x.device):
        taps += (indices % h - start) // dilation * scale
        indices, scale = indices // h, scale * window
    strides = strides_like(y.shape, is_channels_last(x.shape, x.stride()))
    found = (y,) if index is None else (y, taps.to(index))
    return tuple(t.new_empty_strided(t.shape, strides).copy_(t) for t in found)


def _is_ceiled(input_size: Any, size: Any, geometry: Any) -> bool:
    """Whether only ceil_mode gives this output size."""
    return any(
        p != output_size(h, r, stride, 2 * padding, dilation)
        for h, p, r, stride, padding, dilation in zip(input_size, size, *geometry, strict=True)
    )


def _as_plane(geometry: Any) -> Any:
    """A line's geometry as that of a plane one pixel high."""
    return tuple((value, *values) for value, values in zip((1, 1, 0, 1), geometry, strict=True))


def _pytorch_average_pool(x: Tensor, size: Any, geometry: Any, include_padding: bool, divisor: int) -> Tensor:
    if geometry == pool_ops.ADAPTIVE:
        return getattr(torch.nn.functional, f"adaptive_avg_pool{len(size)}d")(x, size)
    if len(size) == 1:
        y = _pytorch_average_pool(x.unsqueeze(2), (1, *size), _as_plane(geometry), include_padding, divisor)
        return y.squeeze(2)
    ceil = _is_ceiled(tuple(x.shape[2:]), size, geometry)
    function = getattr(torch.nn.functional, f"avg_pool{len(size)}d")
    return function(x, *geometry[:3], ceil, include_padding, divisor or None)


def _pytorch_average_pool_backward(dy: Tensor, size: Any, geometry: Any, include_padding: bool, divisor: int) -> Tensor:
    x = dy.new_empty((*dy.shape[:2], *size))
    if len(size) == 1:
        arguments = geometry if geometry == pool_ops.ADAPTIVE else _as_plane(geometry), include_padding, divisor
        return _pytorch_average_pool_backward(dy.unsqueeze(2), (1, *size), *arguments).squeeze(2)
    if geometry == pool_ops.ADAPTIVE:
        return getattr(torch.ops.aten, f"_adaptive_avg_pool{len(size)}d_backward")(dy, x)
    ceil = _is_ceiled(size, tuple(dy.shape[2:]), geometry)
    function = getattr(torch.ops.aten, f"avg_pool{len(size)}d_backward")
    return function(dy, x, *geometry[:3], ceil, include_padding, divisor or None)


max_pool_op = operator(
    f"max_pool(Tensor x, SymInt[] output_size, {_GEOMETRY}, bool indexed) -> (Tensor, Tensor)",
    _max_pool,
    _max_pool_fake,
)
max_pool_backward_op = operator(
    f"max_pool_backward(Tensor dy, Tensor taps, SymInt[] input_size, {_GEOMETRY}, bool channels_last) -> Tensor",
    _max_pool_backward,
    lambda dy, taps, input_size, window, stride, padding, dilation, channels_last: _backward_fake(
        dy, input_size, channels_last
    ),
)
max_pool_gather_op = operator(
    f"max_pool_gather(Tensor taps, Tensor x, {_GEOMETRY}, bool channels_last) -> Tensor",
    _max_pool_gather,
    lambda taps, x, window, stride, padding, dilation, channels_last: x.new_empty_strided(
        taps.shape, strides_like(taps.shape, channels_last)
    ),
)
max_pool_indices_op = operator(
    f"max_pool_indices(Tensor taps, SymInt[] input_size, {_GEOMETRY}, bool channels_last) -> Tensor",
    _max_pool_indices,
    lambda taps, input_size, window, stride, padding, dilation, channels_last: taps.new_empty_strided(
        taps.shape, strides_like(taps.shape, channels_last), dtype=torch.int64
    ),
)
average_pool_op = operator(
    "average_pool(Tensor x, SymInt[] output_size, SymInt[] window, SymInt[] stride, SymInt[] padding, "
    "bool include_padding, SymInt divisor) -> Tensor",
    _average_pool,
    _average_pool_fake,
)
average_pool_backward_op = operator(
    "average_pool_backward(Tensor dy, SymInt[] input_size, SymInt[] window, SymInt[] stride, SymInt[] padding, "
    "bool include_padding, SymInt divisor, bool channels_last) -> Tensor",
    _average_pool_backward,
    lambda dy, input_size, window, stride, padding, include_padding, divisor, channels_last: _backward_fake(
        dy, input_size, channels_last
    ),
)
lp_pool_op = operator(
    "lp_pool(Tensor x, SymInt[] output_size, SymInt[] window, SymInt[] stride, float norm) -> Tensor",
    _lp_pool,
    _lp_pool_fake,
)
lp_pool_backward_op = operator(
    "lp_pool_backward(Tensor dy, Tensor y, Tensor x, SymInt[] window, SymInt[] stride, float norm, "
    "bool channels_last) -> Tensor",
    _lp_pool_backward,
    lambda dy, y, x, window, stride, norm, channels_last: _backward_fake(dy, x.shape[2:], channels_last),
)


def max_pool(
    x: Tensor, output_size: Sequence[int], geometry: Geometry, return_indices: bool
) -> tuple[Tensor, Tensor | None]:
    """(maxima [N, C, *output_size], PyTorch's int64 indices or None) of x [N, C, spatial], differentiable."""
    if tracked(x):
        y, taps = MaxPool.apply(x, output_size, geometry)
    else:
        y, taps = max_pool_op(x, output_size, *geometry, return_indices)
    if not return_indices:
        return y, None
    return y, max_pool_indices_op(taps, x.shape[2:], *geometry, is_channels_last(x.shape, x.stride()))


def average_pool(
    x: Tensor, output_size: Sequence[int], geometry: Geometry, include_padding: bool, divisor: int
) -> Tensor:
    """The averages [N, C, *output_size] of x [N, C, spatial], differentiable. ``divisor`` 0: each window's own."""
    arguments = (*geometry[:3], include_padding, divisor)
    return AveragePool.apply(x, output_size, arguments) if tracked(x) else average_pool_op(x, output_size, *arguments)


def lp_pool(x: Tensor, output_size: Sequence[int], window: Sequence[int], stride: Sequence[int], norm: float) -> Tensor:
    """The lp norms [N, C, *output_size] of x [N, C, spatial], differentiable."""
    apply = LpPool.apply if tracked(x) else lp_pool_op
    return apply(x, output_size, window, stride, norm)


class MaxPool(Function):
    """(maxima, their taps); only the taps are kept for backward."""

    @staticmethod
    def forward(ctx, x, output_size, geometry):
        y, taps = max_pool_op(x, output_size, *geometry, True)
        ctx.save_for_backward(taps)
        ctx.mark_non_differentiable(taps)
        # Otherwise autograd makes a gradient of zeros for the taps.
        ctx.set_materialize_grads(False)
        ctx.arguments = x.shape[2:], geometry, is_channels_last(x.shape, x.stride())
        return y, taps

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return None, None, None
        (taps,) = ctx.saved_tensors
        if tracked(dy):
            return MaxPoolBackward.apply(dy, taps, *ctx.arguments), None, None
        input_size, geometry, channels_last = ctx.arguments
        return max_pool_backward_op(dy, taps, input_size, *geometry, channels_last), None, None


class MaxPoolBackward(Function):
    """The input's gradient as a function of the output's; backward gathers it where the maxima were."""

    @staticmethod
    def forward(ctx, dy, taps, input_size, geometry, channels_last):
        ctx.save_for_backward(taps)
        ctx.arguments = input_size, geometry, channels_last
        return max_pool_backward_op(dy, taps, input_size, *geometry, channels_last)

    @staticmethod
    def backward(ctx, ddx):
        (taps,) = ctx.saved_tensors
        if tracked(ddx):
            return MaxPoolGather.apply(taps, ddx, *ctx.arguments), None, None, None, None
        _, geometry, channels_last = ctx.arguments
        return max_pool_gather_op(taps, ddx, *geometry, channels_last), None, None, None, None


class MaxPoolGather(Function):
    """What lies where the maxima were; backward is `MaxPoolBackward`'s forward."""

    @staticmethod
    def forward(ctx, taps, x, input_size, geometry, channels_last):
        ctx.save_for_backward(taps)
        ctx.arguments = input_size, geometry, channels_last
        return max_pool_gather_op(taps, x, *geometry, channels_last)

    @staticmethod
    def backward(ctx, dy):
        (taps,) = ctx.saved_tensors
        if tracked(dy):
            return None, MaxPoolBackward.apply(dy, taps, *ctx.arguments), None, None, None
        input_size, geometry, channels_last = ctx.arguments
        return None, max_pool_backward_op(dy, taps, input_size, *geometry, channels_last), None, None, None


class AveragePool(Function):
    """Averages; backward spreads each over its window."""

    @staticmethod
    def forward(ctx, x, output_size, arguments):
        ctx.sizes = x.shape[2:], output_size, is_channels_last(x.shape, x.stride())
        ctx.arguments = arguments
        return average_pool_op(x, output_size, *arguments)

    @staticmethod
    def backward(ctx, dy):
        if tracked(dy):
            return AveragePoolBackward.apply(dy, ctx.sizes, ctx.arguments), None, None
        input_size, _, channels_last = ctx.sizes
        return average_pool_backward_op(dy, input_size, *ctx.arguments, channels_last), None, None


class AveragePoolBackward(Function):
    """The input's gradient as a function of the output's; backward averages."""

    @staticmethod
    def forward(ctx, dy, sizes, arguments):
        ctx.sizes, ctx.arguments = sizes, arguments
        return average_pool_backward_op(dy, sizes[0], *arguments, sizes[2])

    @staticmethod
    def backward(ctx, ddx):
        return average_pool(ddx, ctx.sizes[1], (*ctx.arguments[:3], ()), *ctx.arguments[3:]), None, None


class LpPool(Function):
    """Norms of windows; backward spreads each over its window.

    Backward computes the norms again, since they may be changed in place before, as with PyTorch's.
    """

    @staticmethod
    def forward(ctx, x, output_size, window, stride, norm):
        ctx.save_for_backward(x)
        ctx.arguments = output_size, window, stride, norm
        return lp_pool_op(x, *ctx.arguments)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        y = lp_pool(x, *ctx.arguments)
        _, window, stride, norm = ctx.arguments
        channels_last = is_channels_last(x.shape, x.stride())
        if not tracked(dy, x):
            return lp_pool_backward_op(dy, y, x, window, stride, norm, channels_last), None, None, None, None
        # `lp_pool_backward` in differentiable steps, also for windows of zeros, whose norm has no gradient.
        none = y == 0
        slope = y.masked_fill(none, 1.0).pow(1.0 - norm).masked_fill(none, 0.0)
        arguments = window, stride, (0,) * len(window), True, 0
        spread = AveragePoolBackward.apply(dy * slope, (x.shape[2:], y.shape[2:], channels_last), arguments)
        return spread * prod(window) * x.pow(norm - 1.0), None, None, None, None
