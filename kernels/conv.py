"""Convolution on tensors, each direction: check, plan, allocate, launch. No autograd.

A call met before costs one dictionary hit: what was decided for it is kept under everything that decides it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from fastconv.autotune import Config, Gpu
from fastconv.kernels import dispatch, reduce
from fastconv.kernels.dispatch import Layout
from fastconv.kernels.launch import Launch, run
from fastconv.kernels.layout import (
    contiguous_channels,
    dense_channels_last,
    even_pixels,
    is_channels_last,
    linear_stride,
    pixel_strides,
    strides_like,
)
from fastconv.kernels.problem import ConvProblem, check_arguments, conv_problem
from fastconv.kernels.tiles import channel_sum_tile

Sizes = tuple[int, ...]


class Uncovered(NotImplementedError):
    """No kernel family serves the call; the message says why."""


@dataclass(frozen=True)
class Call:
    """A prepared call: which operands are copied first, what is launched, what is returned."""

    copies: tuple[Sizes | None, ...]  # strides to copy each operand to; None: as it is
    launches: tuple[Launch, ...]  # none: the result is empty or all zeros
    shape: Sizes
    strides: Sizes  # as the kernel writes it
    returned: Sizes | None = None  # strides of the copy that is returned; None: as written
    workspace: int = 0  # fp32 elements between a first and a second launch


_calls: dict[tuple[Any, ...], Call] = {}
# A program that never meets the same sizes twice must not keep them all.
MAX_CALLS = 8192


def _execute(
    prepare: Callable[..., Call],
    operands: tuple[torch.Tensor, ...],
    bias: tuple[torch.Tensor | None, ...],
    arguments: tuple[Any, ...],
) -> torch.Tensor:
    """Run the call that ``prepare(gpu, operands, bias, *arguments)`` describes, prepared at most once."""
    first = operands[0]
    gpu = dispatch.target(first.device)
    precision = dispatch.fp32_precision(first.dtype)
    kinds = tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in operands + bias])
    key = (prepare, gpu.name, precision, kinds, arguments)
    call = _calls.get(key)
    if call is None:
        if len(_calls) >= MAX_CALLS:
            _calls.clear()
        call = _calls[key] = prepare(gpu, operands, bias, *arguments)
    out = first.new_empty_strided(call.shape, call.strides)
    if not call.launches:
        return out.zero_()
    if any(call.copies):
        operands = tuple(
            t if strides is None else t.new_empty_strided(t.shape, strides).copy_(t)
            for t, strides in zip(operands, call.copies, strict=True)
        )
    if call.workspace:
        workspace = first.new_empty(call.workspace, dtype=torch.float32)
        run(call.launches[0], *operands, *bias, workspace)
        run(call.launches[1], workspace, out)
    else:
        run(call.launches[0], *operands, *bias, out)
    return out if call.returned is None else out.new_empty_strided(call.shape, call.returned).copy_(out)


def conv_fprop(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
) -> torch.Tensor:
    """``conv(x, weight, bias)``; ``padding`` holds the leading sides, then the trailing ones.

    Channels_last where x or weight is, else contiguous. Raises RuntimeError where the arguments do not fit together,
    Uncovered where no kernel serves them.
    """
    return _execute(_prepare_fprop, (x, weight), (bias,), (stride, padding, dilation, groups))


def _prepare_fprop(gpu: Gpu, operands, bias, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int) -> Call:
    x, weight = operands
    check_same_kind(x, weight, *bias)
    problem = conv_problem(
        x.shape, weight.shape, None if bias[0] is None else bias[0].shape, stride, padding, dilation, groups, x.dtype
    )
    channels_last = is_channels_last(x.shape, x.stride()) or is_channels_last(weight.shape, weight.stride())
    return _prepare_gather("fprop", problem, gpu, x, weight, bias[0] is not None, problem.output_shape, channels_last)


def conv_dgrad(
    dy: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    input_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    channels_last: bool,
) -> torch.Tensor:
    """The input's gradient [N, C, *input_size] from the output's, plus ``bias`` [C]: also the transposed convolution.

    ``padding`` is the leading sides'. Raises RuntimeError where the arguments do not fit together, Uncovered where no
    kernel serves them.
    """
    return _execute(
        _prepare_dgrad, (dy, weight), (bias,), (input_size, stride, padding, dilation, groups, channels_last)
    )


def _prepare_dgrad(
    gpu: Gpu,
    operands,
    bias,
    input_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    channels_last: bool,
) -> Call:
    dy, weight = operands
    check_same_kind(dy, weight, *bias)
    check_arguments(weight.shape, None if bias[0] is None else bias[0].shape, 1, stride, padding, dilation, groups)
    problem = _gradient_problem(
        dy, (weight.shape[1] * groups, *input_size), weight.shape, stride, padding, dilation, groups
    )
    return _prepare_gather("dgrad", problem, gpu, dy, weight, bias[0] is not None, problem.input_shape, channels_last)


def _prepare_gather(
    direction: str,
    problem: ConvProblem,
    gpu: Gpu,
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: bool,
    shape: Sizes,
    channels_last: bool,
) -> Call:
    # Where pixels or channels are single, both formats are the same memory and the kernel writes either.
    direct = channels_last or shape[1] == 1 or all(size == 1 for size in shape[2:])
    strides = strides_like(shape, channels_last or not direct)
    copies = (
        contiguous_channels(source.shape, source.stride()),
        dense_channels_last(weight.shape, weight.stride()),
    )
    launches: tuple[Launch, ...] = ()
    if problem.batch:
        layout = Layout(
            source=pixel_strides(source.shape, copies[0] or source.stride()),
            other=pixel_strides(shape, strides),
            bias=bias,
        )
        launches = _plan(direction, problem, gpu, layout)[1]
    return Call(copies, launches, shape, strides, None if direct else strides_like(shape, False))


def conv_wgrad(
    x: torch.Tensor,
    dy: torch.Tensor,
    filter_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    channels_last: bool,
) -> torch.Tensor:
    """The weight's gradient [K, C/groups, *filter_size]; ``padding`` is the leading sides'.

    Raises Uncovered where no kernel serves the call.
    """
    return _execute(_prepare_wgrad, (x, dy), (), (filter_size, stride, padding, dilation, groups, channels_last))


def _prepare_wgrad(
    gpu: Gpu,
    operands,
    bias,
    filter_size: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    channels_last: bool,
) -> Call:
    x, dy = operands
    check_same_kind(x, dy)
    shape = (dy.shape[1], x.shape[1] // groups, *filter_size)
    problem = _gradient_problem(dy, tuple(x.shape[1:]), shape, stride, padding, dilation, groups)
    strides = strides_like(shape, channels_last)
    copies = (contiguous_channels(x.shape, x.stride()), even_pixels(dy.shape, dy.stride()))
    if not problem.batch:
        return Call(copies, (), shape, strides)
    layout = Layout(
        source=pixel_strides(x.shape, copies[0] or x.stride()),
        other=pixel_strides(dy.shape, copies[1] or dy.stride()),
        channels_last=channels_last,
    )
    config, launches = _plan("wgrad", problem, gpu, layout)
    workspace = config["SPLITS"] * prod(shape) if len(launches) > 1 else 0
    return Call(copies, launches, shape, strides, workspace=workspace)


def channel_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of [N, K, spatial] over all axes but the second, added in fp32: the bias's gradient [K]."""
    return _execute(_prepare_channel_sum, (x,), (), ())


def _prepare_channel_sum(gpu: Gpu, operands, bias) -> Call:
    (x,) = operands
    k = x.shape[1]
    copies = (even_pixels(x.shape, x.stride()),)
    if not x.numel():
        return Call(copies, (), (k,), (1,))
    pixels = x.numel() // k
    stride = linear_stride(x.shape, pixel_strides(x.shape, copies[0] or x.stride()))
    assert stride is not None
    choice = channel_sum_tile(pixels, k, x.element_size(), gpu)
    launches = reduce.channel_sum(pixels, k, stride, x.dtype, choice.config)
    return Call(copies, launches, (k,), (1,), workspace=choice.config["SPLITS"] * k if len(launches) > 1 else 0)


def _plan(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> tuple[Config, tuple[Launch, ...]]:
    plan = dispatch.plan(direction, problem, gpu, layout)
    if plan.choice is None:
        raise Uncovered("; ".join(f"{family}: {reason}" for family, reason in plan.reasons))
    return plan.choice.config, plan.launches


def _gradient_problem(
    dy: torch.Tensor,
    input_shape: Sizes,
    weight_shape: Sizes,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
) -> ConvProblem:
    """The convolution whose output's gradient is ``dy``; ``input_shape`` is [C, spatial]."""
    if dy.shape[1] != weight_shape[0]:
        raise RuntimeError(
            f"expected the output's gradient {list(dy.shape)} to have {weight_shape[0]} channels, as the weight "
            f"{list(weight_shape)} has"
        )
    return ConvProblem(
        batch=dy.shape[0],
        in_channels=input_shape[0],
        out_channels=weight_shape[0],
        groups=groups,
        input_size=tuple(input_shape[1:]),
        filter_size=tuple(weight_shape[2:]),
        output_size=tuple(dy.shape[2:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        dtype=dy.dtype,
    )


def check_same_kind(x: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Raise RuntimeError, as torch does, where dtypes or devices are mixed."""
    for other in others:
        if other is None:
            continue
        if other.dtype != x.dtype:
            raise RuntimeError(
                f"Input type ({x.dtype}) and weight or bias type ({other.dtype}) should be the same "
                f"(input {list(x.shape)}, weight or bias {list(other.shape)})"
            )
        if other.device != x.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found input {list(x.shape)} on {x.device} and "
                f"weight or bias {list(other.shape)} on {other.device}"
            )
