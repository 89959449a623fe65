"""Convolution + batch norm + activation (+ residual) in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastconv.activations import Act, activation_of
from fastconv.arguments import Ints, autocast_dtype, check_tensors, expand, integer, why_not_served
from fastconv.autograd.conv_bn_act import conv_bn_act
from fastconv.functional.conv import (
    check_ranks,
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
    padding_sides,
)
from fastconv.kernels.families.batch_norm import Activated
from fastconv.kernels.jit.activations import ACTIVATIONS
from fastconv.kernels.problem.conv import conv_transpose_problem


def conv1d_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    act: Act = "relu",
    residual: Tensor | None = None,
    residual_after: bool = False,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """``act(batch_norm(conv1d(input)) + residual)``: input [N, C, W], weight [K, C/groups, S] -> [N, K, Q].

    The other arguments, what it does and raises: as `conv2d_bn_act`.
    """
    norm = (running_mean, running_var, bn_weight, bn_bias)
    fused = training, momentum, eps, act, residual, residual_after
    return conv_norm_act(conv1d, input, weight, bias, norm, *fused, stride, padding, dilation, groups)


def conv2d_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    act: Act = "relu",
    residual: Tensor | None = None,
    residual_after: bool = False,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """``act(batch_norm(conv2d(input)) + residual)``: input [N, C, H, W], weight [K, C/groups, R, S] -> [N, K, P, Q].

    It takes the arguments of conv2d and of torch.nn.functional.batch_norm, whose running statistics it updates in
    training. Vectors are [K]; the residual has the result's shape. ``act``: a name, a module of torch.nn or None.
    ``residual_after``: the residual is added behind the activation. Inference is one kernel; training takes statistics
    from the convolution's accumulator. Raises as torch's functions do; ValueError on an activation without a fused
    form.
    """
    norm = (running_mean, running_var, bn_weight, bn_bias)
    fused = training, momentum, eps, act, residual, residual_after
    return conv_norm_act(conv2d, input, weight, bias, norm, *fused, stride, padding, dilation, groups)


def conv3d_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    act: Act = "relu",
    residual: Tensor | None = None,
    residual_after: bool = False,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """``act(batch_norm(conv3d(input)) + residual)``: input [N, C, D, H, W], weight [K, C/groups, T, R, S]
    -> [N, K, O, P, Q].

    The other arguments, what it does and raises: as `conv2d_bn_act`.
    """
    norm = (running_mean, running_var, bn_weight, bn_bias)
    fused = training, momentum, eps, act, residual, residual_after
    return conv_norm_act(conv3d, input, weight, bias, norm, *fused, stride, padding, dilation, groups)


def conv_transpose1d_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    act: Act = "relu",
    residual: Tensor | None = None,
    residual_after: bool = False,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """``act(batch_norm(conv_transpose1d(input)) + residual)``: input [N, K, Q], weight [K, C/groups, S]
    -> [N, C, W].

    Vectors are [C]. The other arguments, what it does and raises: as `conv2d_bn_act`.
    """
    norm = (running_mean, running_var, bn_weight, bn_bias)
    fused = training, momentum, eps, act, residual, residual_after
    arguments = stride, padding, dilation, groups, None, output_padding
    return conv_norm_act(conv_transpose1d, input, weight, bias, norm, *fused, *arguments)


def conv_transpose2d_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    act: Act = "relu",
    residual: Tensor | None = None,
    residual_after: bool = False,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """``act(batch_norm(conv_transpose2d(input)) + residual)``: input [N, K, P, Q], weight [K, C/groups, R, S]
    -> [N, C, H, W].

    Vectors are [C]. The other arguments, what it does and raises: as `conv2d_bn_act`.
    """
    norm = (running_mean, running_var, bn_weight, bn_bias)
    fused = training, momentum, eps, act, residual, residual_after
    arguments = stride, padding, dilation, groups, None, output_padding
    return conv_norm_act(conv_transpose2d, input, weight, bias, norm, *fused, *arguments)


def conv_transpose3d_bn_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    act: Act = "relu",
    residual: Tensor | None = None,
    residual_after: bool = False,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """``act(batch_norm(conv_transpose3d(input)) + residual)``: input [N, K, O, P, Q], weight [K, C/groups, T, R, S]
    -> [N, C, D, H, W].

    Vectors are [C]. The other arguments, what it does and raises: as `conv2d_bn_act`.
    """
    norm = (running_mean, running_var, bn_weight, bn_bias)
    fused = training, momentum, eps, act, residual, residual_after
    arguments = stride, padding, dilation, groups, None, output_padding
    return conv_norm_act(conv_transpose3d, input, weight, bias, norm, *fused, *arguments)


_CONVOLUTIONS = (conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d)


def conv_norm_act(
    conv: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor | None, ...],
    training: bool,
    momentum: float,
    eps: float,
    act: Act,
    residual: Tensor | None,
    residual_after: bool,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    group: Any = None,
    output_padding: Any = None,
    batches: Tensor | None = None,
) -> Tensor:
    """What conv1d_bn_act to conv_transpose3d_bn_act share. ``conv``: fastconv's convolution; ``norm``: running mean,
    running variance, weight and bias; ``group``: the process group over which a synchronised batch norm takes
    statistics; ``output_padding``: only a transposed convolution's; ``batches``: counted up in training."""
    name, a, b, slope = activation_of(act)
    running_mean, running_var, gamma, beta = norm
    if running_mean is None or running_var is None:
        if not training:
            raise RuntimeError("Expected running_mean and running_var to be defined when training=False")
        if running_mean is not running_var:
            raise ValueError("running_mean and running_var must either both be None or neither be None")
    if eps <= 0 and (training or eps < 0):
        bound = "positive during training" if training else "non-negative"
        raise ValueError(f"batch_norm eps must be {bound}, but got {eps}")
    momentum, eps = float(momentum), float(eps)
    check_tensors(x, weight, bias, running_mean, running_var, gamma, beta, residual)
    dtype = autocast_dtype(x)
    if why_not_served(x, dtype):
        if output_padding is None:
            y = conv(x, weight, bias, stride, padding, dilation, groups)
        else:
            y = conv(x, weight, bias, stride, padding, output_padding, groups, dilation)
        if batches is not None:
            batches.add_(1)
        z = torch.nn.functional.batch_norm(y, running_mean, running_var, gamma, beta, training, momentum, eps)
        if residual is not None and not residual_after:
            z = z + residual
        z = ACTIVATIONS[name].torch(z, a if slope is None else slope, b)
        return z + residual if residual is not None and residual_after else z
    if type(groups) is not int:
        groups = integer("groups", groups)
    rank = _CONVOLUTIONS.index(conv) % 3 + 1
    check_ranks(conv.__name__, rank, x, weight)
    if x.dim() != rank + 2:
        raise ValueError(f"expected {rank + 2}D input (got {x.dim()}D input of size: {list(x.shape)})")
    stride, dilation = expand("stride", stride, rank), expand("dilation", dilation, rank)
    channels, output_size = weight.shape[0], None
    if output_padding is not None:
        padding, output_padding = expand("padding", padding, rank), expand("output_padding", output_padding, rank)
        bias_shape = None if bias is None else bias.shape
        problem = conv_transpose_problem(
            x.shape, weight.shape, bias_shape, stride, padding, output_padding, dilation, groups, x.dtype
        )
        channels, output_size = problem.in_channels, problem.input_size
    else:
        padding = padding_sides(padding, weight.shape[2:], stride, dilation)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        residual = None if residual is None else residual.to(dtype)
    for argument, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        if statistic is not None and statistic.numel() != channels:
            raise RuntimeError(f"{argument} should contain {channels} elements not {statistic.numel()}")
    if slope is not None:
        if slope.numel() not in (1, channels):
            raise RuntimeError(
                f"Mismatch of parameter numbers and input channel size. Found parameter numbers = {slope.numel()} and "
                f"channel size = {channels}."
            )
        # A single slope is copied once, since backward's passes read it too.
        slope = slope.expand(channels).contiguous()
    return conv_bn_act(
        *(x, weight, bias, gamma, beta, slope, residual),
        (running_mean, running_var, batches, momentum),
        *((output_size, stride, padding, dilation, groups), training),
        Activated(eps, name, a, b, residual_after),
        group,
    )
