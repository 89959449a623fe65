"""Batch norm + activation (+ residual) around a convolution, in training: statistics combined, applied, and backward.

A convolution's epilogue leaves (mean, sum of squared differences) of each tile and channel. They are combined in a
fixed order, so E[x^2] - E[x]^2 is never subtracted and the bits are the same from run to run (Chan, Golub and LeVeque,
"Updating formulae and a pairwise algorithm for computing sample variances"). Then, all on [pixels, channels]:

forward    u = (y - mean) / sqrt(var + eps) * gamma + beta;  z = act(u + residual), or act(u) + residual
backward   g = dz * act'(u + residual);  dbeta = sum g;  dgamma = sum g * xhat, xhat = (y - mean) / sqrt(var + eps)
           dy = gamma / sqrt(var + eps) * (g - (dbeta + xhat * dgamma) / pixels);  dresidual = g

Bytes: forward reads y and writes z; backward reads y and dz twice and writes dy, and g if the residual needs it.
act'(u) is computed again from y, or from z if the activation allows it: no mask and no normalised copy is kept.
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


@triton.jit(do_not_specialize=["partials", "K", "share"])
def combine_statistics_kernel(
    count_ptr,  # [partials]: the rows that each covers, maybe none
    mean_ptr, m2_ptr,  # [partials, K]
    out_count_ptr,  # [groups of share partials]
    out_mean_ptr, out_m2_ptr,  # [groups, K]
    partials,
    K,
    share,
    FINAL: tl.constexpr,  # out_m2 is the variance
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Combine ``share`` neighbouring partials, in their order, into the means and squares of all their rows."""
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
    # Differences from the first mean are summed, because their sum rounds no more than they do.
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
    eps, a, b,
    VEC: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr, RESIDUAL_AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
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
    DERIVATIVE: tl.constexpr, RESIDUAL_AFTER: tl.constexpr,
):  # fmt: skip
    """(g, xhat, x): the gradient of the activation's input, the normalised y, and that input (or z, or 0: unknown)."""
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
    z_ptr,  # [M, K], if the derivative comes from it
    mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr,  # [K]
    residual_ptr,  # [M, K]
    out_ptr,  # [splits, 3, K]: dbeta, dgamma, dslope
    M,
    K,  # in units of VEC
    splits,
    eps, a, b,
    VEC: tl.constexpr, WIDE: tl.constexpr, DERIVATIVE: tl.constexpr, RESIDUAL_AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The three sums over pixels that batch norm's and PReLU's gradients need; a program sums one share of them."""
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
        # Batch norm's affine makes rows past the last pixel other than 0.
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
    z_ptr,  # [M, K], if the derivative comes from it
    mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr,  # [K]
    residual_ptr,  # [M, K]
    sums_ptr,  # [3, K]: dbeta, dgamma; absent if the statistics are constants
    dy_ptr, dresidual_ptr,  # [M, K]
    M,
    K,  # in units of VEC
    eps, a, b,
    share,  # of one pixel in the statistics
    VEC: tl.constexpr, WIDE: tl.constexpr, DERIVATIVE: tl.constexpr, RESIDUAL_AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
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


Types = tuple[str | None, ...]  # of pointers; None: the operand is absent


class Pass(NamedTuple):
    """The tensor [pixels, channels] that a pass reads and writes."""

    pixels: int
    channels: int
    dtype: torch.dtype

    @property
    def vec(self) -> int:
        return load_width(self.dtype, self.channels)


@dataclass(frozen=True)
class Activated:
    """The parameters of a batch norm and its activation."""

    eps: float
    act: str
    a: float = 0.0
    b: float = 0.0
    residual_after: bool = False


def combine_statistics(partials: int, channels: int, share: int) -> Launch:
    """The launch that combines each ``share`` partials: counts, means, squares -> counts, means, squares; in the last
    step no counts, and variances for squares."""
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
    """y, mean, variance, weight, bias, slope, residual, whose pointer types ``types`` are -> z."""
    types, act = (*types, pointer_type(y.dtype)), {"ACT": ACTIVATIONS[how.act].forward}
    return _launch(batch_norm_act_kernel, y, how, types, (how.eps, how.a, how.b), act, config)


def batch_norm_act_sums(y: Pass, how: Activated, types: Types, bounds: tuple[float, float], config: Config) -> Launches:
    """dz, y, z, and what `batch_norm_act` reads beside y -> sums, or -> partial sums -> sums; ``bounds`` stand for the
    activation's a and b."""
    splits, act = config["SPLITS"], {"DERIVATIVE": ACTIVATIONS[how.act].derivative}
    scalars = (splits, how.eps, *bounds)
    first = _launch(batch_norm_act_sums_kernel, y, how, (*types, "*fp32"), scalars, act, config, splits)
    return (first,) if splits == 1 else (first, split_sum(splits, 3, 1, y.channels, torch.float32))


def batch_norm_act_gradient(
    y: Pass, how: Activated, types: Types, bounds: tuple[float, float], share: float, residual: bool, config: Config
) -> Launch:
    """What `batch_norm_act_sums` reads, and sums -> dy, dresidual (absent unless ``residual``)."""
    element, act = pointer_type(y.dtype), {"DERIVATIVE": ACTIVATIONS[how.act].derivative}
    types = (*types, element, element if residual else None)
    return _launch(batch_norm_act_gradient_kernel, y, how, types, (how.eps, *bounds, share), act, config)


def _launch(
    kernel: Any,
    y: Pass,
    how: Activated,
    types: Types,
    scalars: tuple[float, ...],
    act: dict[str, Any],
    config: Config,
    splits: int | None = None,  # of the pixels; None: a program for each tile
) -> Launch:
    tiles, k_tiles = triton.cdiv(y.pixels, config["BLOCK_M"]), triton.cdiv(y.channels, config["BLOCK_K"])
    return Launch(
        kernel=kernel,
        grid=(tiles, k_tiles, 1) if splits is None else (k_tiles, splits, 1),
        pointers=types,
        scalars=(y.pixels, y.channels // y.vec, *scalars),
        constants={
            "VEC": y.vec,
            "WIDE": y.pixels * y.channels > INT32_MAX,
            **act,
            "RESIDUAL_AFTER": how.residual_after,
            "BLOCK_M": config["BLOCK_M"],
            "BLOCK_K": config["BLOCK_K"],
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


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


def pass_tile(pixels: int, channels: int, element: int, tensors: int, split: bool, gpu: Gpu) -> Choice:
    """The tile of a pass that reads and writes ``tensors`` [pixels, channels]; ``split``: it sums over pixels."""

    def work(config: Config) -> Work:
        m, n, splits = config["BLOCK_M"], config["BLOCK_K"], config["SPLITS"]
        tiles = cdiv(pixels, m)
        return Work(
            programs=cdiv(channels, n) * (splits if split else tiles),
            steps=cdiv(tiles, splits) if split else 1,
            step_flops=m * n,
            step_elements=tensors * m * n,
            step_bytes=tensors * m * n * element,
            dram_bytes=tensors * pixels * channels * element,
            shared_memory=0,
            registers=40 + tensors * m * n // (32 * config["num_warps"]),
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=0.0,
            extra_bytes=2 * splits * channels * 4 if splits > 1 else 0,
        )

    return choose(Candidates(PASS_SPLIT if split else PASS, (pixels, channels, element, tensors), work, gpu))
