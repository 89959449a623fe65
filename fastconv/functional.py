"""torch.nn.functional's convolutions and pools on fastconv's kernels: the same names, signatures, formats and errors.

Only device, dtype and rank decide here whether a call is ours or PyTorch's own, so that sizes never become guards of a
compiled model; which kernel serves it is chosen inside the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastconv.activations import Act, activation_of
from fastconv.arguments import TENSORS, Ints, check_tensors, integer, served
from fastconv.arguments import expand as _expand
from fastconv.autograd import conv as autograd
from fastconv.autograd.conv_bn_act import conv_bn_act
from fastconv.functional_pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
)
from fastconv.kernels.batch_norm import Activated
from fastconv.kernels.epilogue import ACTIVATIONS
from fastconv.kernels.layout import POINTER_TYPES, is_channels_last
from fastconv.kernels.problem import conv_transpose_problem

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "conv1d",
    "conv1d_bn_act",
    "conv2d",
    "conv2d_bn_act",
    "conv3d",
    "conv3d_bn_act",
    "conv_transpose1d",
    "conv_transpose1d_bn_act",
    "conv_transpose2d",
    "conv_transpose2d_bn_act",
    "conv_transpose3d",
    "conv_transpose3d_bn_act",
    "lp_pool1d",
    "lp_pool2d",
    "lp_pool3d",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "served",
]


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """As torch.nn.functional.conv1d: input [N, C, W] or [C, W], weight [K, C/groups, S], bias [K] -> [N, K, Q].

    Any floating dtype, the same for all. Raises RuntimeError and TypeError as torch's does.
    """
    return _conv(1, torch.nn.functional.conv1d, conv1d, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """As torch.nn.functional.conv2d: input [N, C, H, W] or [C, H, W], weight [K, C/groups, R, S], bias [K]
    -> [N, K, P, Q].

    Any floating dtype, the same for all. Raises RuntimeError and TypeError as torch's does.
    """
    return _conv(2, torch.nn.functional.conv2d, conv2d, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """As torch.nn.functional.conv3d: input [N, C, D, H, W] or [C, D, H, W], weight [K, C/groups, T, R, S], bias [K]
    -> [N, K, O, P, Q].

    Any floating dtype, the same for all. Raises RuntimeError and TypeError as torch's does.
    """
    return _conv(3, torch.nn.functional.conv3d, conv3d, input, weight, bias, stride, padding, dilation, groups)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """As torch.nn.functional.conv_transpose1d: input [N, K, Q] or [K, Q], weight [K, C/groups, S], bias [C]
    -> [N, C, W].

    Any floating dtype, the same for all. Raises RuntimeError and TypeError as torch's does.
    """
    theirs = torch.nn.functional.conv_transpose1d
    return _conv_transpose(
        1, theirs, conv_transpose1d, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """As torch.nn.functional.conv_transpose2d: input [N, K, P, Q] or [K, P, Q], weight [K, C/groups, R, S], bias [C]
    -> [N, C, H, W].

    Any floating dtype, the same for all. Raises RuntimeError and TypeError as torch's does.
    """
    theirs = torch.nn.functional.conv_transpose2d
    return _conv_transpose(
        2, theirs, conv_transpose2d, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
) -> Tensor:
    """As torch.nn.functional.conv_transpose3d: input [N, K, O, P, Q] or [K, O, P, Q], weight [K, C/groups, T, R, S],
    bias [C] -> [N, C, D, H, W].

    Any floating dtype, the same for all. Raises RuntimeError and TypeError as torch's does.
    """
    theirs = torch.nn.functional.conv_transpose3d
    return _conv_transpose(
        3, theirs, conv_transpose3d, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


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

    The arguments of conv1d and of torch.nn.functional.batch_norm, whose running statistics it updates in training;
    vectors are [K], the residual as the result. ``act``: a name, a module of torch.nn or None; ``residual_after``: the
    residual is added behind the activation. One kernel in inference, statistics from the convolution's accumulator in
    training. Raises as torch's functions do; ValueError on an activation without a fused form.
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

    The arguments of conv2d and of torch.nn.functional.batch_norm, whose running statistics it updates in training;
    vectors are [K], the residual as the result. ``act``: a name, a module of torch.nn or None; ``residual_after``: the
    residual is added behind the activation. One kernel in inference, statistics from the convolution's accumulator in
    training. Raises as torch's functions do; ValueError on an activation without a fused form.
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

    The arguments of conv3d and of torch.nn.functional.batch_norm, whose running statistics it updates in training;
    vectors are [K], the residual as the result. ``act``: a name, a module of torch.nn or None; ``residual_after``: the
    residual is added behind the activation. One kernel in inference, statistics from the convolution's accumulator in
    training. Raises as torch's functions do; ValueError on an activation without a fused form.
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

    The arguments of conv_transpose1d, and the others, what it does and raises as conv1d_bn_act; vectors are [C].
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

    The arguments of conv_transpose2d, and the others, what it does and raises as conv2d_bn_act; vectors are [C].
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

    The arguments of conv_transpose3d, and the others, what it does and raises as conv3d_bn_act; vectors are [C].
    """
    norm = (running_mean, running_var, bn_weight, bn_bias)
    fused = training, momentum, eps, act, residual, residual_after
    arguments = stride, padding, dilation, groups, None, output_padding
    return conv_norm_act(conv_transpose3d, input, weight, bias, norm, *fused, *arguments)


def _conv(rank: int, theirs: Any, ours: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    if has_torch_function_variadic(x, weight, bias):
        return handle_torch_function(ours, (x, weight, bias), x, weight, bias, *arguments)
    dtype = _autocast_dtype(x)
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or served(x, dtype):
        return theirs(x, weight, bias, *arguments)
    if type(bias) not in TENSORS:
        check_tensors(bias)
    stride, padding, dilation, groups = arguments
    if type(groups) is not int:
        groups = integer("groups", groups)
    if x.dim() != rank + 2 or weight.dim() != rank + 2:
        _check_ranks(ours.__name__, rank, x, weight)
    stride, dilation = _expand("stride", stride, rank), _expand("dilation", dilation, rank)
    if isinstance(padding, str):
        padding = _named_padding(padding, weight.shape[2:], stride, dilation)
    else:
        padding = _expand("padding", padding, rank) * 2
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.dim() == rank + 1:
        return autograd.conv(x.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    return autograd.conv(x, weight, bias, stride, padding, dilation, groups)


def _conv_transpose(
    rank: int, theirs: Any, ours: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> Tensor:
    if has_torch_function_variadic(x, weight, bias):
        return handle_torch_function(ours, (x, weight, bias), x, weight, bias, *arguments)
    dtype = _autocast_dtype(x)
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or served(x, dtype):
        return theirs(x, weight, bias, *arguments)
    if type(bias) not in TENSORS:
        check_tensors(bias)
    stride, padding, output_padding, groups, dilation = arguments
    if type(groups) is not int:
        groups = integer("groups", groups)
    _check_ranks(ours.__name__, rank, x, weight)
    stride, dilation = _expand("stride", stride, rank), _expand("dilation", dilation, rank)
    padding, output_padding = _expand("padding", padding, rank), _expand("output_padding", output_padding, rank)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    batched = x if x.dim() == rank + 2 else x.unsqueeze(0)
    bias_shape = None if bias is None else bias.shape
    problem = conv_transpose_problem(
        batched.shape, weight.shape, bias_shape, stride, padding, output_padding, dilation, groups, x.dtype
    )
    channels_last = any(is_channels_last(t.shape, t.stride()) for t in (batched, weight))
    y = autograd.conv_transpose(
        batched, weight, bias, problem.input_size, stride, padding, dilation, groups, channels_last
    )
    return y if batched is x else y.squeeze(0)


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
    """What conv1d_bn_act to conv_transpose3d_bn_act share. ``conv``: this module's convolution; ``norm``: running mean,
    running variance, weight and bias; ``group``: the process group over which a synchronised batch norm takes
    statistics; ``output_padding``: a transposed convolution's; ``batches``: the count that is increased in training."""
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
    dtype = _autocast_dtype(x)
    if served(x, dtype):
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
    _check_ranks(conv.__name__, rank, x, weight)
    if x.dim() != rank + 2:
        raise ValueError(f"expected {rank + 2}D input (got {x.dim()}D input of size: {list(x.shape)})")
    stride, dilation = _expand("stride", stride, rank), _expand("dilation", dilation, rank)
    channels, output_size = weight.shape[0], None
    if output_padding is not None:
        padding, output_padding = _expand("padding", padding, rank), _expand("output_padding", output_padding, rank)
        bias_shape = None if bias is None else bias.shape
        problem = conv_transpose_problem(
            x.shape, weight.shape, bias_shape, stride, padding, output_padding, dilation, groups, x.dtype
        )
        channels, output_size = problem.in_channels, problem.input_size
    elif isinstance(padding, str):
        padding = _named_padding(padding, weight.shape[2:], stride, dilation)
    else:
        padding = _expand("padding", padding, rank) * 2
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
        # One copy of a single slope: backward's passes read it too.
        slope = slope.expand(channels).contiguous()
    return conv_bn_act(
        *(x, weight, bias, gamma, beta, slope, residual),
        (running_mean, running_var, batches, momentum),
        *((output_size, stride, padding, dilation, groups), training),
        Activated(eps, name, a, b, residual_after),
        group,
    )


def _autocast_dtype(x: Any) -> torch.dtype | None:
    """What autocast casts a convolution's arguments to, None where it leaves them."""
    # Autocast raises where it knows no such device: meta tensors have none.
    if not isinstance(x, Tensor) or x.dtype not in POINTER_TYPES:
        return None
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else None
    return torch.get_autocast_dtype(device) if device and torch.is_autocast_enabled(device) else None


def _check_ranks(name: str, rank: int, x: Tensor, weight: Tensor) -> None:
    if x.dim() not in (rank + 1, rank + 2):
        raise RuntimeError(
            f"Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to {name}, "
            f"but got input of size: {list(x.shape)}"
        )
    if weight.dim() != rank + 2:
        raise RuntimeError(f"Expected {rank + 2}D weight for {name}, but got weight of size: {list(weight.shape)}")


def _named_padding(
    padding: str, filter_size: Sequence[int], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...]:
    """Both sides of 'valid' or 'same'; where 'same' is uneven the trailing side has the extra pixel, as torch's."""
    if padding == "valid":
        return (0,) * (2 * len(stride))
    if padding != "same":
        raise RuntimeError(f"Invalid padding string: {padding!r}")
    if any(s != 1 for s in stride):
        raise RuntimeError(f"padding='same' is not supported for strided convolutions, but got stride={list(stride)}")
    totals = [d * (r - 1) for r, d in zip(filter_size, dilation, strict=True)]
    return (*(total // 2 for total in totals), *(total - total // 2 for total in totals))
