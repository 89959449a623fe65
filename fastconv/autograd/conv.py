"""Convolution's three directions as library operators, and as autograd Functions over them.

fprop, dgrad and wgrad are closed under differentiation: each one's gradients are the other two, so gradients of any
order exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastconv.autograd.operators import Function, call_kernel, fall_back, operator, tracked
from fastconv.kernels.launch.launch import Uncovered
from fastconv.kernels.ops import conv as conv_ops
from fastconv.kernels.problem.conv import conv_problem
from fastconv.kernels.problem.layout import is_channels_last, strides_like, weight_format, weight_strides
from fastconv.reference import conv as conv_reference
from fastconv.reference.conv import both_sides

# The operators' implementations; their schemas, below, hold the types. The three directions do without `call_kernel`,
# whose frame would be a part of every warm call's time.


def fprop(x, weight, bias, stride, padding, dilation, groups):
    try:
        return conv_ops.conv_fprop(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    except Uncovered as reason:
        fall_back("conv_fprop", reason)
    return conv_reference.conv_fprop(x, weight, bias, stride, padding, dilation, groups)


def fprop_fake(x, weight, bias, stride, padding, dilation, groups):
    conv_ops.check_same_kind(x, weight, bias)
    problem = conv_problem(
        x.shape, weight.shape, None if bias is None else bias.shape, stride, padding, dilation, groups, x.dtype
    )
    channels_last = is_channels_last(x.shape, x.stride()) or is_channels_last(weight.shape, weight.stride())
    return x.new_empty_strided(problem.output_shape, strides_like(problem.output_shape, channels_last))


def dgrad(dy, weight, bias, input_size, stride, padding, dilation, groups, channels_last):
    arguments = tuple(input_size), tuple(stride), tuple(padding), tuple(dilation), groups, channels_last
    try:
        return conv_ops.conv_dgrad(dy, weight, bias, *arguments)
    except Uncovered as reason:
        fall_back("conv_dgrad", reason)
    return conv_reference.conv_dgrad(dy, weight, bias, *arguments)


def dgrad_fake(dy, weight, bias, input_size, stride, padding, dilation, groups, channels_last):
    conv_ops.check_same_kind(dy, weight, bias)
    shape = (dy.shape[0], weight.shape[1] * groups, *input_size)
    return dy.new_empty_strided(shape, strides_like(shape, channels_last))


def _wgrad(x, dy, filter_size, stride, padding, dilation, groups, format):
    arguments = tuple(filter_size), tuple(stride), tuple(padding), tuple(dilation), groups, format
    try:
        return conv_ops.conv_wgrad(x, dy, *arguments)
    except Uncovered as reason:
        fall_back("conv_wgrad", reason)
    return conv_reference.conv_wgrad(x, dy, *arguments)


def _wgrad_fake(x, dy, filter_size, stride, padding, dilation, groups, format):
    shape = (dy.shape[1], x.shape[1] // groups, *filter_size)
    return x.new_empty_strided(shape, weight_strides(shape, format))


def _channel_sum(x):
    return call_kernel(conv_ops, conv_reference, "channel_sum", x)


def _channel_sum_fake(x):
    return x.new_empty(x.shape[1])


conv_fprop = operator(
    "conv_fprop(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups) -> Tensor",
    fprop,
    fprop_fake,
)
conv_dgrad = operator(
    "conv_dgrad(Tensor dy, Tensor weight, Tensor? bias, SymInt[] input_size, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, SymInt groups, bool channels_last) -> Tensor",
    dgrad,
    dgrad_fake,
)
conv_wgrad = operator(
    "conv_wgrad(Tensor x, Tensor dy, SymInt[] filter_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "SymInt groups, int format) -> Tensor",
    _wgrad,
    _wgrad_fake,
)
channel_sum = operator("channel_sum(Tensor x) -> Tensor", _channel_sum, _channel_sum_fake)


# For torch.utils.flop_counter: in each direction every output pixel meets all of the weight [K, C/groups, filter].
@register_flop_formula(torch.ops.fastconv.conv_fprop)
def _fprop_flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[1:])


@register_flop_formula(torch.ops.fastconv.conv_dgrad)
def _dgrad_flops(dy: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * prod(dy) * prod(weight[1:])


@register_flop_formula(torch.ops.fastconv.conv_wgrad)
def _wgrad_flops(x: Sequence[int], dy: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * prod(dy) * prod(out_shape[1:])


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``conv(x, weight, bias)``, differentiable; ``padding`` holds the leading sides, then the trailing ones.

    x [N, C, spatial], weight [K, C/groups, filter], bias [K] or None -> [N, K, output].
    """
    if tracked(x, weight, bias):
        return Conv.apply(x, weight, bias, stride, padding, dilation, groups)
    return conv_fprop(x, weight, bias, stride, padding, dilation, groups)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """The transposed convolution, differentiable: dgrad of the convolution with the same weight.

    x [N, K, spatial], weight [K, C/groups, filter], bias [C] or None -> [N, C, *output_size].
    """
    if tracked(x, weight, bias):
        return ConvTranspose.apply(x, weight, bias, output_size, stride, padding, dilation, groups, channels_last)
    return conv_dgrad(x, weight, bias, output_size, stride, padding, dilation, groups, channels_last)


def weight_gradient(
    x: Tensor,
    dy: Tensor,
    filter_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    format: int,
) -> Tensor:
    """The weight's gradient [K, C/groups, *filter_size] of the convolution of x [N, C, spatial], differentiable."""
    if tracked(x, dy):
        return ConvWeightGradient.apply(x, dy, filter_size, stride, padding, dilation, groups, format)
    return conv_wgrad(x, dy, filter_size, stride, padding, dilation, groups, format)


def bias_gradient(dy: Tensor) -> Tensor:
    """The sum of [N, K, spatial] over all but K, differentiable."""
    return ChannelSum.apply(dy) if tracked(dy) else channel_sum(dy)


def any_channels_last(*tensors: Tensor) -> bool:
    return any(is_channels_last(t.shape, t.stride()) for t in tensors)


class Conv(Function):
    """fprop; backward is dgrad, wgrad and a sum, each only if its gradient is needed."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        # A saved tensor may come back with another layout, for example from the CPU.
        ctx.x, ctx.weight = (x.shape, x.stride()), (weight.shape, weight.stride())
        ctx.arguments = stride, padding, dilation, groups
        return conv_fprop(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        input_size, filter_size = ctx.x[0][2:], ctx.weight[0][2:]
        stride, padding, dilation, groups = ctx.arguments
        padding = padding[: len(stride)]
        dx = dw = None
        # PyTorch's rule for both gradients' formats: the input's or else the weight's decides.
        if need_x:
            channels_last = is_channels_last(*ctx.x) or is_channels_last(*ctx.weight)
            dx = conv_transpose(dy, weight, None, input_size, stride, padding, dilation, groups, channels_last)
        if need_weight:
            format = weight_format(*ctx.weight)
            dw = weight_gradient(x, dy, filter_size, stride, padding, dilation, groups, format)
        return dx, dw, bias_gradient(dy) if need_bias else None, None, None, None, None


class ConvTranspose(Function):
    """dgrad, as a function of the output's gradient and the weight; backward is fprop, wgrad and a sum."""

    @staticmethod
    def forward(ctx, dy, weight, bias, input_size, stride, padding, dilation, groups, channels_last):
        need_dy, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(dy if need_weight else None, weight if need_dy else None)
        ctx.sizes = input_size, dy.shape[2:], weight.shape[2:]
        ctx.format = weight_format(weight.shape, weight.stride())
        ctx.arguments = stride, padding, dilation, groups
        return conv_dgrad(dy, weight, bias, input_size, stride, padding, dilation, groups, channels_last)

    @staticmethod
    def backward(ctx, ddx):
        dy, weight = ctx.saved_tensors
        need_dy, need_weight, need_bias = ctx.needs_input_grad[:3]
        stride, padding, dilation, groups = ctx.arguments
        ddy = dw = None
        if need_dy:
            ddy = conv(ddx, weight, None, stride, both_sides(ctx.sizes, stride, padding, dilation), dilation, groups)
        if need_weight:
            dw = weight_gradient(ddx, dy, ctx.sizes[2], stride, padding, dilation, groups, ctx.format)
        return ddy, dw, bias_gradient(ddx) if need_bias else None, None, None, None, None, None, None


class ConvWeightGradient(Function):
    """wgrad, as a function of the input and the output's gradient; backward is dgrad and fprop."""

    @staticmethod
    def forward(ctx, x, dy, filter_size, stride, padding, dilation, groups, format):
        need_x, need_dy = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_dy else None, dy if need_x else None)
        ctx.sizes, ctx.format = (x.shape[2:], dy.shape[2:], filter_size), is_channels_last(x.shape, x.stride())
        ctx.arguments = stride, padding, dilation, groups
        return conv_wgrad(x, dy, filter_size, stride, padding, dilation, groups, format)

    @staticmethod
    def backward(ctx, ddw):
        x, dy = ctx.saved_tensors
        need_x, need_dy = ctx.needs_input_grad[:2]
        stride, padding, dilation, groups = ctx.arguments
        dx = ddy = None
        if need_x:
            dx = conv_transpose(dy, ddw, None, ctx.sizes[0], stride, padding, dilation, groups, ctx.format)
        if need_dy:
            ddy = conv(x, ddw, None, stride, both_sides(ctx.sizes, stride, padding, dilation), dilation, groups)
        return dx, ddy, None, None, None, None, None, None


class ChannelSum(Function):
    """The sum over all axes but the second; backward spreads the gradient over them."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return channel_sum(x)

    @staticmethod
    def backward(ctx, dsum):
        return dsum.view(-1, *(1,) * (len(ctx.shape) - 2)).expand(ctx.shape)
