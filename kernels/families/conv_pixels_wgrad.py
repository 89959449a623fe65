"""The weight's gradient of the pixel GEMM: sums as long as the batch, both operands straight from shared memory.

``dw[k, r, c] = sum over n, p of dy[n, p, k] * x[n, p * stride - padding + r * dilation, c]``, on each axis. As a GEMM:
a program's rows are output channels, its columns are the input channels of TAPS neighbours in a row of the filter. A
step of the reduction is BLOCK_N images at COLUMNS neighbouring outputs, a bulk copy for each pixel of dy and of x. Taps
share what is read of dy; neighbouring outputs of a stride-1 convolution share all but one of their pixels of x. The
outputs that have a tap inside the image are a box, and only they are walked. The walk is split over programs, whose
fp32 sums go to a workspace, and a second kernel adds them in the order of the splits: the result is the same bit for
bit from run to run. Bytes: dy and x once each, the workspace twice.

If images are few, a box also holds PIXELS neighbours of a row, with a stride of two as in `conv_pixels`. PIXELS divides
the row, because a box past its end would multiply pixels of x, which may be infinite, by zeros.

Images past the last are read as 0 from both operands, and so is x outside its image in the walk that taps share.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import ceil, prod
from operator import mul

import torch
import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu, Work
from fastconv.kernels.families.conv_gather_wgrad import wgrad_candidates
from fastconv.kernels.families.conv_pixels import why_slower
from fastconv.kernels.families.family import DENSE, Family, Layout, fp32_precision, named_family, why_not_groups
from fastconv.kernels.families.splits import split_sum, split_sum_kernel
from fastconv.kernels.jit.boxes import has_parities, pixel_view, read_pixels
from fastconv.kernels.jit.walk import unravel
from fastconv.kernels.launch.descriptor import bulk
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import load_width, pointer_type
from fastconv.kernels.tiles.autotuned import Candidates
from fastconv.kernels.tiles.shapes import TileSpace, cdiv, fitting, matrix_share


@triton.jit
def outputs_meeting_taps(size, outputs, stride, first_tap, last_tap):
    """(first, count) of the outputs of an axis for which one of the taps, at these distances, is inside the image."""
    first = tl.cdiv(tl.maximum(-last_tap, 0), stride)
    end = tl.minimum(tl.cdiv(tl.maximum(size - first_tap, 0), stride), outputs)
    return first, tl.maximum(end - first, 0)


@triton.jit(
    do_not_specialize=[
        "N", "D", "H", "W", "C", "O", "P", "Q", "K", "groups", "T", "R", "S",
        "stride_d", "stride_h", "stride_w", "padding_d", "padding_h", "padding_w",
        "dilation_d", "dilation_h", "dilation_w", "splits",
    ]
)  # fmt: skip
def conv_pixels_wgrad_kernel(
    x,  # [D, H, W, N, groups * C], without D in rank 2; see PARITY
    dy,  # [O, P, Q, N, groups * K], without O in rank 2
    dw_ptr,  # [splits, groups * K, T, R, S, C], or [splits, groups * K, C, T, R, S] unless CHANNELS_LAST
    N, D, H, W,
    C,  # input channels of one group, in units of VEC
    O, P, Q,
    K,  # output channels of one group, in units of VEC
    groups,
    T, R, S,
    stride_d, stride_h, stride_w,
    padding_d, padding_h, padding_w,
    dilation_d, dilation_h, dilation_w,
    splits,
    VEC: tl.constexpr, RANK: tl.constexpr,
    TAPS: tl.constexpr,  # neighbouring taps of a filter's row
    COLUMNS: tl.constexpr,  # neighbouring outputs of a step; from one to the next the pixels of x move on by one
    PIXELS: tl.constexpr,  # neighbours in a row that a box holds, a divisor of Q; 1 unless COLUMNS is 1
    PARITY: tl.constexpr,  # a stride of two: x is [H, 2, W / 2, N, C], a box of one parity
    CHANNELS_LAST: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,  # images of a step
):  # fmt: skip
    BOX: tl.constexpr = PIXELS * BLOCK_N  # of a box as a matrix: its pixels x images
    WIDTH: tl.constexpr = PIXELS * COLUMNS  # outputs of a step
    C *= VEC
    K *= VEC

    # Tiles of one split are neighbours: they read the same pixels.
    runs = tl.cdiv(S, TAPS)
    k_tiles = tl.cdiv(K, BLOCK_K)
    c_tiles = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    pid_k = pid % k_tiles
    pid = pid // k_tiles
    pid_c = pid % c_tiles
    pid = pid // c_tiles
    s = pid % runs * TAPS
    pid = pid // runs
    row = pid % (T * R)
    pid = pid // (T * R)
    group = pid % groups
    split = pid // groups

    tap_d = row // R * dilation_d - padding_d
    tap_h = row % R * dilation_h - padding_h
    tap_w = s * dilation_w - padding_w
    last_w = tl.minimum(s + TAPS - 1, S - 1) * dilation_w - padding_w
    p_first, p_count = outputs_meeting_taps(H, P, stride_h, tap_h, tap_h)
    q_first, q_count = 0, Q
    if PIXELS == 1:
        q_first, q_count = outputs_meeting_taps(W, Q, stride_w, tap_w, last_w)
    o_first, o_count = 0, 1
    if RANK == 3:
        o_first, o_count = outputs_meeting_taps(D, O, stride_d, tap_d, tap_d)

    # This split's share of the steps; shares differ by one at most, and may be empty.
    q_steps = tl.cdiv(q_count, WIDTH)
    steps = o_count * p_count * q_steps * tl.cdiv(N, BLOCK_N)
    share = steps // splits
    longer = steps - share * splits
    first = split * share + tl.minimum(split, longer)
    steps = share + (split < longer).to(tl.int32)

    k = group * K + pid_k * BLOCK_K
    c = group * C + pid_c * BLOCK_C
    # Type comments, because Triton evaluates annotations.
    acc = ()  # type: tuple[tl.tensor, ...]
    for _i in tl.static_range(COLUMNS * TAPS):
        acc = acc + (tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32),)
    # Without this guard ptxas waits for every wgmma, because the loop might not run.
    if steps > 0:
        n, o, p, q = unravel(first, o_count, p_count, q_steps, RANK)
        n *= BLOCK_N
        for _ in range(steps):
            y_o = o_first + o
            y_p = p_first + p
            y_q = q_first + q * WIDTH
            d = y_o * stride_d + tap_d
            h = y_p * stride_h + tap_h
            w = y_q * stride_w + tap_w
            x_steps = ()  # type: tuple[tl.tensor, ...]
            for i in tl.static_range(COLUMNS + TAPS - 1):
                x_steps = x_steps + (read_pixels(x, d, h, w + i * dilation_w, n, c, RANK, PARITY, BOX, BLOCK_C),)
            sums = ()  # type: tuple[tl.tensor, ...]
            for column in tl.static_range(COLUMNS):
                dy_step = read_pixels(dy, y_o, y_p, y_q + column, n, k, RANK, False, BOX, BLOCK_K).T
                for i in tl.static_range(TAPS):
                    sums = sums + (tl.dot(dy_step, x_steps[column + i], acc[column * TAPS + i]),)
            acc = sums

            # Neighbours in memory first, images last.
            q += 1
            carry = q == q_steps
            q = tl.where(carry, 0, q)
            p += carry.to(tl.int32)
            carry = p == p_count
            p = tl.where(carry, 0, p)
            if RANK == 3:
                o += carry.to(tl.int32)
                carry = o == o_count
                o = tl.where(carry, 0, o)
            n += carry.to(tl.int32) * BLOCK_N

    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    taps = T * R * S
    out = dw_ptr + (split * groups + group).to(tl.int64) * (K * taps * C) + (offs_k * (taps * C))[:, None]
    for i in tl.static_range(TAPS):
        tap = row * S + s + i
        if CHANNELS_LAST:
            place = tap * C + offs_c
        else:
            place = offs_c * taps + tap
        mask = (offs_k < K)[:, None] & (offs_c < tl.where(s + i < S, C, 0))[None, :]
        total = acc[i]
        for column in tl.static_range(1, COLUMNS):
            total += acc[column * TAPS + i]
        tl.store(out + place[None, :], total.to(dw_ptr.dtype.element_ty), mask=mask)


def conv_pixels_wgrad(
    direction: str, problem: ConvProblem, config: Config, gpu: Gpu, layout: Layout = DENSE
) -> Launches:
    """The launches of wgrad: x, dy -> dw, or x, dy -> workspace -> dw if ``config["SPLITS"]`` splits the walk."""
    rank3 = problem.as_rank3
    x, dy = layout.operands(direction, problem)
    groups, splits = problem.groups, config["SPLITS"]
    c, k = problem.in_channels // groups, problem.out_channels // groups
    tile = {name: config[name] for name in ("TAPS", "COLUMNS", "PIXELS", "BLOCK_K", "BLOCK_C", "BLOCK_N")}
    images, pixels, vec = tile["BLOCK_N"], tile["PIXELS"], load_width(problem.dtype, c, k)
    parity = pixels > 1 and rank3.stride[2] > 1
    assert tile["COLUMNS"] == 1 or (pixels == 1 and pairs_of_outputs(problem, tile["TAPS"]))
    assert pixels == 1 or pixels in neighbours(problem)
    element = pointer_type(problem.dtype)
    tiles = triton.cdiv(k, tile["BLOCK_K"]) * triton.cdiv(c, tile["BLOCK_C"]) * groups
    product = Launch(
        kernel=conv_pixels_wgrad_kernel,
        grid=(tiles * runs_of_taps(problem, tile["TAPS"]) * splits, 1, 1),
        pointers=(
            pixel_view(problem, *x, images, tile["BLOCK_C"], pixels, parity, factor=True),
            pixel_view(problem, *dy, images, tile["BLOCK_K"], pixels, factor=True),
            element if splits == 1 else "*fp32",
        ),
        scalars=(
            *(problem.batch, *rank3.input_size, c // vec, *rank3.output_size, k // vec, groups, *rank3.filter_size),
            *(*rank3.stride, *rank3.padding, *rank3.dilation, splits),
        ),
        constants={
            "VEC": vec,
            "RANK": max(problem.rank, 2),
            "PARITY": parity,
            "CHANNELS_LAST": layout.channels_last or splits > 1 or problem.taps == 1,
            **tile,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    if splits == 1:
        return (product,)
    return product, split_sum(splits, problem.out_channels, problem.taps, c, problem.dtype, layout.channels_last)


def neighbours(problem: ConvProblem) -> list[int]:
    """The numbers of neighbours that a box may hold, powers of two above one."""
    if problem.stride[-1] != 1 and not has_parities(problem):
        return []
    return [pixels for pixels in (64, 32, 16, 8, 4, 2) if problem.output_size[-1] % pixels == 0]


def runs_of_taps(problem: ConvProblem, taps: int) -> int:
    """Programs that a filter takes for one tile of channels, each with ``taps`` taps of a row or what is left of it."""
    return problem.taps // problem.filter_size[-1] * triton.cdiv(problem.filter_size[-1], taps)


def outputs_of_taps(problem: ConvProblem, axis: int, first: int, last: int) -> int:
    """How many outputs along ``axis`` have a tap from ``first`` to ``last`` inside the image, as
    `outputs_meeting_taps` counts them."""
    size, outputs = problem.input_size[axis], problem.output_size[axis]
    stride, padding, dilation = problem.stride[axis], problem.padding[axis], problem.dilation[axis]
    begin = -(min(last * dilation - padding, 0) // stride)
    end = min(-(min(first * dilation - padding - size, 0) // stride), outputs)
    return max(end - begin, 0)


def row_outputs(problem: ConvProblem, taps: int) -> list[int]:
    """For each run of ``taps`` taps of a filter's row, the outputs of a row that it walks."""
    last = problem.filter_size[-1] - 1
    return [outputs_of_taps(problem, -1, s, min(s + taps - 1, last)) for s in range(0, last + 1, taps)]


def pairs_of_outputs(problem: ConvProblem, taps: int) -> bool:
    """Whether neighbouring outputs share pixels of x, and each run of taps walks an even number of outputs: an odd one
    would bring a pixel of x that its taps do not meet."""
    shared = problem.stride[-1] == problem.dilation[-1]
    return shared and all(count % 2 == 0 for count in row_outputs(problem, taps))


# (BLOCK_K, BLOCK_C, TAPS, COLUMNS) -> warps; the FLOP-per-L2-byte figures are in README.md.
PIXELS_WGRAD_TILES = {
    (128, 128, 3, 1): 8,
    (128, 64, 3, 2): 8,
    (64, 64, 3, 2): 4,
    (128, 64, 3, 1): 8,
    (64, 64, 3, 1): 4,
    (128, 256, 1, 1): 8,
    (128, 128, 1, 1): 8,
    (64, 64, 1, 1): 4,
}


def _pixels_wgrad_tile(config: Config) -> str | None:
    sides = config["BLOCK_K"], config["BLOCK_C"], config["TAPS"], config["COLUMNS"]
    if PIXELS_WGRAD_TILES.get(sides) != config["num_warps"]:
        return "no tile that compilers were seen to pipeline, or other warps than it asks for"
    if config["BLOCK_N"] * config["PIXELS"] not in (64, 32):
        return "steps of other depths than 64 and 32"
    if config["PIXELS"] > 1 and config["COLUMNS"] > 1:
        return "boxes of several pixels beside each other"
    if config["PIXELS"] > 1 and sides in ((128, 128, 3, 1), (64, 64, 3, 1)):
        return "boxes of neighbours that one version of the compiler serialises, or spills on Blackwell"
    step = _pixels_wgrad_step(config) * 2
    stages = 4 if 4 * step <= 192 << 10 else 3
    return None if config["num_stages"] == stages else "copies in flight for another step size"


def _pixels_wgrad_step(config: Config) -> int:
    """Elements that a step reads."""
    columns = config["COLUMNS"]
    boxes = columns * config["BLOCK_K"] + (columns + config["TAPS"] - 1) * config["BLOCK_C"]
    return boxes * config["BLOCK_N"] * config["PIXELS"]


PIXELS_WGRAD = TileSpace(
    "conv_pixels_wgrad",
    {
        "BLOCK_N": (64, 32, 16, 8, 4, 2, 1),
        "PIXELS": (1, 64, 32, 16, 8, 4, 2),
        "TAPS": (1,),
        "BLOCK_K": (128, 64),
        "BLOCK_C": (256, 128, 64),
        "COLUMNS": (1,),
        "num_warps": (8, 4),
        "num_stages": (4, 3),
        "SPLITS": tuple(range(1, 13)) + tuple(sorted(f * 2**i for f in (4, 5, 6, 7) for i in range(2, 7))),
    },
    _pixels_wgrad_tile,
    free=("SPLITS",),
    kernels=(conv_pixels_wgrad_kernel, split_sum_kernel),
)
PIXELS_WGRAD_ROW = replace(PIXELS_WGRAD, name="conv_pixels_wgrad_row", ranges={**PIXELS_WGRAD.ranges, "TAPS": (3, 1)})
PIXELS_WGRAD_PAIR = replace(
    PIXELS_WGRAD, name="conv_pixels_wgrad_pair", ranges={**PIXELS_WGRAD_ROW.ranges, "COLUMNS": (2, 1)}
)


def _candidates(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> Candidates:
    groups, element = problem.groups, problem.dtype.itemsize
    k, c = problem.out_channels // groups, problem.in_channels // groups
    weight = prod(problem.weight_shape)
    # Pixels of x that a tap meets; strides leave out the rest.
    met = prod(map(min, problem.input_size, map(mul, problem.output_size, problem.filter_size)))
    operands = problem.batch * (met * problem.in_channels + prod(problem.output_size) * problem.out_channels) * element
    # Results that are stored one element at a time have addresses of their own: 128x128 with three taps then spills.
    by_element = 24 if load_width(problem.dtype, c, k) == 1 else 0
    # A tap's outputs on the other axes, whose taps share no program; on average.
    lines = 1.0
    for axis, taps in enumerate(problem.filter_size[:-1]):
        lines *= sum(outputs_of_taps(problem, axis, tap, tap) for tap in range(taps)) / taps

    @cache
    def outputs(taps: int) -> float:
        """Outputs of a row that a run of taps walks, on average."""
        walked = row_outputs(problem, taps)
        return sum(walked) / len(walked)

    def work(config: Config) -> Work:
        m, n, taps, columns, splits = (config[name] for name in ("BLOCK_K", "BLOCK_C", "TAPS", "COLUMNS", "SPLITS"))
        products, x_boxes = taps * columns, columns + taps - 1
        rows, pixels = config["BLOCK_N"] * config["PIXELS"], config["PIXELS"]
        k_tiles, c_tiles = cdiv(k, m), cdiv(c, n)
        tiles = k_tiles * c_tiles * groups * runs_of_taps(problem, taps)
        along = problem.output_size[-1] / pixels if pixels > 1 else outputs(taps) / columns
        steps = lines * along * cdiv(problem.batch, config["BLOCK_N"])
        # Tiles of one split run at the same time, as far as there are multiprocessors; later tiles read the operands
        # again unless L2 still holds them.
        passes = cdiv(tiles, gpu.multiprocessors) if operands > splits * gpu.l2_bytes // 2 else 1
        return Work(
            programs=tiles * splits,
            steps=ceil(steps / splits),
            step_flops=2 * m * n * products * rows,
            step_elements=_pixels_wgrad_step(config),
            # A tile reads nothing past the last channel.
            step_bytes=(columns * cdiv(k, k_tiles) + x_boxes * cdiv(c, c_tiles)) * rows * element,
            dram_bytes=passes * operands + weight * element,
            shared_memory=config["num_stages"] * _pixels_wgrad_step(config) * element,
            registers=40 + m * n * products // (32 * config["num_warps"]) + by_element,
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=matrix_share(problem.dtype, fp32_precision(problem.dtype)),
            extra_bytes=2 * splits * weight * 4 if splits > 1 else 0,
        )

    space = PIXELS_WGRAD
    if problem.filter_size[-1] >= 3:
        space = PIXELS_WGRAD_PAIR if pairs_of_outputs(problem, 3) else PIXELS_WGRAD_ROW
    narrow: dict[str, tuple[int, ...]] = {"BLOCK_N": (64, 32), "PIXELS": (1,)}
    if problem.batch < 16 and few_images(problem):
        narrow = {**few_images(problem), "COLUMNS": (1,)}
    space = space.narrowed(only=narrow)
    return Candidates(fitting(space, BLOCK_K=k, BLOCK_C=c), problem, work, gpu)


def few_images(problem: ConvProblem) -> dict[str, tuple[int, ...]]:
    """The sides of boxes that fewer than 16 images fill together with neighbouring pixels: all images or one, and the
    pixels. Empty if the problem has no such box."""
    pairs = {
        (images, depth // images)
        for images in (1 << (problem.batch - 1).bit_length(), 1)
        for depth in (64, 32)
        if depth // images in neighbours(problem)
    }
    if not pairs:
        return {}
    images, pixels = (tuple(sorted(set(side), reverse=True)) for side in zip(*pairs, strict=True))
    return {"BLOCK_N": images, "PIXELS": pixels}


def _why_not(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    if not gpu.bulk:
        return "no tensor cores that read what bulk copies bring"
    if problem.dtype is torch.float32:
        return "tensor cores do not transpose float32 in shared memory"
    c, k = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    if problem.groups > 1 and (c % 8 or k % 8):
        return f"groups of {c} to {k} channels do not begin at multiples of 16 bytes"
    if problem.groups > 1 and min(c, k) < 32:
        return f"groups of {c} to {k} channels leave most of a tile empty"
    if problem.batch < 16 and not few_images(problem):
        return f"{problem.batch} images leave most of a step empty"
    views = (problem.as_rank3.input_shape, layout.source_strides), (problem.as_rank3.output_shape, layout.other_strides)
    if not layout.starts_aligned or not all(bulk(problem.dtype, *view) for view in views):
        return "operands whose pixels do not lie at multiples of 16 bytes"
    reason = why_not_groups(problem)
    # A family that is asked for by name is measured, whatever is predicted.
    if reason is not None or problem.batch >= 16 or named_family() == "pixels":
        return reason
    return why_slower(*(make(direction, problem, gpu, layout) for make in (_candidates, wgrad_candidates)))


FAMILY = Family("pixels", _why_not, _candidates, conv_pixels_wgrad, ("source", "other"))
