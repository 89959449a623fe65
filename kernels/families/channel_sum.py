"""The sum of every channel over all pixels, in a fixed order: the bias's gradient.

``out[k] = sum over pixels m of x[m, k]``. Bytes: x once, the workspace twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastconv.autotune import Config
from fastconv.kernels.families.splits import split_sum
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.layout import INT32_MAX, load_width, pointer_type


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
    """Each program sums one share of the pixels, in order, BLOCK_M pixels a step."""
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


def channel_sum(pixels: int, channels: int, stride: int, dtype: torch.dtype, config: Config) -> Launches:
    """The launches that sum [pixels, channels] with pixels ``stride`` apart: x -> out, or x -> workspace -> out."""
    vec = load_width(dtype, channels, stride)
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
