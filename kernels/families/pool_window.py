"""Pools as walks over windows: forward.

    y[p, q] = over (r, s): x[p * stride - padding + r * dilation, ...]; adaptive: x[floor(p * H / P) + r, ...]

A tile is rows by columns. In channels_last rows are pixels and columns are channels, 16 bytes a thread. In the plain
format (PLANES) rows are (image, channel, p) and columns are q: neighbouring threads read neighbours in both formats,
and neither is transposed first. What depends only on a row or only on a column is computed once for it.

An lp norm is an average: elements are raised to a power as they are loaded, and the sum to the inverse power.

A small window is unrolled, and a thread has LINES outputs below each other: a line of the input that several of their
windows hold is loaded and reduced once. LANES rows of the tile, and splits of the grid, share a large window, and one
ordered step combines them: a few global windows fill the GPU. No atomics: the same bits from run to run.

Bytes: x, y and the index once. Programs follow memory, so lines that tiles share meet in L1 and L2.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu, Work
from fastconv.kernels.families.family import Family, Layout, why_not_dtype
from fastconv.kernels.families.splits import split_sum, split_sum_kernel
from fastconv.kernels.jit.walk import advance, in_elements, unravel
from fastconv.kernels.jit.windows import (
    UNROLLED,
    exponents,
    extent,
    first_inside,
    line_of,
    norm_form,
    place,
    pool_blocks,
    power,
    window_bounds,
)
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.layout import (
    INDEX_TYPES,
    INT32_MAX,
    Strides,
    dense_strides,
    linear_stride,
    load_width,
    needs_int64,
    pointer_type,
)
from fastconv.kernels.problem.pool import PoolProblem
from fastconv.kernels.tiles.autotuned import Candidates
from fastconv.kernels.tiles.shapes import TileSpace, cdiv


@triton.jit
def take(acc, best, x, tap, MAX: tl.constexpr, INDEXED: tl.constexpr):
    """Take one more tap: the last NaN wins, else the first maximum, as in PyTorch's CPU op."""
    if not MAX:
        acc += x
    elif INDEXED:
        wins = (x > acc) | (x != x)
        acc = tl.where(wins, x, acc)
        best = tl.where(wins, tap, best)
    else:
        acc = tl.maximum(acc, x, propagate_nan=tl.PropagateNan.ALL)
    return acc, best


@triton.jit
def winner_of(acc, best):
    """The winner over the lanes of [rows, lanes, columns], by the rule of `take`; the taps of lanes are interleaved."""
    nan = tl.max(tl.where(acc != acc, best, -1), axis=1)
    acc = tl.where(acc == acc, acc, float("-inf"))
    highest = tl.max(acc, axis=1)
    first = tl.min(tl.where(acc == highest[:, None, :], best, 2**31 - 1), axis=1)
    return tl.where(nan >= 0, float("nan"), highest), tl.where(nan >= 0, nan, first)


@triton.jit
def raised(x, inside, exponent, sign, NORM: tl.constexpr):
    """What an lp norm sums for x: a power of it, 0 outside; without a norm x itself."""
    if NORM == 2:
        x *= x
    elif NORM == 3:
        x = tl.where(inside, power(x, exponent, sign), 0.0)
    return x


@triton.jit
def root_of(acc, root, root_sign, NORM: tl.constexpr):
    """The lp norm whose sum of powers is ``acc``."""
    if NORM == 2:
        acc = tl.sqrt_rn(acc)
    elif NORM == 3:
        acc = power(acc, root, root_sign)
    return acc


@triton.jit
def scale_of(
    count, p, H, P, stride, padding, taps, scale,
    ADAPTIVE: tl.constexpr, UNIFORM: tl.constexpr, INCLUDE_PADDING: tl.constexpr,
):  # fmt: skip
    """The factor of window ``p``'s sum; ``count``: its pixels along the other axes."""
    if UNIFORM:
        return scale
    else:
        # Rows past the last have windows without pixels, which count as one.
        count *= extent(p, H, P, stride, padding, taps, ADAPTIVE, INCLUDE_PADDING)
        return scale / tl.maximum(count, 1).to(tl.float32)


@triton.jit
def put(y_ptr, index_ptr, acc, best, line, q, c, Q, C, mask, WIDE: tl.constexpr):
    """Store one output of each row in a dense [N, O, P, Q, C] tensor whose ``line`` is (n, o, p)."""
    if WIDE:
        line = line.to(tl.int64)
    out = (line * Q + q) * C + c
    tl.store(y_ptr + out, acc.to(y_ptr.dtype.element_ty), mask=mask)
    if index_ptr is not None:
        tl.store(index_ptr + out, best.to(index_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        *("M", "C", "D", "H", "W", "O", "P", "Q", "x_n", "x_d", "x_h", "x_w", "taps_d", "taps_h", "taps_w"),
        *("stride_d", "stride_h", "stride_w", "pad_d", "pad_h", "pad_w", "dilation_d", "dilation_h", "dilation_w"),
        *("splits", "scale", "exponent", "sign", "root", "root_sign"),
    ]
)
def pool_kernel(
    x_ptr,  # [N, D, H, W, C] by its strides
    y_ptr,  # [splits, N, O, P, Q, C]
    index_ptr,  # like y: the winner's tap
    M,  # rows
    C,  # in units of VEC
    D, H, W, O, P, Q,
    x_n, x_d, x_h, x_w,  # in units of VEC
    taps_d, taps_h, taps_w, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w,
    splits,
    scale,  # of a sum, or of its average unless UNIFORM; 1 for a maximum
    exponent, sign, root, root_sign,  # of an lp norm's power and of its inverse: see `power`
    MAX: tl.constexpr,
    NORM: tl.constexpr,  # lp: 1, 2, or 3 for any other; 0: none
    ADAPTIVE: tl.constexpr,
    BOUNDED: tl.constexpr,  # a tap may be outside
    UNIFORM: tl.constexpr,  # every output divides by the same number
    INCLUDE_PADDING: tl.constexpr,
    LINEAR: tl.constexpr,  # the window is the whole image, x_w elements from pixel to pixel
    PLANES: tl.constexpr, RANK: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,  # the window if it is unrolled, else 0
    LINES: tl.constexpr, STEP: tl.constexpr,  # outputs below each other, STEP lines of the input apart
    VEC: tl.constexpr, WIDE: tl.constexpr,
    LANES: tl.constexpr,  # rows of the tile that share an output
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    INDEXED: tl.constexpr = index_ptr is not None
    OUTSIDE: tl.constexpr = float("-inf") if MAX else 0.0
    C *= VEC
    x_n, x_d, x_h, x_w = in_elements(x_n, x_d, x_h, x_w, VEC, WIDE)
    mask, n, o, p, q, c = place(M, C, O, tl.cdiv(P, LINES), Q, PLANES, RANK, LANES, BLOCK_M, BLOCK_C)
    if LINES > 1:
        # Two threads may compute the last outputs of a column: then no thread reads a line past the image.
        p = tl.minimum(p * LINES, P - LINES)
    w0, w1 = window_bounds(q, W, Q, stride_w, pad_w, ADAPTIVE)
    h0, h1 = window_bounds(p, H, P, stride_h, pad_h, ADAPTIVE)
    d0, d1 = 0, 1
    if RANK == 3:
        d0, d1 = window_bounds(o, D, O, stride_d, pad_d, ADAPTIVE)
    images = x_ptr + n * x_n + c
    line = line_of(n, o, p, O, P, RANK)
    count = 1
    if not UNIFORM:
        count = extent(q, W, Q, stride_w, pad_w, taps_w, ADAPTIVE, INCLUDE_PADDING)
        if RANK == 3:
            count *= extent(o, D, O, stride_d, pad_d, taps_d, ADAPTIVE, INCLUDE_PADDING)
    if T > 0:
        accs, bests = (), ()
        for _ in tl.static_range(LINES):
            accs = accs + (tl.full((BLOCK_M, BLOCK_C), OUTSIDE, dtype=tl.float32),)
            bests = bests + (tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32),)
        for t in tl.static_range(T):
            d = d0 + t * dilation_d
            volumes, mask_d = images, mask
            if RANK == 3:
                volumes = images + d * x_d
                if BOUNDED:
                    mask_d = mask & (d >= 0) & (d < d1)
            for j in tl.static_range((LINES - 1) * STEP + R):
                if j % STEP < R:
                    h = h0 + j * dilation_h
                    lines, mask_h = volumes + h * x_h, mask_d
                    if BOUNDED:
                        mask_h = mask_d & (h >= 0) & (h < h1)
                    acc = tl.full((BLOCK_M, BLOCK_C), OUTSIDE, dtype=tl.float32)
                    best = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.int32)
                    for s in tl.static_range(S):
                        w = w0 + s * dilation_w
                        inside = mask_h
                        if BOUNDED:
                            inside = mask_h & (w >= 0) & (w < w1)
                        x = tl.load(lines + w * x_w, mask=inside, other=OUTSIDE).to(tl.float32)
                        if INDEXED:
                            # scale is 1, which the compiler does not know. Without the product it compares bf16 two at
                            # a time, runs out of predicates and moves each (3x3 on sm_90: 70 registers, not 44).
                            x *= scale
                        x = raised(x, inside, exponent, sign, NORM)
                        if s == 0:
                            acc = x
                        else:
                            acc, best = take(acc, best, x, s, MAX, INDEXED)
                    all_accs, all_bests = accs, bests
                    accs, bests = (), ()
                    for i in tl.static_range(LINES):
                        kept, winner = all_accs[i], all_bests[i]
                        if t == 0 and j == i * STEP:
                            kept, winner = acc, best
                        elif j >= i * STEP and j < i * STEP + R:
                            tap = best + (t * R + j - i * STEP) * S
                            kept, winner = take(kept, winner, acc, tap, MAX, INDEXED)
                        accs, bests = accs + (kept,), bests + (winner,)
        for i in tl.static_range(LINES):
            acc, best = accs[i], bests[i]
            if INDEXED and BOUNDED and not ADAPTIVE:
                # If no tap is above what is read outside, the first tap inside wins.
                first = first_inside(h0 + i * STEP, dilation_h) * S + first_inside(w0, dilation_w)
                if RANK == 3:
                    first += first_inside(d0, dilation_d) * (R * S)
                best = tl.where(acc == OUTSIDE, first, best)
            if not MAX:
                acc *= scale_of(count, p + i, H, P, stride_h, pad_h, taps_h, scale, ADAPTIVE, UNIFORM, INCLUDE_PADDING)
                acc = root_of(acc, root, root_sign, NORM)
            put(y_ptr, index_ptr, acc, best, line + i, q, c, Q, C, mask, WIDE)
    else:
        best = tl.zeros((BLOCK_M * LANES, BLOCK_C), dtype=tl.int32)
        if INDEXED and BOUNDED and not ADAPTIVE:
            first = first_inside(h0, dilation_h) * taps_w + first_inside(w0, dilation_w)
            if RANK == 3:
                first += first_inside(d0, dilation_d) * taps_h * taps_w
            best += first
        acc = tl.full((BLOCK_M * LANES, BLOCK_C), OUTSIDE, dtype=tl.float32)
        taps = taps_d * taps_h * taps_w
        lanes = splits * LANES
        tap = tl.program_id(1) * LANES + tl.arange(0, BLOCK_M * LANES)[:, None] % LANES
        z, t, r, s = unravel(tap, taps_d, taps_h, taps_w, 3)
        z_step, t_step, r_step, s_step = unravel(lanes, taps_d, taps_h, taps_w, 3)
        for _ in tl.range(0, tl.cdiv(taps, lanes), loop_unroll_factor=8):
            inside = mask & (tap < taps)
            if LINEAR:
                offset = tap * x_w
            else:
                h, w = h0 + r * dilation_h, w0 + s * dilation_w
                offset = h * x_h + w * x_w
                if BOUNDED:
                    inside = inside & (h >= 0) & (h < h1) & (w >= 0) & (w < w1)
                if RANK == 3:
                    d = d0 + t * dilation_d
                    offset += d * x_d
                    if BOUNDED:
                        inside = inside & (d >= 0) & (d < d1)
                z, t, r, s = advance(z, t, r, s, z_step, t_step, r_step, s_step, taps_d, taps_h, taps_w, 3)
            x = tl.load(images + offset, mask=inside, other=OUTSIDE).to(tl.float32)
            x = raised(x, inside, exponent, sign, NORM)
            acc, best = take(acc, best, x, tap, MAX, INDEXED)
            tap += lanes
        if not MAX:
            acc *= scale_of(count, p, H, P, stride_h, pad_h, taps_h, scale, ADAPTIVE, UNIFORM, INCLUDE_PADDING)
        if LANES > 1:
            acc = tl.reshape(acc, (BLOCK_M, LANES, BLOCK_C))
            if MAX:
                acc, best = winner_of(acc, tl.reshape(best, (BLOCK_M, LANES, BLOCK_C)))
            else:
                acc = tl.sum(acc, axis=1)
            mask, n, o, p, q, c = place(M, C, O, P, Q, PLANES, RANK, 1, BLOCK_M, BLOCK_C)
            line = line_of(n, o, p, O, P, RANK)
        acc = root_of(acc, root, root_sign, NORM)
        # A split's results follow those of the splits before it.
        line += tl.program_id(1) * (M if PLANES else M // Q)
        put(y_ptr, index_ptr, acc, best, line, q, c, Q, C, mask, WIDE)


@triton.jit(do_not_specialize=["splits", "size"])
def pool_combine_kernel(
    partial_ptr,  # [splits, size], fp32
    partial_index_ptr,  # like partial; absent in inference
    y_ptr,  # [size]
    index_ptr,  # like y; absent in inference
    splits, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The maximum over the splits of a window, by the rule of `take`; the taps of splits are interleaved."""
    INDEXED: tl.constexpr = index_ptr is not None
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    acc = tl.load(partial_ptr + element, mask=mask, other=0.0)
    if INDEXED:
        best = tl.load(partial_index_ptr + element, mask=mask, other=0)
    for split in range(1, splits):
        x = tl.load(partial_ptr + split * size + element, mask=mask, other=0.0)
        if INDEXED:
            tap = tl.load(partial_index_ptr + split * size + element, mask=mask, other=0)
            earlier = (x > acc) | ((x == acc) & (tap < best))
            wins = ((x != x) & ((acc == acc) | (tap > best))) | earlier
            acc = tl.where(wins, x, acc)
            best = tl.where(wins, tap, best)
        else:
            acc = tl.maximum(acc, x, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + element, acc.to(y_ptr.dtype.element_ty), mask=mask)
    if INDEXED:
        tl.store(index_ptr + element, best.to(index_ptr.dtype.element_ty), mask=mask)


def pool_forward(direction: str, problem: PoolProblem, config: Config, gpu: Gpu, layout: Layout) -> Launches:
    """x -> y, index (absent unless ``problem.index``); if ``config["SPLITS"]`` splits windows, x -> partial sums, or
    partial maxima and their taps, -> y, index."""
    channels_last, strides = layout.channels_last, plane_strides(problem, problem.input_size, layout)
    view = problem.as_rank3 if channels_last else problem.as_rank3.planes
    splits, lanes = config["SPLITS"], config["LANES"]
    unroll = problem.taps <= UNROLLED
    assert not unroll or splits == lanes == 1
    assert view.output_size[1] >= config["LINES"]
    assert splits == 1 or problem.kind != "lp", "a root is of the whole sum"
    maximum = problem.kind == "max"
    linear = None if unroll else whole_image(view, strides)
    if linear is not None:
        strides = (*strides[:3], linear)
    vec = load_width(problem.dtype, view.channels, *strides)
    programs, rows, blocks = pool_blocks(view, view.output_size, channels_last, config)
    element, kept = pointer_type(problem.dtype), None if problem.index is None else INDEX_TYPES[problem.index]
    size = view.output_pixels * view.channels
    first = Launch(
        kernel=pool_kernel,
        grid=(programs, splits, 1),
        pointers=(element, *((element, kept) if splits == 1 else ("*fp32", kept and "*i32"))),
        scalars=(
            *(rows, view.channels // vec, *view.input_size, *view.output_size),
            *(stride // vec for stride in strides),
            *(*view.window, *view.stride, *view.padding, *view.dilation, splits, problem.scale),
            *(*exponents(problem.norm), *exponents(1.0 / problem.norm if problem.norm else 0.0)),
        ),
        constants={
            "MAX": maximum,
            "NORM": norm_form(problem.norm),
            "ADAPTIVE": problem.adaptive,
            "BOUNDED": problem.bounded,
            "UNIFORM": problem.uniform_divisor != 0,
            "INCLUDE_PADDING": problem.include_padding,
            "LINEAR": linear is not None,
            "PLANES": not channels_last,
            "RANK": max(2, problem.rank),
            **dict(zip("TRS", view.window if unroll else (0, 0, 0), strict=True)),
            "VEC": vec,
            "WIDE": splits * size - 1 > INT32_MAX
            or needs_int64((view.input_shape, strides), (view.output_shape, dense_strides(view.output_shape))),
            "LINES": config["LINES"],
            "STEP": view.stride[1] if config["LINES"] > 1 else 1,
            "LANES": lanes,
            **blocks,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    if splits == 1:
        return (first,)
    if not maximum:
        return first, split_sum(splits, 1, 1, size, problem.dtype)
    block = 256
    combine = Launch(
        kernel=pool_combine_kernel,
        grid=(triton.cdiv(size, block), 1, 1),
        pointers=("*fp32", None if kept is None else "*i32", element, kept),
        scalars=(splits, size),
        constants={"BLOCK": block},
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return first, combine


def plane_strides(problem: PoolProblem, size: tuple[int, ...], layout: Layout) -> Strides:
    """The pixel strides of an operand [N, C, *size] of a pool."""
    return layout.source_strides or dense_strides((problem.batch, problem.channels, *(1,) * (3 - problem.rank), *size))


def whole_image(view: PoolProblem, strides: Strides) -> int | None:
    """The distance between neighbouring pixels if one window is the whole image and that is one distance, else None."""
    if any(size > 1 for size in view.output_size) or view.window != view.input_size or any(view.padding):
        return None
    return linear_stride((1, 1, *view.input_size), (0, *strides[1:]))


INTERPRETED_POOL = {
    "BLOCK": tuple(2**i for i in range(6, 19, 2)),
    **dict.fromkeys(("LINES", "LANES", "SPLITS", "num_stages"), (1,)),
    "num_warps": (4,),
}
POOL = TileSpace(
    "pool",
    {"BLOCK": (512, 1024), "LINES": (4, 1), "LANES": (1,), "SPLITS": (1,), "num_warps": (4,), "num_stages": (1,)},
    kernels=(pool_kernel,),
    interpreted=INTERPRETED_POOL,
)
# For maxima without an index and for lp norms: with four lines some spill on one version of the compiler.
POOL_PAIR = replace(POOL, name="pool_pair", ranges={**POOL.ranges, "LINES": (2, 1)})
POOL_SINGLE = replace(POOL, name="pool_single", ranges={**POOL.ranges, "LINES": (1,)})
POOL_SPLIT = replace(
    POOL_SINGLE,
    name="pool_split",
    ranges={**POOL_SINGLE.ranges, "LANES": (1, 16), "SPLITS": tuple(2**i for i in range(11))},
    kernels=(pool_kernel, pool_combine_kernel, split_sum_kernel),
)
# For planes with few outputs a row: neighbouring threads read neighbours only as lanes of one window.
POOL_PLANES = replace(POOL_SPLIT, name="pool_planes", ranges={**POOL_SPLIT.ranges, "LANES": (32,)})


def _candidates(direction: str, problem: PoolProblem, gpu: Gpu, layout: Layout) -> Candidates:
    view = problem.as_rank3 if layout.channels_last else problem.as_rank3.planes
    size, taps = view.output_size, view.taps
    space = POOL_SINGLE
    if taps > UNROLLED:
        space = POOL_SPLIT if layout.channels_last or size[2] >= 16 else POOL_PLANES
    elif (
        taps <= 9 and view.dilation[1] == 1 and not problem.adaptive and size[1] >= 4
        # Powers by logarithms already take most registers.
        and problem.norm in (0, 1, 2)
    ):  # fmt: skip
        space = POOL if problem.kind == "average" or problem.index is not None else POOL_PAIR
    return pool_candidates(space, direction, problem, layout.channels_last, gpu, size, taps)


def pool_candidates(
    space: TileSpace,
    direction: str,
    problem: PoolProblem,
    channels_last: bool,
    gpu: Gpu,
    size: tuple[int, ...],
    taps: int,
) -> Candidates:
    """What the tile of a pass over [N, C, *size] is chosen from; each element of it has ``taps`` terms."""
    view = problem.as_rank3 if channels_last else problem.as_rank3.planes
    element, outputs = problem.dtype.itemsize, view.output_pixels * view.channels

    def work(config: Config) -> Work:
        block, splits = config["BLOCK"], config["SPLITS"]
        partial = 4 if problem.index is None else 8
        return Work(
            programs=pool_blocks(view, size, channels_last, config)[0] * splits,
            steps=cdiv(taps, config["LANES"] * splits) * config["LINES"],
            step_flops=8 * block,
            step_elements=block,
            step_bytes=block * element,
            # A norm's gradient reads the input and the norms too.
            dram_bytes=problem.bytes * (2 if problem.kind == "lp" and direction == "backward" else 1),
            shared_memory=0,
            registers=64,
            warps=config["num_warps"],
            stages=9,  # eight unrolled loads under way, and the one in use
            matrix_share=0.0,
            extra_bytes=2 * splits * outputs * partial if splits > 1 else 0,
        )

    # One load of 16 bytes a thread; if each element is a load of its own, half as many elements.
    vectors = channels_last and problem.channels * element % 16 == 0
    width = {} if gpu.interpreted else {"BLOCK": 2048 // element if vectors else 512}
    if problem.kind == "lp":
        width["SPLITS"] = 1  # a root is of the whole sum
    return Candidates(space, (direction, problem, channels_last), work, gpu, width)


def why_not_pool(direction: str, problem: PoolProblem, gpu: Gpu, layout: Layout) -> str | None:
    """Why no kernel serves a pool, or None."""
    # Rows, which are pixels or the lines of planes, are numbered in 32 bits, with room for the last tile.
    lines = problem.batch * problem.channels * max(prod(problem.input_size[:-1]), prod(problem.output_size[:-1]))
    if max(problem.input_pixels, problem.output_pixels, lines) > INT32_MAX - 2**16:
        return "more than 2^31 pixels"
    # The start of an adaptive window is computed in 32 bits.
    if problem.adaptive and any(
        (h + 1) * (p + 1) > INT32_MAX for h, p in zip(problem.input_size, problem.output_size, strict=True)
    ):
        return "an adaptive axis whose sizes multiply to more than 2^31"
    return why_not_dtype(problem.dtype)


FAMILY = Family("pool", why_not_pool, _candidates, pool_forward)
