"""Convolution on tensors, each direction: check, plan, allocate, launch. No autograd."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastconv.autotune import Gpu
from fastconv.kernels.families import channel_sum as family
from fastconv.kernels.families.batch_norm import pass_tile
from fastconv.kernels.families.family import Layout
from fastconv.kernels.jit.epilogue import Epilogue, check_operands
from fastconv.kernels.launch.descriptor import aligned, pitched
from fastconv.kernels.ops.batch_norm import combine_statistics
from fastconv.kernels.ops.call import Operands, PreparedConv, Sizes, execute, planned, prepare_and_run
from fastconv.kernels.problem.conv import ConvProblem, check_arguments, conv_problem
from fastconv.kernels.problem.layout import (
    TAPS_OUTERMOST,
    contiguous_channels,
    dense_copy,
    even_pixels,
    is_channels_last,
    laid_out,
    linear_stride,
    pixel_strides,
    pointer_type,
    strides_like,
    taps_outermost,
    weight_strides,
)

# An epilogue's operands: batch norm's mean, variance, weight and bias, PReLU's slope, the residual.
NO_EPILOGUE = (None,) * 6


def conv_fprop(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """``conv(x, weight, bias)``; ``padding`` holds the leading sides, then the trailing ones.

    The result is channels_last if x or weight is, else contiguous. Raises RuntimeError if the arguments do not fit
    together, Uncovered if no kernel serves them.
    """
    operands = (x, weight, bias, *NO_EPILOGUE)
    return prepare_and_run(_prepare_fprop, operands, (stride, padding, dilation, groups), execute)[0]


def conv_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: tuple[Tensor | None, ...], slope: Tensor | None,
    residual: Tensor | None, output_size: Sizes | None, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int,
    eps: float, act: str, a: float, b: float, residual_after: bool,
) -> Tensor:  # fmt: skip
    """``act(normalise(conv(x, weight, bias)) + residual)`` in one launch, or with the residual after the activation.

    ``output_size``: the transposed convolution's, whose ``padding`` holds only the leading sides; None: a convolution.
    ``norm``: batch norm's mean, variance, weight and bias [K], each may be None; ``slope`` [K]: PReLU's; the residual
    is shaped as the result. Formats and errors as `conv_fprop`.
    """
    operands = (x, weight, bias, *norm, slope, residual)
    how = act, eps, a, b, residual_after
    return _either_direction(operands, output_size, (stride, padding, dilation, groups), how)[0]


def conv_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Sizes | None, stride: Sizes, padding: Sizes,
    dilation: Sizes, groups: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, mean, variance): the convolution as in `conv_act`, always channels_last, and the statistics [K] of its fp32
    result, 0 for an empty batch."""
    operands = (x, weight, bias, *NO_EPILOGUE)
    how = "identity", 0.0, 0.0, 0.0, False, True
    y, *partials = _either_direction(operands, output_size, (stride, padding, dilation, groups), how)
    if not partials:
        mean, var = (y.new_zeros(y.shape[1], dtype=torch.float32) for _ in range(2))
        return y, mean, var
    return y, *combine_statistics(*partials)


def _either_direction(
    operands: Operands, output_size: Sizes | None, arguments: tuple[Any, ...], how: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """fprop, or dgrad if there is an ``output_size``."""
    if output_size is None:
        return prepare_and_run(_prepare_fprop, operands, (*arguments, *how), execute)
    return prepare_and_run(_prepare_dgrad, operands, (output_size, *arguments, None, *how), execute)


def _prepare_fprop(
    gpu: Gpu, operands: Operands, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int, *how: Any
) -> PreparedConv:
    x, weight, bias, *_ = operands
    assert x is not None and weight is not None
    check_same_kind(x, weight, bias)
    bias_shape = None if bias is None else bias.shape
    problem = conv_problem(x.shape, weight.shape, bias_shape, stride, padding, dilation, groups, x.dtype)
    return prepare_fprop_or_dgrad("fprop", problem, gpu, operands, None, *how)


def conv_dgrad(
    dy: Tensor, weight: Tensor, bias: Tensor | None, input_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes,
    groups: int, channels_last: bool,
) -> Tensor:  # fmt: skip
    """The input's gradient [N, C, *input_size] from the output's, plus ``bias`` [C]: also the transposed convolution.

    ``padding`` holds the leading sides. Errors as `conv_fprop`.
    """
    operands = (dy, weight, bias, *NO_EPILOGUE)
    arguments = (input_size, stride, padding, dilation, groups, channels_last)
    return prepare_and_run(_prepare_dgrad, operands, arguments, execute)[0]


def _prepare_dgrad(
    gpu: Gpu, operands: Operands, input_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int,
    channels_last: bool | None, *how: Any,
) -> PreparedConv:  # fmt: skip
    dy, weight, bias, *_ = operands
    assert dy is not None and weight is not None
    check_same_kind(dy, weight, bias)
    check_arguments(weight.shape, None if bias is None else bias.shape, 1, stride, padding, dilation, groups)
    input_shape = (weight.shape[1] * groups, *input_size)
    problem = _gradient_problem(dy, input_shape, weight.shape, stride, padding, dilation, groups)
    return prepare_fprop_or_dgrad("dgrad", problem, gpu, operands, channels_last, *how)


def prepare_fprop_or_dgrad(
    direction: str, problem: ConvProblem, gpu: Gpu, operands: Operands, channels_last: bool | None,
    act: str = "identity", eps: float = 0.0, a: float = 0.0, b: float = 0.0, residual_after: bool = False,
    statistics: bool = False,
) -> PreparedConv:  # fmt: skip
    """``channels_last``: the result's format; None: channels_last if an operand is or statistics are taken."""
    source, weight, bias, *fused, residual = operands
    assert source is not None and weight is not None
    shape = problem.input_shape if direction == "dgrad" else problem.output_shape
    check_operands(source, shape, fused, residual)
    mean, var, gamma, beta, slope, added = (None if t is None else pointer_type(t.dtype) for t in (*fused, residual))
    epilogue = Epilogue(mean, var, gamma, beta, slope, added, residual_after, statistics, act, eps, a, b)
    if channels_last is None:
        channels_last = statistics or any(is_channels_last(t.shape, t.stride()) for t in (source, weight))
    # With one pixel or one channel both formats are the same memory: the kernel writes either.
    direct = channels_last or shape[1] == 1 or all(size == 1 for size in shape[2:])
    strides = strides_like(shape, channels_last or not direct)
    copies: list[Sizes | None] = [contiguous_channels(source.shape, source.stride()), None]
    copies += [None if t is None else dense_copy(t.shape, t.stride()) for t in (bias, *fused)]
    copies.append(None)
    if residual is not None and residual.stride() != strides:
        copies[-1] = strides
    returned = None if direct else strides_like(shape, False)
    if not problem.batch:
        return PreparedConv(tuple(copies), (), shape, strides, returned)
    layout = Layout(
        source_strides=pixel_strides(source.shape, copies[0] or source.stride()),
        other_strides=pixel_strides(shape, strides),
        bias=bias is not None,
        epilogue=epilogue,
        starts_aligned=_aligned(operands, copies),
        precopied=_copied(copies[0], returned),
    )
    plan, config = planned(direction, problem, gpu, layout)
    launches = plan.launches
    if plan.family == "depthwise":
        wanted = taps_outermost(weight.shape)
    else:
        # Bulk copies step from tap to tap by 16 bytes too.
        wanted = pitched(weight.shape, weight.dtype) if launches[0].described else strides_like(weight.shape, True)
    copies[1] = None if laid_out(weight.shape, weight.stride(), wanted) else wanted
    if plan.layout.source_strides != layout.source_strides:
        copies[0] = pitched(source.shape, source.dtype)
    if plan.layout.other_strides != layout.other_strides:
        strides, returned = pitched(shape, source.dtype), returned or strides
        copies[-1] = None if residual is None else strides
    partials = (launches[-1].tiles, shape[1]) if statistics else None
    if plan.family in ("rows", "row_boxes"):
        row_weight = int(launches[0].scalars[-1])
        return PreparedConv(tuple(copies), launches, shape, strides, returned, partials=partials, row_weight=row_weight)
    workspace = config["SPLITS"] * prod(shape) if len(launches) > 1 else 0
    return PreparedConv(tuple(copies), launches, shape, strides, returned, workspace, partials)


def conv_wgrad(
    x: Tensor, dy: Tensor, filter_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int, format: int
) -> Tensor:
    """The weight's gradient [K, C/groups, *filter_size], laid out by `weight_format`; ``padding`` holds the leading
    sides. Errors as `conv_fprop`."""
    arguments = (filter_size, stride, padding, dilation, groups, format)
    return prepare_and_run(prepare_wgrad, (x, dy), arguments, execute)[0]


def prepare_wgrad(
    gpu: Gpu, operands: Operands, filter_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int,
    format: int,
) -> PreparedConv:  # fmt: skip
    x, dy = operands
    assert x is not None and dy is not None
    check_same_kind(x, dy)
    shape = (dy.shape[1], x.shape[1] // groups, *filter_size)
    if x.shape[0] != dy.shape[0] or x.shape[1] % groups or dy.shape[1] % groups:
        raise RuntimeError(
            f"the weight's gradient takes as many images from both, and channels in {groups} groups, but got the input "
            f"{list(x.shape)} and the output's gradient {list(dy.shape)}"
        )
    problem = _gradient_problem(dy, tuple(x.shape[1:]), shape, stride, padding, dilation, groups)
    strides = weight_strides(shape, format)
    copies = [contiguous_channels(x.shape, x.stride()), even_pixels(dy.shape, dy.stride())]
    if not problem.batch:
        return PreparedConv(tuple(copies), (), shape, strides)
    layout = Layout(
        source_strides=pixel_strides(x.shape, copies[0] or x.stride()),
        other_strides=pixel_strides(dy.shape, copies[1] or dy.stride()),
        channels_last=format == 1,
        taps_outermost=format == TAPS_OUTERMOST,
        starts_aligned=_aligned(operands, copies),
        precopied=_copied(*copies),
    )
    plan, config = planned("wgrad", problem, gpu, layout)
    launches = plan.launches
    if plan.layout.source_strides != layout.source_strides:
        copies[0] = pitched(x.shape, x.dtype)
    if plan.layout.other_strides != layout.other_strides:
        copies[1] = pitched(dy.shape, dy.dtype)
    # Neighbouring outputs that share a run have a gradient each.
    columns = launches[0].constants["RUN_OUTPUTS"] if plan.family == "rows" else 1
    workspace = config["SPLITS"] * columns * prod(shape) if len(launches) > 1 else 0
    if format == TAPS_OUTERMOST and plan.family != "depthwise":
        return PreparedConv(tuple(copies), launches, shape, strides_like(shape, False), strides, workspace=workspace)
    return PreparedConv(tuple(copies), launches, shape, strides, workspace=workspace)


def channel_sum(x: Tensor) -> Tensor:
    """The bias's gradient [K]: the sum of x [N, K, spatial] over all other axes, added in fp32."""
    return prepare_and_run(_prepare_channel_sum, (x,), (), execute)[0]


def _prepare_channel_sum(gpu: Gpu, operands: Operands) -> PreparedConv:
    (x,) = operands
    assert x is not None
    k = x.shape[1]
    copies = (even_pixels(x.shape, x.stride()),)
    if not x.numel():
        return PreparedConv(copies, (), (k,), (1,))
    pixels = x.numel() // k
    stride = linear_stride(x.shape, pixel_strides(x.shape, copies[0] or x.stride()))
    assert stride is not None
    choice = pass_tile(pixels, k, x.element_size(), 1, True, gpu)
    launches = family.channel_sum(pixels, k, stride, x.dtype, choice.config)
    return PreparedConv(copies, launches, (k,), (1,), workspace=choice.config["SPLITS"] * k if len(launches) > 1 else 0)


def _copied(source: Sizes | None, other: Sizes | None) -> tuple[str, ...]:
    return tuple(name for name, copy in (("source", source), ("other", other)) if copy is not None)


def _aligned(operands: Operands, copies: Sequence[Sizes | None]) -> bool:
    """Whether all operands start where a bulk copy may; a copy does."""
    return all(t is None or copy is not None or aligned(t) for t, copy in zip(operands, copies, strict=True))


def _gradient_problem(
    dy: Tensor, input_shape: Sizes, weight_shape: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
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


def check_same_kind(x: Tensor, *others: Tensor | None) -> None:
    """Raise RuntimeError, as torch does, if dtypes or devices are mixed."""
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
