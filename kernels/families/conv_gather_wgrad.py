"""The weight's gradient by pointer gather, split over pixels, with an ordered reduction.

``dw[k, r, c] = sum over n, p of dy[n, p, k] * x[n, p * stride - padding + r * dilation, c]``, on each axis. As a GEMM:
rows are output channels, columns are (tap, input channel) pairs, the reduction runs over output pixels. The reduction
is long and the result small, so programs share it. Their fp32 sums go to a workspace, and a second kernel adds them in
the order of the splits: the result is the same bit for bit from run to run. Bytes: dy and x once each, the workspace
twice.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu, Work
from fastconv.kernels.families.conv_gather import (
    packed,
    taps_share_step,
    why_not_packed,
    x_cache_modifier,
)
from fastconv.kernels.families.family import DENSE, Family, Layout, fp32_precision, rounds_in_registers, why_not_groups
from fastconv.kernels.families.splits import split_sum, split_sum_kernel
from fastconv.kernels.jit.rounding import to_tf32
from fastconv.kernels.jit.walk import advance, in_elements, unravel
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import linear_stride, load_width, needs_int64, pointer_type
from fastconv.kernels.tiles.autotuned import Candidates
from fastconv.kernels.tiles.shapes import (
    INTERPRETED_PRODUCT,
    TileSpace,
    cdiv,
    element_registers,
    is_dense,
    matrix_registers,
    matrix_share,
    matrix_tile,
)


@triton.jit(
    do_not_specialize=[
        "N", "D", "H", "W", "C", "O", "P", "Q", "K", "CG", "KG", "T", "R", "S",
        "x_stride_n", "x_stride_d", "x_stride_h", "x_stride_w", "dy_stride",
        "stride_d", "stride_h", "stride_w", "padding_d", "padding_h", "padding_w",
        "dilation_d", "dilation_h", "dilation_w", "splits",
    ]
)  # fmt: skip
def conv_wgrad_kernel(
    x_ptr,  # [N, D, H, W, groups * C]
    dy_ptr,  # [N, O, P, Q, groups * K]
    dw_ptr,  # [splits, groups * K, T, R, S, CG], or [splits, groups * K, CG, T, R, S] unless CHANNELS_LAST
    N, D, H, W,
    C,  # input channels of a tile's groups, in units of VEC_C
    O, P, Q,
    K,  # output channels of a tile's groups, in units of VEC_K
    CG, KG,  # input and output channels of one group
    T, R, S,
    x_stride_n, x_stride_d, x_stride_h, x_stride_w,  # in units of VEC_C
    dy_stride,  # between pixels, the same for all, in units of VEC_K
    stride_d, stride_h, stride_w,
    padding_d, padding_h, padding_w,
    dilation_d, dilation_h, dilation_w,
    splits,
    VEC_C: tl.constexpr, VEC_K: tl.constexpr,
    PACKED: tl.constexpr,  # several groups share a tile, whose blocks on the diagonal are stored
    CACHE: tl.constexpr,  # modifier of x's loads
    RANK: tl.constexpr,
    LINEAR: tl.constexpr,  # one tap, which meets the pixels of x in order and at one distance
    FLAT: tl.constexpr,  # a tile's columns are (tap, channel) pairs, not channels of one tap
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels of a step
):  # fmt: skip
    C *= VEC_C
    K *= VEC_K
    x_stride_n, x_stride_d, x_stride_h, x_stride_w = in_elements(
        x_stride_n, x_stride_d, x_stride_h, x_stride_w, VEC_C, WIDE
    )
    dy_stride *= VEC_K
    if WIDE:
        dy_stride = dy_stride.to(tl.int64)

    # Tiles of one split are neighbours in every group: they read the same pixels.
    taps = T * R * S
    k_tiles = tl.cdiv(K, BLOCK_K)
    c_tiles = tl.cdiv(taps * C, BLOCK_C) if FLAT else taps * tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    pid_k = pid % k_tiles
    pid_c = pid // k_tiles % c_tiles
    pid = pid // k_tiles // c_tiles
    group = pid % tl.num_programs(1)
    split = pid // tl.num_programs(1)

    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    if FLAT:
        pair = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = pair < taps * C
        offs_c = pair % C
        tap = pair // C
    else:
        offs_c = pid_c % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        tap = pid_c // tl.cdiv(C, BLOCK_C)
    tap_w = tap % S * dilation_w - padding_w
    tap_h = tap // S % R * dilation_h - padding_h
    x_column = group * C + offs_c + tap_h * x_stride_h + tap_w * x_stride_w
    if RANK == 3:
        tap_d = tap // (R * S) * dilation_d - padding_d
        x_column += tap_d * x_stride_d
    x_tile = x_ptr + x_column[None, :]

    # This split's share of the pixels, in whole steps; the last shares may be empty.
    pixels = N * P * Q
    if RANK == 3:
        pixels *= O
    steps = tl.cdiv(pixels, BLOCK_M)
    share = tl.cdiv(steps, splits)
    first = split * share
    steps = tl.minimum(steps - first, share)
    m = first * BLOCK_M + tl.arange(0, BLOCK_M)
    # Loaded as [BLOCK_K, pixels], as the product takes it: sm_80 does not copy asynchronously what tl.trans turns.
    dy_tile = dy_ptr + (group * K + offs_k)[:, None] + (m * dy_stride)[None, :]
    if LINEAR:
        x_tile += (m * x_stride_w)[:, None]
    else:
        n, o, p, q = unravel(m, O, P, Q, RANK)
        n_step, o_step, p_step, q_step = unravel(BLOCK_M, O, P, Q, RANK)

    acc = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    # Without this guard ptxas waits for every wgmma, because the loop might not run.
    if steps > 0:
        for _ in range(steps):
            mask_m = m < pixels
            if LINEAR:
                x_step = tl.load(x_tile, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
                x_tile += BLOCK_M * x_stride_w
            else:
                x_h = p * stride_h
                x_w = q * stride_w
                x_row = n * x_stride_n + x_h * x_stride_h + x_w * x_stride_w
                if RANK == 3:
                    x_d = o * stride_d
                    x_row += x_d * x_stride_d
                if FLAT:
                    h = x_h[:, None] + tap_h[None, :]
                    w = x_w[:, None] + tap_w[None, :]
                    mask = mask_m[:, None] & mask_c[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                    if RANK == 3:
                        d = x_d[:, None] + tap_d[None, :]
                        mask = mask & (d >= 0) & (d < D)
                else:
                    h = x_h + tap_h
                    w = x_w + tap_w
                    mask_row = mask_m & (h >= 0) & (h < H) & (w >= 0) & (w < W)
                    if RANK == 3:
                        d = x_d + tap_d
                        mask_row = mask_row & (d >= 0) & (d < D)
                    mask = mask_row[:, None] & mask_c[None, :]
                x_step = tl.load(x_tile + x_row[:, None], mask=mask, other=0.0, cache_modifier=CACHE)
                n, o, p, q = advance(n, o, p, q, n_step, o_step, p_step, q_step, O, P, Q, RANK)
            dy_step = tl.load(dy_tile, mask=mask_k[:, None] & mask_m[None, :], other=0.0)
            acc = tl.dot(to_tf32(dy_step, ROUND), to_tf32(x_step, ROUND), acc, input_precision=PRECISION)
            m += BLOCK_M
            dy_tile += BLOCK_M * dy_stride

    k = group * K + offs_k
    mask = mask_k[:, None] & mask_c[None, :]
    if PACKED:
        mask = mask & ((offs_k // KG)[:, None] == (offs_c // CG)[None, :])
        offs_c = offs_c % CG
    else:
        CG = C
    if CHANNELS_LAST:
        column = tap * CG + offs_c
    else:
        column = offs_c * taps + tap
    out = dw_ptr + split.to(tl.int64) * (tl.num_programs(1) * K * taps * CG)
    out += (k * (taps * CG))[:, None] + column[None, :]
    tl.store(out, acc.to(dw_ptr.dtype.element_ty), mask=mask)


def conv_gather_wgrad(
    direction: str, problem: ConvProblem, config: Config, gpu: Gpu, layout: Layout = DENSE, pack: int = 1
) -> Launches:
    """The launches of wgrad: x, dy -> dw, or x, dy -> workspace -> dw if ``config["SPLITS"]`` splits the pixels.

    dy's pixels lie at one distance, and dw is dense. ``pack`` groups share a tile (`packed_groups`).
    """
    rank3 = problem.as_rank3
    x, dy = layout.operands(direction, problem)
    x_strides, dy_stride = x[1], linear_stride(*dy)
    assert dy_stride is not None, "the launcher copies such a dy"
    x_stride = None
    if problem.taps == 1 and rank3.input_size == rank3.output_size and not problem.padded("wgrad"):
        x_stride = linear_stride(*x)
    if x_stride is not None:
        x_strides = (0, 0, 0, x_stride)
    groups = problem.groups // pack
    c, k = problem.in_channels // groups, problem.out_channels // groups
    vec_c, vec_k = load_width(problem.dtype, c, *x_strides), load_width(problem.dtype, k, dy_stride)
    flat = taps_share_tile(problem.taps, c, pack)
    tile = {name: config[name] for name in ("BLOCK_K", "BLOCK_C", "BLOCK_M")}
    block_c = tile["BLOCK_C"]
    columns = triton.cdiv(problem.taps * c, block_c) if flat else problem.taps * triton.cdiv(c, block_c)
    splits = config["SPLITS"]
    element = pointer_type(problem.dtype)
    product = Launch(
        kernel=conv_wgrad_kernel,
        grid=(triton.cdiv(k, tile["BLOCK_K"]) * columns * splits, groups, 1),
        pointers=(element, element, element if splits == 1 else "*fp32"),
        scalars=(
            *(problem.batch, *rank3.input_size, c // vec_c, *rank3.output_size, k // vec_k),
            *(c // pack, k // pack, *rank3.filter_size),
            *(stride // vec_c for stride in x_strides),
            *(dy_stride // vec_k, *rank3.stride, *rank3.padding, *rank3.dilation, splits),
        ),
        constants={
            "VEC_C": vec_c,
            "VEC_K": vec_k,
            "PACKED": pack > 1,
            "CACHE": x_cache_modifier(problem.taps, pack),
            "RANK": max(problem.rank, 2),
            "LINEAR": x_stride is not None,
            "FLAT": flat,
            "CHANNELS_LAST": layout.channels_last or splits > 1 or problem.taps == 1,
            "WIDE": needs_int64(x, dy),
            "PRECISION": fp32_precision(problem.dtype),
            "ROUND": rounds_in_registers(problem.dtype, gpu),
            **tile,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    if splits == 1:
        return (product,)
    return product, split_sum(
        splits, problem.out_channels, problem.taps, c // pack, problem.dtype, layout.channels_last
    )


def taps_share_tile(taps: int, channels: int, pack: int) -> bool:
    """Whether a tile's columns are (tap, channel) pairs, which share dy: with few channels, and in packed groups."""
    return taps_share_step(taps, channels, pack) or (pack > 1 and taps > 1)


GATHER_WGRAD = TileSpace(
    "conv_wgrad",
    {
        "BLOCK_K": (128, 64),
        "BLOCK_C": (128, 64, 32),
        "BLOCK_M": (64, 32),
        "SPLITS": tuple(2**i for i in range(11)),
        "num_warps": (4, 8),
        "num_stages": (3, 4),
    },
    matrix_tile("BLOCK_K", "BLOCK_C", "BLOCK_M"),
    kernels=(conv_wgrad_kernel, split_sum_kernel),
    interpreted={**INTERPRETED_PRODUCT, "SPLITS": (1, 2)},
)


def _wgrad_tile(config: Config) -> str | None:
    if (config["BLOCK_K"], config["BLOCK_C"]) in ((64, 64), (128, 32)):
        return "binaries that few layers would share, and that spill on one version of the compiler"
    return GATHER_WGRAD.valid(config)


GATHER_WGRAD_DENSE = replace(GATHER_WGRAD, name="conv_wgrad_dense", valid=_wgrad_tile)


def wgrad_candidates(
    direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout = DENSE, pack: int = 1
) -> Candidates:
    precision = fp32_precision(problem.dtype)
    groups = problem.groups // pack
    k, c = problem.out_channels // groups, problem.in_channels // groups
    element, share = problem.dtype.itemsize, matrix_share(problem.dtype, precision)
    flat = taps_share_tile(problem.taps, c, pack)
    # Each pair has coordinates of its own; if channels are read by 16 bytes, each run of pairs has.
    source = element_registers(problem, c) if not flat else 8 if load_width(problem.dtype, c) == 1 else 2
    by_element = source, element_registers(problem, k), 0

    def work(config: Config) -> Work:
        m, n, depth, warps = config["BLOCK_K"], config["BLOCK_C"], config["BLOCK_M"], config["num_warps"]
        splits = config["SPLITS"]
        columns = cdiv(problem.taps * c, n) if flat else problem.taps * cdiv(c, n)
        steps = cdiv(problem.output_pixels, depth)
        workspace = 2 * splits * prod(problem.weight_shape) * 4 if splits > 1 else 0
        return Work(
            programs=cdiv(k, m) * columns * groups * splits,
            steps=cdiv(steps, splits),
            step_flops=2 * m * n * depth,
            step_elements=(m + n) * depth,
            step_bytes=(m + n) * depth * element,
            dram_bytes=problem.bytes,
            shared_memory=config["num_stages"] * (m + n) * depth * element,
            registers=matrix_registers(config, "BLOCK_C", "BLOCK_K", "BLOCK_M", by_element, share == 0, gpu),
            warps=warps,
            stages=config["num_stages"],
            matrix_share=share,
            extra_bytes=workspace,
        )

    space = GATHER_WGRAD_DENSE if is_dense(problem, share, pack) else GATHER_WGRAD
    return Candidates(space, (problem, precision, pack), work, gpu, {"BLOCK_K": k} if pack > 1 else {})


FAMILY = Family("gather", lambda direction, problem, *_: why_not_groups(problem), wgrad_candidates, conv_gather_wgrad)
GROUPED = Family("grouped", why_not_packed, packed(wgrad_candidates), packed(conv_gather_wgrad))
