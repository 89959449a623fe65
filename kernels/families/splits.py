"""The second step of a split reduction: fp32 partial sums are added in a fixed order, with or without an epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastconv.kernels.jit.epilogue import Epilogue, apply_epilogue
from fastconv.kernels.launch.launch import Launch
from fastconv.kernels.problem.layout import INT32_MAX, load_width, pointer_type


@triton.jit(do_not_specialize=["M", "K", "splits", "eps", "a", "b"])
def conv_finish_kernel(
    partial_ptr,  # [splits, M, K], fp32
    bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr,  # [K]
    residual_ptr,  # like y
    y_ptr,  # [M, K]
    tile_count_ptr,  # [tiles of BLOCK_M pixels]
    tile_mean_ptr, tile_m2_ptr,  # [tiles, K]
    M,
    K,  # in units of VEC
    splits,
    eps,
    a, b,
    VEC: tl.constexpr, WIDE: tl.constexpr, ACT: tl.constexpr, RESIDUAL_AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add the splits' sums in their order, and apply the epilogue."""
    K *= VEC
    k_tiles = tl.cdiv(K, BLOCK_K)
    pid_k = tl.program_id(0) % k_tiles
    tile = tl.program_id(0) // k_tiles
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < M
    if WIDE:
        m = m.to(tl.int64)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    source = partial_ptr + (m * K)[:, None] + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for _ in range(splits):
        acc += tl.load(source, mask=mask_m[:, None] & (k < K)[None, :], other=0.0)
        source += M.to(tl.int64) * K
    if tile_count_ptr is not None:
        tl.store(tile_count_ptr + tile, tl.sum(mask_m.to(tl.float32), axis=0))
    apply_epilogue(
        acc, pid_k * BLOCK_K, mask_m, m * K, tile, 0, K,
        bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual_ptr, y_ptr, tile_mean_ptr, tile_m2_ptr,
        eps, a, b, ACT, RESIDUAL_AFTER, BLOCK_M, BLOCK_K, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "rows", "C", "taps"])
def split_sum_kernel(
    partial_ptr,  # [splits, rows, taps, C], fp32
    out_ptr,  # [rows, taps, C], or [rows, C, taps] unless CHANNELS_LAST
    splits, rows,
    C,  # in units of VEC
    taps,
    VEC: tl.constexpr, CHANNELS_LAST: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add every LANES-th split in order, then the LANES sums: a thread has that many loads under way."""
    C *= VEC
    size = rows * taps * C
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    lanes = tl.zeros((LANES, BLOCK), dtype=tl.float32)
    split = tl.arange(0, LANES)
    source = partial_ptr + split.to(tl.int64)[:, None] * size + index[None, :]
    for first in range(0, splits, LANES):
        lanes += tl.load(source, mask=(first + split < splits)[:, None] & mask[None, :], other=0.0)
        source += LANES * size.to(tl.int64)
    acc = tl.sum(lanes, axis=0)
    if not CHANNELS_LAST:
        c = index % C
        tap = index // C % taps
        index = index // (C * taps) * (C * taps) + c * taps + tap
    tl.store(out_ptr + index, acc.to(out_ptr.dtype.element_ty), mask=mask)


def sum_splits_with_epilogue(
    pixels: int, channels: int, splits: int, dtype: torch.dtype, bias: bool, epilogue: Epilogue
) -> Launch:
    """The launch that adds fp32 partial sums [splits, pixels, channels] in order and applies the epilogue.

    Operands: workspace, bias, the epilogue's, the result, and each tile's count, means and squares.
    """
    element, vec = pointer_type(dtype), load_width(dtype, channels)
    block_m, block_k = 16, 64  # small: a reduction is split when results are few
    tiles = triton.cdiv(pixels, block_m)
    return Launch(
        kernel=conv_finish_kernel,
        grid=(tiles * triton.cdiv(channels, block_k), 1, 1),
        pointers=(
            *("*fp32", element if bias else None, *epilogue.pointers),
            *(element, *epilogue.statistics_pointers),
        ),
        scalars=(pixels, channels // vec, splits, *epilogue.scalars),
        constants={
            "VEC": vec,
            "WIDE": pixels * channels > INT32_MAX,
            **epilogue.constants,
            "BLOCK_M": block_m,
            "BLOCK_K": block_k,
        },
        num_warps=4,
        num_stages=1,
        tiles=tiles,
    )


def split_sum(
    splits: int, rows: int, taps: int, channels: int, dtype: torch.dtype, channels_last: bool = True
) -> Launch:
    """The launch that adds fp32 partial sums [splits, rows, taps, channels] in a fixed order: partial -> out."""
    # With one load at a time, a hundred splits of a small weight would take longer than their product.
    lanes, block = (8, 64) if splits >= 16 else (1, 1024)
    if channels_last:
        # Partial sums and result have the same order: they are one run.
        rows, taps, channels = 1, 1, rows * taps * channels
    vec = load_width(dtype, channels)
    return Launch(
        kernel=split_sum_kernel,
        grid=(triton.cdiv(rows * taps * channels, block), 1, 1),
        pointers=("*fp32", pointer_type(dtype)),
        scalars=(splits, rows, channels // vec, taps),
        constants={"VEC": vec, "CHANNELS_LAST": channels_last, "LANES": lanes, "BLOCK": block},
        num_warps=4,
        num_stages=3,
    )
