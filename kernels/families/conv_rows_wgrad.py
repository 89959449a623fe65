"""The weight's gradient of few input channels, by the rows of the filter: see `conv_rows`.

``dw[k, r, e] = sum over n, p, q of dy[n, p, q, k] * x[n, p * stride - padding + r * dilation, start(q) + e]``. As a
GEMM: rows are (column, output channel) pairs, columns are (row, element) pairs, the reduction runs over runs and is
split over programs as in `conv_gather_wgrad`. Bytes: dy and x once each, the workspace twice.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu, Work
from fastconv.kernels.families.conv_gather_wgrad import GATHER_WGRAD
from fastconv.kernels.families.conv_rows import why_not_rows
from fastconv.kernels.families.family import DENSE, Family, Layout, fp32_precision, rounds_in_registers
from fastconv.kernels.families.row_form import count_runs, filter_rows, form_of_call, row_scalars, row_taps
from fastconv.kernels.families.splits import split_sum, split_sum_kernel
from fastconv.kernels.jit.rounding import to_tf32
from fastconv.kernels.jit.walk import advance, in_elements, unravel
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import linear_stride, load_width, needs_int64, pointer_type
from fastconv.kernels.tiles.autotuned import Candidates
from fastconv.kernels.tiles.shapes import cdiv, element_registers, matrix_registers, matrix_share


@triton.jit(
    do_not_specialize=[
        "N", "D", "H", "row_length", "O", "P", "Q", "K", "T", "R", "window", "shift", "distance",
        "x_stride_n", "x_stride_d", "x_stride_h", "hop", "begin", "dy_stride",
        "stride_d", "stride_h", "padding_d", "padding_h", "dilation_d", "dilation_h", "splits",
    ]
)  # fmt: skip
def conv_rows_wgrad_kernel(
    x_ptr,  # [N, D, H, row_length]
    dy_ptr,  # [N, O, P, Q, K]
    dw_ptr,  # [splits, RUN_OUTPUTS, K, T, R, window]
    N, D, H,
    row_length,  # W * C, in units of VEC
    O, P, Q,
    K,  # in units of VEC_K
    T, R,
    window,  # elements that a row of the filter meets
    shift,  # elements from the run's start to the first output's window
    distance,  # between two outputs' windows
    x_stride_n, x_stride_d, x_stride_h,  # in units of VEC, like the next two
    hop,  # between two runs
    begin,  # element of its row at which the first run begins
    dy_stride,  # between pixels, the same for all, in units of VEC_K
    stride_d, stride_h,
    padding_d, padding_h,
    dilation_d, dilation_h,
    splits,
    VEC: tl.constexpr, VEC_K: tl.constexpr, RANK: tl.constexpr,
    RUN_OUTPUTS: tl.constexpr,  # neighbouring outputs that share a run
    RUN: tl.constexpr,
    USED: tl.constexpr,  # elements of the run that a window meets, in whole loads
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_K: tl.constexpr,  # (column, output channel) pairs
    BLOCK_C: tl.constexpr,  # (row, element) pairs, whole rows
    BLOCK_M: tl.constexpr,  # runs of a step
):  # fmt: skip
    row_length *= VEC
    K *= VEC_K
    x_stride_n, x_stride_d, x_stride_h, hop = in_elements(x_stride_n, x_stride_d, x_stride_h, hop, VEC, WIDE)
    dy_stride *= VEC_K
    if WIDE:
        dy_stride = dy_stride.to(tl.int64)
    PART: tl.constexpr = BLOCK_K // RUN_OUTPUTS

    # Tiles of one split are neighbours: they read the same pixels.
    rows = T * R
    k_tiles = tl.cdiv(K, PART)
    c_tiles = tl.cdiv(rows * RUN, BLOCK_C)
    pid = tl.program_id(0)
    pid_k = pid % k_tiles
    pid_c = pid // k_tiles % c_tiles
    split = pid // k_tiles // c_tiles

    offs_j = tl.arange(0, BLOCK_K)
    column = offs_j // PART
    offs_k = pid_k * PART + offs_j % PART
    mask_k = offs_k < K
    offs_c = tl.arange(0, BLOCK_C)
    offs_e = offs_c % RUN
    row = pid_c * (BLOCK_C // RUN) + offs_c // RUN
    mask_c = (row < rows) & (offs_e < USED)
    tap_h = row % R * dilation_h - padding_h
    x_column = offs_e + tap_h * x_stride_h
    if RANK == 3:
        tap_d = row // R * dilation_d - padding_d
        x_column += tap_d * x_stride_d
    x_tile = x_ptr + x_column[None, :]
    dy_tile = dy_ptr + (column * dy_stride + offs_k)[:, None]

    runs_q = tl.cdiv(Q, RUN_OUTPUTS)
    runs = N * P * runs_q
    if RANK == 3:
        runs *= O
    steps = tl.cdiv(runs, BLOCK_M)
    share = tl.cdiv(steps, splits)
    begun = split * share
    steps = tl.minimum(steps - begun, share)
    n, o, p, q = unravel(begun * BLOCK_M + tl.arange(0, BLOCK_M), O, P, runs_q, RANK)
    n_step, o_step, p_step, q_step = unravel(BLOCK_M, O, P, runs_q, RANK)

    acc = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    # Without this guard ptxas waits for every wgmma, because the loop might not run.
    if steps > 0:
        for _ in range(steps):
            mask_m = n < N
            x_h = p * stride_h
            first = begin * VEC + q * hop
            x_row = n * x_stride_n + x_h * x_stride_h + first
            pixel = n * P + p
            if RANK == 3:
                x_d = o * stride_d
                x_row += x_d * x_stride_d
                pixel = (n * O + o) * P + p
            pixel = pixel * Q + q * RUN_OUTPUTS
            place = first[:, None] + offs_e[None, :]
            h = x_h[:, None] + tap_h[None, :]
            mask = mask_m[:, None] & mask_c[None, :] & (h >= 0) & (h < H) & (place >= 0) & (place < row_length)
            if RANK == 3:
                d = x_d[:, None] + tap_d[None, :]
                mask = mask & (d >= 0) & (d < D)
            x_step = tl.load(x_tile + x_row[:, None], mask=mask, other=0.0)
            mask_y = mask_k[:, None] & mask_m[None, :]
            if RUN_OUTPUTS > 1:
                mask_y = mask_y & (column[:, None] + (q * RUN_OUTPUTS)[None, :] < Q)
            dy_step = tl.load(dy_tile + (pixel * dy_stride)[None, :], mask=mask_y, other=0.0)
            acc = tl.dot(to_tf32(dy_step, ROUND), to_tf32(x_step, ROUND), acc, input_precision=PRECISION)
            n, o, p, q = advance(n, o, p, q, n_step, o_step, p_step, q_step, O, P, runs_q, RANK)

    # Each column stores its own window of the run, in a part of the workspace of its own, as splits do.
    own = offs_e[None, :] - (shift + column * distance)[:, None]
    mask = mask_k[:, None] & (row < rows)[None, :] & (own >= 0) & (own < window)
    out = dw_ptr + split.to(tl.int64) * (RUN_OUTPUTS * K * rows * window)
    out += ((column * K + offs_k) * (rows * window))[:, None] + (row * window)[None, :]
    tl.store(out + own, acc.to(dw_ptr.dtype.element_ty), mask=mask)


def conv_rows_wgrad(direction: str, problem: ConvProblem, config: Config, gpu: Gpu, layout: Layout = DENSE) -> Launches:
    """The launches of wgrad, as `conv_gather_wgrad`; the workspace holds each split's gradient of every column."""
    form = form_of_call(problem, layout)
    rank3 = problem.as_rank3
    (_, x_strides), dy = operands = layout.operands(direction, problem)
    dy_stride = linear_stride(*dy)
    assert dy_stride is not None, "the launcher copies such a dy"
    c, k = problem.in_channels, problem.out_channels
    vec_k = load_width(problem.dtype, k, dy_stride)
    tile = {name: config[name] for name in ("BLOCK_K", "BLOCK_C", "BLOCK_M")}
    splits = config["SPLITS"]
    partials = splits * form.columns
    direct = partials == 1 and (layout.channels_last or c == 1)
    element = pointer_type(problem.dtype)
    k_tiles = triton.cdiv(k, tile["BLOCK_K"] // form.columns)
    c_tiles = triton.cdiv(filter_rows(problem) * form.run, tile["BLOCK_C"])
    product = Launch(
        kernel=conv_rows_wgrad_kernel,
        grid=(k_tiles * c_tiles * splits, 1, 1),
        pointers=(element, element, element if direct else "*fp32"),
        scalars=(*row_scalars(problem, form, x_strides, vec_k), dy_stride // vec_k, *row_taps(rank3), splits),
        constants={
            "VEC": form.vec,
            "VEC_K": vec_k,
            "RANK": max(problem.rank, 2),
            "RUN_OUTPUTS": form.columns,
            "RUN": form.run,
            "USED": triton.cdiv(form.used, form.vec) * form.vec,
            "WIDE": needs_int64(*operands),
            "PRECISION": fp32_precision(problem.dtype),
            "ROUND": rounds_in_registers(problem.dtype, gpu),
            **tile,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    if direct:
        return (product,)
    return product, split_sum(partials, k, problem.taps, c, problem.dtype, layout.channels_last)


ROWS_WGRAD = replace(
    GATHER_WGRAD,
    name="conv_rows_wgrad",
    ranges={**GATHER_WGRAD.ranges, "BLOCK_M": (32,)},
    kernels=(conv_rows_wgrad_kernel, split_sum_kernel),
)


def _candidates(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> Candidates:
    form, precision = form_of_call(problem, layout), fp32_precision(problem.dtype)
    element, share = problem.dtype.itemsize, matrix_share(problem.dtype, precision)
    rows, columns = form.columns * problem.out_channels, filter_rows(problem) * form.run
    by_element = 8 / form.vec, element_registers(problem, problem.out_channels), 0

    def work(config: Config) -> Work:
        m, n, depth, splits = config["BLOCK_K"], config["BLOCK_C"], config["BLOCK_M"], config["SPLITS"]
        partials = splits * form.columns
        return Work(
            programs=cdiv(rows, m) * cdiv(columns, n) * splits,
            steps=cdiv(cdiv(count_runs(problem, form), depth), splits),
            step_flops=2 * m * n * depth,
            step_elements=(m + n) * depth,
            step_bytes=(m + n) * depth * element,
            dram_bytes=problem.bytes,
            shared_memory=config["num_stages"] * (m + n) * depth * element,
            registers=matrix_registers(config, "BLOCK_C", "BLOCK_K", "BLOCK_M", by_element, share == 0, gpu),
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=share,
            extra_bytes=2 * partials * prod(problem.weight_shape) * 4 if partials > 1 else 0,
        )

    # If registers and shared memory allow, one program takes all rows of the filter, so that dy is read once.
    most = 128 if 4 * (128 + 128) * 32 * element <= gpu.shared_memory else 64
    width = {"BLOCK_K": min(most, rows), "BLOCK_C": min(most, columns)}
    return Candidates(ROWS_WGRAD, (problem, form, precision), work, gpu, width)


FAMILY = Family("rows", why_not_rows, _candidates, conv_rows_wgrad)
