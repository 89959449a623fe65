"""torch.nn.functional's convolutions: the same names, signatures, formats and errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fastconv.arguments import TENSORS, Ints, autocast_dtype, check_tensors, expand, integer, why_not_served
from fastconv.autograd.conv import conv, conv_transpose
from fastconv.kernels.problem.conv import conv_transpose_problem
from fastconv.kernels.problem.layout import is_channels_last


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """As torch.nn.functional.conv1d, errors too: input [N, C, W] or [C, W], weight [K, C/groups, S], bias [K]
    -> [N, K, Q]. Any floating dtype, the same for all."""
    return _conv(1, conv1d, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """As torch.nn.functional.conv2d, errors too: input [N, C, H, W] or [C, H, W], weight [K, C/groups, R, S], bias [K]
    -> [N, K, P, Q]. Any floating dtype, the same for all."""
    return _conv(2, conv2d, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: str | Ints = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """As torch.nn.functional.conv3d, errors too: input [N, C, D, H, W] or [C, D, H, W], weight [K, C/groups, T, R, S],
    bias [K] -> [N, K, O, P, Q]. Any floating dtype, the same for all."""
    return _conv(3, conv3d, input, weight, bias, stride, padding, dilation, groups)


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
    """As torch.nn.functional.conv_transpose1d, errors too: input [N, K, Q] or [K, Q], weight [K, C/groups, S], bias [C]
    -> [N, C, W]. Any floating dtype, the same for all."""
    return _conv_transpose(1, conv_transpose1d, input, weight, bias, stride, padding, output_padding, groups, dilation)


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
    """As torch.nn.functional.conv_transpose2d, errors too: input [N, K, P, Q] or [K, P, Q], weight [K, C/groups, R, S],
    bias [C] -> [N, C, H, W]. Any floating dtype, the same for all."""
    return _conv_transpose(2, conv_transpose2d, input, weight, bias, stride, padding, output_padding, groups, dilation)


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
    """As torch.nn.functional.conv_transpose3d, errors too: input [N, K, O, P, Q] or [K, O, P, Q], weight [K, C/groups,
    T, R, S], bias [C] -> [N, C, D, H, W]. Any floating dtype, the same for all."""
    return _conv_transpose(3, conv_transpose3d, input, weight, bias, stride, padding, output_padding, groups, dilation)


def _conv(rank: int, ours: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    if has_torch_function_variadic(x, weight, bias):
        return handle_torch_function(ours, (x, weight, bias), x, weight, bias, *arguments)
    dtype = autocast_dtype(x)
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or why_not_served(x, dtype):
        return getattr(torch.nn.functional, ours.__name__)(x, weight, bias, *arguments)
    if type(bias) not in TENSORS:
        check_tensors(bias)
    stride, padding, dilation, groups = arguments
    if type(groups) is not int:
        groups = integer("groups", groups)
    if x.dim() != rank + 2 or weight.dim() != rank + 2:
        check_ranks(ours.__name__, rank, x, weight)
    stride, dilation = expand("stride", stride, rank), expand("dilation", dilation, rank)
    # Only a name asks for the filter's size.
    if isinstance(padding, str):
        padding = padding_sides(padding, weight.shape[2:], stride, dilation)
    else:
        padding = expand("padding", padding, rank) * 2
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.dim() == rank + 1:
        return conv(x.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    return conv(x, weight, bias, stride, padding, dilation, groups)


def _conv_transpose(rank: int, ours: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    if has_torch_function_variadic(x, weight, bias):
        return handle_torch_function(ours, (x, weight, bias), x, weight, bias, *arguments)
    dtype = autocast_dtype(x)
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or why_not_served(x, dtype):
        return getattr(torch.nn.functional, ours.__name__)(x, weight, bias, *arguments)
    if type(bias) not in TENSORS:
        check_tensors(bias)
    stride, padding, output_padding, groups, dilation = arguments
    if type(groups) is not int:
        groups = integer("groups", groups)
    check_ranks(ours.__name__, rank, x, weight)
    stride, dilation = expand("stride", stride, rank), expand("dilation", dilation, rank)
    padding, output_padding = expand("padding", padding, rank), expand("output_padding", output_padding, rank)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    batched = x if x.dim() == rank + 2 else x.unsqueeze(0)
    bias_shape = None if bias is None else bias.shape
    problem = conv_transpose_problem(
        batched.shape, weight.shape, bias_shape, stride, padding, output_padding, dilation, groups, x.dtype
    )
    channels_last = any(is_channels_last(t.shape, t.stride()) for t in (batched, weight))
    y = conv_transpose(batched, weight, bias, problem.input_size, stride, padding, dilation, groups, channels_last)
    return y if batched is x else y.squeeze(0)


def check_ranks(name: str, rank: int, x: Tensor, weight: Tensor) -> None:
    if x.dim() not in (rank + 1, rank + 2):
        raise RuntimeError(
            f"Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to {name}, "
            f"but got input of size: {list(x.shape)}"
        )
    if weight.dim() != rank + 2:
        raise RuntimeError(f"Expected {rank + 2}D weight for {name}, but got weight of size: {list(weight.shape)}")


def padding_sides(
    padding: Any, filter_size: Sequence[int], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...]:
    """The leading sides, then the trailing ones; 'same', if uneven, has the extra pixel at the end, as in torch."""
    if not isinstance(padding, str):
        return expand("padding", padding, len(stride)) * 2
    if padding == "valid":
        return (0,) * (2 * len(stride))
    if padding != "same":
        raise RuntimeError(f"Invalid padding string: {padding!r}")
    if any(s != 1 for s in stride):
        raise RuntimeError(f"padding='same' is not supported for strided convolutions, but got stride={list(stride)}")
    totals = [d * (r - 1) for r, d in zip(filter_size, dilation, strict=True)]
    return (*(total // 2 for total in totals), *(total - total // 2 for total in totals))
