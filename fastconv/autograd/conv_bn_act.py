"""Convolution + batch norm + activation (+ residual) as library operators, and as one autograd Function over them.

Inference is one kernel. Training is the convolution with statistics from its accumulator, one pass that normalises and
activates, and in backward one pass for batch norm's sums and one that gives dgrad and wgrad their operand. Backward
keeps the layer's input, the convolution's output and numbers per channel; with a residual before a ReLU also its
output, which the next layer keeps anyway. A gradient of the gradient goes through `normalise_and_activate`, the same in
plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastconv.autograd.conv import (
    any_channels_last,
    bias_gradient,
    conv,
    conv_transpose,
    dgrad,
    dgrad_fake,
    fprop,
    fprop_fake,
    weight_gradient,
)
from fastconv.autograd.operators import Function, fall_back, operator, tracked
from fastconv.kernels.families.batch_norm import Activated
from fastconv.kernels.jit.activations import ACTIVATIONS
from fastconv.kernels.launch.launch import Uncovered
from fastconv.kernels.ops import batch_norm
from fastconv.kernels.ops import conv as conv_ops
from fastconv.kernels.ops.batch_norm import as_pixels
from fastconv.kernels.problem.layout import is_channels_last, strides_like, weight_format
from fastconv.reference import in_format
from fastconv.reference.conv import both_sides
from fastconv.reference.conv_bn_act import all_but_channels, normalise_and_activate

_NORM = "Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, Tensor? slope, Tensor? residual"
_CONV = "SymInt[]? output_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"
Arguments = tuple[Any, ...]  # output size or None, stride, padding, dilation, groups
# Running mean and variance, how many batches they followed, momentum.
Running = tuple[Tensor | None, Tensor | None, Tensor | None, float]
_HOW = "float eps, str act, float a, float b, bool residual_after"


def _hashable(output_size, stride, padding, dilation, groups):
    return None if output_size is None else tuple(output_size), tuple(stride), tuple(padding), tuple(dilation), groups


def _either(forward, transposed, x, weight, bias, output_size, stride, padding, dilation, groups):
    """The convolution, or the transposed one if there is an output size."""
    if output_size is None:
        return forward(x, weight, bias, stride, padding, dilation, groups)
    channels_last = any_channels_last(x, weight)
    return transposed(x, weight, bias, output_size, stride, padding, dilation, groups, channels_last)


_plain, _plain_fake = partial(_either, fprop, dgrad), partial(_either, fprop_fake, dgrad_fake)


def _conv_act(x, weight, bias, mean, var, gamma, beta, slope, residual, *rest):
    norm, arguments, how = (mean, var, gamma, beta), _hashable(*rest[:5]), rest[5:]
    try:
        return conv_ops.conv_act(x, weight, bias, norm, slope, residual, *arguments, *how)
    except Uncovered as reason:
        fall_back("conv_act", reason)
    y = _plain(x, weight, bias, *rest[:5])
    z = normalise_and_activate(y, norm, slope, residual, Activated(*how))
    return in_format(z, is_channels_last(y.shape, y.stride()))


def _conv_act_fake(x, weight, bias, mean, var, gamma, beta, slope, residual, *rest):
    return _plain_fake(x, weight, bias, *rest[:5])


def _conv_statistics(x, weight, bias, *arguments):
    try:
        return conv_ops.conv_statistics(x, weight, bias, *_hashable(*arguments))
    except Uncovered as reason:
        fall_back("conv_statistics", reason)
    y = as_pixels(_plain(x, weight, bias, *arguments))
    var, mean = torch.var_mean(y.float(), all_but_channels(y), correction=0)
    return y, mean, var


def _conv_statistics_fake(x, weight, bias, *arguments):
    y = _plain_fake(x, weight, bias, *arguments)
    statistics = (y.new_empty(y.shape[1], dtype=torch.float32) for _ in range(2))
    return y.new_empty_strided(y.shape, strides_like(y.shape, True)), *statistics


def _batch_norm_act(y, mean, var, gamma, beta, slope, residual, eps, act, a, b, residual_after, channels_last):
    how = Activated(eps, act, a, b, residual_after)
    z = batch_norm.batch_norm_act(y, (mean, var, gamma, beta), slope, residual, how)
    return z if channels_last else in_format(z, False)


def _batch_norm_act_fake(y, mean, var, gamma, beta, slope, residual, eps, act, a, b, residual_after, channels_last):
    return y.new_empty_strided(y.shape, strides_like(y.shape, channels_last))


def _batch_norm_act_sums(dz, y, z, mean, var, gamma, beta, slope, residual, eps, act, a, b, residual_after):
    how = Activated(eps, act, a, b, residual_after)
    return batch_norm.batch_norm_act_sums(dz, y, z, (mean, var, gamma, beta), slope, residual, how)


def _batch_norm_act_sums_fake(dz, y, *others):
    return y.new_empty((3, y.shape[1]), dtype=torch.float32)


def _batch_norm_act_gradient(
    dz, y, z, mean, var, gamma, beta, slope, residual, sums, count, eps, act, a, b, residual_after, need_residual
):
    how = Activated(eps, act, a, b, residual_after)
    norm, share = (mean, var, gamma, beta), 1.0 / max(1, count)
    dy, dresidual = batch_norm.batch_norm_act_gradient(dz, y, z, norm, slope, residual, sums, share, how, need_residual)
    return dy, dz.new_empty(0) if dresidual is None else dresidual


def _batch_norm_act_gradient_fake(dz, *others):
    need_residual = others[-1]
    dy, dresidual = (dz.new_empty_strided(dz.shape, strides_like(dz.shape, True)) for _ in range(2))
    return dy, dresidual if need_residual else dz.new_empty(0)


conv_act = operator(
    f"conv_act(Tensor x, Tensor weight, Tensor? bias, {_NORM}, {_CONV}, {_HOW}) -> Tensor", _conv_act, _conv_act_fake
)
conv_statistics = operator(
    f"conv_statistics(Tensor x, Tensor weight, Tensor? bias, {_CONV}) -> (Tensor, Tensor, Tensor)",
    _conv_statistics,
    _conv_statistics_fake,
)
batch_norm_act = operator(
    f"batch_norm_act(Tensor y, {_NORM}, {_HOW}, bool channels_last) -> Tensor", _batch_norm_act, _batch_norm_act_fake
)
batch_norm_act_sums = operator(
    f"batch_norm_act_sums(Tensor dz, Tensor y, Tensor? z, {_NORM}, {_HOW}) -> Tensor",
    _batch_norm_act_sums,
    _batch_norm_act_sums_fake,
)
batch_norm_act_gradient = operator(
    f"batch_norm_act_gradient(Tensor dz, Tensor? y, Tensor? z, {_NORM}, Tensor? sums, SymInt count, {_HOW}, "
    "bool need_residual) -> (Tensor, Tensor)",
    _batch_norm_act_gradient,
    _batch_norm_act_gradient_fake,
)


@register_flop_formula([torch.ops.fastconv.conv_act, torch.ops.fastconv.conv_statistics])
def _fused_flops(x: Sequence[int], weight: Sequence[int], *rest: Any, out_shape: Any, **__: Any) -> int:
    y = out_shape if isinstance(out_shape[0], int) else out_shape[0]
    transposed = rest[-5 - 5 * isinstance(rest[-1], bool)] is not None
    return 2 * prod(x if transposed else y) * prod(weight[1:])


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    slope: Tensor | None,
    residual: Tensor | None,
    running: Running,
    arguments: Arguments,
    training: bool,
    how: Activated,
    group: Any = None,
) -> Tensor:
    """``act(batch_norm(conv(x)) + residual)``, differentiable to any order; with a ``group``, once.

    x [N, C, spatial]; ``running``: the statistics of inference, which follow the batch's in training; ``arguments``:
    output size, stride, padding, dilation, groups. An output size means the transposed convolution, and padding holds
    the leading sides; with None it also holds the trailing sides, behind them. Vectors are [K]; ``group``: the process
    group over which statistics are taken. Raises ValueError, as torch does, on one value per channel in training.
    """
    tensors = (x, weight, bias, gamma, beta, slope, residual)
    if tracked(*tensors):
        return ConvBNAct.apply(*tensors, *running, arguments, training, how, group)[0]
    mean, var = running[:2]
    if not training:
        return conv_act(x, weight, bias, mean, var, gamma, beta, slope, residual, *arguments, *astuple(how))
    y, mean, var, pixels = _convolved(x, weight, bias, arguments, group)
    z = batch_norm_act(y, mean, var, gamma, beta, slope, residual, *astuple(how), any_channels_last(x, weight))
    _follow(running, mean, var, pixels)
    return z


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, arguments: Any, group: Any) -> tuple[Any, ...]:
    """(y, mean, variance, pixels) of the convolution in training; the last three over the group."""
    y, mean, var = conv_statistics(x, weight, bias, *arguments)
    pixels = y.numel() // y.shape[1]
    if group is not None:
        return y, *_over_group(mean, var, pixels, group)
    if pixels == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")
    return y, mean, var, pixels


def _over_group(mean: Tensor, var: Tensor, pixels: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, variance, pixels) over all processes, from those of each."""
    own = torch.cat([mean, var, mean.new_full((1,), pixels)])
    gathered = own.new_empty((dist.get_world_size(group), own.numel()))
    dist.all_gather(list(gathered.unbind()), own, group=group)
    means, variances, counts = gathered.split([mean.numel(), var.numel(), 1], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    return mean, ((variances + (means - mean).square()) * counts).sum(0) / total, total


def _follow(running: Running, mean: Tensor, var: Tensor, pixels: int | Tensor) -> None:
    """Let the running statistics follow a batch's: mean and biased variance, fp32, over ``pixels``."""
    running_mean, running_var, batches, momentum = running
    # An empty batch has no statistics, unless it is one process's share of one.
    if running_mean is not None and running_var is not None and (isinstance(pixels, Tensor) or pixels > 0):
        # As PyTorch's batch norm does, unseen by autograd: the same layer called unfused keeps them for its backward.
        # torch.export knows no tensor's data.
        if not torch.compiler.is_exporting():
            running_mean, running_var = running_mean.data, running_var.data
        # Both are computed before either is written: if memory ends, neither has moved.
        mean, var = mean.to(running_mean.dtype), (var * (pixels / (pixels - 1))).to(running_var.dtype)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var, momentum)
    if batches is not None:
        batches.add_(1)


class ConvBNAct(Function):
    """(z, y) of the fused layer.

    y, the convolution's result, is an output if backward keeps it. A gradient of the gradient reads y, comes back as
    y's gradient, and so reaches an input and a weight that are not kept.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, slope, residual, *others):
        mean, var, batches, momentum, arguments, training, how, group = others
        need_x, need_weight, _, need_gamma = ctx.needs_input_grad[:4]
        active = how.act != "identity"
        before, after = (residual is not None and how.residual_after == is_after for is_after in (False, True))
        # Backward takes xhat from y; the activation's derivative from z if that will do, else from y and residual.
        needs_xhat = need_gamma or (training and (need_x or need_weight))
        z_will_do = ACTIVATIONS[how.act].from_output and not after
        needs_y = needs_xhat or (active and not z_will_do)
        from_z = active and z_will_do and (before or not needs_xhat)
        running = mean, var, batches, momentum
        y = None
        if training:
            y, mean, var, ctx.pixels = _convolved(x, weight, bias, arguments, group)
        else:
            # Copies: a write to the running statistics before backward changes no gradient.
            mean, var = mean.clone(), var.clone()
            # With constant statistics the layer is one kernel, if its backward needs no y.
            y = _either(conv, conv_transpose, x, weight, bias, *arguments) if needs_y else None
        if y is None:
            z = conv_act(x, weight, bias, mean, var, gamma, beta, slope, residual, *arguments, *astuple(how))
        else:
            formats = any_channels_last(x, weight)
            z = batch_norm_act(y, mean, var, gamma, beta, slope, residual, *astuple(how), formats)
        if training:
            # Before anything is kept: torch.utils.checkpoint stops recomputing at the last kept tensor.
            _follow(running, mean, var, ctx.pixels)
        ctx.save_for_backward(
            *(x if need_weight else None, weight if need_x else None, gamma),
            *(beta if active and not from_z else None, slope, mean, var, y if needs_y else None),
            *(z if from_z else None, residual if active and before and not from_z else None),
        )
        ctx.sizes, ctx.arguments = (x.shape[2:], weight.shape[2:]), arguments
        ctx.formats = any_channels_last(x, weight), weight_format(weight.shape, weight.stride())
        # If no activation follows the sum, the residual's gradient is dz.
        ctx.training, ctx.how, ctx.group, ctx.through_act = training, how, group, active and before
        # Otherwise autograd makes a gradient of zeros for y.
        ctx.set_materialize_grads(False)
        # Under torch.compile it is differentiable once.
        return z, y if needs_y and not torch.compiler.is_compiling() else None

    @staticmethod
    def backward(ctx, dz, dy):
        if dz is None and dy is None:
            return (None,) * 15
        if ctx.group is not None and torch.is_grad_enabled():
            with torch.no_grad():
                gradients = ConvBNAct.backward(ctx, dz, dy)
            return Once.apply(gradients, dz, *ctx.saved_tensors)
        x, weight, *kept = ctx.saved_tensors
        need_bias = ctx.needs_input_grad[2]
        dbias = bias_gradient(dy) if need_bias and dy is not None and not ctx.training else None
        others: Any = (None,) * 4
        if dz is not None:
            gradients = _composed_gradients if torch.is_grad_enabled() else _gradients
            more_dy, more_dbias, *others = gradients(ctx, dz, *kept)
            dy, dbias = _sum(dy, more_dy), _sum(dbias, more_dbias)
        return *_through_conv(ctx, x, weight, dy), dbias, *others, *(None,) * 8


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class Once(Function):
    """``gradients``, made of ``operands``; differentiating them raises, as with torch.nn.SyncBatchNorm."""

    @staticmethod
    def forward(ctx, gradients, *operands):
        return gradients

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "a batch norm with statistics over a process group is differentiable once, as SyncBatchNorm is"
        )


def _through_conv(ctx: Any, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input and weight, differentiable."""
    need_x, need_weight = ctx.needs_input_grad[:2]
    output_size, stride, padding, dilation, groups = ctx.arguments
    (input_size, filter_size), (dx_format, dw_format) = ctx.sizes, ctx.formats
    before = padding[: len(stride)]
    dx = dw = None
    if need_x and output_size is None:
        dx = conv_transpose(dy, weight, None, input_size, stride, before, dilation, groups, dx_format)
    elif need_x:
        padding = both_sides((output_size, input_size, filter_size), stride, padding, dilation)
        dx = conv(dy, weight, None, stride, padding, dilation, groups)
    if need_weight:
        of, by = (x, dy) if output_size is None else (dy, x)
        dw = weight_gradient(of, by, filter_size, stride, before, dilation, groups, dw_format)
    return dx, dw


def _gradients(ctx, dz, gamma, beta, slope, mean, var, y, z, residual):
    """(dy, dbias, dgamma, dbeta, dslope, dresidual) by kernels, each None unless needed."""
    # `as_pixels` in operations that torch.compile can follow: it knows no strides of a gradient.
    dz = dz.movedim(1, -1).contiguous().movedim(-1, 1)
    need_x, need_weight, need_bias, need_gamma, need_beta, need_slope, need_residual = ctx.needs_input_grad[:7]
    how = astuple(ctx.how)
    derivative = z, mean, var, gamma, beta, slope, residual
    sums: Any = None
    if need_gamma or need_beta or need_slope or (need_x or need_weight if ctx.training else need_bias):
        sums = batch_norm_act_sums(dz, dz if y is None else y, *derivative, *how)
    need_g = need_residual and ctx.through_act
    dy, dresidual = None, dz if need_residual and not need_g else None
    if need_x or need_weight or need_g:
        count, of_batch = 1, None
        if ctx.training and sums is not None:
            count, of_batch = dz.numel() // dz.shape[1], sums
            if ctx.group is not None:
                count, of_batch = 1, sums / ctx.pixels
                dist.all_reduce(of_batch, group=ctx.group)
        dy, g = batch_norm_act_gradient(dz, y, *derivative, of_batch, count, *how, need_g)
        dresidual = g if need_g else dresidual
    # Batch norm subtracts the batch's mean, and with it the bias.
    dbias = torch.zeros_like(mean) if need_bias else None
    if need_bias and not ctx.training:
        dbias = sums[0] * torch.rsqrt(var.float() + ctx.how.eps)
        dbias = dbias if gamma is None else dbias * gamma.float()
    return (
        *(dy, dbias, sums[1].to(gamma.dtype) if need_gamma else None),
        *(sums[0] if need_beta else None, sums[2].to(slope.dtype) if need_slope else None, dresidual),
    )


def _composed_gradients(ctx, dz, gamma, beta, slope, mean, var, y, z, residual):
    """`_gradients` as a graph. Tensors that were not kept do not influence it: anything stands in for them."""
    need_x, need_weight, need_bias, need_gamma, need_beta, need_slope, need_residual = ctx.needs_input_grad[:7]
    g, how = dz, ctx.how
    if z is not None:
        g, how = dz * _derivative_at(z, how), replace(how, act="identity")
    y = dz.detach().requires_grad_() if y is None else y
    beta = torch.zeros_like(mean, requires_grad=True) if need_beta and beta is None else beta
    # Aliases: one tensor may be two operands, each with a gradient of its own.
    y, gamma, beta, slope, residual = (None if t is None else t.view_as(t) for t in (y, gamma, beta, slope, residual))
    again = normalise_and_activate(y, (mean, var, gamma, beta), slope, residual, how, ctx.training)
    through_residual = need_residual and residual is not None
    operands: Any = (y, gamma, beta, slope, residual)
    needs = need_x or need_weight or need_bias, need_gamma, need_beta, need_slope, through_residual
    wanted = [t for t, need in zip(operands, needs, strict=True) if need]
    found: Any = iter(torch.autograd.grad(again, wanted, g, create_graph=True) if wanted else ())
    gradients: Any = (next(found) if need else None for need in needs)
    dy, dgamma, dbeta, dslope, dresidual = gradients
    dbias = bias_gradient(dy) if need_bias else None
    return dy, dbias, dgamma, dbeta, dslope, g if need_residual and not through_residual else dresidual


def _derivative_at(z: Tensor, how: Activated) -> Tensor:
    """The derivative of an activation, constant around its result ``z``."""
    z = z.detach().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[how.act].torch(z, *batch_norm.act_bounds(how, z)).sum(), z)[0]
