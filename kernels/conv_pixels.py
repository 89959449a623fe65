"""The pixel GEMM: fprop and dgrad whose tiles are as long as the batch, by bulk tensor copies.

``y[n, p, k] = sum over taps r, channels c of x[n, p * stride - padding + r * dilation, c] * w[k, r, c]``, on each axis.
One program computes BLOCK_N images x BLOCK_K channels of one output pixel. A tap is inside the image for all of them or
for none: only taps inside are walked, one bulk copy brings each one's channels, and nothing is masked. Bytes: x, w and
y once each; taps re-read x from L2.

dgrad is the same walk over the taps of its pixel's stride phase (`conv_gather.walk`); a pixel that no tap meets is
written too. Two things save what L2 would have to give. Of few images a box holds several neighbours of a row; under a
stride of two, neighbours of one parity, which is an axis of its own in the strided operand's view. And two pixels of a
row share all but one of the columns that S taps meet, and the taps: S + 1 boxes of x and S of w feed 2 S products.

Where registers allow, each product of a pair's step has a sum of its own: after one that another adds to wgmma waits,
and tcgen05 moves the sum through registers.

The product is [BLOCK_K, images], so that few images still fill the tensor cores, whose tiles have at least 64 rows, and
a thread holds few of a channel's numbers in the epilogue: 128x128 fits twice on a multiprocessor with any. Images past
the batch and channels past the last are read as 0 and not written; only statistics need a mask.

The grid is not persistent: what a walk over tiles would hide, a program's first copies and its epilogue, is little
beside the steps of all taps, and two programs a multiprocessor hide most of it. Where one step is the whole product,
`conv_gemm` walks.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

from fastconv.autotune import Config
from fastconv.kernels.conv_gather import walk
from fastconv.kernels.descriptor import Descriptor, pitch
from fastconv.kernels.epilogue import ACTIVATIONS, PLAIN, Epilogue, activated, normalise, statistics
from fastconv.kernels.launch import Launch
from fastconv.kernels.layout import Strides, dense_strides, pointer_type
from fastconv.kernels.problem import ConvProblem


@triton.jit
def taps_inside(
    index, SIZE, OUT, TAPS, STRIDE, PADDING, DILATION, GCD, INVERSE, DGRAD: tl.constexpr, PIXELS: tl.constexpr
):
    """Output ``index`` of one axis and its taps that fall inside the source of SIZE pixels, j from 0 to count:
    source = base + j * hop; tap of the filter = tap + j * skip. Of PIXELS neighbours of one phase the first one's base,
    and the taps inside for any of them.

    Returns (base, hop, tap, skip, count).
    """
    _, _, _, base, move, hop, tap, skip, taps = walk(
        index if DGRAD else 0, OUT, TAPS, STRIDE, PADDING, DILATION, GCD, INVERSE, DGRAD
    )
    if DGRAD:
        low, high, distance = base - SIZE + 1, base + PIXELS - 1, -hop
    else:
        base += index * move
        low, high, distance = (1 - PIXELS) * STRIDE - base, SIZE - 1 - base, hop
    # Quotients of what is not negative alone: negative ones are rounded towards 0.
    begin = (tl.maximum(low, 0) + distance - 1) // distance
    end = tl.where(high < 0, 0, tl.minimum(tl.maximum(high, 0) // distance + 1, taps))
    return base + begin * hop, hop, tap + begin * skip, skip, tl.maximum(end - begin, 0)


@triton.jit
def read(view, d, h, w, n, c, RANK: tl.constexpr, PARITY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS]: pixels of a row from w on, of its PARITY alone, images of each from n on; channels from c on."""
    if PARITY:
        box = view.load([h, w & 1, w >> 1, n, c])
    elif RANK == 3:
        box = view.load([d, h, w, n, c])
    else:
        box = view.load([h, w, n, c])
    return tl.reshape(box, (ROWS, COLUMNS))


@triton.jit
def read_weight(w, tap, k, c, DGRAD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_K, BLOCK_C] of one tap: produced channels from k on, reduced ones from c on."""
    if DGRAD:
        return tl.reshape(w.load([tap, c, k]), (BLOCK_C, BLOCK_K)).T
    else:
        return tl.reshape(w.load([tap, k, c]), (BLOCK_K, BLOCK_C))


@triton.jit
def finish_pixels(
    acc, d, h, w, n, k, mask_m, tile, group, K,
    bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual, y,
    tile_count_ptr, tile_mean_ptr, tile_m2_ptr, eps, a, b,
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,
    RANK: tl.constexpr,
    PARITY: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The epilogue of acc [PIXELS * BLOCK_N, BLOCK_K] of neighbouring pixels from (d, h, w) on."""
    offs_k = k + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    channel = group * K + offs_k
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + channel, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    if tile_mean_ptr is not None:
        tl.store(tile_count_ptr + tile, tl.sum(mask_m.to(tl.float32), axis=0))
        mean, m2 = statistics(acc, mask_m)
        row = tile * (tl.num_programs(1) * K) + channel
        tl.store(tile_mean_ptr + row, mean, mask=mask_k)
        tl.store(tile_m2_ptr + row, m2, mask=mask_k)
    if mean_ptr is not None:
        acc = normalise(acc, channel, mask_k, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps)
    added = None
    if residual is not None:
        added = read(residual, d, h, w, n, group * K + k, RANK, PARITY, PIXELS * BLOCK_N, BLOCK_K).to(tl.float32)
    acc = activated(acc, added, channel, mask_k, slope_ptr, a, b, ACT, RESIDUAL_AFTER)
    if PARITY:
        y.store([h, w & 1, w >> 1, n, group * K + k], tl.reshape(acc.to(y.dtype), (1, 1, PIXELS, BLOCK_N, BLOCK_K)))
    elif RANK == 3:
        y.store([d, h, w, n, group * K + k], tl.reshape(acc.to(y.dtype), (1, 1, PIXELS, BLOCK_N, BLOCK_K)))
    else:
        y.store([h, w, n, group * K + k], tl.reshape(acc.to(y.dtype), (1, PIXELS, BLOCK_N, BLOCK_K)))


@triton.jit(
    do_not_specialize=[
        "N", "D", "H", "W", "C", "O", "P", "Q", "K", "T", "R", "S",
        "stride_d", "stride_h", "stride_w", "padding_d", "padding_h", "padding_w",
        "dilation_d", "dilation_h", "dilation_w", "gcd_d", "gcd_h", "gcd_w", "inverse_d", "inverse_h", "inverse_w",
        "eps", "a", "b",
    ]
)  # fmt: skip
def conv_pixels_kernel(
    x,  # [D, H, W, N, groups * C], without D in rank 2: the input (fprop) or the output's gradient (dgrad); see PARITY
    w,  # [taps, channels of the output, input channels of a group]
    bias_ptr,  # [groups * K], as the next five: absent where the epilogue has no use for them
    mean_ptr, var_ptr, gamma_ptr, beta_ptr,  # of batch norm
    slope_ptr,  # of PReLU
    residual,  # as y
    y,  # [O, P, Q, N, groups * K], without O in rank 2; see PARITY
    tile_count_ptr,  # [tiles of BLOCK_N images of one pixel]
    tile_mean_ptr, tile_m2_ptr,  # [tiles, groups * K]
    N, D, H, W,
    C,  # reduced channels of a group
    O, P, Q,
    K,  # produced channels of a group
    T, R, S,
    stride_d, stride_h, stride_w,
    padding_d, padding_h, padding_w,
    dilation_d, dilation_h, dilation_w,
    gcd_d, gcd_h, gcd_w,  # of dilation and stride
    inverse_d, inverse_h, inverse_w,  # of dilation / gcd modulo stride / gcd
    eps,  # of batch norm
    a, b,  # of the activation
    RANK: tl.constexpr,  # 3, or 2 where the first axis has size one
    DGRAD: tl.constexpr,
    PIXELS: tl.constexpr,  # neighbours in a row that a box holds; each has BLOCK_N rows of a product
    PARITY: tl.constexpr,  # a stride of two: x (fprop) or y (dgrad) is [H, 2, W / 2, N, C], a box of one parity
    ROW: tl.constexpr,  # taps of a filter row, of dilation 1, that two products share; 0: one product
    SUMS: tl.constexpr,  # of each of these two: as many as taps, or one
    PRECISION: tl.constexpr,  # of an fp32 product: "tf32" or "ieee"
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,  # the activation
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = PIXELS * BLOCK_N
    WIDTH: tl.constexpr = 2 if ROW else PIXELS
    X_PARITY: tl.constexpr = PARITY and not DGRAD
    Y_PARITY: tl.constexpr = PARITY and DGRAD
    # Channel tiles fastest, then groups and the pixels of a row, images last: x comes from DRAM once and whole pages at
    # a time, and what a row of the filter spans stays in L2.
    pid = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    k_tiles = tl.cdiv(K, BLOCK_K)
    k = pid % k_tiles * BLOCK_K
    group = pid // k_tiles % tl.num_programs(1)
    tile = pid // k_tiles // tl.num_programs(1)
    if Y_PARITY:
        columns = 2 * tl.cdiv(Q, 2 * PIXELS)
        column = tile % columns
        q = column // 2 * 2 * PIXELS + column % 2
    else:
        columns = tl.cdiv(Q, WIDTH)
        q = tile % columns * WIDTH
    part = tile % columns
    n = tile // columns
    p = n % P
    n = n // P
    o = 0
    d, hop_d, tap_d, skip_d, taps_d = 0, 0, 0, 0, 1
    if RANK == 3:
        o = n % O
        n = n // O
        d, hop_d, tap_d, skip_d, taps_d = taps_inside(
            o, D, O, T, stride_d, padding_d, dilation_d, gcd_d, inverse_d, DGRAD, 1
        )
    n *= BLOCK_N
    h, hop_h, tap_h, skip_h, taps_h = taps_inside(
        p, H, P, R, stride_h, padding_h, dilation_h, gcd_h, inverse_h, DGRAD, 1
    )
    # Channels of w that are reduced lie along its first axis in dgrad, which all groups share.
    w_k = k if DGRAD else group * K + k
    w_c = group * C if DGRAD else 0
    x_c = group * C
    acc = tl.zeros((BLOCK_K, ROWS), dtype=tl.float32)
    # Of a pair's two pixels, `acc` is of the one that meets column u of x with tap u, `far` of that with tap u - 1.
    NEAR: tl.constexpr = 1 if DGRAD else 0
    if ROW:
        TURN: tl.constexpr = -1 if DGRAD else 1
        # (Triton would evaluate annotations.)
        sums = ()  # type: tuple[tl.tensor, ...]
        for _i in tl.static_range(2 * SUMS):
            sums = sums + (tl.zeros((BLOCK_K, ROWS), dtype=tl.float32),)
        column = q + NEAR - TURN * padding_w
        steps = taps_d * taps_h * tl.cdiv(C, BLOCK_C)
        # A loop that may not run would make ptxas wait for every wgmma; behind this guard it does not.
        if steps > 0:
            c, r, t = 0, 0, 0
            for _ in range(steps):
                index = ((tap_d + t * skip_d) * R + tap_h + r * skip_h) * ROW
                x_d = d + t * hop_d
                x_h = h + r * hop_h
                x_near = read(x, x_d, x_h, column, n, x_c + c, RANK, X_PARITY, ROWS, BLOCK_C)
                for s in tl.static_range(ROW):
                    x_far = read(x, x_d, x_h, column + TURN * (s + 1), n, x_c + c, RANK, X_PARITY, ROWS, BLOCK_C)
                    w_step = read_weight(w, index + s, w_k, w_c + c, DGRAD, BLOCK_K, BLOCK_C)
                    near = tl.dot(w_step, x_near.T, sums[0], input_precision=PRECISION)
                    far = tl.dot(w_step, x_far.T, sums[1], input_precision=PRECISION)
                    sums = sums[2:] + (near, far)
                    x_near = x_far
                c += BLOCK_C
                carry = c >= C
                c = tl.where(carry, 0, c)
                r = tl.where(carry, r + 1, r)
                if RANK == 3:
                    carry = r >= taps_h
                    r = tl.where(carry, 0, r)
                    t = tl.where(carry, t + 1, t)
        acc, far = sums[0], sums[1]
        for i in tl.static_range(1, SUMS):
            acc += sums[2 * i]
            far += sums[2 * i + 1]
    else:
        column, hop_w, tap_w, skip_w, taps_w = taps_inside(
            q, W, Q, S, stride_w, padding_w, dilation_w, gcd_w, inverse_w, DGRAD, PIXELS
        )
        steps = taps_d * taps_h * taps_w * tl.cdiv(C, BLOCK_C)
        # A loop that may not run would make ptxas wait for every wgmma; behind this guard it does not.
        if steps > 0:
            c, s, r, t = 0, 0, 0, 0
            for _ in range(steps):
                index = ((tap_d + t * skip_d) * R + tap_h + r * skip_h) * S + tap_w + s * skip_w
                at = column + s * hop_w
                x_step = read(x, d + t * hop_d, h + r * hop_h, at, n, x_c + c, RANK, X_PARITY, ROWS, BLOCK_C)
                w_step = read_weight(w, index, w_k, w_c + c, DGRAD, BLOCK_K, BLOCK_C)
                acc = tl.dot(w_step, x_step.T, acc, input_precision=PRECISION)
                # Carried counters: a division a step costs more than the step's other arithmetic.
                c += BLOCK_C
                carry = c >= C
                c = tl.where(carry, 0, c)
                s = tl.where(carry, s + 1, s)
                carry = s >= taps_w
                s = tl.where(carry, 0, s)
                r = tl.where(carry, r + 1, r)
                if RANK == 3:
                    carry = r >= taps_h
                    r = tl.where(carry, 0, r)
                    t = tl.where(carry, t + 1, t)

    rows = tl.arange(0, ROWS)
    mask_n = n + rows % BLOCK_N < N
    tile = (n // BLOCK_N * O + o if RANK == 3 else n // BLOCK_N) * P + p
    MOVE: tl.constexpr = 2 if Y_PARITY else 1
    if ROW:
        tile = tile * columns * 2 + q
        for i in tl.static_range(2):
            # The second pixel of a row's last pair may be none.
            finish_pixels(
                (acc if i == NEAR else far).T, o, p, q + i, n, k, mask_n & (q + i < Q), tile + i, group, K,
                bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual, y,
                tile_count_ptr, tile_mean_ptr, tile_m2_ptr, eps, a, b,
                ACT, RESIDUAL_AFTER, RANK, Y_PARITY, PIXELS, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        finish_pixels(
            acc.T, o, p, q, n, k, mask_n & (q + rows // BLOCK_N * MOVE < Q), tile * columns + part, group, K,
            bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual, y,
            tile_count_ptr, tile_mean_ptr, tile_m2_ptr, eps, a, b,
            ACT, RESIDUAL_AFTER, RANK, Y_PARITY, PIXELS, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def sums_of(config: Config) -> int:
    """Sums that a program has for each of its pixels: with eight warps up to 192 registers a thread, or all but a
    fourth of tensor memory."""
    pairs = config["PAIRS"]
    separate = 2 * pairs * config["PIXELS"] * config["BLOCK_N"] * config["BLOCK_K"] <= 6 * 64 * 128
    return pairs if pairs and separate else 1


@cache
def taps_walked(direction: str, problem: ConvProblem, pixels: int, pairs: int) -> float:
    """Taps that a program walks, on average; of ``pairs`` the rows of taps."""
    lifted = problem.lifted
    source, size = lifted.input_size, lifted.output_size
    if direction == "dgrad":
        source, size = size, source
    walked = 1.0
    for axis in range(2 if pairs else 3):
        r, stride, padding, dilation = (
            values[axis] for values in (lifted.filter_size, lifted.stride, lifted.padding, lifted.dilation)
        )
        met = 0
        width = pixels if axis == 2 else 1
        move = stride if direction == "dgrad" and width > 1 else 1
        groups = [range(i, i + width * move, move) for i in range(size[axis]) if i // move % width == 0]
        for group in groups:
            for tap in range(r):
                for i in group:
                    if direction == "dgrad":
                        at, rest = divmod(i + padding - tap * dilation, stride)
                    else:
                        at, rest = i * stride - padding + tap * dilation, 0
                    if rest == 0 and 0 <= at < source[axis]:
                        met += 1
                        break
        walked *= met / len(groups)
    return walked


def has_parities(problem: ConvProblem) -> bool:
    """Whether a box can hold neighbours in spite of a stride: of two, over an axis that either parity has half of."""
    lifted = problem.lifted
    return lifted.stride[2] == 2 and lifted.input_size[2] % 2 == 0 and problem.rank < 3


def boxes_of_row(direction: str, problem: ConvProblem, pixels: int) -> int:
    """Boxes of ``pixels`` neighbours that a row of results takes."""
    size, parities = problem.output_size[-1], 1
    if direction == "dgrad":
        size, parities = problem.input_size[-1], problem.stride[-1] if pixels > 1 else 1
    return parities * triton.cdiv(size, parities * pixels)


def pixel_view(
    problem: ConvProblem,
    shape: tuple[int, ...],
    strides: Strides,
    images: int,
    channels: int,
    pixels: int = 1,
    parity: bool = False,
) -> Descriptor:
    """An operand of ``problem.lifted``, [N, C, D, H, W], as [D, H, W, N, C] without D in ranks 1 and 2; a box is
    ``images`` x ``channels`` of ``pixels`` neighbours in a row. ``parity``: as [H, 2, W / 2, N, C], neighbours of one
    parity."""
    n, c, *size = shape
    first = 3 - max(problem.rank, 2)
    # An axis of size one may have any stride, of which 0 is not said to be allowed.
    steps = tuple(step or pitch(c, problem.dtype) for step in (*strides[1 + first :], strides[0]))
    box = (*(1,) * (2 - first), pixels, images, channels)
    if parity:
        size[-1:], box = [2, size[-1] // 2], (1, *box)
        steps = (*steps[:-1], 2 * steps[-2], steps[-1])
    return Descriptor(problem.dtype, (*size[first:], n, c), (*steps, 1), box)


def conv_pixels(
    direction: str,
    problem: ConvProblem,
    config: Config,
    precision: str,
    x_strides: Strides | None = None,
    y_strides: Strides | None = None,
    bias: bool = False,
    epilogue: Epilogue = PLAIN,
) -> Launch:
    """The launch of fprop (x -> y) or dgrad (dy -> dx); strides in elements, channels_last-dense unless given.

    Operands: source, weight, bias, those of ``epilogue``, the result, and each tile's count, means and squares.
    """
    lifted = problem.lifted
    dgrad = direction == "dgrad"
    x_shape, y_shape = lifted.input_shape, lifted.output_shape
    if dgrad:
        x_shape, y_shape = y_shape, x_shape
    groups = problem.groups
    c, k = x_shape[1] // groups, y_shape[1] // groups
    block_n, block_k, block_c = config["BLOCK_N"], config["BLOCK_K"], config["BLOCK_C"]
    pixels, pairs = config["PIXELS"], config["PAIRS"]
    parity = pixels > 1 and lifted.stride[2] > 1
    # A pair shares the columns that the taps of a row meet.
    assert not parity or has_parities(problem)
    assert not pairs or lifted.stride[2] == 1
    assert not pairs or (pairs, pixels, lifted.dilation[2]) == (lifted.filter_size[2], 1, 1)
    element = pointer_type(problem.dtype)
    y = pixel_view(problem, y_shape, y_strides or dense_strides(y_shape), block_n, block_k, pixels, parity and dgrad)
    filters, channels, *_ = lifted.weight_shape
    step = pitch(channels, problem.dtype)
    o, p, _ = y_shape[2:]
    columns = boxes_of_row(direction, problem, 2 if pairs else pixels)
    tiles = triton.cdiv(problem.batch, block_n) * o * p * columns
    gcds, inverses = lifted.phases
    return Launch(
        kernel=conv_pixels_kernel,
        grid=(tiles * triton.cdiv(k, block_k), groups, 1),
        pointers=(
            pixel_view(
                problem, x_shape, x_strides or dense_strides(x_shape), block_n, block_c, pixels, parity and not dgrad
            ),
            Descriptor(
                problem.dtype,
                (problem.taps, filters, channels),
                (step, problem.taps * step, 1),
                (1, block_c, block_k) if dgrad else (1, block_k, block_c),
            ),
            element if bias else None,
            *epilogue.pointers[:-1],
            y if epilogue.residual else None,
            y,
            *("*fp32" if epilogue.statistics else None,) * 3,
        ),
        scalars=(
            problem.batch,
            *x_shape[2:],
            c,
            *y_shape[2:],
            k,
            *lifted.filter_size,
            *lifted.stride,
            *lifted.padding,
            *lifted.dilation,
            *gcds,
            *inverses,
            *epilogue.scalars,
        ),
        constants={
            "RANK": max(problem.rank, 2),
            "DGRAD": dgrad,
            "PIXELS": pixels,
            "PARITY": parity,
            "ROW": pairs,
            "SUMS": sums_of(config),
            "PRECISION": precision,
            "ACT": ACTIVATIONS[epilogue.act].forward,
            "RESIDUAL_AFTER": epilogue.residual_after,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "BLOCK_C": block_c,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        tiles=tiles * (2 if pairs else 1),
    )
