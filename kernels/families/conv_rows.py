"""Convolution of few input channels, a network's first layer: a filter's row is one run of the image.

In channels_last memory the S * C elements that a row of the filter meets are neighbours. With e counting them,

    y[n, p, q, k] = sum over rows r, elements e of x[n, p * stride - padding + r * dilation, start(q) + e] * w[k, r, e].

The reduction runs over (row, element), RUN elements a row, a power of two. RUN_OUTPUTS neighbouring outputs share one
run: each has its weights in a column of the tile, moved on by its distance in the run. So every run begins at a
multiple of VEC elements, as large as the strides allow, and x is copied asynchronously, which single channels of two
bytes are not. Bytes: x, w and y once each; rows of x again from L1 and L2.

Elements of the run beside an output's own window meet zero weights. An infinite one makes the sum a NaN, and a tile
that holds a NaN is computed again, one element of the run after another. wgrad stores nothing from beside a window.

The idea of reading rows: cuDNN's and CUTLASS's "few channels" kernels.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu, Work
from fastconv.autotune.cost_model import MAX_WORKSPACE
from fastconv.kernels.families.family import DENSE, Family, Layout, fp32_precision, rounds_in_registers, why_not_groups
from fastconv.kernels.families.row_form import (
    conv_rows_weight_kernel,
    count_runs,
    filter_rows,
    form_of_call,
    row_form,
    row_scalars,
    row_taps,
    weight_as_runs,
)
from fastconv.kernels.jit.epilogue import PART_K, apply_epilogue
from fastconv.kernels.jit.rounding import to_tf32
from fastconv.kernels.jit.walk import in_elements, unravel
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import load_width, needs_int64, pointer_type
from fastconv.kernels.tiles.autotuned import Candidates
from fastconv.kernels.tiles.shapes import INTERPRETED_PRODUCT, TileSpace, cdiv, element_registers, matrix_share


@triton.jit(
    do_not_specialize=[
        "N", "D", "H", "row_length", "O", "P", "Q", "K", "T", "R", "window", "shift", "distance",
        "x_stride_n", "x_stride_d", "x_stride_h", "hop", "begin",
        "y_stride_n", "y_stride_d", "y_stride_h", "y_stride_w",
        "stride_d", "stride_h", "padding_d", "padding_h", "dilation_d", "dilation_h", "eps", "a", "b",
    ]
)  # fmt: skip
def conv_rows_kernel(
    x_ptr,  # [N, D, H, row_length]
    w_ptr,  # [RUN_OUTPUTS, K, rows of whole steps, RUN]
    bias_ptr,  # [K], like the next five: absent unless the epilogue uses them
    mean_ptr, var_ptr, gamma_ptr, beta_ptr,  # of batch norm
    slope_ptr,  # of PReLU
    residual_ptr,  # like y
    y_ptr,  # [N, O, P, Q, K]
    tile_count_ptr,  # [tiles]
    tile_mean_ptr, tile_m2_ptr,  # [tiles, K]
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
    y_stride_n, y_stride_d, y_stride_h, y_stride_w,  # in units of VEC_K
    stride_d, stride_h,
    padding_d, padding_h,
    dilation_d, dilation_h,
    eps,  # of batch norm
    a, b,  # of the activation
    VEC: tl.constexpr, VEC_K: tl.constexpr, RANK: tl.constexpr,
    RUN_OUTPUTS: tl.constexpr,  # neighbouring outputs that share a run
    RUN: tl.constexpr,
    USED: tl.constexpr,  # elements of the run that a window meets, in whole loads
    EXACT: tl.constexpr,  # each of them is in every output's window
    WIDE: tl.constexpr, PRECISION: tl.constexpr, ROUND: tl.constexpr,
    ACT: tl.constexpr, RESIDUAL_AFTER: tl.constexpr, PART_K: tl.constexpr,
    BLOCK_M: tl.constexpr,  # runs
    BLOCK_K: tl.constexpr,  # output channels
    BLOCK_C: tl.constexpr,  # elements of a step, whole rows
):  # fmt: skip
    row_length *= VEC
    K *= VEC_K
    x_stride_n, x_stride_d, x_stride_h, hop = in_elements(x_stride_n, x_stride_d, x_stride_h, hop, VEC, WIDE)
    y_stride_n, y_stride_d, y_stride_h, y_stride_w = in_elements(
        y_stride_n, y_stride_d, y_stride_h, y_stride_w, VEC_K, WIDE
    )
    STEP_ROWS: tl.constexpr = BLOCK_C // RUN  # of the filter, a step
    COLUMN_K: tl.constexpr = RUN_OUTPUTS * BLOCK_K  # columns of the tile: (output, channel)

    k_tiles = tl.cdiv(K, BLOCK_K)
    pid_k = tl.program_id(0) % k_tiles
    tile = tl.program_id(0) // k_tiles

    runs = tl.cdiv(Q, RUN_OUTPUTS)
    n, o, p, q = unravel(tile * BLOCK_M + tl.arange(0, BLOCK_M), O, P, runs, RANK)
    mask_m = n < N
    first = begin * VEC + q * hop
    x_h = p * stride_h - padding_h
    x_row = n * x_stride_n + x_h * x_stride_h + first
    x_d = o * stride_d - padding_d
    if RANK == 3:
        x_row += x_d * x_stride_d

    offs_e = tl.arange(0, BLOCK_C) % RUN
    step_row = tl.arange(0, BLOCK_C) // RUN
    place = first[:, None] + offs_e[None, :]
    mask_x = mask_m[:, None] & (offs_e < USED)[None, :] & (place >= 0) & (place < row_length)
    x_tile = x_ptr + x_row[:, None] + offs_e[None, :]

    offs_j = tl.arange(0, COLUMN_K)
    column = offs_j // BLOCK_K
    offs_k = pid_k * BLOCK_K + offs_j % BLOCK_K
    rows = T * R
    steps = tl.cdiv(rows, STEP_ROWS)
    w_row = (column * K + offs_k) * (steps * BLOCK_C)
    mask_w = offs_k < K
    w_tile = w_ptr + w_row[None, :] + tl.arange(0, BLOCK_C)[:, None]

    acc = tl.zeros((BLOCK_M, COLUMN_K), dtype=tl.float32)
    # Without this guard ptxas waits for every wgmma, because the loop might not run.
    if steps > 0:
        for step in range(steps):
            row = step * STEP_ROWS + step_row
            mask_r = row < rows
            r = row
            if RANK == 3:
                r = row % R
                t = row // R * dilation_d
                d = x_d[:, None] + t[None, :]
                mask_d = (d >= 0) & (d < D)
            r *= dilation_h
            h = x_h[:, None] + r[None, :]
            mask = mask_x & mask_r[None, :] & (h >= 0) & (h < H)
            delta = r * x_stride_h
            if RANK == 3:
                mask = mask & mask_d
                delta += t * x_stride_d
            x_step = tl.load(x_tile + delta[None, :], mask=mask, other=0.0)
            w_step = tl.load(w_tile + step * BLOCK_C, mask=mask_w[None, :], other=0.0)
            acc = tl.dot(to_tf32(x_step, ROUND), w_step, acc, input_precision=PRECISION)

    if not EXACT:  # noqa: SIM102 (the outer `if` is the compiler's)
        # Infinity times a zero beside a window is a NaN: a tile with a NaN is computed again without the zeros.
        if tl.max((acc != acc).to(tl.int32)) > 0:
            acc = tl.zeros((BLOCK_M, COLUMN_K), dtype=tl.float32)
            for i in range(rows * USED):
                e = i % USED
                row = i // USED
                own = e - shift - column * distance
                own = mask_w & (own >= 0) & (own < window)
                h = x_h + row % R * dilation_h
                mask = mask_m & (h >= 0) & (h < H) & (first + e >= 0) & (first + e < row_length)
                delta = row % R * dilation_h * x_stride_h + e
                if RANK == 3:
                    d = x_d + row // R * dilation_d
                    mask = mask & (d >= 0) & (d < D)
                    delta += row // R * dilation_d * x_stride_d
                x_one = tl.load(x_ptr + x_row + delta, mask=mask, other=0.0).to(tl.float32)
                w_one = tl.load(w_ptr + w_row + row * RUN + e, mask=own, other=0.0).to(tl.float32)
                acc += tl.where(own[None, :], x_one[:, None] * w_one[None, :], 0.0)

    # A run's outputs are neighbours, so they become rows of the tile that is stored.
    acc = tl.reshape(acc, (BLOCK_M * RUN_OUTPUTS, BLOCK_K))
    m = tl.arange(0, BLOCK_M * RUN_OUTPUTS)
    n, o, p, q = unravel(tile * BLOCK_M + m // RUN_OUTPUTS, O, P, runs, RANK)
    q = q * RUN_OUTPUTS + m % RUN_OUTPUTS
    mask_m = (n < N) & (q < Q)
    y_row = n * y_stride_n + p * y_stride_h + q * y_stride_w
    if RANK == 3:
        y_row += o * y_stride_d
    if tile_count_ptr is not None:
        tl.store(tile_count_ptr + tile, tl.sum(mask_m.to(tl.float32), axis=0))
    apply_epilogue(
        acc, pid_k * BLOCK_K, mask_m, y_row, tile, 0, K,
        bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual_ptr, y_ptr, tile_mean_ptr, tile_m2_ptr,
        eps, a, b, ACT, RESIDUAL_AFTER, BLOCK_M * RUN_OUTPUTS, BLOCK_K, PART_K,
    )  # fmt: skip


def conv_rows(direction: str, problem: ConvProblem, config: Config, gpu: Gpu, layout: Layout = DENSE) -> Launches:
    """The launches of fprop: weight -> runs, then that of `conv_gather` with the runs as its weight."""
    form, epilogue = form_of_call(problem, layout), layout.epilogue
    rank3 = problem.as_rank3
    (_, x_strides), (_, y_strides) = operands = layout.operands(direction, problem)
    k, element = problem.out_channels, pointer_type(problem.dtype)
    vec_k = load_width(problem.dtype, k, *y_strides)
    tile = {name: config[name] for name in ("BLOCK_M", "BLOCK_K", "BLOCK_C")}
    used = triton.cdiv(form.used, form.vec) * form.vec
    window = problem.filter_size[-1] * problem.in_channels
    steps = triton.cdiv(filter_rows(problem) * form.run, tile["BLOCK_C"])
    tiles = triton.cdiv(count_runs(problem, form), tile["BLOCK_M"])
    product = Launch(
        kernel=conv_rows_kernel,
        grid=(tiles * triton.cdiv(k, tile["BLOCK_K"]), 1, 1),
        pointers=(
            *(element, element, element if layout.bias else None, *epilogue.pointers),
            *(element, *epilogue.statistics_pointers),
        ),
        scalars=(
            *row_scalars(problem, form, x_strides, vec_k),
            *(stride // vec_k for stride in y_strides),
            *row_taps(rank3),
            *epilogue.scalars,
        ),
        constants={
            "VEC": form.vec,
            "VEC_K": vec_k,
            "RANK": max(problem.rank, 2),
            "RUN_OUTPUTS": form.columns,
            "RUN": form.run,
            "USED": used,
            "EXACT": form.columns == 1 and used == window,
            "WIDE": needs_int64(*operands),
            "PRECISION": fp32_precision(problem.dtype),
            "ROUND": rounds_in_registers(problem.dtype, gpu),
            **epilogue.constants,
            # A run's outputs become rows; with half of the columns at once no compiler spills.
            "PART_K": min(tile["BLOCK_K"], PART_K // (2 * form.columns)),
            **tile,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        tiles=tiles,
    )
    return weight_as_runs(problem, form, steps * tile["BLOCK_C"] // form.run), product


# One run per thread, so recomputing a NaN tile fits in registers.
CONV_ROWS = TileSpace(
    "conv_rows",
    {"BLOCK_M": (256, 128), "BLOCK_K": (32, 16), "BLOCK_C": (32, 64), "num_warps": (8, 4), "num_stages": (4, 3)},
    lambda config: (
        None
        if config["BLOCK_M"] == 32 * config["num_warps"]
        and config["num_stages"] == (3 if config["BLOCK_C"] > 32 else 4)
        else "other warps or copies in flight than its sides ask for"
    ),
    kernels=(conv_rows_kernel, conv_rows_weight_kernel),
    interpreted={**INTERPRETED_PRODUCT, "BLOCK_M": (16, 64, 256, 1024, 4096), "BLOCK_K": (16, 64)},
)


def rows_candidates(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> Candidates:
    form, precision = form_of_call(problem, layout), fp32_precision(problem.dtype)
    element, share = problem.dtype.itemsize, matrix_share(problem.dtype, precision)

    def work(config: Config) -> Work:
        m, n, depth, warps = config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"], config["num_warps"]
        columns = form.columns * n
        threads = 32 * warps
        registers = 40 + m * columns // threads + 5 * m * depth // (form.vec * threads)
        if element_registers(problem, problem.out_channels):
            registers += 3 * m * columns // threads
        if gpu.arch < 90:
            registers += (m + 2 * columns) * depth // 256
        return Work(
            programs=cdiv(count_runs(problem, form), m) * cdiv(problem.out_channels, n),
            steps=cdiv(filter_rows(problem) * form.run, depth),
            step_flops=2 * m * columns * depth,
            step_elements=(m + columns) * depth,
            # The half of a run that its neighbour also reads comes from L1.
            step_bytes=(m * depth // 2 + columns * depth) * element,
            dram_bytes=problem.bytes,
            shared_memory=config["num_stages"] * (m + columns) * depth * element,
            registers=registers,
            warps=warps,
            stages=config["num_stages"],
            matrix_share=share,
        )

    return Candidates(CONV_ROWS, (problem, form, precision), work, gpu, {"BLOCK_C": max(32, form.run)})


def why_not_rows(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    """Why loads of rows do not serve a convolution, or None."""
    form = row_form(problem, layout.source_strides)
    if isinstance(form, str):
        return form
    if problem.dtype is torch.float32 and fp32_precision(problem.dtype) == "ieee":
        return "fp32 products outside the tensor cores"
    if direction == "wgrad" and 4 * form.columns * prod(problem.weight_shape) > MAX_WORKSPACE:
        return "a weight whose gradient, of each column of outputs, is more than a workspace holds"
    return why_not_groups(problem)


FAMILY = Family("rows", why_not_rows, rows_candidates, conv_rows)
