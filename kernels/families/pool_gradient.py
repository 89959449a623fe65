"""The gradient of a pool's input: every pixel gathers from the windows that hold it. No atomics, one order of sums.

``dx[h] = sum over windows p, tap = h + padding - p * stride, of dy[p] * share``, on each axis: ``share`` is 1 / count
in an average, 1 or 0 in a maximum. A thread has a block of SPAN pixels, SPAN a multiple of the stride, that begins at
``b * SPAN - padding``. The block meets the windows ``b * SPAN / stride + e`` by taps that do not depend on b, so taps
are constants. The thread loads each window's gradient and index once, and asks for each pixel whether its tap is the
one kept. For dilated, adaptive and large windows a thread has one pixel and finds its windows one by one.

Bytes: dy and the index once, dx once; in an lp norm also y and x. Windows that blocks share meet in L1. Tiles are those
of `pool_window`.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu
from fastconv.kernels.families.family import Family, Layout
from fastconv.kernels.families.pool_window import POOL_SINGLE, plane_strides, pool_candidates, why_not_pool
from fastconv.kernels.jit.walk import advance, in_elements
from fastconv.kernels.jit.windows import UNROLLED, exponents, extent, line_of, norm_form, place, pool_blocks, power
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.layout import INDEX_TYPES, dense_strides, load_width, needs_int64, pointer_type
from fastconv.kernels.problem.pool import PoolProblem
from fastconv.kernels.tiles.autotuned import Candidates


# y = (sum of x ** p) ** (1 / p), so dy / dx = x ** (p - 1), the pixel's factor, times y ** (1 - p), the window's.
@triton.jit
def slope_of(y, exponent, sign, NORM: tl.constexpr):
    """y ** (1 - p); ``exponent`` is p - 1. Like PyTorch's it is 0 for a zero, and with p = 1 for a NaN."""
    if NORM == 1:
        slope = tl.where(tl.abs(y) > 0, 1.0, 0.0)
    elif NORM == 2:
        slope = tl.where(y == 0, 0.0, 1.0 / y)
    else:
        slope = tl.where(y == 0, 0.0, power(y, -exponent, sign))
    return slope


@triton.jit
def derivative_of(x, exponent, sign, NORM: tl.constexpr):
    """x ** (p - 1)."""
    if NORM != 2:
        x = power(x, exponent, sign)
    return x


@triton.jit(
    do_not_specialize=[
        *("M", "C", "D", "H", "W", "O", "P", "Q", "blocks_d", "blocks_h", "blocks_w", "dy_n", "dy_d", "dy_h", "dy_w"),
        *("pad_d", "pad_h", "pad_w", "scale", "exponent", "sign"),
    ]
)
def pool_gradient_kernel(
    dy_ptr,  # [N, O, P, Q, C] by its strides
    index_ptr,  # [N, O, P, Q, C]: taps of maxima; else absent
    y_ptr,  # [N, O, P, Q, C]: lp norms; else absent
    x_ptr,  # like dx, in an lp norm other than 1; else absent
    dx_ptr,  # [N, D, H, W, C]
    M,  # rows
    C,  # in units of VEC
    D, H, W, O, P, Q,
    blocks_d, blocks_h, blocks_w,  # of pixels
    dy_n, dy_d, dy_h, dy_w,  # in units of VEC
    pad_d, pad_h, pad_w,
    scale,  # of a gradient, or of its share unless UNIFORM
    exponent, sign,  # of an lp norm's derivative: see `power`
    UNIFORM: tl.constexpr,
    NORM: tl.constexpr,  # lp: 1, 2, or 3 for any other; 0: none
    INCLUDE_PADDING: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, S: tl.constexpr,  # the window
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    SPAN_D: tl.constexpr, SPAN_H: tl.constexpr, SPAN_W: tl.constexpr,  # a thread's block of pixels
    PLANES: tl.constexpr, RANK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, SPAN_D x SPAN_H x SPAN_W pixels a thread."""
    # How many of the windows that meet a block begin before it.
    BEFORE_D: tl.constexpr = (T - 1) // STRIDE_D
    BEFORE_H: tl.constexpr = (R - 1) // STRIDE_H
    BEFORE_W: tl.constexpr = (S - 1) // STRIDE_W
    C *= VEC
    dy_n, dy_d, dy_h, dy_w = in_elements(dy_n, dy_d, dy_h, dy_w, VEC, WIDE)
    mask, n, d, h, w, c = place(M, C, blocks_d, blocks_h, blocks_w, PLANES, RANK, 1, BLOCK_M, BLOCK_C)
    images = dy_ptr + n * dy_n + c
    if WIDE:
        n = n.to(tl.int64)
    accs = ()
    for _ in tl.static_range(SPAN_D * SPAN_H * SPAN_W):
        accs = accs + (tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32),)
    for e_d in tl.static_range(-BEFORE_D, (SPAN_D - 1) // STRIDE_D + 1):
        o = d * (SPAN_D // STRIDE_D) + e_d
        volumes, mask_d, count_d = images, mask, 1
        if RANK == 3:
            volumes, mask_d = images + o * dy_d, mask & (o >= 0) & (o < O)
            if not UNIFORM:
                count_d = extent(o, D, O, STRIDE_D, pad_d, T, False, INCLUDE_PADDING)
        for e_h in tl.static_range(-BEFORE_H, (SPAN_H - 1) // STRIDE_H + 1):
            p = h * (SPAN_H // STRIDE_H) + e_h
            lines, line = volumes + p * dy_h, line_of(n, o, p, O, P, RANK)
            mask_h, count_h = mask_d & (p >= 0) & (p < P), count_d
            if not UNIFORM:
                count_h = count_d * extent(p, H, P, STRIDE_H, pad_h, R, False, INCLUDE_PADDING)
            for e_w in tl.static_range(-BEFORE_W, (SPAN_W - 1) // STRIDE_W + 1):
                q = w * (SPAN_W // STRIDE_W) + e_w
                held = mask_h & (q >= 0) & (q < Q)
                dy = tl.load(lines + q * dy_w, mask=held, other=0.0).to(tl.float32)
                if index_ptr is not None:
                    best = tl.load(index_ptr + (line * Q + q) * C + c, mask=held, other=0).to(tl.int32)
                elif not UNIFORM:
                    count = count_h * extent(q, W, Q, STRIDE_W, pad_w, S, False, INCLUDE_PADDING)
                    dy *= scale / tl.maximum(count, 1).to(tl.float32)
                if y_ptr is not None:
                    y = tl.load(y_ptr + (line * Q + q) * C + c, mask=held, other=1.0).to(tl.float32)
                    dy *= slope_of(y, exponent, sign, NORM)
                before = accs
                accs = ()
                for f in tl.static_range(SPAN_D * SPAN_H * SPAN_W):
                    t = f // (SPAN_H * SPAN_W) - e_d * STRIDE_D
                    r = f // SPAN_W % SPAN_H - e_h * STRIDE_H
                    s = f % SPAN_W - e_w * STRIDE_W
                    acc = before[f]
                    if t >= 0 and t < T and r >= 0 and r < R and s >= 0 and s < S:
                        if index_ptr is not None:
                            acc = tl.where(best == (t * R + r) * S + s, acc + dy, acc)
                        else:
                            acc += dy
                    accs = accs + (acc,)
    for f in tl.static_range(SPAN_D * SPAN_H * SPAN_W):
        z = d * SPAN_D - pad_d + f // (SPAN_H * SPAN_W)
        y = h * SPAN_H - pad_h + f // SPAN_W % SPAN_H
        x = w * SPAN_W - pad_w + f % SPAN_W
        inside = mask & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        if RANK == 3:
            inside = inside & (z >= 0) & (z < D)
        acc = accs[f]
        if index_ptr is None and UNIFORM:
            acc *= scale
        out = (line_of(n, z, y, D, H, RANK) * W + x) * C + c
        if x_ptr is not None:
            acc *= derivative_of(tl.load(x_ptr + out, mask=inside, other=1.0).to(tl.float32), exponent, sign, NORM)
        tl.store(dx_ptr + out, acc.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def window_of(
    h, j, size, outputs, stride, padding, dilation, window, ADAPTIVE: tl.constexpr, DILATED: tl.constexpr
):  # fmt: skip
    """The j-th window of an axis that may hold pixel ``h``: its number, its tap at ``h``, whether it holds ``h``."""
    if ADAPTIVE:
        p = h * outputs // size + j
        r = h - p * size // outputs
        held = p * size < (h + 1) * outputs
    elif DILATED:
        first = h + padding - j * dilation
        p = first // stride
        r = j
        held = (first >= 0) & (p * stride == first) & (p < outputs)
    else:
        p = (h + padding) // stride - j
        r = h + padding - p * stride
        held = (p >= 0) & (p < outputs) & (r < window)
    return p, r, held


@triton.jit(
    do_not_specialize=[
        *("M", "C", "D", "H", "W", "O", "P", "Q", "dy_n", "dy_d", "dy_h", "dy_w", "taps_d", "taps_h", "taps_w"),
        *("stride_d", "stride_h", "stride_w", "pad_d", "pad_h", "pad_w", "dilation_d", "dilation_h", "dilation_w"),
        *("windows_d", "windows_h", "windows_w", "scale", "exponent", "sign"),
    ]
)
def pool_pixel_gradient_kernel(
    dy_ptr,  # [N, O, P, Q, C] by its strides
    index_ptr,  # [N, O, P, Q, C]: taps of maxima; else absent
    y_ptr,  # [N, O, P, Q, C]: lp norms; else absent
    x_ptr,  # like dx, in an lp norm other than 1; else absent
    dx_ptr,  # [N, D, H, W, C]
    M,  # rows
    C,  # in units of VEC
    D, H, W, O, P, Q,
    dy_n, dy_d, dy_h, dy_w,  # in units of VEC
    taps_d, taps_h, taps_w, stride_d, stride_h, stride_w, pad_d, pad_h, pad_w, dilation_d, dilation_h, dilation_w,
    windows_d, windows_h, windows_w,  # how many may hold a pixel
    scale,  # of a gradient, or of its share unless UNIFORM
    exponent, sign,  # of an lp norm's derivative: see `power`
    ADAPTIVE: tl.constexpr, DILATED: tl.constexpr, UNIFORM: tl.constexpr,
    NORM: tl.constexpr,  # lp: 1, 2, or 3 for any other; 0: none
    INCLUDE_PADDING: tl.constexpr, PLANES: tl.constexpr, RANK: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx, one pixel a thread, for windows of every kind."""
    C *= VEC
    dy_n, dy_d, dy_h, dy_w = in_elements(dy_n, dy_d, dy_h, dy_w, VEC, WIDE)
    mask, n, d, h, w, c = place(M, C, D, H, W, PLANES, RANK, 1, BLOCK_M, BLOCK_C)
    images = dy_ptr + n * dy_n + c
    if WIDE:
        n = n.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    jt, jr, js = 0, 0, 0
    for _ in tl.range(0, windows_d * windows_h * windows_w, loop_unroll_factor=2):
        p, r, held_h = window_of(h, jr, H, P, stride_h, pad_h, dilation_h, taps_h, ADAPTIVE, DILATED)
        q, s, held_w = window_of(w, js, W, Q, stride_w, pad_w, dilation_w, taps_w, ADAPTIVE, DILATED)
        held = mask & held_h & held_w
        o, tap = 0, r
        dy = images + p * dy_h + q * dy_w
        if RANK == 3:
            o, t, held_d = window_of(d, jt, D, O, stride_d, pad_d, dilation_d, taps_d, ADAPTIVE, DILATED)
            held, tap, dy = held & held_d, t * taps_h + r, dy + o * dy_d
        gradient = tl.load(dy, mask=held, other=0.0).to(tl.float32)
        out = (line_of(n, o, p, O, P, RANK) * Q + q) * C + c
        if y_ptr is not None:
            y = tl.load(y_ptr + out, mask=held, other=1.0).to(tl.float32)
            gradient *= slope_of(y, exponent, sign, NORM)
        if index_ptr is not None:
            best = tl.load(index_ptr + out, mask=held, other=0).to(tl.int32)
            gradient = tl.where(best == tap * taps_w + s, gradient, 0.0)
        elif not UNIFORM:
            count = extent(q, W, Q, stride_w, pad_w, taps_w, ADAPTIVE, INCLUDE_PADDING)
            count *= extent(p, H, P, stride_h, pad_h, taps_h, ADAPTIVE, INCLUDE_PADDING)
            if RANK == 3:
                count *= extent(o, D, O, stride_d, pad_d, taps_d, ADAPTIVE, INCLUDE_PADDING)
            gradient *= scale / tl.maximum(count, 1).to(tl.float32)
        acc += gradient
        _, jt, jr, js = advance(0, jt, jr, js, 0, 0, 0, 1, windows_d, windows_h, windows_w, 3)
    if UNIFORM:
        acc *= scale
    out = (line_of(n, d, h, D, H, RANK) * W + w) * C + c
    if x_ptr is not None:
        acc *= derivative_of(tl.load(x_ptr + out, mask=mask, other=1.0).to(tl.float32), exponent, sign, NORM)
    tl.store(dx_ptr + out, acc.to(dx_ptr.dtype.element_ty), mask=mask)


MOST_PIXELS = 9  # of a block: a thread's registers hold no more sums


def pixel_block(problem: PoolProblem) -> tuple[int, ...] | None:
    """The sides of the block of pixels that a thread of `pool_gradient_kernel` has; None: that kernel cannot serve."""
    view = problem.as_rank3
    if problem.adaptive or any(d > 1 for d in problem.dilation) or problem.taps > UNROLLED:
        return None
    # At stride 1 two pixels along each axis of a plane share the windows that overlap.
    shared = [2 if axis and taps > 1 else 1 for axis, taps in enumerate(view.window)]
    found = tuple(stride if stride > 1 else two for stride, two in zip(view.stride, shared, strict=True))
    return found if found[0] * found[1] * found[2] <= MOST_PIXELS else None


def blocks_of(problem: PoolProblem) -> tuple[int, ...]:
    """The number of blocks of pixels along each axis."""
    view = problem.as_rank3
    block = pixel_block(problem)
    if block is None:
        return view.input_size
    return tuple((h + pad - 1) // b + 1 for h, pad, b in zip(view.input_size, view.padding, block, strict=True))


def pool_backward(direction: str, problem: PoolProblem, config: Config, gpu: Gpu, layout: Layout) -> Launches:
    """dy, index (absent unless ``problem.index``), y and x (absent unless an lp norm reads them) -> dx."""
    channels_last, strides = layout.channels_last, plane_strides(problem, problem.output_size, layout)
    view = problem.as_rank3 if channels_last else problem.as_rank3.planes
    block, blocks = pixel_block(problem), blocks_of(problem)
    vec = load_width(problem.dtype, view.channels, *strides)
    programs, rows, sides = pool_blocks(view, blocks, channels_last, {"BLOCK": config["BLOCK"]})
    element = pointer_type(problem.dtype)
    sizes = (rows, view.channels // vec, *view.input_size, *view.output_size)
    steps = tuple(stride // vec for stride in strides)
    norm = norm_form(problem.norm)
    last = (problem.scale, *exponents(problem.norm - 1.0))
    scalars: tuple[int | float, ...]
    if block is not None:
        scalars = (*sizes, *blocks, *steps, *view.padding, *last)
        constants = {
            **dict(zip("TRS", view.window, strict=True)),
            **{f"STRIDE_{axis}": value for axis, value in zip("DHW", view.stride, strict=True)},
            **{f"SPAN_{axis}": value for axis, value in zip("DHW", block, strict=True)},
        }
    else:
        geometry = (*view.window, *view.stride, *view.padding, *view.dilation)
        scalars = (*sizes, *steps, *geometry, *view.windows, *last)
        constants = {"ADAPTIVE": problem.adaptive, "DILATED": any(d > 1 for d in view.dilation)}
    launch = Launch(
        kernel=pool_pixel_gradient_kernel if block is None else pool_gradient_kernel,
        grid=(programs, 1, 1),
        pointers=(
            element,
            None if problem.index is None else INDEX_TYPES[problem.index],
            element if norm > 0 else None,
            element if norm > 1 else None,
            element,
        ),
        scalars=scalars,
        constants={
            "UNIFORM": problem.uniform_divisor != 0,
            "NORM": norm,
            "INCLUDE_PADDING": problem.include_padding,
            "PLANES": not channels_last,
            "RANK": max(2, problem.rank),
            "VEC": vec,
            "WIDE": needs_int64((view.output_shape, strides), (view.input_shape, dense_strides(view.input_shape))),
            **constants,
            **sides,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return (launch,)


POOL_GRADIENT = replace(POOL_SINGLE, name="pool_gradient", kernels=(pool_gradient_kernel, pool_pixel_gradient_kernel))


def _candidates(direction: str, problem: PoolProblem, gpu: Gpu, layout: Layout) -> Candidates:
    view = problem.as_rank3 if layout.channels_last else problem.as_rank3.planes
    size, taps = blocks_of(problem), prod(view.windows)
    return pool_candidates(POOL_GRADIENT, direction, problem, layout.channels_last, gpu, size, taps)


FAMILY = Family("pool", why_not_pool, _candidates, pool_backward)
