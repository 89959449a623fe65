"""Pools on tensors, both directions: view, plan, allocate, launch. No autograd.

A geometry is (window, stride, padding, dilation), each of ``rank`` entries; an adaptive pool's is four empty tuples.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastconv.autotune import Gpu
from fastconv.kernels.families.family import Layout
from fastconv.kernels.families.pool_index import pool_gather
from fastconv.kernels.launch.launch import run
from fastconv.kernels.ops.call import Operands, Prepared, Sizes, planned, prepare_and_run, prepared, workspace
from fastconv.kernels.problem.layout import (
    INDEX_TYPES,
    POINTER_TYPES,
    Strides,
    contiguous_channels,
    dense_copy,
    is_channels_last,
    pixel_strides,
    strides_like,
)
from fastconv.kernels.problem.pool import PoolProblem, index_type, largest_share

Geometry = tuple[Sizes, Sizes, Sizes, Sizes]
ADAPTIVE: Geometry = ((), (), (), ())


def max_pool(x: Tensor, output_size: Sizes, geometry: Geometry, index: torch.dtype | None) -> tuple[Tensor, ...]:
    """(y, taps) [N, C, *output_size] of x [N, C, spatial]: the maxima, and the tap of each in type ``index``.

    Without ``index`` only (y,). The last NaN of a window wins, else its first maximum. The result is channels_last if x
    is, else contiguous. Raises Uncovered if no kernel serves the call.
    """

    def carry_out(call: Prepared, operands: Operands) -> tuple[Tensor, ...]:
        y = x.new_empty_strided(call.shape, call.strides)
        taps = None if index is None else x.new_empty_strided(call.shape, call.strides, dtype=index)
        if len(call.launches) == 1:
            run(call.launches[0], *call.laid_out(operands), y, taps)
        elif call.launches:
            partial = workspace(x, call.launches[0].grid[1] * y.numel())
            partial_taps = None if taps is None else workspace(x, partial.shape, torch.int32)
            run(call.launches[0], *call.laid_out(operands), partial, partial_taps)
            run(call.launches[1], partial, partial_taps, y, taps)
        return (y,) if taps is None else (y, taps)

    return prepare_and_run(_prepare_forward, (x,), ("max", output_size, geometry, index), carry_out)


def average_pool(x: Tensor, output_size: Sizes, geometry: Geometry, include_padding: bool, divisor: int) -> Tensor:
    """The averages [N, C, *output_size] of x [N, C, spatial], summed in fp32. ``divisor`` 0 divides by a window's
    pixels, with or without its padding. Formats and errors as `max_pool`."""
    arguments = ("average", output_size, geometry, None, include_padding, divisor)
    return prepare_and_run(_prepare_forward, (x,), arguments, _average)


def _average(call: Prepared, operands: Operands) -> Tensor:
    (x,) = operands
    assert x is not None
    y = x.new_empty_strided(call.shape, call.strides)
    if len(call.launches) == 1:
        run(call.launches[0], *call.laid_out(operands), y, None)
    elif call.launches:
        partial = workspace(x, call.launches[0].grid[1] * y.numel())
        run(call.launches[0], *call.laid_out(operands), partial, None)
        run(call.launches[1], partial, y)
    return y


def lp_pool(x: Tensor, output_size: Sizes, geometry: Geometry, norm: float) -> Tensor:
    """The norms [N, C, *output_size] of x [N, C, spatial]: (sum of x ** norm) ** (1 / norm) of each window, in fp32.

    The sum of a window over the edge is scaled up from the part inside. Formats and errors as `max_pool`.
    """
    call = prepared(_prepare_forward, (x,), ("lp", output_size, geometry, None, True, 0, norm))
    return _execute(call, (x,), x.dtype, None)


def max_pool_backward(dy: Tensor, taps: Tensor, input_size: Sizes, geometry: Geometry, channels_last: bool) -> Tensor:
    """The input's gradient [N, C, *input_size] from the output's and the taps that `max_pool` kept, summed in fp32.

    ``channels_last``: the input's format, and the result's. Raises Uncovered if no kernel serves the call.
    """
    call = prepared(_prepare_backward, (dy, taps, None, None), ("max", input_size, geometry, channels_last))
    return _execute(call, (dy, taps, None, None), dy.dtype)


def average_pool_backward(
    dy: Tensor, input_size: Sizes, geometry: Geometry, channels_last: bool, include_padding: bool, divisor: int
) -> Tensor:
    """The input's gradient [N, C, *input_size] from the output's; see `average_pool` and `max_pool_backward`."""
    arguments = ("average", input_size, geometry, channels_last, include_padding, divisor)
    operands = (dy, None, None, None)
    return _execute(prepared(_prepare_backward, operands, arguments), operands, dy.dtype)


def lp_pool_backward(dy: Tensor, y: Tensor, x: Tensor, geometry: Geometry, channels_last: bool, norm: float) -> Tensor:
    """The gradient of x [N, C, spatial] from the output's and from what `lp_pool` read and returned; see it and
    `max_pool_backward`."""
    operands = (dy, None, y, None if norm == 1 else x)
    arguments = ("lp", tuple(x.shape[2:]), geometry, channels_last, True, 0, norm)
    return _execute(prepared(_prepare_backward, operands, arguments), operands, dy.dtype)


def max_pool_gather(taps: Tensor, x: Tensor, geometry: Geometry, channels_last: bool) -> Tensor:
    """x [N, C, spatial] at the pixel of each window's maximum, laid out as ``taps`` [N, C, output]."""
    arguments = (tuple(x.shape[2:]), x.dtype, geometry, channels_last)
    return _execute(prepared(_prepare_gather, (taps, x), arguments), (taps, x), x.dtype)


def max_pool_indices(taps: Tensor, input_size: Sizes, geometry: Geometry, channels_last: bool) -> Tensor:
    """PyTorch's indices, int64: the pixel of each window's maximum in an image of ``input_size``."""
    arguments = (input_size, torch.float32, geometry, channels_last)
    return _execute(prepared(_prepare_gather, (taps, None), arguments), (taps, None), torch.int64)


def tap_type(input_size: Sizes, output_size: Sizes, window: Sizes) -> torch.dtype:
    """The type that `max_pool` keeps taps in, wide enough for any adaptive window."""
    if window:
        return index_type(prod(window))
    # An upper bound: the largest share's greatest common divisor would become a guard on every size.
    return index_type(prod((h - 2) // max(p, 1) + 2 for h, p in zip(input_size, output_size, strict=True)))


def _problem(
    kind: str, shape: Sizes, output_size: Sizes, geometry: Geometry, dtype: torch.dtype, index: torch.dtype | None,
    include_padding: bool = True, divisor: int = 0, norm: float = 0.0,
) -> PoolProblem:  # fmt: skip
    adaptive = geometry == ADAPTIVE
    if adaptive:
        rank = len(output_size)
        window = tuple(map(largest_share, shape[2:], output_size))
        geometry = window, (1,) * rank, (0,) * rank, (1,) * rank
    return PoolProblem(
        kind, shape[0], shape[1], tuple(shape[2:]), output_size, *geometry, dtype, adaptive, index, divisor,
        include_padding, norm,
    )  # fmt: skip


def _view(shape: Sizes, strides: Sizes, channels_last: bool) -> tuple[Sizes | None, Strides]:
    """(strides of the copy of a tensor [N, C, spatial], or None; strides of its pixels, or of its planes' pixels)."""
    if channels_last:
        copy = contiguous_channels(shape, strides)
        return copy, pixel_strides(shape, copy or strides)
    # Planes can be numbered only if they lie at one distance.
    even = shape[0] == 1 or shape[1] == 1 or strides[0] == strides[1] * shape[1]
    copy = None if even else strides_like(shape, False)
    n, c, *spatial = copy or strides
    plane = n if shape[1] == 1 else c
    return copy, pixel_strides((shape[0] * shape[1], 1, *shape[2:]), (plane, 1, *spatial))


def _prepare_forward(
    gpu: Gpu,
    operands: Operands,
    kind: str,
    output_size: Sizes,
    geometry: Geometry,
    index: torch.dtype | None,
    *sums: Any,
) -> Prepared:
    (x,) = operands
    assert x is not None
    channels_last = is_channels_last(x.shape, x.stride())
    shape = (*x.shape[:2], *output_size)
    strides = strides_like(shape, channels_last)
    if not prod(shape):
        return Prepared((None,), (), shape, strides)
    problem = _problem(kind, x.shape, output_size, geometry, x.dtype, index, *sums)
    copy, source = _view(x.shape, x.stride(), channels_last)
    plan, _ = planned("forward", problem, gpu, Layout(source_strides=source, channels_last=channels_last))
    return Prepared((copy,), plan.launches, shape, strides)


def _prepare_backward(
    gpu: Gpu, operands: Operands, kind: str, input_size: Sizes, geometry: Geometry, channels_last: bool, *sums: Any
) -> Prepared:
    dy, *kept = operands
    assert dy is not None
    shape = (*dy.shape[:2], *input_size)
    strides = strides_like(shape, channels_last)
    if not prod(shape) or not dy.numel():
        return Prepared((None,) * 4, (), shape, strides)
    taps, y, x = kept
    _check(taps, dy.shape, INDEX_TYPES, dy)
    _check(y, dy.shape, (dy.dtype,), dy)
    _check(x, shape, (dy.dtype,), dy)
    index = None if taps is None else taps.dtype
    problem = _problem(kind, shape, tuple(dy.shape[2:]), geometry, dy.dtype, index, *sums)
    copy, source = _view(dy.shape, dy.stride(), channels_last)
    plan, _ = planned("backward", problem, gpu, Layout(source_strides=source, channels_last=channels_last))
    # The kernel reads taps, y and x without strides.
    dense = (None if t is None else dense_copy(t.shape, t.stride(), channels_last) for t in kept)
    return Prepared((copy, *dense), plan.launches, shape, strides)


def _prepare_gather(
    gpu: Gpu, operands: Operands, input_size: Sizes, dtype: torch.dtype, geometry: Geometry, channels_last: bool
) -> Prepared:
    taps, x = operands
    assert taps is not None
    shape = tuple(taps.shape)
    _check(taps, shape, INDEX_TYPES, taps)
    _check(x, (*shape[:2], *input_size), POINTER_TYPES, taps)
    strides = strides_like(shape, channels_last)
    if not prod(shape):
        return Prepared((None, None), (), shape, strides)
    problem = _problem("max", (*shape[:2], *input_size), shape[2:], geometry, dtype, taps.dtype)
    copy, source = (None, None) if x is None else _view(x.shape, x.stride(), channels_last)
    # Its tile is the forward pool's, which also walks the output.
    _, config = planned("forward", problem, gpu, Layout(channels_last=channels_last))
    launch = pool_gather(problem, {**config, "LANES": 1}, channels_last, source)
    return Prepared((dense_copy(taps.shape, taps.stride(), channels_last), copy), (launch,), shape, strides)


def _check(t: Tensor | None, shape: Sequence[int], dtypes: Container[torch.dtype], beside: Tensor) -> None:
    """Raise RuntimeError if a kept tensor, or a gradient's gradient, does not fit its pool."""
    if t is not None and (tuple(t.shape) != tuple(shape) or t.dtype not in dtypes or t.device != beside.device):
        raise RuntimeError(
            f"expected {list(shape)} beside {list(beside.shape)}, {beside.dtype} on {beside.device}, "
            f"but got {list(t.shape)}, {t.dtype} on {t.device}"
        )


def _execute(call: Prepared, operands: Operands, dtype: torch.dtype, *absent: None) -> Tensor:
    """The result of one launch, whose last pointers are ``absent``."""
    first = operands[0]
    assert first is not None
    out = first.new_empty_strided(call.shape, call.strides, dtype=dtype)
    if not call.launches:
        return out.zero_()
    run(call.launches[0], *call.laid_out(operands), out, *absent)
    return out
