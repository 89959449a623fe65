"""Convolution by PyTorch's own operators. Each function takes the arguments of the function of the same name in
`fastconv.kernels.ops.conv`, and returns the same in the same memory format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastconv.kernels.problem.layout import weight_strides
from fastconv.kernels.problem.windows import least_input_size
from fastconv.reference import in_format


def both_sides(
    sizes: tuple[Sequence[int], ...], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """The leading padding, then the trailing one, maybe negative, with which a convolution's output has exactly its
    size; ``sizes`` are the input's, the output's and the filter's."""
    after = [
        least_input_size(p, r, s, before, d) - h
        for before, h, p, r, s, d in zip(padding, *sizes, stride, dilation, strict=True)
    ]
    return (*padding, *after)


def pad_argument(padding: Sequence[int]) -> list[int]:
    """Leading sides, then trailing ones, in the order of torch.nn.functional.pad: last axis first."""
    rank = len(padding) // 2
    return [side for axis in reversed(range(rank)) for side in (padding[axis], padding[axis + rank])]


def conv_fprop(x, weight, bias, stride, padding, dilation, groups):
    rank = len(stride)
    if padding[:rank] != padding[rank:]:
        x, padding = torch.nn.functional.pad(x, pad_argument(padding)), [0] * rank
    return torch.convolution(
        x, weight, bias, stride, padding[:rank], dilation, transposed=False, output_padding=[0] * rank, groups=groups
    )


def conv_dgrad(dy, weight, bias, input_size, stride, padding, dilation, groups, channels_last):
    # PyTorch's backward knows only equal padding on both sides: it gets the padded input, whose gradient is cropped.
    shape = (dy.shape[0], weight.shape[1] * groups, *input_size)
    sides = pad_argument(both_sides((input_size, dy.shape[2:], weight.shape[2:]), stride, padding, dilation))
    x = torch.nn.functional.pad(dy.new_empty(shape), sides)
    dx = _backward(dy, x, weight, stride, dilation, groups, 0)
    dx = torch.nn.functional.pad(dx, [-side for side in sides])
    if bias is not None:
        dx += bias.view(-1, *(1,) * len(input_size))
    return in_format(dx, channels_last)


def conv_wgrad(x, dy, filter_size, stride, padding, dilation, groups, format):
    shape = (dy.shape[1], x.shape[1] // groups, *filter_size)
    sides = both_sides((x.shape[2:], dy.shape[2:], filter_size), stride, padding, dilation)
    x = torch.nn.functional.pad(x, pad_argument(sides))
    dw = _backward(dy, x, x.new_empty(shape), stride, dilation, groups, 1)
    return dw.new_empty_strided(shape, weight_strides(shape, format)).copy_(dw)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int, wanted: int
) -> Tensor:
    """The gradient of the input (``wanted`` 0) or the weight (1) of a convolution without padding."""
    rank, mask = len(stride), [wanted == 0, wanted == 1, False]
    arguments = stride, [0] * rank, dilation, False, [0] * rank, groups, mask
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *arguments)[wanted]


def channel_sum(x: Tensor) -> Tensor:
    return x.sum([0, *range(2, x.dim())], dtype=torch.float32).to(x.dtype)
