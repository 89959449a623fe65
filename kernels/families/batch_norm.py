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
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastconv.autotune import Choice, Config, Gpu, Work
from fastconv.kernels.families.channel_sum import channel_sum_kernel
from fastconv.kernels.families.splits import split_sum, split_sum_kernel
from fastconv.kernels.jit.activations import ACTIVATIONS
from fastconv.kernels.jit.epilogue import activate, normalise
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.layout import INT32_MAX, load_width, pointer_type
from fastconv.kernels.tiles.autotuned import Candidates, choose
from fastconv.kernels.tiles.shapes import INTERPRETED_SIDES, TileSpace, cdiv

# A tree of two levels above this many partials.
MAX_PARTIALS = 256


Types = tuple[str | None, ...]  # of pointers, None where the operand is absent


class Pass(NamedTuple):
    """The tensor [pixels, channels] that a pass goes over."""

    pixels: int
    channels: int
    dtype: torch.dtype

    @property
    def vec(self) -> int:
        return load_width(self.dtype, self.channels)


@dataclass(frozen=True)
class Activated:
    """The numbers of one batch norm + activation."""

    eps: float
    act: str
    a: float = 0.0
    b: float = 0.0
    residual_after: bool = False


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


def combine_statistics(partials: int, channels: int, share: int) -> Launch:
    """The launch that combines the statistics of ``share`` partials each: counts, means, squares -> counts (absent if
    they are the last), means, and squares or variances."""
    final = share == partials
    return Launch(
        kernel=combine_statistics_kernel,
        grid=(triton.cdiv(channels, 32), triton.cdiv(partials, share), 1),
        pointers=(*("*fp32",) * 3, None if final else "*fp32", *("*fp32",) * 2),
        scalars=(partials, channels, share),
        constants={"FINAL": final, "BLOCK_T": min(32, triton.next_power_of_2(partials)), "BLOCK_K": 32},
        num_warps=4,
        num_stages=3,
    )


def batch_norm_act(y: Pass, how: Activated, types: Types, config: Config) -> Launch:
    """y, mean, variance, weight, bias, slope, residual (types of these) -> z."""
    pointers, function = (*types, pointer_type(y.dtype)), {"ACT": ACTIVATIONS[how.act].forward}
    return _launch(batch_norm_act_kernel, y, how, pointers, (how.eps, how.a, how.b), function, config)


def batch_norm_act_sums(y: Pass, how: Activated, types: Types, bounds: tuple[float, float], config: Config) -> Launches:
    """dz, y, z, and what `batch_norm_act` reads beside y -> sums, or -> partial sums -> sums; ``bounds``: the
    activation's two numbers."""
    splits = config["SPLITS"]
    first = Launch(
        kernel=batch_norm_act_sums_kernel,
        grid=(triton.cdiv(y.channels, config["BLOCK_K"]), splits, 1),
        pointers=(*types, "*fp32"),
        scalars=(y.pixels, y.channels // y.vec, splits, how.eps, *bounds),
        constants=_constants(y, how, {"DERIVATIVE": ACTIVATIONS[how.act].derivative}, config),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return (first,) if splits == 1 else (first, split_sum(splits, 3, 1, y.channels, torch.float32))


def batch_norm_act_gradient(
    y: Pass,
    how: Activated,
    types: Types,
    bounds: tuple[float, float],
    share: float,
    need_residual: bool,
    config: Config,
) -> Launch:
    """As `batch_norm_act_sums`, and sums -> dy, dresidual (absent unless needed)."""
    element, function = pointer_type(y.dtype), {"DERIVATIVE": ACTIVATIONS[how.act].derivative}
    pointers = (*types, element, element if need_residual else None)
    return _launch(batch_norm_act_gradient_kernel, y, how, pointers, (how.eps, *bounds, share), function, config)


def _launch(
    kernel: Any,
    y: Pass,
    how: Activated,
    pointers: Types,
    scalars: tuple[float, ...],
    function: dict[str, Any],
    config: Config,
) -> Launch:
    return Launch(
        kernel=kernel,
        grid=(triton.cdiv(y.pixels, config["BLOCK_M"]), triton.cdiv(y.channels, config["BLOCK_K"]), 1),
        pointers=pointers,
        scalars=(y.pixels, y.channels // y.vec, *scalars),
        constants=_constants(y, how, function, config),
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


def _constants(y: Pass, how: Activated, function: dict[str, Any], config: Config) -> dict[str, Any]:
    return {
        "VEC": y.vec,
        "WIDE": y.pixels * y.channels > INT32_MAX,
        **function,
        "RESIDUAL_AFTER": how.residual_after,
        "BLOCK_M": config["BLOCK_M"],
        "BLOCK_K": config["BLOCK_K"],
    }


# Batch norm's passes and sums over pixels.
PASS = TileSpace(
    "pass",
    {"BLOCK_M": (32,), "BLOCK_K": (64,), "SPLITS": (1,), "num_warps": (4,), "num_stages": (3,)},
    kernels=(batch_norm_act_kernel, batch_norm_act_gradient_kernel),
    interpreted=INTERPRETED_SIDES,
)
PASS_SPLIT = TileSpace(
    "pass_split",
    {**PASS.ranges, "SPLITS": tuple(2**i for i in range(11))},
    kernels=(batch_norm_act_sums_kernel, channel_sum_kernel, split_sum_kernel),
    interpreted={**INTERPRETED_SIDES, "SPLITS": (1, 2)},
)


def pass_tile(pixels: int, channels: int, element: int, moved: int, split: bool, gpu: Gpu) -> Choice:
    """The tile of a pass over [pixels, channels] that moves ``moved`` such tensors; ``split``: it sums over pixels."""

    def work(config: Config) -> Work:
        m, n, splits = config["BLOCK_M"], config["BLOCK_K"], config["SPLITS"]
        tiles = cdiv(pixels, m)
        return Work(
            programs=cdiv(channels, n) * (splits if split else tiles),
            steps=cdiv(tiles, splits) if split else 1,
            step_flops=m * n,
            step_elements=moved * m * n,
            step_bytes=moved * m * n * element,
            dram_bytes=moved * pixels * channels * element,
            shared_memory=0,
            registers=40 + moved * m * n // (32 * config["num_warps"]),
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=0.0,
            extra_bytes=2 * splits * channels * 4 if splits > 1 else 0,
        )

    return choose(Candidates(PASS_SPLIT if split else PASS, (pixels, channels, element, moved), work, gpu))
