"""The weight's gradient of a depthwise convolution, a stencil that sums over pixels: see `conv_depthwise`.

``dw[k, r] = sum over n, p of dy[n, p, k] * x[n, p * stride - padding + r * dilation, k // multiplier]``, on each axis.
A thread has OUTPUTS neighbours of one row and a few channels, as in `conv_depthwise`, and a sum for each tap of its
program. Programs share the filter, and they share the pixels as in `conv_gather_wgrad`. Bytes: dy and x once each, the
workspace twice; parts of the filter re-read dy and x from L2.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu, Work
from fastconv.kernels.families.conv_depthwise import DEPTHWISE, why_not_depthwise
from fastconv.kernels.families.depthwise_schedule import WGRAD_ROW, blocks, row_schedule, strips
from fastconv.kernels.families.family import DENSE, Family, Layout
from fastconv.kernels.families.splits import split_sum, split_sum_kernel
from fastconv.kernels.jit.walk import in_elements
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import load_width, needs_int64, pointer_type
from fastconv.kernels.tiles.autotuned import Candidates
from fastconv.kernels.tiles.shapes import INTERPRETED_STENCIL, TileSpace, cdiv


@triton.jit(
    do_not_specialize=[
        "N", "D", "H", "W", "O", "P", "Q", "K", "T", "R", "S", "dw_stride_tap", "dw_stride_k", "strip", "splits",
        "x_stride_n", "x_stride_d", "x_stride_h", "x_stride_w",
        "dy_stride_n", "dy_stride_d", "dy_stride_h", "dy_stride_w",
        "stride_d", "stride_h", "padding_d", "padding_h", "dilation_d", "dilation_h", "dilation_w",
    ]
)  # fmt: skip
def conv_depthwise_wgrad_kernel(
    x_ptr,  # [N, D, H, W, K / MULTIPLIER]
    dy_ptr,  # [N, O, P, Q, K]
    dw_ptr,  # [splits, T, R, S, K], or by its strides [K, T, R, S]
    N, D, H, W,
    O, P, Q,
    K,  # in units of VEC
    T, R, S,
    dw_stride_tap, dw_stride_k,
    strip,  # groups side by side before the next row
    splits,  # of the pixels
    x_stride_n, x_stride_d, x_stride_h, x_stride_w,  # in units of VEC
    dy_stride_n, dy_stride_d, dy_stride_h, dy_stride_w,  # in units of VEC
    stride_d, stride_h,
    padding_d, padding_h,
    dilation_d, dilation_h, dilation_w,
    VEC: tl.constexpr, RANK: tl.constexpr, WIDE: tl.constexpr, MULTIPLIER: tl.constexpr,
    X_COLUMNS: tl.constexpr,  # columns of x; this and the next: see Schedule
    ADVANCE: tl.constexpr,
    MET: tl.constexpr,  # for each column and tap, its output: Schedule.outputs
    ROW: tl.constexpr,  # taps of a row that a program takes
    ROWS: tl.constexpr,  # rows of the filter that a program takes
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # groups of OUTPUTS neighbours
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROWS x ROW taps of BLOCK_K channels, summed over one share of the pixels in their order."""
    K *= VEC
    x_stride_n, x_stride_d, x_stride_h, x_stride_w = in_elements(
        x_stride_n, x_stride_d, x_stride_h, x_stride_w, VEC, WIDE
    )
    dy_stride_n, dy_stride_d, dy_stride_h, dy_stride_w = in_elements(
        dy_stride_n, dy_stride_d, dy_stride_h, dy_stride_w, VEC, WIDE
    )
    # Channel tiles are fastest, then parts of the filter, which read the same pixels.
    pid = tl.program_id(0)
    k_tiles = tl.cdiv(K, BLOCK_K)
    k = pid % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = k < K
    pid = pid // k_tiles
    parts = tl.cdiv(S, ROW)
    first_s = pid % parts * ROW
    pid = pid // parts
    blocks_r = tl.cdiv(T * R, ROWS)
    first_r = pid % blocks_r * ROWS
    split = pid // blocks_r
    groups = tl.cdiv(Q, OUTPUTS)
    images = N
    if RANK == 3:
        images = N * O
    # A row's strips are whole, so some groups may lie past its end.
    tiles = tl.cdiv(images * P * tl.cdiv(groups, strip) * strip, BLOCK_M)
    share = tl.cdiv(tiles, splits)
    x_tile = x_ptr + (k // MULTIPLIER)[None, :]
    dy_tile = dy_ptr + k[None, :]

    acc = ()
    for _ in tl.static_range(ROWS * ROW):
        acc = acc + (tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32),)
    for step in range(split * share, tl.minimum(split * share + share, tiles)):
        group, p, n = blocks(step * BLOCK_M + tl.arange(0, BLOCK_M), strip, groups, P)
        mask_m = n < images
        o = 0
        if RANK == 3:
            o = n % O
            n = n // O
        q = group * OUTPUTS
        dy_row = n * dy_stride_n + p * dy_stride_h + q * dy_stride_w
        if RANK == 3:
            dy_row += o * dy_stride_d
        dys = ()
        for output in tl.static_range(OUTPUTS):
            mask = (mask_m & (q + output < Q))[:, None] & mask_k[None, :]
            dy = tl.load(dy_tile + (dy_row + output * dy_stride_w)[:, None], mask=mask, other=0.0)
            dys = dys + (dy.to(tl.float32),)
        x_w = group * ADVANCE + first_s * dilation_w
        for row in tl.static_range(ROWS):
            t = (first_r + row) // R
            r = (first_r + row) % R
            h = p * stride_h - padding_h + r * dilation_h
            mask_row = mask_m & (h >= 0) & (h < H)
            x_row = n * x_stride_n + h * x_stride_h + x_w * x_stride_w
            if RANK == 3:
                d = o * stride_d - padding_d + t * dilation_d
                mask_row = mask_row & (d >= 0) & (d < D)
                x_row += d * x_stride_d
            for column in tl.static_range(len(X_COLUMNS)):
                w = x_w + X_COLUMNS[column]
                mask = mask_row & (w >= 0) & (w < W)
                x = tl.load(
                    x_tile + (x_row + X_COLUMNS[column] * x_stride_w)[:, None],
                    mask=mask[:, None] & mask_k[None, :],
                    other=0.0,
                ).to(tl.float32)
                # A tuple cannot be assigned to, so all sums are collected anew.
                updated = ()
                for tap in tl.static_range(ROWS * ROW):
                    if tap // ROW == row and MET[column][tap % ROW] >= 0:
                        updated = updated + (acc[tap] + x * dys[MET[column][tap % ROW]],)
                    else:
                        updated = updated + (acc[tap],)
                acc = updated

    out = dw_ptr + split.to(tl.int64) * (T * R * S * K)
    for row in tl.static_range(ROWS):
        for tap in tl.static_range(ROW):
            s = first_s + tap
            index = (first_r + row) * S + s
            offs = index * dw_stride_tap + k * dw_stride_k
            total = tl.sum(acc[row * ROW + tap], axis=0)
            # The last part of the filter may reach past it.
            channels = tl.where((first_r + row < T * R) & (s < S), K, 0)
            tl.store(out + offs, total.to(dw_ptr.dtype.element_ty), mask=k < channels)


def conv_depthwise_wgrad(
    direction: str, problem: ConvProblem, config: Config, gpu: Gpu, layout: Layout = DENSE
) -> Launches:
    """The launches of wgrad: x, dy -> dw, or x, dy -> workspace -> dw if ``config["SPLITS"]`` splits the pixels."""
    rank3 = problem.as_rank3
    operands = layout.operands(direction, problem)
    ((_, _, *x_size), x_strides), ((_, k, *dy_size), dy_strides) = operands
    multiplier = problem.out_channels // problem.in_channels
    vec = load_width(problem.dtype, k, *x_strides, *dy_strides) if multiplier == 1 else 1
    outputs = config["OUTPUTS"]
    schedule = row_schedule("wgrad", problem, outputs)
    strip, _ = strips(dy_size[2], outputs)
    splits = config["SPLITS"]
    element = pointer_type(problem.dtype)
    first = Launch(
        kernel=conv_depthwise_wgrad_kernel,
        grid=(triton.cdiv(k, config["BLOCK_K"]) * filter_parts(problem, config) * splits, 1, 1),
        pointers=(element, element, element if splits == 1 else "*fp32"),
        scalars=(
            *(problem.batch, *x_size, *dy_size, k // vec, *rank3.filter_size),
            *(*((k, 1) if layout.taps_outermost or splits > 1 else (1, problem.taps)), strip, splits),
            *(stride // vec for stride in (*x_strides, *dy_strides)),
            *(*rank3.stride[:2], *rank3.padding[:2], *rank3.dilation),
        ),
        constants={
            "VEC": vec,
            "RANK": max(problem.rank, 2),
            "WIDE": needs_int64(*operands),
            "MULTIPLIER": multiplier,
            "X_COLUMNS": schedule.columns,
            "ADVANCE": schedule.advance,
            "MET": schedule.outputs,
            "ROW": len(schedule.outputs[0]),
            "ROWS": config["ROWS"],
            "OUTPUTS": outputs,
            "BLOCK_M": config["BLOCK_M"],
            "BLOCK_K": config["BLOCK_K"],
        },
        num_warps=config["num_warps"],
        num_stages=1,
    )
    if splits == 1:
        return (first,)
    return first, split_sum(splits, 1, problem.taps, k, problem.dtype, layout.taps_outermost)


def filter_parts(problem: ConvProblem, config: Config) -> int:
    """Programs that share the filter for one channel tile and split: each has some of its taps."""
    return triton.cdiv(problem.filter_size[-1], WGRAD_ROW) * triton.cdiv(prod(problem.filter_size[:-1]), config["ROWS"])


DEPTHWISE_WGRAD = TileSpace(
    "conv_depthwise_wgrad",
    {**DEPTHWISE.ranges, "OUTPUTS": (4,), "ROWS": (3, 1), "SPLITS": tuple(2**i for i in range(11))},
    kernels=(conv_depthwise_wgrad_kernel, split_sum_kernel),
    interpreted={**INTERPRETED_STENCIL, "OUTPUTS": (1,), "ROWS": (1, 3), "SPLITS": (1, 2)},
)
# For rows of more than three taps. If a thread had eight elements, only one row's sums would fit it, and each pixel
# would come from L2 for every row of the filter.
DEPTHWISE_WGRAD_LONG = replace(
    DEPTHWISE_WGRAD,
    name="conv_depthwise_wgrad_long",
    ranges={**DEPTHWISE_WGRAD.ranges, "ROWS": (5, 3, 1), "BLOCK_M": (16,)},
)


def _candidates(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> Candidates:
    rank3 = problem.as_rank3
    _, k, *sizes = rank3.output_shape

    def work(config: Config) -> Work:
        m, n, rows, outputs, splits = (config[name] for name in ("BLOCK_M", "BLOCK_K", "ROWS", "OUTPUTS", "SPLITS"))
        schedule = row_schedule("wgrad", problem, outputs)
        columns, taps = len(schedule.columns), len(schedule.outputs[0])
        strip, groups = strips(sizes[2], outputs)
        tiles = cdiv(problem.batch * sizes[0] * sizes[1] * groups, m)
        covered = ((max(1, m // strip) - 1) * rank3.stride[1] + rows) * ((strip - 1) * schedule.advance + columns)
        per_thread = m * n // (32 * config["num_warps"])
        by_element = 0 if load_width(problem.dtype, k) > 1 and k == problem.in_channels else 12 * per_thread
        return Work(
            programs=cdiv(k, n) * filter_parts(problem, config) * splits,
            steps=cdiv(tiles, splits),
            step_flops=2 * m * n * rows * taps * outputs + 4 * m * n * (columns * rows + outputs),
            step_elements=(columns * rows + outputs) * m * n,
            step_bytes=(covered + m * outputs) * n * problem.dtype.itemsize,
            dram_bytes=problem.bytes,
            shared_memory=0,
            registers=int(32 + per_thread * rows * taps + 8 * (outputs + rows) + 1.5 * columns) + by_element,
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=0.0,
            extra_bytes=2 * splits * problem.taps * k * 4 if splits > 1 else 0,
        )

    space = DEPTHWISE_WGRAD if problem.filter_size[-1] <= 3 else DEPTHWISE_WGRAD_LONG
    return Candidates(space, problem, work, gpu)


FAMILY = Family("depthwise", why_not_depthwise, _candidates, conv_depthwise_wgrad)
