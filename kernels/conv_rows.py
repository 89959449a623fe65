"""Convolution of few input channels, a network's first layer: a filter's row is one run of the image.

In channels_last memory the S * C elements that a row of the filter meets are neighbours. With e counting them,

    y[n, p, q, k] = sum over rows r, elements e of x[n, p * stride - padding + r * dilation, start(q) + e] * w[k, r, e],

a product whose reduction runs over (row, element), RUN elements a row, a power of two. COLUMNS neighbouring outputs
share one run: their weights lie in it side by side, each moved on by its distance, and are columns of one tile. So
every run begins at a multiple of VEC elements, VEC as large as the strides allow, and x is copied asynchronously where
single channels would be read by two bytes each: for 7x7 stride 2 on three channels 4 loads of 8 bytes where a gather of
(tap, channel) pairs has 32 of 2. Bytes: x, w and y once each, rows of x again from L1 and L2.

Elements of the run beside an output's own window meet zero weights; where one of them is infinite the sum is a NaN, and
a tile that holds any is computed again, one element of the run after another. wgrad stores no such product.

The idea of packing rows: cuDNN's and CUTLASS's "few channels" kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from fastconv.autotune import Config
from fastconv.kernels.conv_gather import PART_K, finish
from fastconv.kernels.epilogue import ACTIVATIONS, PLAIN, Epilogue
from fastconv.kernels.launch import Launch
from fastconv.kernels.layout import Strides, common, dense_strides, linear_stride, pointer_type, vector, wide
from fastconv.kernels.pixels import advance, in_elements, unravel
from fastconv.kernels.problem import ConvProblem
from fastconv.kernels.reduce import split_sum

MOST_CHANNELS = 4
LONGEST_RUN = 64


@dataclass(frozen=True)
class Rows:
    """How the rows of a filter are read."""

    columns: int  # neighbouring outputs that share a run
    vec: int  # elements of one load
    shift: int  # elements from the run's begin to the first output's window
    used: int  # elements from the run's begin to the last output's window's end
    run: int  # used, rounded up to a power of two


def rows_unfit(problem: ConvProblem, x_strides: Strides | None = None) -> str | None:
    """Why the rows of a filter meet no runs of the image, or none so short, or None."""
    c, s = problem.in_channels, problem.filter_size[-1]
    if problem.groups > 1:
        return f"{problem.groups} groups"
    if c > MOST_CHANNELS:
        return f"{c} input channels"
    if problem.taps == 1:
        return "one tap"
    if s > 1 and problem.dilation[-1] > 1:
        return "a dilated row is no run"
    pixel = (x_strides or dense_strides(problem.lifted.input_shape))[-1]
    if problem.input_size[-1] > 1 and pixel != c:
        return f"pixels of {c} channels lie {pixel} elements apart"
    if s * c > LONGEST_RUN:
        return f"{s * c} elements a row of the filter, more than {LONGEST_RUN}"
    return None


def row_form(problem: ConvProblem, x_strides: Strides | None = None) -> Rows | str:
    """The form with the shortest run and the widest loads, or the reason why there is none."""
    unfit = rows_unfit(problem, x_strides)
    if unfit is not None:
        return unfit
    c, s = problem.in_channels, problem.filter_size[-1]
    *others, _ = x_strides or dense_strides(problem.lifted.input_shape)
    forms = []
    for columns in (1, 2):
        distance = problem.stride[-1] * c
        vec = common(problem.dtype, columns * distance, problem.input_size[-1] * c, *others)
        shift = -problem.padding[-1] * c % vec
        used = shift + s * c + (columns - 1) * distance
        form = Rows(columns, vec, shift, used, max(8, triton.next_power_of_2(used)))
        if vec * problem.dtype.itemsize >= 4 and form.run <= LONGEST_RUN:
            forms.append(form)
    if not forms:
        row, size = problem.input_size[-1] * c, problem.dtype.itemsize
        return f"rows of {row} elements of {size} bytes: no copy of 4 bytes begins each run"
    return min(forms, key=lambda form: (form.run, -form.vec, form.columns))


@triton.jit(do_not_specialize=["K", "rows", "window", "shift", "distance", "padded", "elements"])
def conv_rows_pack_kernel(
    w_ptr,  # [K, rows, window]
    out_ptr,  # [columns, K, padded, RUN]
    K,
    rows,
    window,  # elements that a row meets
    shift,
    distance,  # between two outputs' windows
    padded,  # rows of whole steps
    elements,  # that are written
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each column's weights at their place in the run, zeros beside them."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = index // RUN % padded
    k = index // RUN // padded
    column = k // K
    e = index % RUN - shift - column * distance
    inside = (index < elements) & (row < rows) & (e >= 0) & (e < window)
    w = tl.load(w_ptr + (k % K * rows + row) * window + e, mask=inside, other=0.0)
    tl.store(out_ptr + index, w, mask=index < elements)


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
    w_ptr,  # [COLUMNS, K, rows of whole steps, RUN]
    bias_ptr,  # [K], as the next five: absent where the epilogue has no use for them
    mean_ptr, var_ptr, gamma_ptr, beta_ptr,  # of batch norm
    slope_ptr,  # of PReLU
    residual_ptr,  # as y
    y_ptr,  # [N, O, P, Q, K]
    tile_count_ptr,  # [tiles]
    tile_mean_ptr, tile_m2_ptr,  # [tiles, K]
    N, D, H,
    row_length,  # W * C, in units of VEC
    O, P, Q,
    K,  # in units of VEC_K
    T, R,
    window,  # elements that a row meets
    shift,  # of the first output's window in the run
    distance,  # between two outputs' windows
    x_stride_n, x_stride_d, x_stride_h,  # in units of VEC, as the next two
    hop,  # between two runs
    begin,  # of the first run in its row
    y_stride_n, y_stride_d, y_stride_h, y_stride_w,  # in units of VEC_K
    stride_d, stride_h,
    padding_d, padding_h,
    dilation_d, dilation_h,
    eps,  # of batch norm
    a, b,  # of the activation
    VEC: tl.constexpr,
    VEC_K: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,  # neighbouring outputs that share a run
    RUN: tl.constexpr,
    USED: tl.constexpr,  # elements of the run that a window meets, in whole loads
    EXACT: tl.constexpr,  # every one of them is in every output's window
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,
    PART_K: tl.constexpr,
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
    ROWS: tl.constexpr = BLOCK_C // RUN
    COLUMN_K: tl.constexpr = COLUMNS * BLOCK_K

    k_tiles = tl.cdiv(K, BLOCK_K)
    pid_k = tl.program_id(0) % k_tiles
    tile = tl.program_id(0) // k_tiles

    runs = tl.cdiv(Q, COLUMNS)
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
    steps = tl.cdiv(rows, ROWS)
    w_row = (column * K + offs_k) * (steps * BLOCK_C)
    mask_w = offs_k < K
    w_tile = w_ptr + w_row[None, :] + tl.arange(0, BLOCK_C)[:, None]

    acc = tl.zeros((BLOCK_M, COLUMN_K), dtype=tl.float32)
    # A loop that may not run would make ptxas wait for every wgmma; behind this guard it does not.
    if steps > 0:
        for step in range(steps):
            row = step * ROWS + step_row
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
            acc = tl.dot(x_step, w_step, acc, input_precision=PRECISION)

    if not EXACT:  # noqa: SIM102 (the outer one is the compiler's)
        # Infinity times the zeros beside an output's window: then without them, one element after another.
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

    # A run's outputs are neighbours: rows of the tile that is stored.
    acc = tl.reshape(acc, (BLOCK_M * COLUMNS, BLOCK_K))
    m = tl.arange(0, BLOCK_M * COLUMNS)
    n, o, p, q = unravel(tile * BLOCK_M + m // COLUMNS, O, P, runs, RANK)
    q = q * COLUMNS + m % COLUMNS
    mask_m = (n < N) & (q < Q)
    y_row = n * y_stride_n + p * y_stride_h + q * y_stride_w
    if RANK == 3:
        y_row += o * y_stride_d
    if tile_count_ptr is not None:
        tl.store(tile_count_ptr + tile, tl.sum(mask_m.to(tl.float32), axis=0))
    finish(
        acc, pid_k * BLOCK_K, mask_m, y_row, tile, 0, K,
        bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual_ptr, y_ptr, tile_mean_ptr, tile_m2_ptr,
        eps, a, b, ACT, RESIDUAL_AFTER, BLOCK_M * COLUMNS, BLOCK_K, PART_K,
    )  # fmt: skip


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
    dw_ptr,  # [splits, COLUMNS, K, T, R, window]
    N, D, H,
    row_length,  # W * C, in units of VEC
    O, P, Q,
    K,  # in units of VEC_K
    T, R,
    window,  # elements that a row meets
    shift,  # of the first output's window in the run
    distance,  # between two outputs' windows
    x_stride_n, x_stride_d, x_stride_h,  # in units of VEC, as the next two
    hop,  # between two runs
    begin,  # of the first run in its row
    dy_stride,  # of its pixels, which lie at even distances, in units of VEC_K
    stride_d, stride_h,
    padding_d, padding_h,
    dilation_d, dilation_h,
    splits,
    VEC: tl.constexpr,
    VEC_K: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    USED: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
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
    PART: tl.constexpr = BLOCK_K // COLUMNS

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

    runs_q = tl.cdiv(Q, COLUMNS)
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
    # A loop that may not run would make ptxas wait for every wgmma; behind this guard it does not.
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
            pixel = pixel * Q + q * COLUMNS
            place = first[:, None] + offs_e[None, :]
            h = x_h[:, None] + tap_h[None, :]
            mask = mask_m[:, None] & mask_c[None, :] & (h >= 0) & (h < H) & (place >= 0) & (place < row_length)
            if RANK == 3:
                d = x_d[:, None] + tap_d[None, :]
                mask = mask & (d >= 0) & (d < D)
            x_step = tl.load(x_tile + x_row[:, None], mask=mask, other=0.0)
            mask_y = mask_k[:, None] & mask_m[None, :]
            if COLUMNS > 1:
                mask_y = mask_y & (column[:, None] + (q * COLUMNS)[None, :] < Q)
            dy_step = tl.load(dy_tile + (pixel * dy_stride)[None, :], mask=mask_y, other=0.0)
            acc = tl.dot(dy_step, x_step, acc, input_precision=PRECISION)
            n, o, p, q = advance(n, o, p, q, n_step, o_step, p_step, q_step, O, P, runs_q, RANK)

    # Each column's own window of the run, as a split of its own.
    own = offs_e[None, :] - (shift + column * distance)[:, None]
    mask = mask_k[:, None] & (row < rows)[None, :] & (own >= 0) & (own < window)
    out = dw_ptr + split.to(tl.int64) * (COLUMNS * K * rows * window)
    out += ((column * K + offs_k) * (rows * window))[:, None] + (row * window)[None, :]
    tl.store(out + own, acc.to(dw_ptr.dtype.element_ty), mask=mask)


def conv_rows(
    problem: ConvProblem,
    form: Rows,
    config: Config,
    precision: str,
    x_strides: Strides | None = None,
    y_strides: Strides | None = None,
    bias: bool = False,
    epilogue: Epilogue = PLAIN,
) -> tuple[Launch, Launch]:
    """The launches of fprop: weight -> its rows, then as `conv_gather`'s, with these for it.

    ``form`` is `row_form`'s for these strides, here and below.
    """
    lifted = problem.lifted
    x_strides = x_strides or dense_strides(lifted.input_shape)
    y_strides = y_strides or dense_strides(lifted.output_shape)
    k, element = problem.out_channels, pointer_type(problem.dtype)
    vec_k = vector(problem.dtype, k, *y_strides)
    tile = {name: config[name] for name in ("BLOCK_M", "BLOCK_K", "BLOCK_C")}
    used = triton.cdiv(form.used, form.vec) * form.vec
    window = problem.filter_size[-1] * problem.in_channels
    runs = problem.output_pixels // problem.output_size[-1] * triton.cdiv(problem.output_size[-1], form.columns)
    steps = triton.cdiv(rows_of(problem) * form.run, tile["BLOCK_C"])
    tiles = triton.cdiv(runs, tile["BLOCK_M"])
    product = Launch(
        kernel=conv_rows_kernel,
        grid=(tiles * triton.cdiv(k, tile["BLOCK_K"]), 1, 1),
        pointers=(
            *(element, element, element if bias else None, *epilogue.pointers),
            *(element, *("*fp32" if epilogue.statistics else None,) * 3),
        ),
        scalars=(
            *_scalars(problem, form, x_strides, vec_k),
            *(stride // vec_k for stride in y_strides),
            *_taps(lifted),
            *epilogue.scalars,
        ),
        constants={
            "VEC": form.vec,
            "VEC_K": vec_k,
            "RANK": max(problem.rank, 2),
            "COLUMNS": form.columns,
            "RUN": form.run,
            "USED": used,
            "EXACT": form.columns == 1 and used == window,
            "WIDE": wide((lifted.input_shape, x_strides), (lifted.output_shape, y_strides)),
            "PRECISION": precision,
            "ACT": ACTIVATIONS[epilogue.act].forward,
            "RESIDUAL_AFTER": epilogue.residual_after,
            # A run's outputs together are as many rows; with half of the columns no compiler spills any.
            "PART_K": min(tile["BLOCK_K"], PART_K // (2 * form.columns)),
            **tile,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        tiles=tiles,
    )
    return pack_rows(problem, form, steps * tile["BLOCK_C"] // form.run), product


def pack_rows(problem: ConvProblem, form: Rows, padded: int) -> Launch:
    """The launch that lays out a weight as runs, so many ``padded`` rows of each channel; its last scalar counts the
    elements."""
    c, k, element = problem.in_channels, problem.out_channels, pointer_type(problem.dtype)
    elements, block = form.columns * k * padded * form.run, 1024
    return Launch(
        kernel=conv_rows_pack_kernel,
        grid=(triton.cdiv(elements, block), 1, 1),
        pointers=(element, element),
        scalars=(
            *(k, rows_of(problem), problem.filter_size[-1] * c, form.shift, problem.stride[-1] * c),
            *(padded, elements),
        ),
        constants={"RUN": form.run, "BLOCK": block},
        num_warps=4,
        num_stages=1,
    )


def conv_rows_wgrad(
    problem: ConvProblem,
    form: Rows,
    config: Config,
    precision: str,
    x_strides: Strides | None = None,
    dy_strides: Strides | None = None,
    channels_last: bool = True,
) -> tuple[Launch, ...]:
    """The launches of wgrad, as `conv_wgrad`'s, but the workspace holds each split's gradient of every column."""
    lifted = problem.lifted
    x_strides = x_strides or dense_strides(lifted.input_shape)
    dy_strides = dy_strides or dense_strides(lifted.output_shape)
    dy_stride = linear_stride(lifted.output_shape, dy_strides)
    assert dy_stride is not None, "the launcher copies such a dy"
    c, k = problem.in_channels, problem.out_channels
    vec_k = vector(problem.dtype, k, dy_stride)
    tile = {name: config[name] for name in ("BLOCK_K", "BLOCK_C", "BLOCK_M")}
    splits = config["SPLITS"]
    partials = splits * form.columns
    direct = partials == 1 and (channels_last or c == 1)
    element = pointer_type(problem.dtype)
    tiles = triton.cdiv(k, tile["BLOCK_K"] // form.columns) * triton.cdiv(rows_of(problem) * form.run, tile["BLOCK_C"])
    product = Launch(
        kernel=conv_rows_wgrad_kernel,
        grid=(tiles * splits, 1, 1),
        pointers=(element, element, element if direct else "*fp32"),
        scalars=(*_scalars(problem, form, x_strides, vec_k), dy_stride // vec_k, *_taps(lifted), splits),
        constants={
            "VEC": form.vec,
            "VEC_K": vec_k,
            "RANK": max(problem.rank, 2),
            "COLUMNS": form.columns,
            "RUN": form.run,
            "USED": triton.cdiv(form.used, form.vec) * form.vec,
            "WIDE": wide((lifted.input_shape, x_strides), (lifted.output_shape, dy_strides)),
            "PRECISION": precision,
            **tile,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    if direct:
        return (product,)
    return product, split_sum(partials, k, problem.taps, c, problem.dtype, channels_last)


def rows_of(problem: ConvProblem) -> int:
    """Rows of the filter."""
    return problem.taps // problem.filter_size[-1]


def _scalars(problem: ConvProblem, form: Rows, x_strides: Strides, vec_k: int) -> tuple[int, ...]:
    lifted, c = problem.lifted, problem.in_channels
    depth, height, width = lifted.input_size
    distance = lifted.stride[-1] * c
    return (
        *(problem.batch, depth, height, width * c // form.vec),
        *lifted.output_size,
        problem.out_channels // vec_k,
        *lifted.filter_size[:2],
        *(lifted.filter_size[-1] * c, form.shift, distance),
        *(stride // form.vec for stride in x_strides[:3]),
        form.columns * distance // form.vec,
        -(lifted.padding[-1] * c + form.shift) // form.vec,
    )


def _taps(lifted: ConvProblem) -> tuple[int, ...]:
    return *lifted.stride[:2], *lifted.padding[:2], *lifted.dilation[:2]
