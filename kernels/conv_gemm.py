"""Convolution with filters of one tap and stride 1 as a flat GEMM by bulk tensor copies: fprop, dgrad, wgrad.

Where pixels lie at even distances the image is a matrix [M, C], M = N*O*P*Q: fprop is ``y[M, K] = x[M, C] w[K, C]^T``,
dgrad ``dx[M, C] = dy[M, K] w[K, C]``, wgrad ``dw[K, C] = dy[M, K]^T x[M, C]``. Bytes: x, w and y once each; wgrad's
workspace twice. Both operands go from shared memory into the tensor cores, and what a box has outside its matrix is
read as 0, so that no step needs a mask.

Few layers have arithmetic enough to hide their bytes, so what counts is that copies never pause. Where one step is the
whole reduction a loop over steps has nothing to run ahead of: a program then keeps its weight tile and walks tiles of
pixels, and the copies of the next ones go on under the product and the store of one. Else a program has one tile,
channel tiles fastest, so that x comes from DRAM once; of few tiles each reduction is split, as in `conv_gather`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu
from fastconv.kernels.conv_gather import PART_K, finish, finish_splits
from fastconv.kernels.descriptor import ALIGNMENT, Descriptor, pitch
from fastconv.kernels.epilogue import ACTIVATIONS, PLAIN, Epilogue
from fastconv.kernels.launch import Launch
from fastconv.kernels.layout import INT32_MAX, Strides, dense_strides, linear_stride, pointer_type, vector
from fastconv.kernels.problem import ConvProblem
from fastconv.kernels.reduce import split_sum

# Bytes of a line of shared memory as bulk copies write it, and so the reduced channels that a step covers.
LINE = 128


@triton.jit
def _finish_tile(
    acc, tile, k, M, K, operands, tile_count_ptr, eps, a, b,
    WIDE: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,
    PART_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile's acc [BLOCK_M, BLOCK_K]; ``operands`` are `finish`'s pointers."""
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = m < M
    if WIDE:
        m = m.to(tl.int64)
    if tile_count_ptr is not None:
        tl.store(tile_count_ptr + tile, tl.sum(mask_m.to(tl.float32), axis=0))
    finish(
        acc, k, mask_m, m * K, tile, 0, K, *operands, eps, a, b, ACT, RESIDUAL_AFTER, BLOCK_M, BLOCK_K, PART_K
    )  # fmt: skip


@triton.jit(do_not_specialize=["M", "C", "K", "splits", "eps", "a", "b"])
def conv_gemm_kernel(
    x_desc,  # [M, C], boxes [BLOCK_M, BLOCK_C]: the input (fprop) or the output's gradient (dgrad)
    w_desc,  # [K, C], boxes [BLOCK_K, BLOCK_C], or of dgrad [C, K], boxes [BLOCK_C, BLOCK_K]
    bias_ptr,  # [K], as the next five: absent where the epilogue has no use for them
    mean_ptr, var_ptr, gamma_ptr, beta_ptr,  # of batch norm
    slope_ptr,  # of PReLU
    residual_ptr,  # as y
    y_ptr,  # [M, K], or so for each split, in fp32
    tile_count_ptr,  # [tiles of BLOCK_M pixels]
    tile_mean_ptr, tile_m2_ptr,  # [tiles, K]
    M,
    C,  # reduced channels
    K,  # produced channels, in units of VEC
    splits,  # of the reduction
    eps,  # of batch norm
    a, b,  # of the activation
    VEC: tl.constexpr,
    DGRAD: tl.constexpr,
    RESIDENT: tl.constexpr,  # one step is the whole reduction: a program walks tiles of pixels
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,  # y holds 2^31 elements or more
    PRECISION: tl.constexpr,  # of an fp32 product
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,  # the activation
    PART_K: tl.constexpr,  # columns that the epilogue takes at once
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
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
            _finish_tile(
                acc, i, k, M, K, operands, tile_count_ptr, eps, a, b,
                WIDE, ACT, RESIDUAL_AFTER, PART_K, BLOCK_M, BLOCK_K,
            )  # fmt: skip
    else:
        steps = tl.cdiv(C, BLOCK_C)
        share = tl.cdiv(steps, splits)
        c = split * share * BLOCK_C
        steps = tl.minimum(steps - split * share, share)
        acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        # A loop that may not run would make ptxas wait for every wgmma; behind this guard it does not.
        if steps > 0:
            for _ in range(steps):
                x_step = x_desc.load([tile * BLOCK_M, c])
                w_step = w_desc.load([c, k]) if DGRAD else w_desc.load([k, c]).T
                acc = tl.dot(x_step, w_step, acc, input_precision=PRECISION)
                c += BLOCK_C
        _finish_tile(
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
    VEC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
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
    # A loop that may not run would make ptxas wait for every wgmma; behind this guard it does not.
    if steps > 0:
        for _ in range(steps):
            acc = tl.dot(dy_desc.load([m, k]).T, x_desc.load([m, c]), acc)
            m += BLOCK_M
    offs_k = k + tl.arange(0, BLOCK_K)
    offs_c = c + tl.arange(0, BLOCK_C)
    out = dw_ptr + split.to(tl.int64) * K * C + (offs_k * C)[:, None] + offs_c[None, :]
    tl.store(out, acc.to(dw_ptr.dtype.element_ty), mask=(offs_k < K)[:, None] & (offs_c < C)[None, :])


def gemm_unfit(direction: str, problem: ConvProblem, source: Strides | None, other: Strides | None) -> str | None:
    """Why a convolution is no flat GEMM that bulk copies can feed, or None; pixel strides as `conv_gemm` takes them."""
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


def _read(direction: str, problem: ConvProblem) -> tuple[tuple[int, ...], ...]:
    """The shapes of the images that are read by bulk copies."""
    x, dy = problem.lifted.input_shape, problem.lifted.output_shape
    return {"fprop": (x,), "dgrad": (dy,), "wgrad": (x, dy)}[direction]


def _pixel_stride(problem: ConvProblem, shape: tuple[int, ...], strides: Strides | None) -> int | None:
    """`linear_stride`, and of a single pixel, which has none, one that bulk copies can step by."""
    if shape[0] * shape[2] * shape[3] * shape[4] == 1:
        return pitch(shape[1], problem.dtype)
    return linear_stride(shape, strides or dense_strides(shape))


def resident(channels: int, dtype: torch.dtype) -> bool:
    """Whether one step reduces all channels. (Not of fp32: so few are rare, and some tiles spill.)"""
    return dtype.itemsize == 2 and channels * dtype.itemsize <= LINE


def conv_gemm(
    direction: str,
    problem: ConvProblem,
    config: Config,
    precision: str,
    gpu: Gpu,
    x_strides: Strides | None = None,
    bias: bool = False,
    epilogue: Epilogue = PLAIN,
) -> tuple[Launch, ...]:
    """The launches of fprop (x -> y) or dgrad (dy -> dx), the result dense; operands as `conv_gather`'s.

    Strides in elements, channels_last-dense unless given.
    """
    dgrad = direction == "dgrad"
    c, k = problem.in_channels, problem.out_channels
    if dgrad:
        c, k = k, c
    pixels, dtype = problem.output_pixels, problem.dtype
    (shape,) = _read(direction, problem)
    stride = _pixel_stride(problem, shape, x_strides)
    assert stride is not None, "no flat GEMM"
    tile = {name: config[name] for name in ("BLOCK_M", "BLOCK_K", "BLOCK_C")}
    m_block, k_block, c_block = tile.values()
    x = Descriptor(dtype, (pixels, c), (stride, 1), (m_block, c_block))
    sides, box = ((c, k), (c_block, k_block)) if dgrad else ((k, c), (k_block, c_block))
    w = Descriptor(dtype, sides, (pitch(problem.in_channels, dtype), 1), box)
    splits, finishing = config["SPLITS"], epilogue
    if splits > 1:
        epilogue = PLAIN
    stays = resident(c, dtype)
    assert not stays or (c_block >= c and splits == 1), "one step is the whole reduction"
    element, vec = pointer_type(dtype), vector(dtype, k)
    tiles, k_tiles = triton.cdiv(pixels, m_block), triton.cdiv(k, k_block)
    product = Launch(
        kernel=conv_gemm_kernel,
        grid=(k_tiles * (walkers(problem, tiles, k_tiles, config, gpu) if stays else tiles * splits), 1, 1),
        pointers=(
            *(x, w, element if bias and splits == 1 else None, *epilogue.pointers),
            *(element if splits == 1 else "*fp32", *("*fp32" if epilogue.statistics else None,) * 3),
        ),
        scalars=(pixels, c, k // vec, splits, *epilogue.scalars),
        constants={
            "VEC": vec,
            "DGRAD": dgrad,
            "RESIDENT": stays,
            "SPLIT": splits > 1,
            "WIDE": pixels * k > INT32_MAX,
            "PRECISION": precision,
            "ACT": ACTIVATIONS[epilogue.act].forward,
            "RESIDUAL_AFTER": epilogue.residual_after,
            "PART_K": k_block if epilogue == PLAIN else min(k_block, PART_K),
            **tile,
        },
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        tiles=tiles,
    )
    if splits == 1:
        return (product,)
    return product, finish_splits(pixels, k, splits, dtype, bias, finishing)


def walkers(problem: ConvProblem, tiles: int, k_tiles: int, config: Config, gpu: Gpu) -> int:
    """How many programs walk the tiles of pixels of each channel tile: as many as ``gpu`` holds at once, two a
    multiprocessor at most."""
    programs = gpu.multiprocessors * max(1, min(2, gpu.shared_memory // resident_bytes(problem, config)))
    return min(tiles, max(1, programs // k_tiles))


def resident_bytes(problem: ConvProblem, config: Config) -> int:
    """Shared memory of a program that keeps its weight tile: that, the pixels of all stages, and what it stores."""
    m, k, c = config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"]
    return problem.dtype.itemsize * (k * c + config["num_stages"] * m * c + m * k)


def conv_gemm_wgrad(
    problem: ConvProblem, config: Config, x_strides: Strides | None = None, dy_strides: Strides | None = None
) -> tuple[Launch, ...]:
    """The launches of wgrad: x, dy -> dw, or x, dy -> workspace -> dw where ``config["SPLITS"]`` splits the pixels.

    Strides in elements, channels_last-dense unless given; dw is dense.
    """
    c, k, pixels, dtype = problem.in_channels, problem.out_channels, problem.output_pixels, problem.dtype
    tile = {name: config[name] for name in ("BLOCK_K", "BLOCK_C", "BLOCK_M")}
    k_block, c_block, m_block = tile.values()
    operands = zip(_read("wgrad", problem), (x_strides, dy_strides), (c_block, k_block), strict=True)
    x, dy = (
        Descriptor(dtype, (pixels, shape[1]), (_pixel_stride(problem, shape, strides) or 0, 1), (m_block, block))
        for shape, strides, block in operands
    )
    splits, vec = config["SPLITS"], vector(dtype, c)
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
