"""Ordered sums: over pixels (the bias's gradient) and over the splits of another kernel's reduction.

No atomics: every sum has one order, so results are the same bit for bit from run to run. Bytes: the input once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastconv.autotune import Config
from fastconv.kernels.launch import Launch
from fastconv.kernels.layout import INT32_MAX, pointer_type, vector


@triton.jit(do_not_specialize=["splits", "rows", "C", "taps"])
def split_sum_kernel(
    partial_ptr,  # [splits, rows, taps, C], fp32
    out_ptr,  # [rows, taps, C], or [rows, C, taps] unless CHANNELS_LAST
    splits, rows,
    C,  # in units of VEC
    taps,
    VEC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds every LANES-th split in order, then the lanes: so many loads are on their way at once."""
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


@triton.jit(do_not_specialize=["M", "K", "stride", "splits"])
def channel_sum_kernel(
    x_ptr,  # [M, K]
    out_ptr,  # [splits, K]
    M,  # pixels
    K,  # in units of VEC
    stride,  # between pixels, in units of VEC
    splits,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over pixels, the bias's gradient: each program one share of the pixels, in steps of BLOCK_M, in order."""
    K *= VEC
    stride *= VEC
    if WIDE:
        stride = stride.to(tl.int64)
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    split = tl.program_id(1)
    steps = tl.cdiv(M, BLOCK_M)
    share = tl.cdiv(steps, splits)
    first = split * share
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        tile = x_ptr + (m * stride)[:, None] + offs_k[None, :]
        acc += tl.load(tile, mask=(m < M)[:, None] & mask_k[None, :], other=0.0).to(tl.float32)
    tl.store(out_ptr + split * K + offs_k, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=mask_k)


def split_sum(
    splits: int, rows: int, taps: int, channels: int, dtype: torch.dtype, channels_last: bool = True
) -> Launch:
    """The launch that adds fp32 partial sums [splits, rows, taps, channels] in a fixed order: partial -> out."""
    # One load after another, a hundred splits of a small weight would take longer than their product.
    lanes, block = (8, 64) if splits >= 16 else (1, 1024)
    if channels_last:
        # The order of both sides is the same, so that all is one run.
        rows, taps, channels = 1, 1, rows * taps * channels
    vec = vector(dtype, channels)
    return Launch(
        kernel=split_sum_kernel,
        grid=(triton.cdiv(rows * taps * channels, block), 1, 1),
        pointers=("*fp32", pointer_type(dtype)),
        scalars=(splits, rows, channels // vec, taps),
        constants={"VEC": vec, "CHANNELS_LAST": channels_last, "LANES": lanes, "BLOCK": block},
        num_warps=4,
        num_stages=3,
    )


def channel_sum(pixels: int, channels: int, stride: int, dtype: torch.dtype, config: Config) -> tuple[Launch, ...]:
    """The launches that sum [pixels, channels], ``stride`` elements a pixel: x -> out, or x -> workspace -> out."""
    vec = vector(dtype, channels, stride)
    element = pointer_type(dtype)
    splits = config["SPLITS"]
    first = Launch(
        kernel=channel_sum_kernel,
        grid=(triton.cdiv(channels, config["BLOCK_K"]), splits, 1),
        pointers=(element, element if splits == 1 else "*fp32"),
        scalars=(pixels, channels // vec, stride // vec, splits),
        constants={
            "VEC": vec,
            "WIDE": (pixels - 1) * stride + channels - 1 > INT32_MAX,
            "BLOCK_M": config["BLOCK_M"],
            "BLOCK_K": config["BLOCK_K"],
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return (first,) if splits == 1 else (first, split_sum(splits, 1, 1, channels, dtype))
