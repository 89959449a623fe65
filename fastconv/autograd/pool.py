"""Pools as library operators, and as autograd Functions over them.

All except the lp norms are linear once the winners' taps are known, so that an operator and its backward are each
other's gradients: `average_pool` and `average_pool_backward`, `max_pool_gather` and `max_pool_backward`. Gradients of
any order exist; an lp norm's second gradient is composed of the average's and PyTorch's powers.

A geometry is (window, stride, padding, dilation); four empty tuples mean an adaptive pool. Choices that depend on sizes
are made inside the operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastconv.autograd.operators import Function, call_kernel, operator, tracked
from fastconv.kernels.ops import pool as pool_ops
from fastconv.kernels.problem.layout import is_channels_last, strides_like
from fastconv.reference import pool as pool_reference

Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]
_call = partial(call_kernel, pool_ops, pool_reference)
_GEOMETRY = "SymInt[] window, SymInt[] stride, SymInt[] padding, SymInt[] dilation"


def _tuples(*values: Sequence[int]) -> Any:
    return tuple(tuple(value) for value in values)


# The operators' implementations and fakes; their schemas, below, hold the types.


def _max_pool(x, output_size, window, stride, padding, dilation, indexed):
    size, geometry = tuple(output_size), _tuples(window, stride, padding, dilation)
    index = pool_ops.tap_type(tuple(x.shape[2:]), size, geometry[0]) if indexed else None
    found = _call("max_pool", x, size, geometry, index)
    return found[0], found[1] if indexed else x.new_empty(0, dtype=torch.uint8)


def _max_pool_fake(x, output_size, window, stride, padding, dilation, indexed):
    taps = x.new_empty(0, dtype=torch.uint8)
    if indexed:
        taps = _output_fake(x, output_size, dtype=pool_ops.tap_type(x.shape[2:], output_size, window))
    return _output_fake(x, output_size), taps


def _max_pool_backward(dy, taps, input_size, window, stride, padding, dilation, channels_last):
    return _call(
        "max_pool_backward", dy, taps, tuple(input_size), _tuples(window, stride, padding, dilation), channels_last
    )


def _max_pool_gather(taps, x, window, stride, padding, dilation, channels_last):
    return _call("max_pool_gather", taps, x, _tuples(window, stride, padding, dilation), channels_last)


def _max_pool_indices(taps, input_size, window, stride, padding, dilation, channels_last):
    return _call("max_pool_indices", taps, tuple(input_size), _tuples(window, stride, padding, dilation), channels_last)


def _average_pool(x, output_size, window, stride, padding, include_padding, divisor):
    geometry = _tuples(window, stride, padding, [1] * len(window))
    return _call("average_pool", x, tuple(output_size), geometry, include_padding, divisor)


def _average_pool_backward(dy, input_size, window, stride, padding, include_padding, divisor, channels_last):
    geometry = _tuples(window, stride, padding, [1] * len(window))
    return _call("average_pool_backward", dy, tuple(input_size), geometry, channels_last, include_padding, divisor)


def _lp_pool(x, output_size, window, stride, norm):
    return _call("lp_pool", x, tuple(output_size), _tuples(window, stride, [0] * len(window), [1] * len(window)), norm)


def _lp_pool_backward(dy, y, x, window, stride, norm, channels_last):
    return _call(
        "lp_pool_backward", dy, y, x, _tuples(window, stride, [0] * len(window), [1] * len(window)), channels_last, norm
    )


def _fake(like, size, channels_last, dtype=None):
    shape = (*like.shape[:2], *size)
    return like.new_empty_strided(shape, strides_like(shape, channels_last), dtype=dtype)


def _output_fake(x, output_size, *_, dtype=None):
    return _fake(x, output_size, is_channels_last(x.shape, x.stride()), dtype)


max_pool_op = operator(
    f"max_pool(Tensor x, SymInt[] output_size, {_GEOMETRY}, bool indexed) -> (Tensor, Tensor)",
    _max_pool,
    _max_pool_fake,
)
max_pool_backward_op = operator(
    f"max_pool_backward(Tensor dy, Tensor taps, SymInt[] input_size, {_GEOMETRY}, bool channels_last) -> Tensor",
    _max_pool_backward,
    lambda dy, taps, input_size, *others: _fake(dy, input_size, others[-1]),
)
max_pool_gather_op = operator(
    f"max_pool_gather(Tensor taps, Tensor x, {_GEOMETRY}, bool channels_last) -> Tensor",
    _max_pool_gather,
    lambda taps, x, *others: _fake(x, taps.shape[2:], others[-1]),
)
max_pool_indices_op = operator(
    f"max_pool_indices(Tensor taps, SymInt[] input_size, {_GEOMETRY}, bool channels_last) -> Tensor",
    _max_pool_indices,
    lambda taps, input_size, *others: _fake(taps, taps.shape[2:], others[-1], torch.int64),
)
average_pool_op = operator(
    "average_pool(Tensor x, SymInt[] output_size, SymInt[] window, SymInt[] stride, SymInt[] padding, "
    "bool include_padding, SymInt divisor) -> Tensor",
    _average_pool,
    _output_fake,
)
average_pool_backward_op = operator(
    "average_pool_backward(Tensor dy, SymInt[] input_size, SymInt[] window, SymInt[] stride, SymInt[] padding, "
    "bool include_padding, SymInt divisor, bool channels_last) -> Tensor",
    _average_pool_backward,
    lambda dy, input_size, *others: _fake(dy, input_size, others[-1]),
)
lp_pool_op = operator(
    "lp_pool(Tensor x, SymInt[] output_size, SymInt[] window, SymInt[] stride, float norm) -> Tensor",
    _lp_pool,
    _output_fake,
)
lp_pool_backward_op = operator(
    "lp_pool_backward(Tensor dy, Tensor y, Tensor x, SymInt[] window, SymInt[] stride, float norm, "
    "bool channels_last) -> Tensor",
    _lp_pool_backward,
    lambda dy, y, x, *others: _fake(dy, x.shape[2:], others[-1]),
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
