"""Boxes of neighbouring pixels that bulk copies read and write, for the pixel GEMM and the row boxes."""

from __future__ import annotations

import triton
import triton.language as tl

from fastconv.kernels.jit.epilogue import activate_with, normalise, statistics
from fastconv.kernels.launch.descriptor import Descriptor, pitch
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import Strides, dense_strides


@triton.jit
def read_pixels(
    view, d, h, w, n, c, RANK: tl.constexpr, PARITY: tl.constexpr, BOX: tl.constexpr, CHANNELS: tl.constexpr
):
    """[BOX, CHANNELS] of x: rows are pixels from w on, all or every second one (PARITY), each with images from n on;
    columns are channels from c on."""
    if PARITY:
        box = view.load([h, w & 1, w >> 1, n, c])
    elif RANK == 3:
        box = view.load([d, h, w, n, c])
    else:
        box = view.load([h, w, n, c])
    return tl.reshape(box, (BOX, CHANNELS))


@triton.jit
def apply_epilogue_to_pixels(
    acc, d, h, w, n, k, mask_m, tile, group, K,
    bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual, y,
    tile_count_ptr, tile_mean_ptr, tile_m2_ptr, eps, a, b,
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,
    RANK: tl.constexpr,
    PARITY: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Apply the epilogue to acc [PIXELS * BLOCK_N, BLOCK_K], whose pixels are neighbours from (d, h, w) on."""
    offs_k = k + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    channel = group * K + offs_k
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    if tile_mean_ptr is not None:
        tl.store(tile_count_ptr + tile, tl.sum(mask_m.to(tl.float32), axis=0))
        mean, m2 = statistics(acc, mask_m)
        row = tile * (tl.num_programs(1) * K) + channel
        tl.store(tile_mean_ptr + row, mean, mask=mask_k)
        tl.store(tile_m2_ptr + row, m2, mask=mask_k)
    if mean_ptr is not None:
        acc = normalise(acc, channel, mask_k, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps)
    added = None
    if residual is not None:
        added = read_pixels(residual, d, h, w, n, group * K + k, RANK, PARITY, PIXELS * BLOCK_N, BLOCK_K).to(tl.float32)
    acc = activate_with(acc, added, channel, mask_k, slope_ptr, a, b, ACT, RESIDUAL_AFTER)
    if PARITY:
        y.store([h, w & 1, w >> 1, n, group * K + k], tl.reshape(acc.to(y.dtype), (1, 1, PIXELS, BLOCK_N, BLOCK_K)))
    elif RANK == 3:
        y.store([d, h, w, n, group * K + k], tl.reshape(acc.to(y.dtype), (1, 1, PIXELS, BLOCK_N, BLOCK_K)))
    else:
        y.store([h, w, n, group * K + k], tl.reshape(acc.to(y.dtype), (1, PIXELS, BLOCK_N, BLOCK_K)))


def has_parities(problem: ConvProblem) -> bool:
    """Whether boxes can hold neighbours although the stride is 2: pixels of one parity of an even width are a view."""
    rank3 = problem.as_rank3
    return rank3.stride[2] == 2 and rank3.input_size[2] % 2 == 0 and problem.rank < 3


def pixel_view(
    problem: ConvProblem,
    shape: tuple[int, ...],
    strides: Strides | None,
    images: int,
    channels: int,
    pixels: int = 1,
    parity: bool = False,
    factor: bool = False,
) -> Descriptor:
    """An operand [N, C, D, H, W] of ``problem.as_rank3`` as [D, H, W, N, C], in ranks 1 and 2 as [H, W, N, C].

    A box is ``images`` x ``channels`` of ``pixels`` neighbours in a row; with ``parity`` the view is
    [H, 2, W / 2, N, C] and neighbours have one parity.
    """
    n, c, *size = shape
    strides = strides or dense_strides(shape)
    first = 3 - max(problem.rank, 2)
    # An axis of size one may have any stride; bulk copies may not take 0.
    steps = tuple(step or pitch(c, problem.dtype) for step in (*strides[1 + first :], strides[0]))
    box = (*(1,) * (2 - first), pixels, images, channels)
    if parity:
        size[-1:], box = [2, size[-1] // 2], (1, *box)
        steps = (*steps[:-1], 2 * steps[-2], steps[-1])
    return Descriptor(problem.dtype, (*size[first:], n, c), (*steps, 1), box, factor=factor)
