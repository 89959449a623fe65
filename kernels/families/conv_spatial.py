"""Convolution of few images by bulk tensor copies over rows or rectangles of pixels: fprop, dgrad.

``y[n, p, k] = sum over taps r, channels c of x[n, p * stride - padding + r * dilation, c] * w[k, r, c]``, on each axis.
A tile is a rectangle of output pixels, ROWS high and TILE_WIDTH wide. Under one tap it meets a rectangle of x, which
one copy brings for a block of channels; the copy reads 0 outside the image, which is the padding. Bytes: x, w and y
once each; taps re-read x from L2.

A copy takes neighbouring pixels, but outputs of a strided convolution meet every stride-th one. A view of x with one
axis more separates the phases of columns; with a row stride a tile has one row. dgrad needs neither, because its phases
are stride-1 walks (`phase_walk`). Which copies feed tensor cores from shared memory: README.md.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu, Work
from fastconv.kernels.families.conv_gather import gather_candidates
from fastconv.kernels.families.family import DENSE, Family, Layout, fp32_precision, named_family, why_not_bulk_copies
from fastconv.kernels.families.splits import conv_finish_kernel, sum_splits_with_epilogue
from fastconv.kernels.jit.epilogue import PART_K, PLAIN, apply_epilogue
from fastconv.kernels.jit.walk import in_elements, phase_walk, taps_in_image
from fastconv.kernels.launch.descriptor import ALIGNMENT, LINE, Descriptor, pitch
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import Strides, dense_strides, linear_stride, load_width, needs_int64, pointer_type
from fastconv.kernels.tiles.autotuned import Candidates, predicted
from fastconv.kernels.tiles.shapes import BOX_TILES, TileSpace, cdiv, fitting, matrix_share


@triton.jit(
    do_not_specialize=[
        "N", "D", "H", "W", "C", "O", "P", "Q", "K", "T", "R", "S", "splits",
        "y_stride_n", "y_stride_d", "y_stride_h", "y_stride_w",
        "stride_d", "stride_h", "stride_w", "padding_d", "padding_h", "padding_w",
        "dilation_d", "dilation_h", "dilation_w", "gcd_d", "gcd_h", "gcd_w", "inverse_d", "inverse_h", "inverse_w",
        "eps", "a", "b",
    ]
)  # fmt: skip
def conv_spatial_kernel(
    x_desc,  # [N * D, phases, H, W / phases, C], boxes [1, 1, ROWS, TILE_WIDTH, BLOCK_C]
    w_desc,  # [taps, K, C], boxes [1, BLOCK_K, BLOCK_C]; in dgrad [taps, C, K], boxes [1, BLOCK_C, BLOCK_K]
    bias_ptr,  # [K], like the next five: absent unless the epilogue uses them
    mean_ptr, var_ptr, gamma_ptr, beta_ptr,  # of batch norm
    slope_ptr,  # of PReLU
    residual_ptr,  # like y
    y_ptr,  # [N, O, P, Q, K]; if the reduction is split, [splits, ...] in fp32
    tile_count_ptr,  # [tiles]
    tile_mean_ptr, tile_m2_ptr,  # [tiles, K]
    N, D, H, W,
    C,  # reduced channels
    O, P, Q,
    K,  # produced channels, in units of VEC
    T, R, S,
    splits,  # of the reduction
    y_stride_n, y_stride_d, y_stride_h, y_stride_w,  # in units of VEC
    stride_d, stride_h, stride_w,
    padding_d, padding_h, padding_w,
    dilation_d, dilation_h, dilation_w,
    gcd_d, gcd_h, gcd_w,  # of dilation and stride
    inverse_d, inverse_h, inverse_w,  # of dilation / gcd modulo stride / gcd
    eps,  # of batch norm
    a, b,  # of the activation
    VEC: tl.constexpr,
    RANK: tl.constexpr,  # 3, or 2 if the first axis has size one
    DGRAD: tl.constexpr,
    PHASED: tl.constexpr,  # x has an axis for the phase of a column
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,  # y holds 2^31 elements or more
    PRECISION: tl.constexpr,  # of an fp32 product
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,  # the residual is added after the activation
    PART_K: tl.constexpr,  # columns that the epilogue takes at once
    ROWS: tl.constexpr,  # height of the tile
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    TILE_WIDTH: tl.constexpr = BLOCK_M // ROWS  # width of the tile
    K *= VEC
    y_stride_n, y_stride_d, y_stride_h, y_stride_w = in_elements(
        y_stride_n, y_stride_d, y_stride_h, y_stride_w, VEC, WIDE
    )
    # Channel tiles are fastest, so that x comes from DRAM once; then phases, which share their source pixels; then the
    # tiles of a row.
    k_tiles = tl.cdiv(K, BLOCK_K)
    k = tl.program_id(0) % k_tiles * BLOCK_K
    tile = tl.program_id(0) // k_tiles
    split = 0
    if SPLIT:
        split = tile % splits
        tile = tile // splits
        y_ptr += tl.cast(split, tl.int64) * N * O * P * Q * K
    at = tile
    phase_d, phase_h, phase_w = 0, 0, 0
    phases_d, phases_h, phases_w = 1, 1, 1
    if DGRAD:
        phases_d, phases_h, phases_w = tl.minimum(stride_d, O), tl.minimum(stride_h, P), tl.minimum(stride_w, Q)
        phase_w = at % phases_w
        at = at // phases_w
        phase_h = at % phases_h
        at = at // phases_h
        if RANK == 3:
            phase_d = at % phases_d
            at = at // phases_d
    first_h, step_h, count_h, base_h, move_h, hop_h, tap_h, skip_h, taps_h = phase_walk(
        phase_h, P, R, stride_h, padding_h, dilation_h, gcd_h, inverse_h, DGRAD
    )
    first_w, step_w, count_w, base_w, move_w, hop_w, tap_w, skip_w, taps_w = phase_walk(
        phase_w, Q, S, stride_w, padding_w, dilation_w, gcd_w, inverse_w, DGRAD
    )
    # Phases differ by at most one pixel along an axis; the largest sets the grid.
    q_tiles = tl.cdiv(tl.cdiv(Q, phases_w), TILE_WIDTH)
    q = at % q_tiles * TILE_WIDTH
    at = at // q_tiles
    p_tiles = tl.cdiv(tl.cdiv(P, phases_h), ROWS)
    p = at % p_tiles * ROWS
    image = at // p_tiles
    o, rows = 0, count_h
    base_d, hop_d, tap_d, skip_d, taps_d = 0, 0, 0, 1, 1
    if RANK == 3:
        # Depth and batch are one axis of x, without a gap between images, so taps outside an image are left out.
        depth = tl.cdiv(O, phases_d)
        o = phase_d + image % depth * phases_d
        image = image // depth
        rows = tl.where(o < O, count_h, 0)
        base_d, hop_d, tap_d, skip_d, taps_d = taps_in_image(
            tl.minimum(o, O - 1), D, O, T, stride_d, padding_d, dilation_d, gcd_d, inverse_d, DGRAD, 1
        )

    h = base_h + p * move_h
    # The padding is subtracted after the quotient below, so that no negative number is divided.
    w = base_w + padding_w * move_w
    c_blocks = tl.cdiv(C, BLOCK_C)
    steps = taps_d * taps_h * taps_w * c_blocks
    share = tl.cdiv(steps, splits)
    first = split * share
    steps = tl.minimum(first + share, steps) - first
    c = first % c_blocks * BLOCK_C
    # A phase may have no tap.
    j = first // c_blocks
    s = j % tl.maximum(taps_w, 1)
    j = j // tl.maximum(taps_w, 1)
    r = j % tl.maximum(taps_h, 1)
    t = j // tl.maximum(taps_h, 1)
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    # Without this guard ptxas waits for every wgmma, because the loop might not run.
    if steps > 0:
        for _ in range(steps):
            column = w + s * hop_w
            phase = 0
            if PHASED:
                phase = column % move_w
                column = column // move_w
            index = (tap_h + r * skip_h) * S + tap_w + s * skip_w
            depth = image
            if RANK == 3:
                depth = image * D + base_d + t * hop_d
                index += (tap_d + t * skip_d) * (R * S)
            x_step = x_desc.load([depth, phase, h + r * hop_h, q + column - padding_w, c]).reshape(BLOCK_M, BLOCK_C)
            if DGRAD:
                w_step = w_desc.load([index, c, k]).reshape(BLOCK_C, BLOCK_K)
            else:
                w_step = w_desc.load([index, k, c]).reshape(BLOCK_K, BLOCK_C).T
            acc = tl.dot(x_step, w_step, acc, input_precision=PRECISION)
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

    m = tl.arange(0, BLOCK_M)
    p += m // TILE_WIDTH
    q += m % TILE_WIDTH
    mask_m = (p < rows) & (q < count_w)
    y_row = image * y_stride_n + (first_h + p * step_h) * y_stride_h + (first_w + q * step_w) * y_stride_w
    if RANK == 3:
        y_row += o * y_stride_d
    if tile_count_ptr is not None:
        tl.store(tile_count_ptr + tile, tl.sum(mask_m.to(tl.float32), axis=0))
    apply_epilogue(
        acc, k, mask_m, y_row, tile, 0, K,
        bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual_ptr, y_ptr, tile_mean_ptr, tile_m2_ptr,
        eps, a, b, ACT, RESIDUAL_AFTER, BLOCK_M, BLOCK_K, PART_K,
    )  # fmt: skip


def conv_spatial(direction: str, problem: ConvProblem, config: Config, gpu: Gpu, layout: Layout = DENSE) -> Launches:
    """The launches of fprop (x -> y) or dgrad (dy -> dx), with the operands of `conv_gather`; the result is dense."""
    rank3, dtype = problem.as_rank3, problem.dtype
    dgrad = direction == "dgrad"
    (shape, strides), (y_shape, _) = layout.operands(direction, problem)
    (n, c, d, h, w), (_, k, *y_size), y_strides = shape, y_shape, dense_strides(y_shape)
    tile = {name: config[name] for name in ("ROWS", "BLOCK_M", "BLOCK_K", "BLOCK_C")}
    rows, m_block, k_block, c_block = tile.values()
    assert rows == 1 or dgrad or rank3.stride[1] == 1, "a copy takes neighbouring rows"
    phases = 1 if dgrad else rank3.stride[2]
    image, row, column = (stride or pitch(c, dtype) for stride in (_image_stride(shape, strides) or 0, *strides[2:]))
    x = Descriptor(
        *(dtype, (n * d, phases, h, w // phases, c), (image, column, row, phases * column, 1)),
        (1, 1, rows, m_block // rows, c_block),
        factor=True,
    )
    taps = problem.taps
    # [taps, K, C] of the convolution in either direction.
    step = pitch(problem.in_channels, dtype)
    reduced = (c_block, k_block) if dgrad else (k_block, c_block)
    weight = Descriptor(
        dtype, (taps, problem.out_channels, problem.in_channels), (step, taps * step, 1), (1, *reduced), factor=True
    )
    gcds, inverses = rank3.phases
    splits = config["SPLITS"]
    epilogue = PLAIN if splits > 1 else layout.epilogue
    element, vec = pointer_type(dtype), load_width(dtype, k)
    tiles = rectangles(direction, problem, config)
    product = Launch(
        kernel=conv_spatial_kernel,
        grid=(tiles * triton.cdiv(k, k_block) * splits, 1, 1),
        pointers=(
            *(x, weight, element if layout.bias and splits == 1 else None, *epilogue.pointers),
            *(element if splits == 1 else "*fp32", *epilogue.statistics_pointers),
        ),
        scalars=(
            *(n, d, h, w, c, *y_size, k // vec, *rank3.filter_size, splits),
            *(stride // vec for stride in y_strides),
            *(*rank3.stride, *rank3.padding, *rank3.dilation, *gcds, *inverses, *epilogue.scalars),
        ),
        constants={
            "VEC": vec,
            "RANK": max(problem.rank, 2),
            "DGRAD": dgrad,
            "PHASED": phases > 1,
            "SPLIT": splits > 1,
            "WIDE": needs_int64((y_shape, y_strides)),
            "PRECISION": fp32_precision(problem.dtype),
            **epilogue.constants,
            "PART_K": k_block if epilogue == PLAIN else min(k_block, PART_K),
            **tile,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        tiles=tiles,
    )
    if splits == 1:
        return (product,)
    return product, sum_splits_with_epilogue(n * prod(y_size), k, splits, dtype, layout.bias, layout.epilogue)


def rectangles(direction: str, problem: ConvProblem, config: Config) -> int:
    """The number of tiles of pixels, in all phases."""
    rank3 = problem.as_rank3
    size, phases = rank3.output_size, [1, 1, 1]
    if direction == "dgrad":
        size, phases = rank3.input_size, list(map(min, rank3.stride, rank3.input_size))
    tile = 1, config["ROWS"], config["BLOCK_M"] // config["ROWS"]
    return problem.batch * prod(phases) * prod(map(triton.cdiv, map(triton.cdiv, size, phases), tile))


def _source_shape(direction: str, problem: ConvProblem) -> tuple[int, ...]:
    return problem.as_rank3.output_shape if direction == "dgrad" else problem.as_rank3.input_shape


def _image_stride(shape: tuple[int, ...], strides: Strides) -> int | None:
    """The one distance between the planes [H, W, C] of a batch, across depth and images."""
    return linear_stride(shape[:3], (strides[0], 0, 0, strides[1]))


def _spatial_tile(config: Config) -> str | None:
    if (config["num_warps"], config["num_stages"]) != BOX_TILES.get((config["BLOCK_M"], config["BLOCK_K"])):
        return "other warps or copies in flight than its sides ask for"
    if (config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"]) == (128, 64, 32):
        return "a binary of fp32 that one version of the compiler spills"
    if config["SPLITS"] > 1 and config["BLOCK_M"] > 64:
        return "a split reduction of another tile than 64x64"
    return None


# ROWS 1 first: every GPU's tensor cores take a row from shared memory.
SPATIAL = TileSpace(
    "conv_spatial",
    {
        "SPLITS": (1, 2, 4, 8, 16),
        "ROWS": (1, 4, 8),
        "BLOCK_M": (128, 64),
        "BLOCK_K": (128, 64),
        "BLOCK_C": (64, 32),
        "num_warps": (8, 4),
        "num_stages": (3, 4),
    },
    _spatial_tile,
    kernels=(conv_spatial_kernel, conv_finish_kernel),
)


def _candidates(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> Candidates:
    precision = fp32_precision(problem.dtype)
    k, c, phases = problem.out_channels, problem.in_channels, 1
    if direction == "dgrad":
        k, c, phases = c, k, prod(map(min, problem.stride, problem.input_size))
    pixels = problem.input_pixels if direction == "dgrad" else problem.output_pixels
    element = problem.dtype.itemsize

    def work(config: Config) -> Work:
        m, n, depth, splits = config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"], config["SPLITS"]
        return Work(
            programs=rectangles(direction, problem, config) * cdiv(k, n) * splits,
            steps=max(1, cdiv(problem.taps * cdiv(c, depth), phases * splits)),
            step_flops=2 * m * n * depth,
            step_elements=(m + n) * depth,
            step_bytes=(m + n) * depth * element,
            dram_bytes=problem.bytes,
            shared_memory=config["num_stages"] * (m + n) * depth * element,
            registers=64 + m * n // (32 * config["num_warps"]),
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=matrix_share(problem.dtype, precision),
            extra_bytes=(2 * splits * 4 + element) * pixels * k if splits > 1 else 0,
        )

    # A bulk copy takes neighbouring rows only; with a row stride a tile has one row.
    one_row = {"ROWS": 1} if direction == "fprop" and problem.as_rank3.stride[1] > 1 else {}
    space, width = fitting(SPATIAL, BLOCK_K=k), {"BLOCK_C": LINE // element, **one_row}
    return Candidates(space, (direction, problem, precision), work, gpu, width)


# With more images the pixel GEMM's tile, long in the batch, is better.
MOST_IMAGES = 15


def why_not_rectangles(direction: str, problem: ConvProblem, x_strides: Strides | None) -> str | None:
    """Why bulk copies cannot take a convolution's rectangles of pixels as boxes of a view of x, or None."""
    if problem.batch > MOST_IMAGES:
        return f"{problem.batch} images, more than {MOST_IMAGES}"
    if problem.groups > 1:
        return f"{problem.groups} groups"
    element = problem.dtype.itemsize
    if problem.dtype is torch.float32 and direction != "fprop":
        return "fp32 tensor cores take no operand whose reduced axis is not its last"
    if direction == "fprop" and problem.input_size[-1] % problem.stride[-1]:
        return f"rows of {problem.input_size[-1]} pixels, of which phases of {problem.stride[-1]} have not as many each"
    shape = _source_shape(direction, problem)
    strides = x_strides or dense_strides(shape)
    if _image_stride(shape, strides) is None:
        return "images at uneven distances"
    if any(stride * element % ALIGNMENT for stride in strides):
        return f"pixels whose distances are not all of {ALIGNMENT} bytes"
    if any(size > 1 and not stride for size, stride in zip((shape[0], *shape[2:]), strides, strict=True)):
        return "pixels that are one in memory"
    return None


def _why_not(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    reason = why_not_rectangles(direction, problem, layout.source_strides) or why_not_bulk_copies(problem, gpu, layout)
    # A family that is asked for by name is measured, whatever is predicted.
    if reason is not None or named_family() == "spatial":
        return reason
    spatial, gather = (predicted(make(direction, problem, gpu, layout)) for make in (_candidates, gather_candidates))
    if spatial > gather:
        return "tiles of rows and rectangles that fit the image badly: predicted slower than the gather's"
    return None


FAMILY = Family("spatial", _why_not, _candidates, conv_spatial, ("source",))
