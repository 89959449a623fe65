"""Depthwise convolution on channels_last tensors: each output channel reads one input channel. fprop, dgrad, wgrad.

``y[n, p, k] = sum over taps r of x[n, p * stride - padding + r * dilation, k // multiplier] * w[k, r]``, on each axis.
A stencil, not a product of matrices, bound by memory: x, w and y move once each, and what it costs beside that is
instructions. So a thread computes OUTPUTS neighbours of one row and eight channels: each element of x is loaded (16
bytes at a time) and widened to fp32 once for all outputs that it meets in a row of the filter, each weight once for all
outputs. A program covers a block of rows, so that its halo comes from L2 once and from L1 after that.

Which column of x meets which output under which tap depends on filter, stride, dilation and padding alone, so it is
laid out in advance (`Schedule`) and unrolled; in dgrad with a stride no tap is met that would multiply a zero. Along
the other axes taps are a loop, as in ``conv_gather``, whose phases dgrad shares.

The weight is read as [taps, K]: from a parameter that has these strides (`layout.packed_taps`) as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import prod

import triton
import triton.language as tl

from fastconv.autotune import Config
from fastconv.kernels.conv_gather import walk
from fastconv.kernels.epilogue import ACTIVATIONS, PLAIN, Epilogue, activate, affine_of
from fastconv.kernels.launch import Launch
from fastconv.kernels.layout import Strides, dense_strides, pointer_type, vector, wide
from fastconv.kernels.pixels import in_elements
from fastconv.kernels.problem import ConvProblem
from fastconv.kernels.reduce import split_sum

# Taps of a filter's row that are unrolled; in wgrad, whose accumulators they are, a program takes fewer at once.
MAX_ROW = 31
WGRAD_ROW = 8
# In dgrad a thread's outputs are a multiple of the stride.
MAX_STRIDE = 8
# Neighbours along a row that a program of a tall block takes before it goes on to the next row.
STRIP = 4


@dataclass(frozen=True)
class Schedule:
    """Along a row: each column of x that some of a group of neighbouring outputs meet, and who meets it there.

    Columns count from ``advance`` times the number of the group; -1 stands for nobody.
    """

    columns: tuple[int, ...]
    advance: int
    first: tuple[tuple[int, ...], ...]  # for each column, the taps that none before it has met
    taps: tuple[tuple[int, ...], ...]  # for each column and output, its tap, numbered in the order of ``first``
    outputs: tuple[tuple[int, ...], ...]  # for each column and tap, its output


@cache
def schedule(outputs: int, taps: int, stride: int, padding: int, dilation: int, dgrad: bool) -> Schedule:
    """Of ``outputs`` neighbours, a multiple of the stride in dgrad."""
    met: dict[int, dict[int, int]] = {}
    for output in range(outputs):
        for tap in range(taps):
            if not dgrad:
                met.setdefault(output * stride + tap * dilation - padding, {})[output] = tap
            elif (output + padding - tap * dilation) % stride == 0:
                met.setdefault((output + padding - tap * dilation) // stride, {})[output] = tap
    columns = tuple(sorted(met))
    order: list[int] = []
    first = []
    for column in columns:
        first.append(tuple(tap for tap in sorted(set(met[column].values())) if tap not in order))
        order.extend(first[-1])
    number = {tap: index for index, tap in enumerate(order)}
    output_of = [{tap: output for output, tap in met[column].items()} for column in columns]
    return Schedule(
        columns=columns,
        advance=outputs // stride if dgrad else outputs * stride,
        first=tuple(first),
        taps=tuple(
            tuple(number[met[column][output]] if output in met[column] else -1 for output in range(outputs))
            for column in columns
        ),
        outputs=tuple(tuple(found.get(tap, -1) for tap in range(taps)) for found in output_of),
    )


@triton.jit
def blocks(m, strip, groups, P):
    """Numbers of groups of neighbours -> (group in its row, row, number of the image), by strips of a few columns."""
    strips = tl.cdiv(groups, strip)
    group = m % strip
    m = m // strip
    p = m % P
    m = m // P
    return m % strips * strip + group, p, m // strips


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
    bias_ptr,  # [K], as the next five: absent where the epilogue has no use for them
    mean_ptr, var_ptr, gamma_ptr, beta_ptr,  # of batch norm
    slope_ptr,  # of PReLU
    residual_ptr,  # as y
    y_ptr,  # [N, O, P, Q, K]
    tile_count_ptr,  # [tiles]
    tile_mean_ptr, tile_m2_ptr,  # [tiles, K]
    N, D, H, W,
    O, P, Q,
    K,  # produced channels, in units of VEC
    T, R,
    w_stride,  # from one tap to the next, in units of VEC; negative: the filter from its end
    strip,
    x_stride_n, x_stride_d, x_stride_h, x_stride_w,  # in units of VEC
    y_stride_n, y_stride_d, y_stride_h, y_stride_w,
    stride_d, stride_h,
    padding_d, padding_h,
    dilation_d, dilation_h,
    gcd_d, gcd_h,  # of dilation and stride
    inverse_d, inverse_h,  # of dilation / gcd modulo stride / gcd
    eps,  # of batch norm
    a, b,  # of the activation
    VEC: tl.constexpr,
    RANK: tl.constexpr,  # 3, or 2 where the first axis has size one
    DGRAD: tl.constexpr,
    WIDE: tl.constexpr,  # a tensor holds 2^31 elements or more
    MULTIPLIER: tl.constexpr,  # output channels of the convolution for one of its input
    S: tl.constexpr,
    COLUMNS: tl.constexpr,  # as the next three: see Schedule
    ADVANCE: tl.constexpr,
    FIRST: tl.constexpr,
    TAPS: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,  # the activation
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

    # Channel tiles fastest: together they read whole pixels.
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
    first_h, step_h, count_h, base_h, move_h, hop_h, tap_h, skip_h, taps_h = walk(
        phase_h, P, R, stride_h, padding_h, dilation_h, gcd_h, inverse_h, DGRAD
    )
    rows = taps_h
    if RANK == 3:
        first_d, step_d, count_d, base_d, move_d, hop_d, tap_d, skip_d, taps_d = walk(
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
        # Of the source's channels, which the weight has as well, MULTIPLIER meet one of the result.
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
        for column in tl.static_range(len(COLUMNS)):
            for new in tl.static_range(len(FIRST[column])):
                w = tl.load(w_row + FIRST[column][new] * w_stride, mask=mask_k, other=0.0)
                weights = weights + (w.to(tl.float32)[None, :],)
            mask = mask_row & (x_w < W - COLUMNS[column])
            if COLUMNS[column] < 0:
                mask = mask & (x_w >= -COLUMNS[column])
            x = tl.load(
                x_tile + (delta + COLUMNS[column] * x_stride_w), mask=mask[:, None] & mask_k[None, :], other=0.0
            ).to(tl.float32)
            # A tuple cannot be assigned to: all outputs anew.
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
        # Once for all outputs.
        mean, scale, shift = affine_of(k, mask_k, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps)
    for output in tl.static_range(OUTPUTS):
        z = acc[output]
        if mean_ptr is not None:
            z = (z - mean[None, :]) * scale[None, :] + shift[None, :]
        offs = (y_row + output * y_stride_w)[:, None] + k[None, :]
        mask = (mask_m & (q + output < Q))[:, None] & mask_k[None, :]
        z = activate(z, k, mask_k, offs, mask, slope_ptr, residual_ptr, a, b, ACT, RESIDUAL_AFTER)
        tl.store(y_ptr + offs, z.to(y_ptr.dtype.element_ty), mask=mask)


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
    dw_ptr,  # [splits, T, R, S, K], or its taps innermost
    N, D, H, W,
    O, P, Q,
    K,  # in units of VEC
    T, R, S,
    dw_stride_tap, dw_stride_k,
    strip,
    splits,
    x_stride_n, x_stride_d, x_stride_h, x_stride_w,  # in units of VEC
    dy_stride_n, dy_stride_d, dy_stride_h, dy_stride_w,
    stride_d, stride_h,
    padding_d, padding_h,
    dilation_d, dilation_h, dilation_w,
    VEC: tl.constexpr,
    RANK: tl.constexpr,
    WIDE: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    COLUMNS: tl.constexpr,  # as the next two: see Schedule
    ADVANCE: tl.constexpr,
    MET: tl.constexpr,
    ROW: tl.constexpr,  # taps of a row that a program takes
    ROWS: tl.constexpr,  # rows of the filter that a program takes
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # groups of OUTPUTS neighbours
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Some taps of some channels, summed over one share of the pixels in their order."""
    K *= VEC
    x_stride_n, x_stride_d, x_stride_h, x_stride_w = in_elements(
        x_stride_n, x_stride_d, x_stride_h, x_stride_w, VEC, WIDE
    )
    dy_stride_n, dy_stride_d, dy_stride_h, dy_stride_w = in_elements(
        dy_stride_n, dy_stride_d, dy_stride_h, dy_stride_w, VEC, WIDE
    )
    # Channel tiles fastest, then parts of the filter, which read the same pixels.
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
    # In strips, some of whose groups may lie past the end of the row.
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
            for column in tl.static_range(len(COLUMNS)):
                w = x_w + COLUMNS[column]
                mask = mask_row & (w >= 0) & (w < W)
                x = tl.load(
                    x_tile + (x_row + COLUMNS[column] * x_stride_w)[:, None],
                    mask=mask[:, None] & mask_k[None, :],
                    other=0.0,
                ).to(tl.float32)
                # A tuple cannot be assigned to: all sums anew.
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


def conv_depthwise(
    direction: str,
    problem: ConvProblem,
    config: Config,
    x_strides: Strides | None = None,
    y_strides: Strides | None = None,
    bias: bool = False,
    epilogue: Epilogue = PLAIN,
) -> Launch:
    """The launch of fprop (x -> y) or dgrad (dy -> dx); strides in elements, channels_last-dense unless given.

    Its operands: source, weight [taps, K], bias, those of ``epilogue``, the result, and each tile's count, means and
    squares.
    """
    w_stride = problem.out_channels
    if mirrors(direction, problem):
        direction, problem, w_stride = "fprop", mirrored(problem), -w_stride
    lifted = problem.lifted
    dgrad = direction == "dgrad"
    operands = (lifted.output_shape, lifted.input_shape) if dgrad else (lifted.input_shape, lifted.output_shape)
    (_, x_channels, *x_size), (_, k, *y_size) = operands
    x_strides = x_strides or dense_strides(operands[0])
    y_strides = y_strides or dense_strides(operands[1])
    # Where a result's channel does not read the one channel of its number, 16 bytes hold no vector of them.
    vec = vector(problem.dtype, k, x_channels, *x_strides, *y_strides) if x_channels == k else 1
    gcds, inverses = lifted.phases
    outputs = outputs_of(direction, problem, config)
    plan = row_schedule(direction, problem, outputs)
    phases = tuple(map(min, lifted.stride[:2], y_size[:2])) if dgrad else (1, 1)
    # Phases differ by at most one pixel along an axis; the largest sets the grid.
    sizes = tuple(map(triton.cdiv, y_size[:2], lifted.stride[:2] if dgrad else phases))
    strip, groups = strips(y_size[2], outputs)
    element = pointer_type(problem.dtype)
    tiles = triton.cdiv(problem.batch * prod(sizes) * groups, config["BLOCK_M"]) * prod(phases)
    return Launch(
        kernel=conv_depthwise_kernel,
        grid=(tiles * triton.cdiv(k, config["BLOCK_K"]), 1, 1),
        pointers=(
            *(element, element, element if bias else None, *epilogue.pointers),
            *(element, *("*fp32" if epilogue.statistics else None,) * 3),
        ),
        scalars=(
            problem.batch,
            *x_size,
            *y_size,
            k // vec,
            *lifted.filter_size[:2],
            w_stride // vec,
            strip,
            *(stride // vec for stride in x_strides),
            *(stride // vec for stride in y_strides),
            *lifted.stride[:2],
            *lifted.padding[:2],
            *lifted.dilation[:2],
            *gcds[:2],
            *inverses[:2],
            *epilogue.scalars,
        ),
        constants={
            "VEC": vec,
            "RANK": max(problem.rank, 2),
            "DGRAD": dgrad,
            "WIDE": wide((operands[0], x_strides), (operands[1], y_strides)),
            "MULTIPLIER": problem.out_channels // problem.in_channels,
            "S": problem.filter_size[-1],
            "COLUMNS": plan.columns,
            "ADVANCE": plan.advance,
            "FIRST": plan.first,
            "TAPS": plan.taps,
            "ACT": ACTIVATIONS[epilogue.act].forward,
            "RESIDUAL_AFTER": epilogue.residual_after,
            "OUTPUTS": outputs,
            "BLOCK_M": config["BLOCK_M"],
            "BLOCK_K": config["BLOCK_K"],
        },
        num_warps=config["num_warps"],
        num_stages=1,
        tiles=tiles,
    )


def mirrors(direction: str, problem: ConvProblem) -> bool:
    """Whether a dgrad is run as the fprop that it equals with the filter turned around: one binary for both."""
    return direction == "dgrad" and set(problem.stride) == {1} and problem.in_channels == problem.out_channels


def mirrored(problem: ConvProblem) -> ConvProblem:
    """The fprop that a dgrad of stride 1 is."""
    return replace(
        problem,
        input_size=problem.output_size,
        output_size=problem.input_size,
        padding=tuple(
            d * (r - 1) - before
            for d, r, before in zip(problem.dilation, problem.filter_size, problem.padding, strict=True)
        ),
    )


def row_schedule(direction: str, problem: ConvProblem, outputs: int) -> Schedule:
    """How ``outputs`` neighbours meet the filter's row, in wgrad as much of it as a program takes."""
    taps = min(problem.filter_size[-1], WGRAD_ROW) if direction == "wgrad" else problem.filter_size[-1]
    return schedule(outputs, taps, problem.stride[-1], problem.padding[-1], problem.dilation[-1], direction == "dgrad")


def strips(size: int, outputs: int) -> tuple[int, int]:
    """(groups side by side before the next row, groups a row in whole strips) of a row of ``size`` outputs."""
    groups = triton.cdiv(size, outputs)
    strip = min(groups, STRIP)
    return strip, triton.cdiv(groups, strip) * strip


def outputs_of(direction: str, problem: ConvProblem, config: Config) -> int:
    """Neighbouring outputs of a thread: those of ``config``, in dgrad a multiple of the stride."""
    stride = problem.stride[-1] if direction == "dgrad" else 1
    return triton.cdiv(config["OUTPUTS"], stride) * stride


def conv_depthwise_wgrad(
    problem: ConvProblem,
    config: Config,
    x_strides: Strides | None = None,
    dy_strides: Strides | None = None,
    packed: bool = False,
) -> tuple[Launch, ...]:
    """The launches of wgrad: x, dy -> dw, or x, dy -> workspace -> dw where ``config["SPLITS"]`` splits the pixels.

    Strides in elements, channels_last-dense unless given; dw is [taps, K] where ``packed``, else [K, taps].
    """
    lifted = problem.lifted
    _, _, *x_size = lifted.input_shape
    _, k, *dy_size = lifted.output_shape
    x_strides = x_strides or dense_strides(lifted.input_shape)
    dy_strides = dy_strides or dense_strides(lifted.output_shape)
    multiplier = problem.out_channels // problem.in_channels
    vec = vector(problem.dtype, k, *x_strides, *dy_strides) if multiplier == 1 else 1
    outputs = config["OUTPUTS"]
    plan = row_schedule("wgrad", problem, outputs)
    strip, _ = strips(dy_size[2], outputs)
    splits = config["SPLITS"]
    element = pointer_type(problem.dtype)
    first = Launch(
        kernel=conv_depthwise_wgrad_kernel,
        grid=(triton.cdiv(k, config["BLOCK_K"]) * filter_parts(problem, config) * splits, 1, 1),
        pointers=(element, element, element if splits == 1 else "*fp32"),
        scalars=(
            problem.batch,
            *x_size,
            *dy_size,
            k // vec,
            *lifted.filter_size,
            *((k, 1) if packed or splits > 1 else (1, problem.taps)),
            strip,
            splits,
            *(stride // vec for stride in x_strides),
            *(stride // vec for stride in dy_strides),
            *lifted.stride[:2],
            *lifted.padding[:2],
            *lifted.dilation,
        ),
        constants={
            "VEC": vec,
            "RANK": max(problem.rank, 2),
            "WIDE": wide((lifted.input_shape, x_strides), (lifted.output_shape, dy_strides)),
            "MULTIPLIER": multiplier,
            "COLUMNS": plan.columns,
            "ADVANCE": plan.advance,
            "MET": plan.outputs,
            "ROW": len(plan.outputs[0]),
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
    return first, split_sum(splits, 1, problem.taps, k, problem.dtype, packed)


def filter_parts(problem: ConvProblem, config: Config) -> int:
    """Programs that share the pixels of one channel tile, each with some taps of the filter."""
    return triton.cdiv(problem.filter_size[-1], WGRAD_ROW) * triton.cdiv(prod(problem.filter_size[:-1]), config["ROWS"])
