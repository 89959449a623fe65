"""Convolution with filters of one tap and stride 1 as a flat GEMM by bulk tensor copies: fprop, dgrad, wgrad.

An image whose pixels lie at one distance is a matrix [M, C], M = N*O*P*Q. fprop is ``y[M, K] = x[M, C] w[K, C]^T``,
dgrad ``dx[M, C] = dy[M, K] w[K, C]``, wgrad ``dw[K, C] = dy[M, K]^T x[M, C]``. Bytes: x, w and y once each; wgrad's
workspace twice. Both operands go from shared memory into the tensor cores. No step needs a mask, because a box reads 0
outside its matrix.

Few layers have enough arithmetic to hide their bytes, so copies should never pause. If one step is the whole reduction,
a loop over steps cannot run ahead: a program then keeps its weight tile and walks tiles of pixels, and the next tiles
are copied under the product and the store of this one. Otherwise a program has one tile. Channel tiles are fastest, so
x comes from DRAM once, and if tiles are few each reduction is split, as in `conv_gather`.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu, Work
from fastconv.kernels.families.family import DENSE, Family, Layout, fp32_precision, why_not_bulk_copies
from fastconv.kernels.families.splits import conv_finish_kernel, split_sum, split_sum_kernel, sum_splits_with_epilogue
from fastconv.kernels.jit.epilogue import PART_K, PLAIN, apply_epilogue
from fastconv.kernels.launch.descriptor import ALIGNMENT, LINE, Descriptor, pitch
from fastconv.kernels.launch.launch import Launch, Launches
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import INT32_MAX, Strides, dense_strides, linear_stride, load_width, pointer_type
from fastconv.kernels.tiles.autotuned import Candidates
from fastconv.kernels.tiles.shapes import BOX_TILES, TileSpace, cdiv, fitting, matrix_share


@triton.jit
def _apply_tile_epilogue(
    acc, tile, k, M, K, operands, tile_count_ptr, eps, a, b,
    WIDE: tl.constexpr, ACT: tl.constexpr, RESIDUAL_AFTER: tl.constexpr, PART_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile's acc [BLOCK_M, BLOCK_K]; ``operands`` are `apply_epilogue`'s pointers."""
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < M
    if WIDE:
        m = m.to(tl.int64)
    if tile_count_ptr is not None:
        tl.store(tile_count_ptr + tile, tl.sum(mask_m.to(tl.float32), axis=0))
    apply_epilogue(
        acc, k, mask_m, m * K, tile, 0, K, *operands, eps, a, b, ACT, RESIDUAL_AFTER, BLOCK_M, BLOCK_K, PART_K
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "C", "K", "splits", "eps", "a", "b"])
def conv_gemm_kernel(
    x_desc,  # [M, C], boxes [BLOCK_M, BLOCK_C]: the input (fprop) or the output's gradient (dgrad)
    w_desc,  # [K, C], boxes [BLOCK_K, BLOCK_C]; in dgrad [C, K], boxes [BLOCK_C, BLOCK_K]
    bias_ptr,  # [K], like the next five: absent unless the epilogue uses them
    mean_ptr, var_ptr, gamma_ptr, beta_ptr,  # of batch norm
    slope_ptr,  # of PReLU
    residual_ptr,  # like y
    y_ptr,  # [M, K]; if the reduction is split, [splits, ...] in fp32
    tile_count_ptr,  # [tiles of BLOCK_M pixels]
    tile_mean_ptr, tile_m2_ptr,  # [tiles, K]
    M,
    C,  # reduced channels
    K,  # produced channels, in units of VEC
    splits,  # of the reduction
    eps,  # of batch norm
    a, b,  # of the activation
    VEC: tl.constexpr, DGRAD: tl.constexpr,
    RESIDENT: tl.constexpr,  # one step is the whole reduction: a program walks tiles of pixels
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,  # y holds 2^31 elements or more
    PRECISION: tl.constexpr,  # of an fp32 product
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,  # the residual is added after the activation
    PART_K: tl.constexpr,  # columns that the epilogue takes at once
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    K *= VEC
    k_tiles = tl.cdiv(K, BLOCK_K)
    k = tl.program_id(0) % k_tiles * BLOCK_K
    tile = tl.program_id(0) // k_tiles
    split = 0
    if SPLIT:
        split = tile % splits
        tile = tile // splits
        y_ptr += tl.cast(split, tl.int64) * M * K
    operands = (
        bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual_ptr, y_ptr, tile_mean_ptr, tile_m2_ptr
    )  # fmt: skip
    if RESIDENT:
        w_tile = w_desc.load([0, k]) if DGRAD else w_desc.load([k, 0]).T
        for i in range(tile, tl.cdiv(M, BLOCK_M), tl.num_programs(0) // k_tiles):
            acc = tl.dot(x_desc.load([i * BLOCK_M, 0]), w_tile, input_precision=PRECISION)
            _apply_tile_epilogue(
                acc, i, k, M, K, operands, tile_count_ptr, eps, a, b,
                WIDE, ACT, RESIDUAL_AFTER, PART_K, BLOCK_M, BLOCK_K,
            )  # fmt: skip
    else:
        steps = tl.cdiv(C, BLOCK_C)
        share = tl.cdiv(steps, splits)
        c = split * share * BLOCK_C
        steps = tl.minimum(steps - split * share, share)
        acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        # Without this guard ptxas waits for every wgmma, because the loop might not run.
        if steps > 0:
            for _ in range(steps):
                x_step = x_desc.load([tile * BLOCK_M, c])
                w_step = w_desc.load([c, k]) if DGRAD else w_desc.load([k, c]).T
                acc = tl.dot(x_step, w_step, acc, input_precision=PRECISION)
                c += BLOCK_C
        _apply_tile_epilogue(
            acc, tile, k, M, K, operands, tile_count_ptr, eps, a, b,
            WIDE, ACT, RESIDUAL_AFTER, PART_K, BLOCK_M, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "C", "K", "splits"])
def conv_gemm_wgrad_kernel(
    x_desc,  # [M, C], boxes [BLOCK_M, BLOCK_C]
    dy_desc,  # [M, K], boxes [BLOCK_M, BLOCK_K]
    dw_ptr,  # [splits, K, C]
    M,
    C,  # in units of VEC
    K,
    splits,  # of the pixels
    VEC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels of a step
):  # fmt: skip
    C *= VEC
    # Tiles of one split are neighbours: they read the same pixels.
    k_tiles = tl.cdiv(K, BLOCK_K)
    c_tiles = tl.cdiv(C, BLOCK_C)
    k = tl.program_id(0) % k_tiles * BLOCK_K
    c = tl.program_id(0) // k_tiles % c_tiles * BLOCK_C
    split = tl.program_id(0) // k_tiles // c_tiles
    # This split's share of the pixels, in whole steps; the last shares may be empty.
    steps = tl.cdiv(M, BLOCK_M)
    share = tl.cdiv(steps, splits)
    m = split * share * BLOCK_M
    steps = tl.minimum(steps - split * share, share)
    acc = tl.zeros((BLOCK_K, BLOCK_C), dtype=tl.float32)
    # Without this guard ptxas waits for every wgmma, because the loop might not run.
    if steps > 0:
        for _ in range(steps):
            acc = tl.dot(dy_desc.load([m, k]).T, x_desc.load([m, c]), acc)
            m += BLOCK_M
    offs_k = k + tl.arange(0, BLOCK_K)
    offs_c = c + tl.arange(0, BLOCK_C)
    out = dw_ptr + split.to(tl.int64) * K * C + (offs_k * C)[:, None] + offs_c[None, :]
    tl.store(out, acc.to(dw_ptr.dtype.element_ty), mask=(offs_k < K)[:, None] & (offs_c < C)[None, :])


def conv_gemm(direction: str, problem: ConvProblem, config: Config, gpu: Gpu, layout: Layout = DENSE) -> Launches:
    """The launches of fprop (x -> y) or dgrad (dy -> dx), with the operands of `conv_gather`; the result is dense."""
    dgrad = direction == "dgrad"
    c, k = problem.in_channels, problem.out_channels
    if dgrad:
        c, k = k, c
    pixels, dtype = problem.output_pixels, problem.dtype
    (shape,) = _read(direction, problem)
    stride = _pixel_stride(problem, shape, layout.source_strides)
    assert stride is not None, "no flat GEMM"
    tile = {name: config[name] for name in ("BLOCK_M", "BLOCK_K", "BLOCK_C")}
    m_block, k_block, c_block = tile.values()
    x = Descriptor(dtype, (pixels, c), (stride, 1), (m_block, c_block), factor=True)
    sides, box = ((c, k), (c_block, k_block)) if dgrad else ((k, c), (k_block, c_block))
    w = Descriptor(dtype, sides, (pitch(problem.in_channels, dtype), 1), box, factor=True)
    splits = config["SPLITS"]
    epilogue = PLAIN if splits > 1 else layout.epilogue
    stays = resident(c, dtype)
    assert not stays or (c_block >= c and splits == 1), "one step is the whole reduction"
    element, vec = pointer_type(dtype), load_width(dtype, k)
    tiles, k_tiles = triton.cdiv(pixels, m_block), triton.cdiv(k, k_block)
    product = Launch(
        kernel=conv_gemm_kernel,
        grid=(k_tiles * (walkers(problem, tiles, k_tiles, config, gpu) if stays else tiles * splits), 1, 1),
        pointers=(
            *(x, w, element if layout.bias and splits == 1 else None, *epilogue.pointers),
            *(element if splits == 1 else "*fp32", *epilogue.statistics_pointers),
        ),
        scalars=(pixels, c, k // vec, splits, *epilogue.scalars),
        constants={
            "VEC": vec,
            "DGRAD": dgrad,
            "RESIDENT": stays,
            "SPLIT": splits > 1,
            "WIDE": pixels * k > INT32_MAX,
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
    return product, sum_splits_with_epilogue(pixels, k, splits, dtype, layout.bias, layout.epilogue)


def conv_gemm_wgrad(direction: str, problem: ConvProblem, config: Config, gpu: Gpu, layout: Layout = DENSE) -> Launches:
    """The launches of wgrad: x, dy -> dw, or x, dy -> workspace -> dw if ``config["SPLITS"]`` splits the pixels."""
    c, k, pixels, dtype = problem.in_channels, problem.out_channels, problem.output_pixels, problem.dtype
    tile = {name: config[name] for name in ("BLOCK_K", "BLOCK_C", "BLOCK_M")}
    k_block, c_block, m_block = tile.values()
    operands = zip(
        _read("wgrad", problem), (layout.source_strides, layout.other_strides), (c_block, k_block), strict=True
    )
    x, dy = (
        Descriptor(
            dtype, (pixels, shape[1]), (_pixel_stride(problem, shape, strides) or 0, 1), (m_block, block), factor=True
        )
        for shape, strides, block in operands
    )
    splits, vec = config["SPLITS"], load_width(dtype, c)
    product = Launch(
        kernel=conv_gemm_wgrad_kernel,
        grid=(triton.cdiv(k, k_block) * triton.cdiv(c, c_block) * splits, 1, 1),
        pointers=(x, dy, pointer_type(dtype) if splits == 1 else "*fp32"),
        scalars=(pixels, c // vec, k, splits),
        constants={"VEC": vec, **tile},
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return (product,) if splits == 1 else (product, split_sum(splits, k, 1, c, dtype))


def _read(direction: str, problem: ConvProblem) -> tuple[tuple[int, ...], ...]:
    """The shapes of the images that are read by bulk copies."""
    x, dy = problem.as_rank3.input_shape, problem.as_rank3.output_shape
    return {"fprop": (x,), "dgrad": (dy,), "wgrad": (x, dy)}[direction]


def _pixel_stride(problem: ConvProblem, shape: tuple[int, ...], strides: Strides | None) -> int | None:
    """`linear_stride`; for a single pixel, which has none, a distance that bulk copies can step by."""
    if shape[0] * shape[2] * shape[3] * shape[4] == 1:
        return pitch(shape[1], problem.dtype)
    return linear_stride(shape, strides or dense_strides(shape))


def resident(channels: int, dtype: torch.dtype) -> bool:
    """Whether one step reduces all channels; never in fp32, in which few channels are rare and some tiles spill."""
    return dtype.itemsize == 2 and channels * dtype.itemsize <= LINE


def walkers(problem: ConvProblem, tiles: int, k_tiles: int, config: Config, gpu: Gpu) -> int:
    """Programs that walk a channel tile's pixels: as many as run on ``gpu`` at once, at most two a multiprocessor."""
    programs = gpu.multiprocessors * max(1, min(2, gpu.shared_memory // resident_bytes(problem, config)))
    return min(tiles, max(1, programs // k_tiles))


def resident_bytes(problem: ConvProblem, config: Config) -> int:
    """Shared memory of a program that keeps its weight tile: the weight, the pixels of all stages, the stored tile."""
    m, k, c = config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"]
    return problem.dtype.itemsize * (k * c + config["num_stages"] * m * c + m * k)


def _gemm_tile(config: Config) -> str | None:
    side = config["BLOCK_M"], config["BLOCK_K"]
    if (config["num_warps"], config["num_stages"]) != BOX_TILES.get(side):
        return "other warps or copies in flight than its sides ask for"
    if config["SPLITS"] > 1 and side != (64, 64):
        return "a split reduction of another tile than 64x64"
    return None


def _gemm_wgrad_tile(config: Config) -> str | None:
    if (config["num_warps"], config["num_stages"]) != BOX_TILES.get((config["BLOCK_K"], config["BLOCK_C"])):
        return "other warps or copies in flight than its sides ask for"
    if config["BLOCK_K"] > config["BLOCK_C"]:
        return "a binary that few layers would share"
    return None


GEMM = TileSpace(
    "conv_gemm",
    {
        "SPLITS": (1, 2, 4, 8, 16),
        "BLOCK_M": (128, 64),
        "BLOCK_K": (256, 128, 64),
        "BLOCK_C": (64, 32),
        "num_warps": (8, 4),
        "num_stages": (3, 4),
    },
    _gemm_tile,
    kernels=(conv_gemm_kernel, conv_finish_kernel),
)
GEMM_RESIDENT = TileSpace(
    "conv_gemm_resident",
    {
        "SPLITS": (1,),
        "BLOCK_M": (128, 256),
        "BLOCK_K": (128, 64),
        "BLOCK_C": (64,),
        "num_warps": (8,),
        "num_stages": (4,),
    },
    lambda config: (
        None if config["BLOCK_M"] * config["BLOCK_K"] == 128 * 128 else "a binary that few layers would share"
    ),
    kernels=(conv_gemm_kernel,),
)
# For results that are stored one element at a time: larger tiles spill on one version of the compiler or another.
GEMM_RESIDENT_SINGLE = TileSpace(
    "conv_gemm_resident_single",
    {**GEMM_RESIDENT.ranges, "BLOCK_M": (64,), "BLOCK_K": (32,), "num_warps": (4,)},
    kernels=(conv_gemm_kernel,),
)
GEMM_WGRAD = TileSpace(
    "conv_gemm_wgrad",
    {
        "BLOCK_K": (128, 64),
        "BLOCK_C": (256, 128, 64),
        "BLOCK_M": (64,),
        "SPLITS": tuple(2**i for i in range(11)),
        "num_warps": (8, 4),
        "num_stages": (3, 4),
    },
    _gemm_wgrad_tile,
    free=("SPLITS",),
    kernels=(conv_gemm_wgrad_kernel, split_sum_kernel),
)


def _candidates(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> Candidates:
    c, k, pixels = problem.in_channels, problem.out_channels, problem.output_pixels
    if direction == "dgrad":
        c, k = k, c
    precision = fp32_precision(problem.dtype)
    element, share = problem.dtype.itemsize, matrix_share(problem.dtype, precision)
    stays = resident(c, problem.dtype)

    def work(config: Config) -> Work:
        m, n, depth, splits = config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"], config["SPLITS"]
        tiles, columns = cdiv(pixels, m), cdiv(k, n)
        if stays:
            walking = walkers(problem, tiles, columns, config, gpu)
            programs, steps = walking * columns, cdiv(tiles, walking)
            elements = m * depth + m * min(n, k)
            shared_memory = resident_bytes(problem, config)
        else:
            programs, steps = tiles * columns * splits, cdiv(cdiv(c, depth), splits)
            elements = (m + min(n, k)) * depth
            shared_memory = config["num_stages"] * (m + n) * depth * element
        return Work(
            programs=programs,
            steps=steps,
            step_flops=2 * m * n * depth,
            step_elements=elements,
            step_bytes=elements * element,
            dram_bytes=problem.bytes,
            shared_memory=shared_memory,
            # Beside the accumulators, an epilogue in parts takes 64, no epilogue as few as 26.
            registers=64 + m * n // (32 * config["num_warps"]),
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=share,
            extra_bytes=(2 * splits * 4 + element) * pixels * k if splits > 1 else 0,
        )

    space = fitting(GEMM_RESIDENT if stays else GEMM, BLOCK_K=k)
    if load_width(problem.dtype, k) == 1:
        space = GEMM_RESIDENT_SINGLE if stays else fitting(GEMM, BLOCK_K=min(k, 128))
    return Candidates(space, (direction, problem, precision), work, gpu, {"BLOCK_C": LINE // element})


def _wgrad_candidates(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> Candidates:
    c, k, element = problem.in_channels, problem.out_channels, problem.dtype.itemsize

    def work(config: Config) -> Work:
        m, n, depth, splits = config["BLOCK_K"], config["BLOCK_C"], config["BLOCK_M"], config["SPLITS"]
        return Work(
            programs=cdiv(k, m) * cdiv(c, n) * splits,
            steps=cdiv(cdiv(problem.output_pixels, depth), splits),
            step_flops=2 * m * n * depth,
            step_elements=(min(m, k) + min(n, c)) * depth,
            step_bytes=(min(m, k) + min(n, c)) * depth * element,
            dram_bytes=problem.bytes,
            shared_memory=config["num_stages"] * (m + n) * depth * element,
            registers=64 + m * n // (32 * config["num_warps"]),
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=matrix_share(problem.dtype, "ieee"),
            extra_bytes=2 * splits * prod(problem.weight_shape) * 4 if splits > 1 else 0,
        )

    # If one side is wider than 64, the other may take a 128 tile half empty: the wide operand is then read half as
    # often.
    least = 128 if max(c, k) > 64 else 64
    # 128x256 spills if results are stored one element at a time.
    most = max(c, least) if load_width(problem.dtype, c) > 1 else least
    return Candidates(fitting(GEMM_WGRAD, BLOCK_K=max(k, least), BLOCK_C=most), problem, work, gpu)


def why_not_flat(direction: str, problem: ConvProblem, source: Strides | None, other: Strides | None) -> str | None:
    """Why bulk copies cannot feed a convolution as a flat GEMM, or None."""
    if problem.groups > 1:
        return f"{problem.groups} groups"
    if problem.taps > 1:
        return f"a filter of {problem.taps} taps"
    if problem.input_size != problem.output_size or any(problem.padding) or any(s > 1 for s in problem.stride):
        return "pixels of input and output that are not the same"
    element = problem.dtype.itemsize
    if problem.dtype is torch.float32 and direction != "fprop":
        return "fp32 tensor cores take no operand whose reduced axis is not its last"
    for shape, strides in zip(_read(direction, problem), (source, other), strict=False):
        stride = _pixel_stride(problem, shape, strides)
        if stride is None:
            return "pixels at uneven distances"
        if stride == 0 or stride * element % ALIGNMENT:
            return f"pixels {stride * element} bytes apart"
    return None


def _why_not(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    reason = why_not_flat(direction, problem, layout.source_strides, layout.other_strides)
    return reason or why_not_bulk_copies(problem, gpu, layout)


FAMILY = Family("gemm", _why_not, _candidates, conv_gemm, ("source",))
FAMILY_WGRAD = Family("gemm", _why_not, _wgrad_candidates, conv_gemm_wgrad, ("source", "other"))
