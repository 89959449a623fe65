"""Depthwise convolution on channels_last tensors, each output channel reads one input channel: fprop, dgrad.

``y[n, p, k] = sum over taps r of x[n, p * stride - padding + r * dilation, k // multiplier] * w[k, r]``, on each axis.
It is a stencil, not a product of matrices, and bound by memory. Bytes: x, w and y once each; what costs beside them is
instructions. So a thread computes OUTPUTS neighbours of one row and eight channels. It loads each element of x, 16
bytes at a time, and widens it to fp32 once for all outputs that it meets in a row of the filter, and each weight once
for all outputs. A program covers a block of rows, so that its halo comes from L2 once and from L1 after that.

Which column of x meets which output under which tap depends on filter, stride, dilation and padding only, so it is laid
out in advance (`Schedule`) and unrolled. In dgrad with a stride the schedule has no tap that would multiply a zero.
Along the other axes taps are a loop, and dgrad has phases, as in `conv_gather`.

The weight is read as [taps, K]. A parameter that has these strides (`layout.taps_outermost`) is read as it is.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu, Work
from fastconv.kernels.families.depthwise_schedule import blocks, row_schedule, strips
from fastconv.kernels.families.family import DENSE, Family, Layout, why_not_sizes
from fastconv.kernels.jit.epilogue import activate, affine_of
from fastconv.kernels.jit.walk import in_elements, phase_walk
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import load_width, needs_int64, pointer_type
from fastconv.kernels.tiles.autotuned import Candidates
from fastconv.kernels.tiles.shapes import INTERPRETED_STENCIL, TileSpace, cdiv


@triton.jit(
    do_not_specialize=[
        "N", "D", "H", "W", "O", "P", "Q", "K", "T", "R", "w_stride", "strip",
        "x_stride_n", "x_stride_d", "x_stride_h", "x_stride_w", "y_stride_n", "y_stride_d", "y_stride_h", "y_stride_w",
        "stride_d", "stride_h", "padding_d", "padding_h", "dilation_d", "dilation_h",
        "gcd_d", "gcd_h", "inverse_d", "inverse_h", "eps", "a", "b",
    ]
)  # fmt: skip
def conv_depthwise_kernel(
    x_ptr,  # [N, D, H, W, channels]: the input (fprop) or the output's gradient (dgrad)
    w_ptr,  # [T, R, S, channels of the convolution's output]
    bias_ptr,  # [K], like the next five: absent unless the epilogue uses them
    mean_ptr, var_ptr, gamma_ptr, beta_ptr,  # of batch norm
    slope_ptr,  # of PReLU
    residual_ptr,  # like y
    y_ptr,  # [N, O, P, Q, K]
    tile_count_ptr,  # [tiles]
    tile_mean_ptr, tile_m2_ptr,  # [tiles, K]
    N, D, H, W,
    O, P, Q,
    K,  # produced channels, in units of VEC
    T, R,
    w_stride,  # from one tap to the next, in units of VEC; negative: the filter is read from its end
    strip,  # groups side by side before the next row
    x_stride_n, x_stride_d, x_stride_h, x_stride_w,  # in units of VEC
    y_stride_n, y_stride_d, y_stride_h, y_stride_w,  # in units of VEC
    stride_d, stride_h,
    padding_d, padding_h,
    dilation_d, dilation_h,
    gcd_d, gcd_h,  # of dilation and stride
    inverse_d, inverse_h,  # of dilation / gcd modulo stride / gcd
    eps,  # of batch norm
    a, b,  # of the activation
    VEC: tl.constexpr,
    RANK: tl.constexpr,  # 3, or 2 if the first axis has size one
    DGRAD: tl.constexpr,
    WIDE: tl.constexpr,  # a tensor holds 2^31 elements or more
    MULTIPLIER: tl.constexpr,  # output channels of the convolution for each input channel
    S: tl.constexpr,
    X_COLUMNS: tl.constexpr,  # columns of x; this and the next three: see Schedule
    ADVANCE: tl.constexpr, FIRST: tl.constexpr, TAPS: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,  # the residual is added after the activation
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # groups of OUTPUTS neighbours
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    K *= VEC
    x_stride_n, x_stride_d, x_stride_h, x_stride_w = in_elements(
        x_stride_n, x_stride_d, x_stride_h, x_stride_w, VEC, WIDE
    )
    y_stride_n, y_stride_d, y_stride_h, y_stride_w = in_elements(
        y_stride_n, y_stride_d, y_stride_h, y_stride_w, VEC, WIDE
    )

    # Channel tiles are fastest: together they read whole pixels.
    pid = tl.program_id(0)
    k_tiles = tl.cdiv(K, BLOCK_K)
    k = pid % k_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = k < K
    tile = pid // k_tiles
    pid_m = tile
    phase_d, phase_h = 0, 0
    if DGRAD:
        phases_h = tl.minimum(stride_h, P)
        phase_h = pid_m % phases_h
        pid_m = pid_m // phases_h
        if RANK == 3:
            phases_d = tl.minimum(stride_d, O)
            phase_d = pid_m % phases_d
            pid_m = pid_m // phases_d
    first_h, step_h, count_h, base_h, move_h, hop_h, tap_h, skip_h, taps_h = phase_walk(
        phase_h, P, R, stride_h, padding_h, dilation_h, gcd_h, inverse_h, DGRAD
    )
    rows = taps_h
    if RANK == 3:
        first_d, step_d, count_d, base_d, move_d, hop_d, tap_d, skip_d, taps_d = phase_walk(
            phase_d, O, T, stride_d, padding_d, dilation_d, gcd_d, inverse_d, DGRAD
        )
        rows = rows * taps_d

    # The tile's groups of outputs, and the source pixel of each one's tap (0, 0), at its row's column 0.
    group, p, n = blocks(pid_m * BLOCK_M + tl.arange(0, BLOCK_M), strip, tl.cdiv(Q, OUTPUTS), count_h)
    q = group * OUTPUTS
    x_h = base_h + p * move_h
    x_w = group * ADVANCE
    x_row = x_h * x_stride_h + x_w * x_stride_w
    y_row = (first_h + p * step_h) * y_stride_h + q * y_stride_w
    if RANK == 3:
        o = n % count_d
        n = n // count_d
        x_d = base_d + o * move_d
        x_row += x_d * x_stride_d
        y_row += (first_d + o * step_d) * y_stride_d
    mask_m = n < N
    x_row += n * x_stride_n
    y_row += n * y_stride_n
    w_stride *= VEC
    w_tile = w_ptr + tl.where(w_stride < 0, -w_stride * (T * R * S - 1), 0)
    if DGRAD:
        # MULTIPLIER of the source's channels, which are the weight's too, meet one channel of the result.
        channel = k * MULTIPLIER
        w_tile += channel
        rows = rows * MULTIPLIER
    else:
        channel = k // MULTIPLIER
        w_tile += k
    x_tile = x_ptr + x_row[:, None] + channel[None, :]

    acc = ()
    for _ in tl.static_range(OUTPUTS):
        acc = acc + (tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32),)
    i, r, t = 0, 0, 0
    for _ in range(rows):
        h = x_h + r * hop_h
        mask_row = mask_m & (h >= 0) & (h < H)
        delta = r * hop_h * x_stride_h
        index = tap_h + r * skip_h
        if RANK == 3:
            d = x_d + t * hop_d
            mask_row = mask_row & (d >= 0) & (d < D)
            delta += t * hop_d * x_stride_d
            index += (tap_d + t * skip_d) * R
        w_row = w_tile + index * S * w_stride
        if DGRAD and MULTIPLIER > 1:
            delta += i
            w_row += i
        weights = ()
        for column in tl.static_range(len(X_COLUMNS)):
            for new in tl.static_range(len(FIRST[column])):
                w = tl.load(w_row + FIRST[column][new] * w_stride, mask=mask_k, other=0.0)
                weights = weights + (w.to(tl.float32)[None, :],)
            mask = mask_row & (x_w < W - X_COLUMNS[column])
            if X_COLUMNS[column] < 0:
                mask = mask & (x_w >= -X_COLUMNS[column])
            x = tl.load(
                x_tile + (delta + X_COLUMNS[column] * x_stride_w), mask=mask[:, None] & mask_k[None, :], other=0.0
            ).to(tl.float32)
            # A tuple cannot be assigned to, so all outputs are collected anew.
            updated = ()
            for output in tl.static_range(OUTPUTS):
                if TAPS[column][output] >= 0:
                    updated = updated + (acc[output] + x * weights[TAPS[column][output]],)
                else:
                    updated = updated + (acc[output],)
            acc = updated
        carry = True
        if DGRAD and MULTIPLIER > 1:
            i += 1
            carry = i == MULTIPLIER
            i = tl.where(carry, 0, i)
            r = tl.where(carry, r + 1, r)
        else:
            r += 1
        if RANK == 3:
            carry = r == taps_h
            r = tl.where(carry, 0, r)
            t = tl.where(carry, t + 1, t)

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        updated = ()
        for output in tl.static_range(OUTPUTS):
            updated = updated + (acc[output] + bias,)
        acc = updated
    if tile_mean_ptr is not None:
        count = tl.zeros((BLOCK_M,), dtype=tl.float32)
        total = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for output in tl.static_range(OUTPUTS):
            valid = mask_m & (q + output < Q)
            count += valid.to(tl.float32)
            total += tl.where(valid[:, None], acc[output], 0.0)
        count = tl.sum(count, axis=0)
        mean = tl.sum(total, axis=0) / tl.maximum(count, 1.0)
        m2 = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for output in tl.static_range(OUTPUTS):
            valid = mask_m & (q + output < Q)
            difference = tl.where(valid[:, None], acc[output] - mean[None, :], 0.0)
            m2 += difference * difference
        tl.store(tile_count_ptr + tile, count)
        tl.store(tile_mean_ptr + tile * K + k, mean, mask=mask_k)
        tl.store(tile_m2_ptr + tile * K + k, tl.sum(m2, axis=0), mask=mask_k)
    if mean_ptr is not None:
        mean, scale, shift = affine_of(k, mask_k, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps)
    for output in tl.static_range(OUTPUTS):
        z = acc[output]
        if mean_ptr is not None:
            z = (z - mean[None, :]) * scale[None, :] + shift[None, :]
        offs = (y_row + output * y_stride_w)[:, None] + k[None, :]
        mask = (mask_m & (q + output < Q))[:, None] & mask_k[None, :]
        z = activate(z, k, mask_k, offs, mask, slope_ptr, residual_ptr, a, b, ACT, RESIDUAL_AFTER)
        tl.store(y_ptr + offs, z.to(y_ptr.dtype.element_ty), mask=mask)


def conv_depthwise(direction: str, problem: ConvProblem, config: Config, gpu: Gpu, layout: Layout = DENSE) -> Launches:
    """The launch of fprop (x -> y) or dgrad (dy -> dx), with the operands of `conv_gather`; the weight is [taps, K]."""
    epilogue = layout.epilogue
    w_stride = problem.out_channels
    if mirrors(direction, problem):
        direction, problem, w_stride = "fprop", mirrored(problem), -w_stride
    rank3 = problem.as_rank3
    dgrad = direction == "dgrad"
    operands = layout.operands(direction, problem)
    ((_, x_channels, *x_size), x_strides), ((_, k, *y_size), y_strides) = operands
    # If a channel of the result reads a channel of another number, 16 bytes hold no vector of both.
    vec = load_width(problem.dtype, k, x_channels, *x_strides, *y_strides) if x_channels == k else 1
    gcds, inverses = rank3.phases
    outputs = outputs_of(direction, problem, config)
    schedule = row_schedule(direction, problem, outputs)
    phases = tuple(map(min, rank3.stride[:2], y_size[:2])) if dgrad else (1, 1)
    # Phases differ by at most one pixel along an axis; the largest sets the grid.
    sizes = tuple(map(triton.cdiv, y_size[:2], rank3.stride[:2] if dgrad else phases))
    strip, groups = strips(y_size[2], outputs)
    element = pointer_type(problem.dtype)
    tiles = triton.cdiv(problem.batch * prod(sizes) * groups, config["BLOCK_M"]) * prod(phases)
    launch = Launch(
        kernel=conv_depthwise_kernel,
        grid=(tiles * triton.cdiv(k, config["BLOCK_K"]), 1, 1),
        pointers=(
            *(element, element, element if layout.bias else None, *epilogue.pointers),
            *(element, *epilogue.statistics_pointers),
        ),
        scalars=(
            *(problem.batch, *x_size, *y_size, k // vec, *rank3.filter_size[:2], w_stride // vec, strip),
            *(stride // vec for stride in (*x_strides, *y_strides)),
            *(*rank3.stride[:2], *rank3.padding[:2], *rank3.dilation[:2], *gcds[:2], *inverses[:2]),
            *epilogue.scalars,
        ),
        constants={
            "VEC": vec,
            "RANK": max(problem.rank, 2),
            "DGRAD": dgrad,
            "WIDE": needs_int64(*operands),
            "MULTIPLIER": problem.out_channels // problem.in_channels,
            "S": problem.filter_size[-1],
            "X_COLUMNS": schedule.columns,
            "ADVANCE": schedule.advance,
            "FIRST": schedule.first,
            "TAPS": schedule.taps,
            **epilogue.constants,
            "OUTPUTS": outputs,
            "BLOCK_M": config["BLOCK_M"],
            "BLOCK_K": config["BLOCK_K"],
        },
        num_warps=config["num_warps"],
        num_stages=1,
        tiles=tiles,
    )
    return (launch,)


def mirrors(direction: str, problem: ConvProblem) -> bool:
    """Whether a dgrad runs as the fprop that it equals with the filter turned around: one binary serves both."""
    return direction == "dgrad" and set(problem.stride) == {1} and problem.in_channels == problem.out_channels


def mirrored(problem: ConvProblem) -> ConvProblem:
    """The fprop that a dgrad of stride 1 equals."""
    return replace(
        problem,
        input_size=problem.output_size,
        output_size=problem.input_size,
        padding=tuple(
            d * (r - 1) - before
            for d, r, before in zip(problem.dilation, problem.filter_size, problem.padding, strict=True)
        ),
    )


def outputs_of(direction: str, problem: ConvProblem, config: Config) -> int:
    """Neighbouring outputs of a thread: the config's, in dgrad rounded up to a multiple of the stride."""
    stride = problem.stride[-1] if direction == "dgrad" else 1
    return triton.cdiv(config["OUTPUTS"], stride) * stride


# Few channels and many pixels make a program's halo small; no lane is idle if channels are a multiple of 32.
DEPTHWISE = TileSpace(
    "conv_depthwise",
    {"OUTPUTS": (7, 4, 2), "BLOCK_M": (32,), "BLOCK_K": (32,), "num_warps": (4,), "num_stages": (1,)},
    kernels=(conv_depthwise_kernel,),
    interpreted={**INTERPRETED_STENCIL, "OUTPUTS": (1,)},
)


def _candidates(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> Candidates:
    if mirrors(direction, problem):
        direction, problem = "fprop", mirrored(problem)
    dgrad = direction == "dgrad"
    rank3 = problem.as_rank3
    _, k, *sizes = rank3.input_shape if dgrad else rank3.output_shape
    stride = rank3.stride if dgrad else (1, 1, 1)
    phases = prod(map(min, stride[:2], sizes[:2]))
    lines = problem.batch * prod(map(cdiv, sizes[:2], stride[:2]))
    rows = cdiv(prod(rank3.filter_size[:2]) * (problem.out_channels // k if dgrad else 1), phases)
    # Elements that are loaded one by one have addresses of their own.
    by_element = 0 if load_width(problem.dtype, k) > 1 and problem.in_channels == problem.out_channels else 8
    taps = problem.filter_size[-1]

    def work(config: Config) -> Work:
        m, n, warps = config["BLOCK_M"], config["BLOCK_K"], config["num_warps"]
        outputs = outputs_of(direction, problem, config)
        schedule = row_schedule(direction, problem, outputs)
        products = sum(tap >= 0 for met in schedule.taps for tap in met)
        columns = len(schedule.columns)
        strip, groups = strips(sizes[2], outputs)
        height = max(1, m // strip)
        step = 1 if dgrad else rank3.stride[1]
        # The pixels of x that a block covers come from L2 once.
        covered = ((height - 1) * step + rows) * ((strip - 1) * schedule.advance + columns)
        return Work(
            programs=cdiv(lines * groups, m) * phases * cdiv(k, n),
            steps=rows,
            # Products; an operand widened, with its share of a load and a mask; a weight widened.
            step_flops=2 * m * n * products + 4 * m * n * columns + 2 * m * n * len(schedule.first),
            step_elements=columns * m * n,
            step_bytes=cdiv((covered + m * outputs) * n * problem.dtype.itemsize, rows),
            dram_bytes=problem.bytes,
            shared_memory=0,
            # With rows of seven taps one version of the compiler or the other spills seven outputs.
            registers=int(36 + (8 * outputs + (5.5 + by_element) * columns) * m * n / (256 * warps))
            + 128 * (outputs > 4 and taps > 6),
            warps=warps,
            stages=config["num_stages"],
            matrix_share=0.0,
        )

    return Candidates(DEPTHWISE, (direction, problem), work, gpu)


MAX_ROW = 31  # taps of a filter's row, which are unrolled
MAX_STRIDE = 8  # of a row, in dgrad: a thread's outputs are a multiple of it


def why_not_depthwise(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    """Why no depthwise kernel serves a convolution, or None."""
    if problem.groups == 1 or problem.in_channels != problem.groups:
        return f"{problem.in_channels // problem.groups} input channels a group"
    if problem.filter_size[-1] > MAX_ROW:
        return f"a filter of more than {MAX_ROW} columns"
    if direction == "dgrad" and problem.stride[-1] > MAX_STRIDE:
        return f"a stride of more than {MAX_STRIDE} columns"
    return why_not_sizes(problem)


FAMILY = Family("depthwise", why_not_depthwise, _candidates, conv_depthwise)
