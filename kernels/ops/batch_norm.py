"""Batch norm + activation on tensors: check, allocate, launch. No autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from fastconv.autotune import Config, Gpu
from fastconv.kernels.families import batch_norm as family
from fastconv.kernels.families.batch_norm import Activated, Pass, Types, pass_tile
from fastconv.kernels.jit.epilogue import check_operands
from fastconv.kernels.launch.launch import Launch, run
from fastconv.kernels.ops.call import Operands, Prepared, Sizes, prepare_and_run, prepared, workspace
from fastconv.kernels.problem.layout import dense_copy, pointer_type, strides_like

MAX_PARTIALS = 256  # with more, statistics are combined by a tree of two levels


def combine_statistics(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, variance) [K] from partials: the count of rows [partials], means and squares [partials, K], all fp32.

    The variance is biased. A partial may have no rows; statistics of no rows are 0.
    """
    while True:
        partials, k = mean.shape
        final = partials <= MAX_PARTIALS
        share = partials if final else -(-partials // MAX_PARTIALS)
        groups = -(-partials // share)
        launch = family.combine_statistics(partials, k, share)
        out_count = None if final else count.new_empty(groups)
        out_mean, out_m2 = (mean.new_empty((k,) if final else (groups, k)) for _ in range(2))
        run(launch, count, mean, m2, out_count, out_mean, out_m2)
        if out_count is None:
            return out_mean, out_m2
        count, mean, m2 = out_count, out_mean, out_m2


def batch_norm_act(
    y: Tensor, norm: tuple[Tensor | None, ...], slope: Tensor | None, residual: Tensor | None, how: Activated
) -> Tensor:
    """``act(normalise(y) + residual)`` of y [N, K, spatial]; z is dense channels_last.

    ``norm``: mean, variance, weight and bias [K], the last two may be None; ``slope`` [K]: PReLU's; the residual is
    shaped as y. Raises RuntimeError if an operand does not fit.
    """
    operands = (y, *norm, slope, residual)
    call = prepared(_prepare_apply, operands, (how,))
    z = y.new_empty_strided(call.shape, call.strides)
    if call.launches:
        run(call.launches[0], *call.laid_out(operands), z)
    return z


def _prepare_apply(gpu: Gpu, operands: Operands, how: Activated) -> Prepared:
    y, *vectors, residual = operands
    assert y is not None
    check_operands(y, y.shape, vectors, residual)
    over = _pass(y)
    launch = family.batch_norm_act(over, how, _types(operands), _tile(over, 2 + (residual is not None), gpu))
    return _prepared(operands, (launch,), y.shape, strides_like(y.shape, True))


def batch_norm_act_sums(
    dz: Tensor, y: Tensor, z: Tensor | None, norm: tuple[Tensor | None, ...], slope: Tensor | None,
    residual: Tensor | None, how: Activated,
) -> Tensor:  # fmt: skip
    """[3, K] in fp32: the gradients of batch norm's bias and weight, and of PReLU's slope. dz, z and the residual are
    shaped as y [N, K, spatial]."""
    return prepare_and_run(_prepare_sums, (dz, y, z, *norm, slope, residual), (how,), _sum)


def _sum(call: Prepared, operands: Operands) -> Tensor:
    y = operands[1]
    assert y is not None
    out = y.new_empty_strided(call.shape, call.strides, dtype=torch.float32)
    if not call.launches:
        return out.zero_()
    first, *second = call.launches
    partial = workspace(y, (first.grid[1], *call.shape)) if second else out
    run(first, *call.laid_out(operands), partial)
    if second:
        run(second[0], partial, out)
    return out


def _prepare_sums(gpu: Gpu, operands: Operands, how: Activated) -> Prepared:
    y = operands[1]
    assert y is not None
    _check(y, operands)
    over, k = _pass(y), y.shape[1]
    config = _tile(over, sum(t is not None for t in (*operands[:3], operands[-1])), gpu, split=True)
    launches = family.batch_norm_act_sums(over, how, _types(operands), act_bounds(how, operands[2]), config)
    return _prepared(operands, launches, (3, k), (k, 1))


def batch_norm_act_gradient(
    dz: Tensor, y: Tensor | None, z: Tensor | None, norm: tuple[Tensor | None, ...], slope: Tensor | None,
    residual: Tensor | None, sums: Tensor | None, share: float, how: Activated, need_residual: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dy, dresidual or None), dense channels_last, from `batch_norm_act_sums`; no sums: the statistics were constants.

    ``share``: 1 / pixels that the statistics were taken over.
    """
    operands = (dz, y, z, *norm, slope, residual, sums)
    call = prepared(_prepare_gradient, operands, (share, how, need_residual))
    dy = dz.new_empty_strided(call.shape, call.strides)
    dresidual = torch.empty_like(dy) if need_residual else None
    if call.launches:
        run(call.launches[0], *call.laid_out(operands), dy, dresidual)
    return dy, dresidual


def _prepare_gradient(gpu: Gpu, operands: Operands, share: float, how: Activated, need_residual: bool) -> Prepared:
    dz, *others, sums = operands
    assert dz is not None
    _check(dz, (dz, *others))
    k = dz.shape[1]
    if sums is not None and tuple(sums.shape) != (3, k):
        raise RuntimeError(
            f"expected sums of shape {[3, k]}, as dz {list(dz.shape)} has channels, but got {list(sums.shape)}"
        )
    tensors = sum(t is not None for t in (*operands[:3], operands[-2])) + 1 + need_residual
    over, bounds = _pass(dz), act_bounds(how, operands[2])
    config = _tile(over, tensors, gpu)
    launch = family.batch_norm_act_gradient(over, how, _types(operands), bounds, share, need_residual, config)
    return _prepared(operands, (launch,), dz.shape, strides_like(dz.shape, True))


def _prepared(operands: Operands, launches: tuple[Launch, ...], shape: Sizes, strides: Sizes) -> Prepared:
    """A call whose vectors and sums are read without gaps, its pixels as dense channels_last."""
    copies = tuple(None if t is None else dense_copy(t.shape, t.stride(), t.dim() > 2) for t in operands)
    empty = any(t is not None and not t.numel() for t in operands)
    return Prepared(copies, () if empty else launches, tuple(shape), strides)


def _check(x: Tensor, operands: Operands) -> None:
    """Raise RuntimeError if an operand of backward does not fit x [N, K, spatial]."""
    dz, y, z, *vectors, residual = operands
    for t in (dz, y, z):
        if t is not None and (t.shape != x.shape or t.device != x.device):
            raise RuntimeError(
                f"expected {list(x.shape)} on {x.device}, as the gradient or the output is, but got {list(t.shape)} on "
                f"{t.device}"
            )
    check_operands(x, x.shape, vectors, residual)


def _types(operands: Operands) -> Types:
    return tuple(None if t is None else pointer_type(t.dtype) for t in operands)


def act_bounds(how: Activated, z: Tensor | None) -> tuple[float, float]:
    """The activation's two numbers; a derivative that is taken from z has them rounded as z was when it was clamped."""
    if z is None:
        return how.a, how.b
    # One tensor for each number: a tensor without data keeps the value of one.
    a, b = (torch.tensor(value, dtype=z.dtype, device="cpu").item() for value in (how.a, how.b))
    return a, b


def _pass(y: Tensor) -> Pass:
    return Pass(max(1, y.numel() // y.shape[1]), y.shape[1], y.dtype)


def _tile(over: Pass, tensors: int, gpu: Gpu, split: bool = False) -> Config:
    """The tile of a pass that reads and writes ``tensors`` operands."""
    return pass_tile(over.pixels, over.channels, over.dtype.itemsize, tensors, split, gpu).config


def as_pixels(t: Tensor) -> Tensor:
    """``t``, or its copy if it is not dense channels_last."""
    strides = dense_copy(t.shape, t.stride(), True)
    return t if strides is None else t.new_empty_strided(t.shape, strides).copy_(t)
