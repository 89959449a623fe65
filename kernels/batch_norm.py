"""Batch norm + activation (+ residual) around a convolution, in training: statistics combined, applied, and backward.

A convolution's epilogue leaves (mean, sum of squared differences) of each tile and channel; they are combined in a
fixed order, so no cancellation of E[x^2] - E[x]^2 and the same bits from run to run (Chan, Golub and LeVeque, "Updating
formulae and a pairwise algorithm for computing sample variances"). Then, all on [pixels, channels]:

forward    u = (y - mean) / sqrt(var + eps) * gamma + beta;  z = act(u + residual), or act(u) + residual
backward   g = dz * act'(u + residual);  dbeta = sum g;  dgamma = sum g * xhat, xhat = (y - mean) / sqrt(var + eps)
           dy = gamma / sqrt(var + eps) * (g - (dbeta + xhat * dgamma) / pixels);  dresidual = g

Bytes: forward reads y and writes z; backward reads y and dz twice and writes dy: act'(u) is computed again from y, or
where the activation allows it from z. No mask and no normalised copy exists. The residual's gradient is g, written
beside dy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastconv.autotune import Config, Gpu
from fastconv.kernels.call import Operands, Prepared, Sizes, carried_out, prepared, workspace
from fastconv.kernels.epilogue import ACTIVATIONS, activate, check_operands, normalise
from fastconv.kernels.launch import Launch, run
from fastconv.kernels.layout import INT32_MAX, dense_copy, pointer_type, strides_like, vector
from fastconv.kernels.reduce import split_sum
from fastconv.kernels.tiles import pass_tile

# A tree of two levels above this many partials.
MAX_PARTIALS = 256


@triton.jit(do_not_specialize=["partials", "K", "share"])
def combine_statistics_kernel(
    count_ptr,  # [partials]: the rows that each one covers, maybe none
    mean_ptr, m2_ptr,  # [partials, K]
    out_count_ptr,  # [groups of share partials]
    out_mean_ptr, out_m2_ptr,  # [groups, K]
    partials,
    K,
    share,
    FINAL: tl.constexpr,  # out_m2 is the variance
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Means and squares of ``share`` neighbouring partials -> of all their rows, in the partials' order."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, partials)
    rows = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for t in range(first, last, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        rows += tl.load(count_ptr + offs_t, mask=offs_t < last, other=0.0)
    rows = tl.sum(rows, axis=0)
    count = tl.maximum(rows, 1.0)
    # Of differences from one of the means, whose sum rounds no more than the differences do.
    origin = tl.load(mean_ptr + first * K + offs_k, mask=mask_k, other=0.0)
    acc = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    for t in range(first, last, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < last)[:, None] & mask_k[None, :]
        n = tl.load(count_ptr + offs_t, mask=offs_t < last, other=0.0)[:, None]
        partial = tl.load(mean_ptr + offs_t[:, None] * K + offs_k[None, :], mask=mask, other=0.0)
        acc += tl.where(mask, (partial - origin[None, :]) * (n / count), 0.0)
    mean = origin + tl.sum(acc, axis=0)
    acc = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)
    for t in range(first, last, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < last)[:, None] & mask_k[None, :]
        n = tl.load(count_ptr + offs_t, mask=offs_t < last, other=0.0)[:, None]
        offs = offs_t[:, None] * K + offs_k[None, :]
        difference = tl.load(mean_ptr + offs, mask=mask, other=0.0) - mean[None, :]
        acc += tl.where(mask, tl.load(m2_ptr + offs, mask=mask, other=0.0) + difference * difference * n, 0.0)
    m2 = tl.sum(acc, axis=0)
    if FINAL:
        m2 = m2 / count
    else:
        tl.store(out_count_ptr + tl.program_id(1), rows)
    out = tl.program_id(1) * K + offs_k
    tl.store(out_mean_ptr + out, mean, mask=mask_k)
    tl.store(out_m2_ptr + out, m2, mask=mask_k)


@triton.jit(do_not_specialize=["M", "K", "eps", "a", "b"])
def batch_norm_act_kernel(
    y_ptr,  # [M, K]
    mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr,  # [K]
    residual_ptr,  # [M, K]
    z_ptr,  # [M, K]
    M,
    K,  # in units of VEC
    eps,
    a, b,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z = act(normalise(y) + residual)."""
    K *= VEC
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = k < K
    mask = (m < M)[:, None] & mask_k[None, :]
    if WIDE:
        m = m.to(tl.int64)
    offs = m[:, None] * K + k[None, :]
    x = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    x = normalise(x, k, mask_k, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps)
    x = activate(x, k, mask_k, offs, mask, slope_ptr, residual_ptr, a, b, ACT, RESIDUAL_AFTER)
    tl.store(z_ptr + offs, x.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradient_of_sum(
    dz, k, mask_k, offs, mask,
    y_ptr, z_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual_ptr,
    eps, a, b,
    DERIVATIVE: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,
):  # fmt: skip
    """(g, xhat, x): dz behind the activation, the normalised y, and what the activation was given (0 where unknown)."""
    xhat = tl.zeros(dz.shape, dtype=tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        xhat = normalise(y, k, mask_k, mean_ptr, var_ptr, None, None, eps)
    if slope_ptr is not None:
        a = tl.load(slope_ptr + k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    if z_ptr is not None:
        x = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    else:
        x = xhat
        if gamma_ptr is not None:
            x = x * tl.load(gamma_ptr + k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        if beta_ptr is not None:
            x += tl.load(beta_ptr + k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        if residual_ptr is not None and not RESIDUAL_AFTER:
            x += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return dz * DERIVATIVE(x, a, b), xhat, x


@triton.jit(do_not_specialize=["M", "K", "splits", "eps", "a", "b"])
def batch_norm_act_sums_kernel(
    dz_ptr, y_ptr,  # [M, K]
    z_ptr,  # [M, K], where the derivative comes from it
    mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr,  # [K]
    residual_ptr,  # [M, K]
    out_ptr,  # [splits, 3, K]: dbeta, dgamma, dslope
    M,
    K,  # in units of VEC
    splits,
    eps,
    a, b,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The three sums over pixels that batch norm's and PReLU's gradients need; one share of the pixels a program."""
    K *= VEC
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = k < K
    split = tl.program_id(1)
    steps = tl.cdiv(M, BLOCK_M)
    share = tl.cdiv(steps, splits)
    first = split * share
    dbeta = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    dgamma = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    dslope = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (m < M)[:, None] & mask_k[None, :]
        if WIDE:
            m = m.to(tl.int64)
        offs = m[:, None] * K + k[None, :]
        dz = tl.load(dz_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        g, xhat, x = gradient_of_sum(
            dz, k, mask_k, offs, mask, y_ptr, z_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual_ptr,
            eps, a, b, DERIVATIVE, RESIDUAL_AFTER,
        )  # fmt: skip
        # Rows past the last pixel are not 0 behind an affine.
        dbeta += tl.where(mask, g, 0.0)
        dgamma += tl.where(mask, g * xhat, 0.0)
        if slope_ptr is not None:
            dslope += tl.where(mask & ~(x > 0), dz * x, 0.0)
    out = out_ptr + split * 3 * K + k
    tl.store(out, tl.sum(dbeta, axis=0), mask=mask_k)
    tl.store(out + K, tl.sum(dgamma, axis=0), mask=mask_k)
    tl.store(out + 2 * K, tl.sum(dslope, axis=0), mask=mask_k)


@triton.jit(do_not_specialize=["M", "K", "eps", "a", "b", "share"])
def batch_norm_act_gradient_kernel(
    dz_ptr, y_ptr,  # [M, K]
    z_ptr,  # [M, K], where the derivative comes from it
    mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr,  # [K]
    residual_ptr,  # [M, K]
    sums_ptr,  # [3, K]: dbeta, dgamma; absent where the statistics are constants
    dy_ptr, dresidual_ptr,  # [M, K]
    M,
    K,  # in units of VEC
    eps,
    a, b,
    share,  # of one pixel in the statistics
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dy, the operand of dgrad and wgrad, and the residual's gradient."""
    K *= VEC
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = k < K
    mask = (m < M)[:, None] & mask_k[None, :]
    if WIDE:
        m = m.to(tl.int64)
    offs = m[:, None] * K + k[None, :]
    dz = tl.load(dz_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    g, xhat, _ = gradient_of_sum(
        dz, k, mask_k, offs, mask, y_ptr, z_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual_ptr,
        eps, a, b, DERIVATIVE, RESIDUAL_AFTER,
    )  # fmt: skip
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + offs, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if sums_ptr is not None:
        dbeta = tl.load(sums_ptr + k, mask=mask_k, other=0.0)[None, :]
        dgamma = tl.load(sums_ptr + K + k, mask=mask_k, other=0.0)[None, :]
        g -= (dbeta + xhat * dgamma) * share
    scale = tl.rsqrt(tl.load(var_ptr + k, mask=mask_k, other=1.0).to(tl.float32) + eps)
    if gamma_ptr is not None:
        scale *= tl.load(gamma_ptr + k, mask=mask_k, other=0.0).to(tl.float32)
    tl.store(dy_ptr + offs, (g * scale[None, :]).to(dy_ptr.dtype.element_ty), mask=mask)


def combine_statistics(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, variance) [K] from partials: the rows of each [partials], and their means and squares [partials, K].

    Biased; all fp32. A partial may have no rows; the statistics of none at all are 0.
    """
    while True:
        partials, k = mean.shape
        final = partials <= MAX_PARTIALS
        share = partials if final else -(-partials // MAX_PARTIALS)
        groups = -(-partials // share)
        block = min(32, triton.next_power_of_2(partials))
        launch = Launch(
            kernel=combine_statistics_kernel,
            grid=(triton.cdiv(k, 32), groups, 1),
            pointers=(*("*fp32",) * 3, None if final else "*fp32", *("*fp32",) * 2),
            scalars=(partials, k, share),
            constants={"FINAL": final, "BLOCK_T": block, "BLOCK_K": 32},
            num_warps=4,
            num_stages=3,
        )
        out_count = None if final else count.new_empty(groups)
        out_mean, out_m2 = (mean.new_empty((k,) if final else (groups, k)) for _ in range(2))
        run(launch, count, mean, m2, out_count, out_mean, out_m2)
        if out_count is None:
            return out_mean, out_m2
        count, mean, m2 = out_count, out_mean, out_m2


@dataclass(frozen=True)
class Activated:
    """The numbers of one batch norm + activation."""

    eps: float
    act: str
    a: float = 0.0
    b: float = 0.0
    residual_after: bool = False


def batch_norm_act(
    y: Tensor, norm: tuple[Tensor | None, ...], slope: Tensor | None, residual: Tensor | None, how: Activated
) -> Tensor:
    """``act(normalise(y) + residual)`` of y [N, K, spatial]; z is dense channels_last.

    ``norm``: mean, variance, weight and bias [K], the last two or None; ``slope`` [K]: PReLU's; residual: as y. Raises
    RuntimeError where they are not.
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
    pixels, k, config = _tile(y, 2 + (residual is not None), gpu)
    launch = Launch(
        kernel=batch_norm_act_kernel,
        grid=(triton.cdiv(pixels, config["BLOCK_M"]), triton.cdiv(k, config["BLOCK_K"]), 1),
        pointers=(*_types(operands), pointer_type(y.dtype)),
        scalars=(pixels, k // vector(y.dtype, k), how.eps, how.a, how.b),
        constants=_constants(y, how, config, ACT=ACTIVATIONS[how.act].forward),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return _prepared(operands, (launch,), y.shape, strides_like(y.shape, True))


def batch_norm_act_sums(
    dz: Tensor,
    y: Tensor,
    z: Tensor | None,
    norm: tuple[Tensor | None, ...],
    slope: Tensor | None,
    residual: Tensor | None,
    how: Activated,
) -> Tensor:
    """[3, K] in fp32: the gradients of batch norm's bias and weight, and of PReLU's slope. All [N, K, spatial] as y."""
    return carried_out(_prepare_sums, (dz, y, z, *norm, slope, residual), (how,), _sum)


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
    pixels, k, config = _tile(y, sum(t is not None for t in (*operands[:3], operands[-1])), gpu, split=True)
    splits = config["SPLITS"]
    first = Launch(
        kernel=batch_norm_act_sums_kernel,
        grid=(triton.cdiv(k, config["BLOCK_K"]), splits, 1),
        pointers=(*_types(operands), "*fp32"),
        scalars=(pixels, k // vector(y.dtype, k), splits, how.eps, *_bounds(how, operands[2])),
        constants=_constants(y, how, config, DERIVATIVE=ACTIVATIONS[how.act].derivative),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    launches = (first,) if splits == 1 else (first, split_sum(splits, 3, 1, k, torch.float32))
    return _prepared(operands, launches, (3, k), (k, 1))


def batch_norm_act_gradient(
    dz: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    norm: tuple[Tensor | None, ...],
    slope: Tensor | None,
    residual: Tensor | None,
    sums: Tensor | None,
    share: float,
    how: Activated,
    need_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dy, dresidual) from `batch_norm_act_sums`; without sums the statistics were constants. dresidual if needed.

    ``share``: 1 / pixels that the statistics were taken over. Both are dense channels_last.
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
    moved = sum(t is not None for t in (*operands[:3], operands[-2])) + 1 + need_residual
    pixels, k, config = _tile(dz, moved, gpu)
    element = pointer_type(dz.dtype)
    launch = Launch(
        kernel=batch_norm_act_gradient_kernel,
        grid=(triton.cdiv(pixels, config["BLOCK_M"]), triton.cdiv(k, config["BLOCK_K"]), 1),
        pointers=(*_types(operands), element, element if need_residual else None),
        scalars=(pixels, k // vector(dz.dtype, k), how.eps, *_bounds(how, operands[2]), share),
        constants=_constants(dz, how, config, DERIVATIVE=ACTIVATIONS[how.act].derivative),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return _prepared(operands, (launch,), dz.shape, strides_like(dz.shape, True))


def _prepared(operands: Operands, launches: tuple[Launch, ...], shape: Sizes, strides: Sizes) -> Prepared:
    """Vectors and sums are read without gaps, and all that is a pixel's dense channels_last."""
    copies = tuple(None if t is None else dense_copy(t.shape, t.stride(), t.dim() > 2) for t in operands)
    empty = any(t is not None and not t.numel() for t in operands)
    return Prepared(copies, () if empty else launches, tuple(shape), strides)


def _check(x: Tensor, operands: Operands) -> None:
    """Raise RuntimeError where what backward's passes read of each pixel, or of each channel, is not as x."""
    dz, y, z, *vectors, residual = operands
    for t in (dz, y, z):
        if t is not None and (t.shape != x.shape or t.device != x.device):
            raise RuntimeError(
                f"expected {list(x.shape)} on {x.device}, as the gradient or the output is, but got {list(t.shape)} on "
                f"{t.device}"
            )
    check_operands(x, x.shape, vectors, residual)


def _types(operands: Operands) -> tuple[str | None, ...]:
    return tuple(None if t is None else pointer_type(t.dtype) for t in operands)


def _bounds(how: Activated, z: Tensor | None) -> tuple[float, float]:
    """The activation's two numbers; of a derivative taken from z rounded as z was when it was clamped to them."""
    if z is None:
        return how.a, how.b
    # Each for itself: a tensor without data keeps the value of one number.
    a, b = (torch.tensor(value, dtype=z.dtype, device="cpu").item() for value in (how.a, how.b))
    return a, b


def _tile(y: Tensor, moved: int, gpu: Gpu, split: bool = False) -> tuple[int, int, Config]:
    """(pixels, channels, config) of a pass that moves ``moved`` tensors of y's shape."""
    k = y.shape[1]
    pixels = max(1, y.numel() // k)
    return pixels, k, pass_tile(pixels, k, y.element_size(), moved, split, gpu).config


def _constants(y: Tensor, how: Activated, config: Config, **functions: Any) -> dict[str, Any]:
    return {
        "VEC": vector(y.dtype, y.shape[1]),
        "WIDE": y.numel() > INT32_MAX,
        **functions,
        "RESIDUAL_AFTER": how.residual_after,
        "BLOCK_M": config["BLOCK_M"],
        "BLOCK_K": config["BLOCK_K"],
    }


def as_pixels(t: Tensor) -> Tensor:
    """``t`` as these kernels read it, dense channels_last: itself, or a copy."""
    strides = dense_copy(t.shape, t.stride(), True)
    return t if strides is None else t.new_empty_strided(t.shape, strides).copy_(t)
