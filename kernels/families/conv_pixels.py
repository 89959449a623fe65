"""The pixel GEMM: fprop and dgrad whose tiles are as long as the batch, by bulk tensor copies.

``y[n, p, k] = sum over taps r, channels c of x[n, p * stride - padding + r * dilation, c] * w[k, r, c]``, on each axis.
A program computes BLOCK_N images x BLOCK_K channels of one output pixel. A tap is inside the image for all of them or
for none: only taps inside are walked, one bulk copy brings each one's channels, and nothing is masked. Bytes: x, w and
y once each; taps re-read x from L2.

dgrad is the same walk over the taps of its pixel's stride phase (`phase_walk`); a pixel that no tap meets is written
too. Two things save reads from L2. If images are few, a box holds several neighbours of a row; under a stride of two,
neighbours of one parity, which is an axis of its own in the strided operand's view. And two neighbouring outputs are
a pair that shares the S taps of a row and all but one of their columns: S + 1 boxes of x and S of w feed 2 S products.
If registers allow, each product of a pair's step has a sum of its own, because wgmma waits for a product that adds to
the same sum, and tcgen05 moves that sum through registers.

The product is [BLOCK_K, images]: channels fill the rows of tensor-core tiles even if images are few (README.md).
Images past the batch and channels past the last are read as 0 and not written; only statistics need a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod

import torch
import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu, Work
from fastconv.autotune.choose import RESOLUTION
from fastconv.kernels.families.conv_gather import gather_candidates
from fastconv.kernels.families.family import (
    DENSE,
    Family,
    Layout,
    fp32_precision,
    named_family,
    why_not_bulk_copies,
    why_not_groups,
)
from fastconv.kernels.jit.boxes import apply_epilogue_to_pixels, has_parities, pixel_view, read_pixels
from fastconv.kernels.jit.walk import taps_in_image
from fastconv.kernels.launch.descriptor import Descriptor, bulk, pitch
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import pointer_type
from fastconv.kernels.tiles.autotuned import Candidates, predicted
from fastconv.kernels.tiles.shapes import TileSpace, cdiv, matrix_share


@triton.jit
def read_weight(w, tap, k, c, DGRAD: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_K, BLOCK_C] of one tap: produced channels from k on, reduced channels from c on."""
    if DGRAD:
        return tl.reshape(w.load([tap, c, k]), (BLOCK_C, BLOCK_K)).T
    else:
        return tl.reshape(w.load([tap, k, c]), (BLOCK_K, BLOCK_C))


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
    bias_ptr,  # [groups * K], like the next five: absent unless the epilogue uses them
    mean_ptr, var_ptr, gamma_ptr, beta_ptr,  # of batch norm
    slope_ptr,  # of PReLU
    residual,  # like y
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
    RANK: tl.constexpr,  # 3, or 2 if the first axis has size one
    DGRAD: tl.constexpr,
    PIXELS: tl.constexpr,  # neighbours in a row that a box holds; each has BLOCK_N rows of a product
    PARITY: tl.constexpr,  # a stride of two: x (fprop) or y (dgrad) is [H, 2, W / 2, N, C], a box of one parity
    ROW: tl.constexpr,  # taps of a filter's row, of dilation 1, that a pair of outputs shares; 0: no pair
    SUMS: tl.constexpr,  # of each of a pair's outputs: ROW or one
    PRECISION: tl.constexpr,  # of an fp32 product: "tf32" or "ieee"
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,  # the residual is added after the activation
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    BOX: tl.constexpr = PIXELS * BLOCK_N  # of a box as a matrix: its pixels x images
    WIDTH: tl.constexpr = 2 if ROW else PIXELS  # outputs of a program
    X_PARITY: tl.constexpr = PARITY and not DGRAD
    Y_PARITY: tl.constexpr = PARITY and DGRAD
    # Channel tiles are fastest, then groups, then the pixels of a row, images last: x comes from DRAM once, in whole
    # pages, and the rows that the filter meets stay in L2.
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
        d, hop_d, tap_d, skip_d, taps_d = taps_in_image(
            o, D, O, T, stride_d, padding_d, dilation_d, gcd_d, inverse_d, DGRAD, 1
        )
    n *= BLOCK_N
    h, hop_h, tap_h, skip_h, taps_h = taps_in_image(
        p, H, P, R, stride_h, padding_h, dilation_h, gcd_h, inverse_h, DGRAD, 1
    )
    # In dgrad w's reduced channels lie along its first axis, which all groups share.
    w_k = k if DGRAD else group * K + k
    w_c = group * C if DGRAD else 0
    x_c = group * C
    acc = tl.zeros((BLOCK_K, BOX), dtype=tl.float32)
    # A pair computes outputs q and q + 1. Column u of x meets tap u for one of them (`acc`) and tap u - 1 for the other
    # (`far`); NEAR says which of them `acc` is.
    NEAR: tl.constexpr = 1 if DGRAD else 0
    if ROW:
        TURN: tl.constexpr = -1 if DGRAD else 1
        # Type comments, because Triton evaluates annotations.
        sums = ()  # type: tuple[tl.tensor, ...]
        for _i in tl.static_range(2 * SUMS):
            sums = sums + (tl.zeros((BLOCK_K, BOX), dtype=tl.float32),)
        column = q + NEAR - TURN * padding_w
        steps = taps_d * taps_h * tl.cdiv(C, BLOCK_C)
        # Without this guard ptxas waits for every wgmma, because the loop might not run.
        if steps > 0:
            c, r, t = 0, 0, 0
            for _ in range(steps):
                index = ((tap_d + t * skip_d) * R + tap_h + r * skip_h) * ROW
                x_d = d + t * hop_d
                x_h = h + r * hop_h
                x_near = read_pixels(x, x_d, x_h, column, n, x_c + c, RANK, X_PARITY, BOX, BLOCK_C)
                for s in tl.static_range(ROW):
                    x_far = read_pixels(x, x_d, x_h, column + TURN * (s + 1), n, x_c + c, RANK, X_PARITY, BOX, BLOCK_C)
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
        column, hop_w, tap_w, skip_w, taps_w = taps_in_image(
            q, W, Q, S, stride_w, padding_w, dilation_w, gcd_w, inverse_w, DGRAD, PIXELS
        )
        steps = taps_d * taps_h * taps_w * tl.cdiv(C, BLOCK_C)
        # Without this guard ptxas waits for every wgmma, because the loop might not run.
        if steps > 0:
            c, s, r, t = 0, 0, 0, 0
            for _ in range(steps):
                index = ((tap_d + t * skip_d) * R + tap_h + r * skip_h) * S + tap_w + s * skip_w
                at = column + s * hop_w
                x_step = read_pixels(x, d + t * hop_d, h + r * hop_h, at, n, x_c + c, RANK, X_PARITY, BOX, BLOCK_C)
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

    rows = tl.arange(0, BOX)
    mask_n = n + rows % BLOCK_N < N
    tile = (n // BLOCK_N * O + o if RANK == 3 else n // BLOCK_N) * P + p
    MOVE: tl.constexpr = 2 if Y_PARITY else 1
    if ROW:
        tile = tile * columns * 2 + q
        for i in tl.static_range(2):
            # A row's last pair may have no second pixel.
            apply_epilogue_to_pixels(
                (acc if i == NEAR else far).T, o, p, q + i, n, k, mask_n & (q + i < Q), tile + i, group, K,
                bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual, y,
                tile_count_ptr, tile_mean_ptr, tile_m2_ptr, eps, a, b,
                ACT, RESIDUAL_AFTER, RANK, Y_PARITY, PIXELS, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        apply_epilogue_to_pixels(
            acc.T, o, p, q, n, k, mask_n & (q + rows // BLOCK_N * MOVE < Q), tile * columns + part, group, K,
            bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual, y,
            tile_count_ptr, tile_mean_ptr, tile_m2_ptr, eps, a, b,
            ACT, RESIDUAL_AFTER, RANK, Y_PARITY, PIXELS, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def conv_pixels(direction: str, problem: ConvProblem, config: Config, gpu: Gpu, layout: Layout = DENSE) -> Launches:
    """The launch of fprop (x -> y) or dgrad (dy -> dx), with the operands of `conv_gather`."""
    epilogue = layout.epilogue
    rank3 = problem.as_rank3
    dgrad = direction == "dgrad"
    source, result = layout.operands(direction, problem)
    ((_, c, *x_size), _), ((_, k, *y_size), _) = source, result
    groups = problem.groups
    c, k = c // groups, k // groups
    block_n, block_k, block_c = config["BLOCK_N"], config["BLOCK_K"], config["BLOCK_C"]
    pixels, pairs = config["PIXELS"], config["PAIRS"]
    parity = pixels > 1 and rank3.stride[2] > 1
    assert not parity or has_parities(problem)
    shared = rank3.filter_size[2], 1, 1, 1
    assert not pairs or (pairs, pixels, rank3.stride[2], rank3.dilation[2]) == shared, "a pair shares a row's columns"
    element = pointer_type(problem.dtype)
    x = pixel_view(problem, *source, block_n, block_c, pixels, parity and not dgrad, factor=True)
    y = pixel_view(problem, *result, block_n, block_k, pixels, parity and dgrad)
    filters, channels, *_ = rank3.weight_shape
    step = pitch(channels, problem.dtype)
    columns = boxes_of_row(direction, problem, 2 if pairs else pixels)
    tiles = triton.cdiv(problem.batch, block_n) * y_size[0] * y_size[1] * columns
    gcds, inverses = rank3.phases
    launch = Launch(
        kernel=conv_pixels_kernel,
        grid=(tiles * triton.cdiv(k, block_k), groups, 1),
        pointers=(
            x,
            Descriptor(
                problem.dtype,
                (problem.taps, filters, channels),
                (step, problem.taps * step, 1),
                (1, block_c, block_k) if dgrad else (1, block_k, block_c),
                factor=True,
            ),
            element if layout.bias else None,
            *epilogue.pointers[:-1],
            y if epilogue.residual else None,
            y,
            *epilogue.statistics_pointers,
        ),
        scalars=(
            *(problem.batch, *x_size, c, *y_size, k, *rank3.filter_size),
            *(*rank3.stride, *rank3.padding, *rank3.dilation, *gcds, *inverses, *epilogue.scalars),
        ),
        constants={
            "RANK": max(problem.rank, 2),
            "DGRAD": dgrad,
            "PIXELS": pixels,
            "PARITY": parity,
            "ROW": pairs,
            "SUMS": sums_of(config),
            "PRECISION": fp32_precision(problem.dtype),
            **epilogue.constants,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "BLOCK_C": block_c,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        tiles=tiles * (2 if pairs else 1),
    )
    return (launch,)


def sums_of(config: Config) -> int:
    """Sums of each of a pair's outputs: one for each tap, or one in all if these do not fit 192 registers a thread of
    eight warps, three fourths of tensor memory."""
    pairs = config["PAIRS"]
    separate = 2 * pairs * config["PIXELS"] * config["BLOCK_N"] * config["BLOCK_K"] <= 6 * 64 * 128
    return pairs if pairs and separate else 1


@cache
def taps_walked(direction: str, problem: ConvProblem, pixels: int, pairs: int) -> float:
    """Taps that a program walks, on average; for ``pairs``, rows of taps."""
    rank3 = problem.as_rank3
    source, size = rank3.input_size, rank3.output_size
    if direction == "dgrad":
        source, size = size, source
    walked = 1.0
    for axis in range(2 if pairs else 3):
        r, stride, padding, dilation = (
            values[axis] for values in (rank3.filter_size, rank3.stride, rank3.padding, rank3.dilation)
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


def boxes_of_row(direction: str, problem: ConvProblem, pixels: int) -> int:
    """Boxes of ``pixels`` neighbours that a row of results takes."""
    size, parities = problem.output_size[-1], 1
    if direction == "dgrad":
        size, parities = problem.input_size[-1], problem.stride[-1] if pixels > 1 else 1
    return parities * triton.cdiv(size, parities * pixels)


# (PIXELS * BLOCK_N, BLOCK_K, PAIRS) -> (warps, stages). Only tiles that both compilers pipeline without spills; the
# FLOP-per-L2-byte figures are in README.md.
PIXELS_TILES = {
    (128, 128, 0): (8, 3),
    (128, 64, 0): (4, 4),
    (64, 128, 0): (4, 4),
    (64, 64, 0): (4, 4),
    (32, 128, 0): (4, 4),
    (32, 64, 0): (4, 4),
    (16, 128, 0): (4, 4),
    (16, 64, 0): (4, 4),
    (256, 64, 0): (8, 3),
    (128, 256, 0): (8, 3),
    (128, 128, 3): (8, 3),
    (128, 64, 3): (8, 4),
    (64, 128, 3): (8, 4),
    (64, 64, 3): (4, 4),
    (64, 128, 5): (8, 3),
    (64, 64, 5): (8, 4),
}


def _pixels_tile(line: int, shared_sums: bool = True) -> Callable[[Config], str | None]:
    """Why a config is no tile of the pixel GEMM. A box is ``line`` elements wide, a line of shared memory; half a line
    for pairs. ``shared_sums``: the products of a pair's step may add to one sum."""

    def valid(config: Config) -> str | None:
        pixels, pairs = config["PIXELS"], config["PAIRS"]
        images = pixels * config["BLOCK_N"]
        if pixels > 1 and images != 128:
            return f"{images} rows of several pixels, not 128"
        if pixels > 1 and pairs:
            return "pairs of several pixels, which would compute most of them twice"
        if pairs and not shared_sums and sums_of(config) == 1:
            return "pairs whose sums would move through registers from one product to the next"
        if config["BLOCK_C"] != (line // 2 if pairs else line):
            return "boxes of another width than a line of shared memory, or half of one for pairs"
        if PIXELS_TILES.get((images, config["BLOCK_K"], pairs)) != (config["num_warps"], config["num_stages"]):
            return "no tile that compilers were seen to pipeline, or other warps or stages than it asks for"
        return None

    return valid


CONV_PIXELS = TileSpace(
    "conv_pixels",
    {
        "BLOCK_N": (128, 64, 32, 16, 256),
        "BLOCK_K": (128, 64, 256),
        "BLOCK_C": (64, 32),
        "PIXELS": (1, 2, 4, 8),
        "PAIRS": (0, 3, 5),
        "num_warps": (8, 4),
        "num_stages": (3, 4),
    },
    _pixels_tile(64),
    kernels=(conv_pixels_kernel,),
)
CONV_PIXELS_TCGEN05 = replace(CONV_PIXELS, valid=_pixels_tile(64, shared_sums=False))
CONV_PIXELS_FP32 = replace(
    CONV_PIXELS,
    name="conv_pixels_fp32",
    ranges={**CONV_PIXELS.ranges, "BLOCK_K": (128, 64), "PAIRS": (0,)},
    valid=_pixels_tile(32),
)


def pixels_candidates(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> Candidates:
    rank3, groups, element = problem.as_rank3, problem.groups, problem.dtype.itemsize
    precision = fp32_precision(problem.dtype)
    share = matrix_share(problem.dtype, precision)
    (_, c, *source), (_, k, *size) = rank3.input_shape, rank3.output_shape
    if direction == "dgrad":
        (c, source), (k, size) = (k, size), (c, source)
    c, k = c // groups, k // groups
    shared = rank3.filter_size[2]  # taps of a row
    # What the filter reaches around a row of outputs, or around a plane, is read from DRAM once if L2 holds it.
    reach = [min(n, d * (r - 1) + 1) for n, r, d in zip(source, rank3.filter_size, rank3.dilation, strict=True)]

    def work(config: Config) -> Work:
        n, m, pixels, pairs = (config[name] for name in ("BLOCK_N", "BLOCK_K", "PIXELS", "PAIRS"))
        depth, rows = config["BLOCK_C"], n * pixels
        columns = boxes_of_row(direction, problem, 2 if pairs else pixels)
        boxes = (shared + 1) * rows + shared * m if pairs else rows + m
        accumulators = rows * m * sums_of(config) * (2 if pairs else 1) // (32 * config["num_warps"])
        image = n * source[2] * c * groups * element
        again = 1
        if reach[1] * image > gpu.l2_bytes // 2:
            again = reach[0] * reach[1]
        elif reach[0] * source[1] * image > gpu.l2_bytes // 2:
            again = reach[0]
        return Work(
            programs=cdiv(problem.batch, n) * size[0] * size[1] * columns * cdiv(k, m) * groups,
            steps=max(1, round(taps_walked(direction, problem, pixels, pairs) * cdiv(c, depth))),
            step_flops=2 * rows * m * depth * (2 * shared if pairs else 1),
            step_elements=boxes * depth,
            step_bytes=boxes * depth * element,
            dram_bytes=problem.bytes + (again - 1) * problem.batch * prod(source) * c * groups * element,
            shared_memory=config["num_stages"] * boxes * depth * element,
            registers=26 + accumulators,
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=share,
        )

    space = CONV_PIXELS_TCGEN05 if gpu.tcgen05 else CONV_PIXELS
    if element > 2:
        space = CONV_PIXELS_FP32
    # A box that leaves up to half of its images empty may be near the best.
    narrow = {"BLOCK_N": tuple(n for n in space.ranges["BLOCK_N"] if n < 2 * problem.batch)}
    if k <= 64 or groups > 1:
        narrow["BLOCK_K"] = (64,)
    if rank3.stride[2] > 1 and not has_parities(problem):
        narrow["PIXELS"] = (1,)
    paired = rank3.stride[2] == rank3.dilation[2] == 1
    narrow["PAIRS"] = tuple(taps for taps in space.ranges["PAIRS"] if taps in (0, paired * shared))
    space = space.narrowed(only=narrow)
    return Candidates(space, (direction, problem, precision), work, gpu)


def _why_not(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    reason = why_not_bulk_copies(problem, gpu, layout)
    if reason is not None:
        return reason
    if direction == "dgrad" and problem.dtype is torch.float32:
        return "tensor cores do not transpose float32 in shared memory"
    c, k = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    if problem.groups > 1 and (c % 64 or k % 64):
        return f"groups of {c} to {k} channels fill no tile"
    if problem.batch < 16:
        return f"{problem.batch} images leave most of a box empty"
    shapes = problem.as_rank3.input_shape, problem.as_rank3.output_shape
    if direction == "dgrad":
        shapes = shapes[::-1]
    views = zip(shapes, (layout.source_strides, layout.other_strides), strict=True)
    if not all(bulk(problem.dtype, *view) for view in views):
        return "operands whose pixels do not lie at multiples of 16 bytes"
    # A family that is asked for by name is measured, whatever is predicted.
    if named_family() == "pixels":
        return why_not_groups(problem)
    pixels, gather = (make(direction, problem, gpu, layout) for make in (pixels_candidates, gather_candidates))
    return why_not_groups(problem) or why_slower(pixels, gather)


def why_slower(pixels: Candidates, gather: Candidates) -> str | None:
    """Why the pixel GEMM is predicted to take far longer than a gather, or None."""
    ratio = predicted(pixels) / predicted(gather)
    return None if ratio <= 1 + RESOLUTION else f"predicted to take {ratio:.1f} times as long as a gather"


FAMILY = Family("pixels", _why_not, pixels_candidates, conv_pixels, ("source", "other"))
