"""Convolution of few input channels by the rows of its filter, as bulk copies: fprop.

``y[n, p, q, k] = sum over rows r, elements e of x[n, p * stride - padding + r * dilation, start(q) + e] * w[k, r, e]``:
a filter's row is one run of RUN elements of the image. A tile is BLOCK_N images of RUN_OUTPUTS neighbouring outputs,
which share runs; one copy brings them for each row of the filter. Rows outside the image are not walked, and a copy
reads 0 where a run leaves its row, which is the padding: nothing is masked and no address is computed. Bytes: x, w and
y once each; rows of x again from L2.

A run begins where its window does, seldom at a multiple of 16 bytes. CUDA asks that a view's start and strides be
aligned, not a box's place; Triton's interpreter refuses a box that is not.

Elements of a run beside an output's own window meet zero weights. An infinite one makes the sum a NaN, and a tile that
holds a NaN is computed again, each output from its own window.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu, Work
from fastconv.kernels.families.conv_gather import gather_candidates
from fastconv.kernels.families.conv_rows import rows_candidates
from fastconv.kernels.families.family import DENSE, Family, Layout, named_family, why_not_bulk_copies
from fastconv.kernels.families.row_form import (
    box_form,
    conv_rows_weight_kernel,
    filter_rows,
    form_of_call,
    row_form,
    weight_as_runs,
)
from fastconv.kernels.jit.boxes import apply_epilogue_to_pixels, pixel_view
from fastconv.kernels.jit.walk import taps_in_image
from fastconv.kernels.launch.descriptor import ALIGNMENT, Descriptor, bulk
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import pointer_type
from fastconv.kernels.tiles.autotuned import Candidates, predicted
from fastconv.kernels.tiles.shapes import TileSpace, cdiv


@triton.jit
def _own_windows(
    x, w, k, n, first, d, h, hop_d, hop_h, tap_d, tap_h, skip_d, skip_h, taps_h, steps, K, R, window, distance,
    RANK: tl.constexpr, RUN_OUTPUTS: tl.constexpr, RUN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sums of a tile that holds a NaN: each element of a run, one by one, added to the outputs whose window has it.

    Products of masked operands by tensor cores would make ptxas wait for every wgmma, those of the first walk too.
    """
    acc = ()  # type: tuple[tl.tensor, ...]
    for _column in tl.static_range(RUN_OUTPUTS):
        acc = acc + (tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32),)
    for step in range(steps):
        r = step % taps_h
        t = step // taps_h
        if RANK == 3:
            box = x.load([d + t * hop_d, h + r * hop_h, n, first])
        else:
            box = x.load([h + r * hop_h, n, first])
        x_step = tl.reshape(box, (BLOCK_N, RUN))
        row = ((tap_d + t * skip_d) * R + tap_h + r * skip_h) * RUN
        for e in range(RUN):
            here = (tl.arange(0, RUN) == e)[None, :]
            x_one = tl.sum(tl.where(here, x_step, 0.0).to(tl.float32), axis=1)
            sums = ()  # type: tuple[tl.tensor, ...]
            for column in tl.static_range(RUN_OUTPUTS):
                w_step = w.load([column * K + k, row])
                w_one = tl.sum(tl.where(here, w_step, 0.0).to(tl.float32), axis=1)
                own = (e >= column * distance) & (e < column * distance + window)
                sums = sums + (acc[column] + tl.where(own, x_one[:, None] * w_one[None, :], 0.0),)
            acc = sums
    return acc


@triton.jit(
    do_not_specialize=[
        "N", "D", "H", "O", "P", "Q", "K", "T", "R", "hop", "begin", "window",
        "stride_d", "stride_h", "padding_d", "padding_h", "dilation_d", "dilation_h", "eps", "a", "b",
    ]
)  # fmt: skip
def conv_row_boxes_kernel(
    x,  # [D, H, N, W * C], without D in rank 2
    w,  # [RUN_OUTPUTS * K, rows * RUN]
    bias_ptr,  # [K], like the next five: absent unless the epilogue uses them
    mean_ptr, var_ptr, gamma_ptr, beta_ptr,  # of batch norm
    slope_ptr,  # of PReLU
    residual,  # like y
    y,  # [O, P, Q, N, K], without O in rank 2
    tile_count_ptr,  # [tiles of BLOCK_N images of one pixel]
    tile_mean_ptr, tile_m2_ptr,  # [tiles, K]
    N, D, H, O, P, Q, K, T, R,
    hop,  # elements between two runs
    begin,  # element of its row at which the first run begins
    window,  # elements that a row of the filter meets
    stride_d, stride_h,
    padding_d, padding_h,
    dilation_d, dilation_h,
    eps,  # of batch norm
    a, b,  # of the activation
    RANK: tl.constexpr,
    RUN_OUTPUTS: tl.constexpr,  # neighbouring outputs that share a run
    RUN: tl.constexpr,
    EXACT: tl.constexpr,  # a run is one window
    ACT: tl.constexpr, RESIDUAL_AFTER: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Like `conv_pixels`: channel tiles are fastest, then the outputs of a row, images last.
    k_tiles = tl.cdiv(K, BLOCK_K)
    k = tl.program_id(0) % k_tiles * BLOCK_K
    tile = tl.program_id(0) // k_tiles
    runs = tl.cdiv(Q, RUN_OUTPUTS)
    run = tile % runs
    n = tile // runs
    p = n % P
    n = n // P
    o = 0
    d, hop_d, tap_d, skip_d, taps_d = 0, 0, 0, 0, 1
    if RANK == 3:
        o = n % O
        n = n // O
        d, hop_d, tap_d, skip_d, taps_d = taps_in_image(o, D, O, T, stride_d, padding_d, dilation_d, 1, 0, False, 1)
    n *= BLOCK_N
    h, hop_h, tap_h, skip_h, taps_h = taps_in_image(p, H, P, R, stride_h, padding_h, dilation_h, 1, 0, False, 1)
    first = begin + run * hop
    steps = taps_d * taps_h
    acc = ()  # type: tuple[tl.tensor, ...]
    for _column in tl.static_range(RUN_OUTPUTS):
        acc = acc + (tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32),)
    # Without this guard ptxas waits for every wgmma, because the loop might not run.
    if steps > 0:
        r, t = 0, 0
        for _ in range(steps):
            if RANK == 3:
                box = x.load([d + t * hop_d, h + r * hop_h, n, first])
            else:
                box = x.load([h + r * hop_h, n, first])
            x_step = tl.reshape(box, (BLOCK_N, RUN))
            row = ((tap_d + t * skip_d) * R + tap_h + r * skip_h) * RUN
            sums = ()  # type: tuple[tl.tensor, ...]
            for column in tl.static_range(RUN_OUTPUTS):
                sums = sums + (tl.dot(x_step, w.load([column * K + k, row]).T, acc[column]),)
            acc = sums
            r += 1
            if RANK == 3:
                carry = r >= taps_h
                r = tl.where(carry, 0, r)
                t = tl.where(carry, t + 1, t)
    if not EXACT:
        nans = 0
        for column in tl.static_range(RUN_OUTPUTS):
            nans += tl.max((acc[column] != acc[column]).to(tl.int32))
        if nans > 0:
            acc = _own_windows(
                x, w, k, n, first, d, h, hop_d, hop_h, tap_d, tap_h, skip_d, skip_h, taps_h, steps, K, R,
                window, hop // RUN_OUTPUTS, RANK, RUN_OUTPUTS, RUN, BLOCK_N, BLOCK_K,
            )  # fmt: skip

    mask_n = n + tl.arange(0, BLOCK_N) < N
    tile = ((n // BLOCK_N * O + o) * P + p) * runs * RUN_OUTPUTS
    for i in tl.static_range(RUN_OUTPUTS):
        q = run * RUN_OUTPUTS + i
        # A row's last run may have no second output.
        apply_epilogue_to_pixels(
            acc[i], o, p, q, n, k, mask_n & (q < Q), tile + q, 0, K,
            bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual, y,
            tile_count_ptr, tile_mean_ptr, tile_m2_ptr, eps, a, b,
            ACT, RESIDUAL_AFTER, RANK, False, 1, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def conv_row_boxes(direction: str, problem: ConvProblem, config: Config, gpu: Gpu, layout: Layout = DENSE) -> Launches:
    """The launches of fprop: weight -> runs, then that of `conv_pixels` with the runs as its weight."""
    form, epilogue = form_of_call(problem, layout, box_form), layout.epilogue
    rank3, dtype = problem.as_rank3, problem.dtype
    source, result = layout.operands(direction, problem)
    (n, c, *size), (stride_n, *steps, _) = source
    _, k, *outputs = rank3.output_shape
    rows, run, columns = filter_rows(problem), form.run, form.columns
    block_n, block_k = config["BLOCK_N"], config["BLOCK_K"]
    window, distance = rank3.filter_size[-1] * c, rank3.stride[-1] * c
    element = pointer_type(dtype)
    outer = 3 - max(problem.rank, 2)
    axes = list(zip((*size[outer:2], n), (*steps[outer:], stride_n), strict=True))
    x = Descriptor(
        dtype,
        (*(count for count, _ in axes), size[2] * c),
        # An axis of size one may have any stride.
        (*(step if count > 1 else ALIGNMENT for count, step in axes), 1),
        (*(1,) * (2 - outer), block_n, run),
        factor=True,
    )
    w = Descriptor(dtype, (columns * k, rows * run), (rows * run, 1), (block_k, run), factor=True)
    y = pixel_view(problem, *result, block_n, block_k)
    pixels = triton.cdiv(n, block_n) * outputs[0] * outputs[1] * triton.cdiv(outputs[2], columns)
    product = Launch(
        kernel=conv_row_boxes_kernel,
        grid=(pixels * triton.cdiv(k, block_k), 1, 1),
        pointers=(
            *(x, w, element if layout.bias else None, *epilogue.pointers[:-1]),
            *(y if epilogue.residual else None, y, *epilogue.statistics_pointers),
        ),
        scalars=(
            *(n, *size[:2], *outputs, k, *rank3.filter_size[:2]),
            *(columns * distance, -rank3.padding[-1] * c, window),
            *(*rank3.stride[:2], *rank3.padding[:2], *rank3.dilation[:2]),
            *epilogue.scalars,
        ),
        constants={
            "RANK": max(problem.rank, 2),
            "RUN_OUTPUTS": columns,
            "RUN": run,
            "EXACT": columns == 1 and window == run,
            **epilogue.constants,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        tiles=pixels * columns,
    )
    return weight_as_runs(problem, form, rows), product


ROW_BOXES = TileSpace(
    "conv_row_boxes",
    {"BLOCK_N": (128, 64), "BLOCK_K": (64, 32), "num_warps": (8, 4), "num_stages": (4,)},
    lambda config: None if config["BLOCK_N"] == 16 * config["num_warps"] else "other warps than its sides ask for",
    kernels=(conv_row_boxes_kernel, conv_rows_weight_kernel),
)


def _candidates(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> Candidates:
    form = form_of_call(problem, layout, box_form)
    element = problem.dtype.itemsize
    *lines, outputs = problem.output_size
    runs = prod(lines) * cdiv(outputs, form.columns)

    def work(config: Config) -> Work:
        n, k = config["BLOCK_N"], form.columns * config["BLOCK_K"]
        return Work(
            programs=runs * cdiv(problem.batch, n) * cdiv(problem.out_channels, config["BLOCK_K"]),
            steps=filter_rows(problem),
            step_flops=2 * n * k * form.run,
            step_elements=(n + k) * form.run,
            step_bytes=(n + k) * form.run * element,
            dram_bytes=problem.bytes,
            shared_memory=config["num_stages"] * (n + k) * form.run * element,
            # What computing a NaN's tile again takes.
            registers=96 + n * k // (32 * config["num_warps"]),
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=1.0,
        )

    return Candidates(ROW_BOXES, (problem, form), work, gpu)


def _why_not(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    form = box_form(problem, layout.source_strides)
    if isinstance(form, str):
        return form
    if problem.dtype is torch.float32:
        return "float32, in which it is untried"
    if problem.batch < 16:
        return f"{problem.batch} images leave most of a box empty"
    if not bulk(problem.dtype, problem.as_rank3.output_shape, layout.other_strides):
        return "a result whose pixels do not lie at multiples of 16 bytes"
    reason = why_not_bulk_copies(problem, gpu, layout)
    # A family that is asked for by name is measured, whatever is predicted.
    if reason is not None or named_family() == "row_boxes":
        return reason
    gathers = isinstance(row_form(problem, layout.source_strides), str)
    others, name = (gather_candidates, "a gather") if gathers else (rows_candidates, "rows")
    boxes, other = (predicted(make(direction, problem, gpu, layout)) for make in (_candidates, others))
    ratio = boxes / other
    return None if ratio <= 1 else f"predicted to take {ratio:.1f} times as long as {name}"


FAMILY = Family("row_boxes", _why_not, _candidates, conv_row_boxes)
