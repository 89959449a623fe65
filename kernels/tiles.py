"""The tiles each kernel may be launched with, and what a tile makes of a problem: what ``autotune`` chooses from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import ceil, prod
from operator import mul

import torch

from fastconv.autotune import Choice, Config, Gpu, Space, Work
from fastconv.autotune.choose import RESOLUTION, by_cost_model
from fastconv.autotune.cost_model import predict_pass
from fastconv.kernels.conv_depthwise import filter_parts, mirrored, mirrors, outputs_of, row_schedule, strips
from fastconv.kernels.conv_gather import flat
from fastconv.kernels.conv_gemm import LINE, resident, resident_bytes, walkers
from fastconv.kernels.conv_pixels import boxes_of_row, has_parities, sums_of, taps_walked
from fastconv.kernels.conv_pixels_wgrad import neighbours, outputs_of_taps, pairs_of_outputs, row_outputs, runs_of_taps
from fastconv.kernels.conv_rows import Rows, rows_of
from fastconv.kernels.conv_spatial import rectangles
from fastconv.kernels.conv_wgrad import wgrad_flat
from fastconv.kernels.launch import decided
from fastconv.kernels.layout import common, vector
from fastconv.kernels.pool_gradient import blocks_of
from fastconv.kernels.pool_window import UNROLLED
from fastconv.kernels.pool_window import tile as pool_blocks
from fastconv.kernels.problem import ConvProblem, PoolProblem
from fastconv.kernels.tuned import choose

# A space, what identifies the problem, what a config makes of it, the GPU, and what parameters must cover.
Asked = tuple[Space, Hashable, Callable[[Config], Work], Gpu, Mapping[str, int]]
# Largest tensor that Triton allows, in elements.
MAX_ELEMENTS = 1 << 20


def _matrix_tile(rows: str, columns: str, depth: str) -> Callable[[Config], str | None]:
    """A tensor-core tile: warps and stages follow from its sides, so that few binaries serve many problems."""

    def valid(config: Config) -> str | None:
        elements = config[rows] * config[columns] // (32 * config["num_warps"])
        # Addresses take as many registers as accumulators: eight warps hold 128x64 in half of what four need each.
        if not 16 <= elements <= (32 if config["num_warps"] == 4 else 128):
            return f"{elements} accumulators a thread do not suit {config['num_warps']} warps"
        if config["num_stages"] != (3 if config[depth] > 32 else 4):
            return "copies in flight for another step size"
        return None

    return valid


def _fits_interpreter(config: Config) -> str | None:
    sides = sorted(value for name, value in config.items() if name.startswith("BLOCK_"))
    return "larger than a tensor may be" if sides[-1] * sides[-2] > MAX_ELEMENTS else None


GATHER = Space(
    "conv_gather",
    {
        "SPLITS": (1,),
        "BLOCK_M": (128, 64),
        "BLOCK_K": (128, 64, 32, 256),
        "BLOCK_C": (64, 32),
        "num_warps": (4, 8),
        "num_stages": (3, 4),
    },
    _matrix_tile("BLOCK_M", "BLOCK_K", "BLOCK_C"),
)


def _dense_tile(config: Config) -> str | None:
    """Where tiles are too few for the GPU, several programs share the reduction of one: of one small tile."""
    if config["BLOCK_K"] <= 64 and config["BLOCK_C"] == 32:
        return "binaries that few layers would share, and that spill on one version of the compiler"
    if config["SPLITS"] > 1 and (config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"]) != (64, 64, 64):
        return "a split reduction of another tile than 64x64x64"
    return GATHER.valid(config)


GATHER_SPLIT = Space("conv_gather_split", {**GATHER.ranges, "SPLITS": (1, 2, 4, 8, 16)}, _dense_tile)


def _wgrad_tile(config: Config) -> str | None:
    if (config["BLOCK_K"], config["BLOCK_C"]) in ((64, 64), (128, 32)):
        return "binaries that few layers would share, and that spill on one version of the compiler"
    return WGRAD.valid(config)


WGRAD = Space(
    "conv_wgrad",
    {
        "BLOCK_K": (128, 64),
        "BLOCK_C": (128, 64, 32),
        "BLOCK_M": (64, 32),
        "SPLITS": tuple(2**i for i in range(11)),
        "num_warps": (4, 8),
        "num_stages": (3, 4),
    },
    _matrix_tile("BLOCK_K", "BLOCK_C", "BLOCK_M"),
)
WGRAD_DENSE = Space("conv_wgrad_dense", WGRAD.ranges, _wgrad_tile)
# (images of all pixels of a box, BLOCK_K, PAIRS) of the pixel GEMM -> its warps and stages. Of a byte from L2 128x128
# makes 64 FLOP, 128x64 and 64x128 make 43, 128x256 makes 85; pairs of three taps of the first make 110, of the others
# 70, 77 and 55, of five taps of the last two 80 and 58. (256x128 spills with the largest epilogue on one version of the
# compiler, in fp32 128x256 too. Of five taps 128x64 takes 254 registers on one version, 128x128 leaves room for one
# step on its way alone, as seven taps do; these in steps of half the depth wait after 12 of 14 wgmmas.)
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


def _pixels_tile(line: int, chains: bool = True) -> Callable[[Config], str | None]:
    """A tile of the pixel GEMM. A box is as wide as a line of shared memory, ``line`` elements; of pairs half of it.
    ``chains``: products of a pair's step may add to each other's sums."""

    def valid(config: Config) -> str | None:
        pixels, pairs = config["PIXELS"], config["PAIRS"]
        images = pixels * config["BLOCK_N"]
        if pixels > 1 and images != 128:
            return f"{images} rows of several pixels, not 128"
        if pixels > 1 and pairs:
            return "pairs of several pixels, which would compute most of them twice"
        if pairs and not chains and sums_of(config) == 1:
            return "pairs whose sums would move through registers from one product to the next"
        if config["BLOCK_C"] != (line // 2 if pairs else line):
            return "boxes of another width than a line of shared memory, or half of one for pairs"
        if PIXELS_TILES.get((images, config["BLOCK_K"], pairs)) != (config["num_warps"], config["num_stages"]):
            return "no tile that compilers were seen to pipeline, or other warps or stages than it asks for"
        return None

    return valid


CONV_PIXELS = Space(
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
)
CONV_PIXELS_TCGEN05 = replace(CONV_PIXELS, valid=_pixels_tile(64, chains=False))
CONV_PIXELS_FP32 = Space(
    "conv_pixels_fp32", {**CONV_PIXELS.ranges, "BLOCK_K": (128, 64), "PAIRS": (0,)}, _pixels_tile(32)
)
# (BLOCK_K, BLOCK_C, TAPS, COLUMNS) of the pixel GEMM's wgrad -> its warps. Of one tap 128x256 makes 85 FLOP of a byte
# from L2, 128x128 makes 64 and 64x64 makes 32; of three taps the second makes 96, of three and two outputs the last 64.
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
        return "of neighbours one version of the compiler waits for every wgmma, or spills on Blackwell"
    step = _pixels_wgrad_step(config) * 2
    stages = 4 if 4 * step <= 192 << 10 else 3
    return None if config["num_stages"] == stages else "copies in flight for another step size"


def _pixels_wgrad_step(config: Config) -> int:
    """Elements that a step of the pixel GEMM's wgrad reads."""
    columns = config["COLUMNS"]
    boxes = columns * config["BLOCK_K"] + (columns + config["TAPS"] - 1) * config["BLOCK_C"]
    return boxes * config["BLOCK_N"] * config["PIXELS"]


PIXELS_WGRAD = Space(
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
)
PIXELS_WGRAD_ROW = replace(PIXELS_WGRAD, name="conv_pixels_wgrad_row", ranges={**PIXELS_WGRAD.ranges, "TAPS": (3, 1)})
PIXELS_WGRAD_PAIR = replace(
    PIXELS_WGRAD, name="conv_pixels_wgrad_pair", ranges={**PIXELS_WGRAD_ROW.ranges, "COLUMNS": (2, 1)}
)
# Of the flat GEMM, (rows, columns) of a tile -> its warps and stages: what is read from L2 for a product falls with the
# first, two programs and more fit a multiprocessor of the next ones. (Of 128x64 four warps spill statistics.)
GEMM_TILES = {(128, 256): (8, 3), (128, 128): (8, 3), (128, 64): (8, 3), (64, 64): (4, 4)}


def _gemm_tile(config: Config) -> str | None:
    side = config["BLOCK_M"], config["BLOCK_K"]
    if (config["num_warps"], config["num_stages"]) != GEMM_TILES.get(side):
        return "other warps or copies in flight than its sides ask for"
    if config["SPLITS"] > 1 and side != (64, 64):
        return "a split reduction of another tile than 64x64"
    return None


def _gemm_wgrad_tile(config: Config) -> str | None:
    if (config["num_warps"], config["num_stages"]) != GEMM_TILES.get((config["BLOCK_K"], config["BLOCK_C"])):
        return "other warps or copies in flight than its sides ask for"
    if config["BLOCK_K"] > config["BLOCK_C"]:
        return "a binary that few layers would share"
    return None


GEMM = Space(
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
)
# Eight warps, because between two products of a program stands its store. (Statistics of 128x64 spill on one version of
# the compiler.)
GEMM_RESIDENT = Space(
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
)
# Of results that are stored one element at a time larger tiles spill on one version of the compiler or another.
GEMM_RESIDENT_SINGLE = Space(
    "conv_gemm_resident_single",
    {**GEMM_RESIDENT.ranges, "BLOCK_M": (64,), "BLOCK_K": (32,), "num_warps": (4,)},
)
GEMM_WGRAD = Space(
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
)


def _spatial_tile(config: Config) -> str | None:
    if (config["num_warps"], config["num_stages"]) != GEMM_TILES.get((config["BLOCK_M"], config["BLOCK_K"])):
        return "other warps or copies in flight than its sides ask for"
    if (config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"]) == (128, 64, 32):
        return "a binary of fp32 that one version of the compiler spills"
    if config["SPLITS"] > 1 and config["BLOCK_M"] > 64:
        return "a split reduction of another tile than 64x64"
    return None


# Rows first, which every GPU's tensor cores take from shared memory.
SPATIAL = Space(
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
)
# As many runs as threads: then a NaN's tile is walked in few registers.
ROWS = Space(
    "conv_rows",
    {"BLOCK_M": (256, 128), "BLOCK_K": (32, 16), "BLOCK_C": (32, 64), "num_warps": (8, 4), "num_stages": (4, 3)},
    lambda config: (
        None
        if config["BLOCK_M"] == 32 * config["num_warps"]
        and config["num_stages"] == (3 if config["BLOCK_C"] > 32 else 4)
        else "other warps or copies in flight than its sides ask for"
    ),
)
ROW_BOXES = Space(
    "conv_row_boxes",
    {"BLOCK_N": (128, 64), "BLOCK_K": (64, 32), "num_warps": (8, 4), "num_stages": (4,)},
    lambda config: None if config["BLOCK_N"] == 16 * config["num_warps"] else "other warps than its sides ask for",
)
ROWS_WGRAD = Space("conv_rows_wgrad", {**WGRAD.ranges, "BLOCK_M": (32,)}, WGRAD.valid)
# Batch norm's passes and sums over pixels.
PASS = Space(
    "pass",
    {"BLOCK_M": (32,), "BLOCK_K": (64,), "SPLITS": (1,), "num_warps": (4,), "num_stages": (3,)},
)
PASS_SPLIT = Space(
    "pass_split",
    {**PASS.ranges, "SPLITS": tuple(2**i for i in range(11))},
)
# A small window is unrolled, for LINES outputs at once; of a large one LANES rows and SPLITS programs may take a part.
POOL = Space(
    "pool",
    {"BLOCK": (512, 1024), "LINES": (4, 1), "LANES": (1,), "SPLITS": (1,), "num_warps": (4,), "num_stages": (1,)},
)
# Maxima without taps to keep and lp norms: of four lines some spill on one version of the compiler.
POOL_PAIR = Space("pool_pair", {**POOL.ranges, "LINES": (2, 1)})
POOL_SINGLE = Space("pool_single", {**POOL.ranges, "LINES": (1,)})
POOL_SPLIT = Space(
    "pool_split",
    {**POOL_SINGLE.ranges, "LANES": (1, 16), "SPLITS": tuple(2**i for i in range(11))},
)
# Planes whose outputs are few: neighbouring threads read neighbours only as lanes of one window.
POOL_PLANES = Space("pool_planes", {**POOL_SPLIT.ranges, "LANES": (32,)})


def _channels_a_thread(count: int) -> Callable[[Config], str | None]:
    """A block of a stencil, in which a thread has so many channels of one group of neighbours."""

    def valid(config: Config) -> str | None:
        elements = config["BLOCK_M"] * config["BLOCK_K"] // (32 * config["num_warps"])
        return None if elements == count else f"{elements} elements a thread"

    return valid


# Seven neighbours divide the rows of most networks' maps. A thread has the channels of a 16-byte load, a program few of
# them and many pixels: its halo is small, and no lane is idle where channels are a multiple of 32.
DEPTHWISE = Space(
    "conv_depthwise",
    {"OUTPUTS": (7, 4, 2), "BLOCK_M": (32,), "BLOCK_K": (32,), "num_warps": (4,), "num_stages": (1,)},
)
DEPTHWISE_WGRAD = Space(
    "conv_depthwise_wgrad",
    {**DEPTHWISE.ranges, "OUTPUTS": (4,), "ROWS": (3, 1), "SPLITS": tuple(2**i for i in range(11))},
)
# With eight channels the sums of longer rows would not fit, and each pixel come from L2 for every row of a filter.
DEPTHWISE_WGRAD_LONG = Space(
    "conv_depthwise_wgrad_long", {**DEPTHWISE_WGRAD.ranges, "ROWS": (5, 3, 1), "BLOCK_M": (16,)}
)
# In the interpreter a step costs much the same whatever its size, so tiles are as large as the problem.
_SIDES = {
    "BLOCK_M": tuple(2**i for i in range(4, 15)),
    "BLOCK_K": (16, 64, 256),
    "SPLITS": (1,),
    "num_warps": (4,),
    "num_stages": (1,),
}
_PRODUCT = {**_SIDES, "BLOCK_C": (16, 64, 256, 1024)}
_STENCIL = {name: _SIDES[name] for name in ("BLOCK_M", "BLOCK_K", "num_warps", "num_stages")}
INTERPRETED = {
    **{
        name: Space(name, {**_PRODUCT, "SPLITS": (1,)}, _fits_interpreter)
        for name in ("conv_gather", "conv_gather_split")
    },
    **{
        name: Space(name, {**_PRODUCT, "SPLITS": (1, 2)}, _fits_interpreter)
        for name in ("conv_wgrad", "conv_wgrad_dense")
    },
    "conv_rows": Space("conv_rows", {**_PRODUCT, "BLOCK_M": (16, 64, 256, 1024, 4096), "BLOCK_K": (16, 64)}),
    "conv_rows_wgrad": Space("conv_rows_wgrad", {**_PRODUCT, "SPLITS": (1, 2)}, _fits_interpreter),
    **{
        name: Space(name, {**POOL_SINGLE.ranges, "BLOCK": tuple(2**i for i in range(6, 19, 2))})
        for name in ("pool", "pool_pair", "pool_single", "pool_split", "pool_planes")
    },
    "conv_depthwise": Space("conv_depthwise", {**_STENCIL, "OUTPUTS": (1,)}, _fits_interpreter),
    **{
        name: Space(name, {**_STENCIL, "OUTPUTS": (1,), "ROWS": (1, 3), "SPLITS": (1, 2)}, _fits_interpreter)
        for name in ("conv_depthwise_wgrad", "conv_depthwise_wgrad_long")
    },
    "pass": Space("pass", _SIDES, _fits_interpreter),
    "pass_split": Space("pass_split", {**_SIDES, "SPLITS": (1, 2)}, _fits_interpreter),
}


def matrix_share(dtype: torch.dtype, precision: str) -> float:
    """The share of the GPU's fp16 matrix rate that a product of this dtype runs at; 0 without tensor cores."""
    if dtype is not torch.float32:
        return 1.0
    return 0.5 if precision == "tf32" else 0.0


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _registers(
    config: Config,
    rows: str,
    columns: str,
    depth: str,
    single: tuple[float, float, float],
    fma: bool,
    gpu: Gpu,
) -> int:
    """Registers a thread of a tile rows x columns, fitted to what ptxas reports; rows are the gathered side.

    The accumulator; the addresses and coordinates of 16-byte loads; operands where the tensor cores read registers.
    ``single``: registers for each element of the rows', columns' or result's operand that goes element by element (see
    `_single`), else 0. ``fma``: no tensor cores.
    """
    threads = 32 * config["num_warps"]
    m, n, k = config[rows], config[columns], config[depth]
    registers = 36 + m * n // threads
    registers += int(single[2] * m * n / threads)
    for side, wide, each in ((m, 6, single[0]), (n, 3, single[1])):
        registers += int((each or wide / 8) * side * k / threads)
    if fma:
        # Above 16 accumulators a thread or 32 of depth one or the other version of the compiler spills.
        registers += 3 * m * n // threads + 2 * k if m * n // threads <= 16 and k <= 32 else 256
    elif gpu.arch < 90:
        registers += (m + 2 * n) * k // 256
    return registers


def _packed(problem: ConvProblem) -> float:
    """Registers for an element of the packed weight, which is read by the runs that one group has."""
    run = common(problem.dtype, problem.in_channels // problem.groups, problem.out_channels // problem.groups)
    return 3 / run if run * problem.dtype.itemsize >= 4 else 4


def _single(problem: ConvProblem, channels: int) -> int:
    """Registers for an element of runs of so many channels, 0 where they are read by 16 bytes.

    Else each has an address of its own and, under 4 bytes, waits in a register, since no asynchronous copy is so small.
    """
    return 5 if problem.dtype.itemsize < 4 and vector(problem.dtype, channels) == 1 else 0


def _is_dense(problem: ConvProblem, share: float, pack: int) -> bool:
    """Whether tiles are one group's, on tensor cores, and loaded by 16 bytes."""
    widths = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    return pack == 1 and share > 0 and not any(_single(problem, width) for width in widths)


def gather_tile(direction: str, problem: ConvProblem, precision: str, gpu: Gpu, pack: int = 1) -> Choice:
    """The tile of fprop or dgrad; ``pack`` groups share one."""
    return _choose(*_gather(direction, problem, precision, gpu, pack))


def _gather(direction: str, problem: ConvProblem, precision: str, gpu: Gpu, pack: int) -> Asked:
    """What `gather_tile` chooses from."""
    groups = problem.groups // pack
    k, c = problem.out_channels // groups, problem.in_channels // groups
    pixels, phases = problem.output_pixels, 1
    if direction == "dgrad":
        k, c = c, k
        phases = prod(map(min, problem.stride, problem.input_size))
        pixels = _cdiv(problem.input_pixels, phases)
    element, share = problem.dtype.itemsize, matrix_share(problem.dtype, precision)
    # (Tap, channel) pairs have coordinates of their own as well.
    pairs = flat(problem.taps, c, pack)
    source = (8 if problem.rank == 3 else 5) if pairs else _single(problem, c)
    result = 6 if _single(problem, k) else 0
    weight: float = _single(problem, k) if direction == "dgrad" else source
    if pack > 1:
        source, weight = min(source, 4), _packed(problem)
    single = source, weight, result

    def work(config: Config) -> Work:
        m, n, depth, warps = config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"], config["num_warps"]
        splits = config["SPLITS"]
        steps = _cdiv(problem.taps * c, depth) if pairs else problem.taps * _cdiv(c, depth)
        registers = _registers(config, "BLOCK_M", "BLOCK_K", "BLOCK_C", single, share == 0, gpu)
        if pairs and share == 0 and n > 32:
            registers += 256  # as Triton 3.9 compiles it
        if pack > 1:
            # What the walk by single channels takes, whose rows are shared between threads or held by each.
            registers = max(registers, 128 if m >= 32 * warps else 168)
        return Work(
            programs=_cdiv(pixels, m) * phases * _cdiv(k, n) * groups * splits,
            steps=max(1, _cdiv(steps, phases * splits)),
            step_flops=2 * m * n * depth,
            step_elements=(m + n) * depth,
            step_bytes=(m + n) * depth * element,
            dram_bytes=problem.bytes,
            shared_memory=config["num_stages"] * (m + n) * depth * element,
            registers=registers,
            warps=warps,
            stages=config["num_stages"],
            matrix_share=share,
            extra_bytes=(2 * splits * 4 + element) * pixels * phases * k * groups if splits > 1 else 0,
        )

    width = {"BLOCK_K": k, "BLOCK_C": c} if pack > 1 else {}
    space = GATHER_SPLIT if _is_dense(problem, share, pack) else GATHER
    return space, (direction, problem, precision, pack), work, gpu, width


def wgrad_tile(problem: ConvProblem, precision: str, gpu: Gpu, pack: int = 1) -> Choice:
    """The tile of wgrad, and into how many parts its pixels are split; ``pack`` groups share one."""
    return _choose(*_wgrad(problem, precision, gpu, pack))


def _wgrad(problem: ConvProblem, precision: str, gpu: Gpu, pack: int) -> Asked:
    """What `wgrad_tile` chooses from."""
    groups = problem.groups // pack
    k, c = problem.out_channels // groups, problem.in_channels // groups
    element, share = problem.dtype.itemsize, matrix_share(problem.dtype, precision)
    pairs = wgrad_flat(problem.taps, c, pack)
    # A pair has coordinates of its own, or a run of them has where channels are read by 16 bytes.
    source = _single(problem, c) if not pairs else 8 if vector(problem.dtype, c) == 1 else 2
    single = source, _single(problem, k), 0

    def work(config: Config) -> Work:
        m, n, depth, warps = config["BLOCK_K"], config["BLOCK_C"], config["BLOCK_M"], config["num_warps"]
        splits = config["SPLITS"]
        columns = _cdiv(problem.taps * c, n) if pairs else problem.taps * _cdiv(c, n)
        steps = _cdiv(problem.output_pixels, depth)
        workspace = 2 * splits * prod(problem.weight_shape) * 4 if splits > 1 else 0
        return Work(
            programs=_cdiv(k, m) * columns * groups * splits,
            steps=_cdiv(steps, splits),
            step_flops=2 * m * n * depth,
            step_elements=(m + n) * depth,
            step_bytes=(m + n) * depth * element,
            dram_bytes=problem.bytes,
            shared_memory=config["num_stages"] * (m + n) * depth * element,
            registers=_registers(config, "BLOCK_C", "BLOCK_K", "BLOCK_M", single, share == 0, gpu),
            warps=warps,
            stages=config["num_stages"],
            matrix_share=share,
            extra_bytes=workspace,
        )

    space = WGRAD_DENSE if _is_dense(problem, share, pack) else WGRAD
    return space, (problem, precision, pack), work, gpu, {"BLOCK_K": k} if pack > 1 else {}


def pixels_tile(direction: str, problem: ConvProblem, precision: str, gpu: Gpu) -> Choice:
    """The tile of the pixel GEMM, fprop or dgrad."""
    return _choose(*_pixels(direction, problem, precision, gpu))


def pixels_slower(direction: str, problem: ConvProblem, precision: str, gpu: Gpu) -> str | None:
    """The cost model's reason to gather what the pixel GEMM could serve: it is predicted to take far longer."""
    if direction == "wgrad":
        pixels, gather = _predicted(*_pixels_wgrad(problem, gpu)), _predicted(*_wgrad(problem, precision, gpu, 1))
    else:
        pixels = _predicted(*_pixels(direction, problem, precision, gpu))
        gather = _predicted(*_gather(direction, problem, precision, gpu, 1))
    if pixels <= (1 + RESOLUTION) * gather:
        return None
    return f"predicted to take {pixels / gather:.1f} times as long as a gather"


def _pixels(direction: str, problem: ConvProblem, precision: str, gpu: Gpu) -> Asked:
    """What `pixels_tile` chooses from."""
    lifted, groups, element = problem.lifted, problem.groups, problem.dtype.itemsize
    share = matrix_share(problem.dtype, precision)
    (_, c, *source), (_, k, *size) = lifted.input_shape, lifted.output_shape
    if direction == "dgrad":
        (c, source), (k, size) = (k, size), (c, source)
    c, k = c // groups, k // groups
    shared = lifted.filter_size[2]  # taps of a row
    # Of x what the filter spans around a row of outputs, or around a plane, is read from DRAM once if L2 holds it.
    spans = [min(n, d * (r - 1) + 1) for n, r, d in zip(source, lifted.filter_size, lifted.dilation, strict=True)]

    def work(config: Config) -> Work:
        n, m, pixels, pairs = (config[name] for name in ("BLOCK_N", "BLOCK_K", "PIXELS", "PAIRS"))
        depth, rows = config["BLOCK_C"], n * pixels
        columns = boxes_of_row(direction, problem, 2 if pairs else pixels)
        boxes = (shared + 1) * rows + shared * m if pairs else rows + m
        accumulators = rows * m * sums_of(config) * (2 if pairs else 1) // (32 * config["num_warps"])
        image = n * source[2] * c * groups * element
        again = 1
        if spans[1] * image > gpu.l2_bytes // 2:
            again = spans[0] * spans[1]
        elif spans[0] * source[1] * image > gpu.l2_bytes // 2:
            again = spans[0]
        return Work(
            programs=_cdiv(problem.batch, n) * size[0] * size[1] * columns * _cdiv(k, m) * groups,
            steps=max(1, round(taps_walked(direction, problem, pixels, pairs) * _cdiv(c, depth))),
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
    # Near the best there may be a box that leaves half of its images empty.
    narrow = {"BLOCK_N": tuple(n for n in space.ranges["BLOCK_N"] if n < 2 * problem.batch)}
    if k <= 64 or groups > 1:
        narrow["BLOCK_K"] = (64,)
    if lifted.stride[2] > 1 and not has_parities(problem):
        narrow["PIXELS"] = (1,)
    paired = lifted.stride[2] == lifted.dilation[2] == 1
    narrow["PAIRS"] = tuple(taps for taps in space.ranges["PAIRS"] if taps in (0, paired * shared))
    space = replace(space, ranges={**space.ranges, **narrow})
    return space, (direction, problem, precision), work, gpu, {}


def pixels_wgrad_tile(problem: ConvProblem, gpu: Gpu) -> Choice:
    """The tile of the pixel GEMM's wgrad, and into how many parts its walk is split."""
    return _choose(*_pixels_wgrad(problem, gpu))


def _pixels_wgrad(problem: ConvProblem, gpu: Gpu) -> Asked:
    """What `pixels_wgrad_tile` chooses from."""
    groups, element = problem.groups, problem.dtype.itemsize
    k, c = problem.out_channels // groups, problem.in_channels // groups
    weight = prod(problem.weight_shape)
    # Of x what any tap meets; strides leave out the rest.
    met = prod(map(min, problem.input_size, map(mul, problem.output_size, problem.filter_size)))
    operands = problem.batch * (met * problem.in_channels + prod(problem.output_size) * problem.out_channels) * element
    # Results that are stored one element at a time have addresses of their own: of three taps 128x128 spills.
    single = 24 if vector(problem.dtype, c, k) == 1 else 0
    # A tap's outputs on the axes that taps do not share, on average.
    lines = 1.0
    for axis, taps in enumerate(problem.filter_size[:-1]):
        lines *= sum(outputs_of_taps(problem, axis, tap, tap) for tap in range(taps)) / taps

    @cache
    def outputs(taps: int) -> float:
        """Of a row that a run of taps walks, on average."""
        walked = row_outputs(problem, taps)
        return sum(walked) / len(walked)

    def work(config: Config) -> Work:
        m, n, taps, columns, splits = (config[name] for name in ("BLOCK_K", "BLOCK_C", "TAPS", "COLUMNS", "SPLITS"))
        products, boxes = taps * columns, columns + taps - 1  # boxes: of x
        rows, pixels = config["BLOCK_N"] * config["PIXELS"], config["PIXELS"]
        k_tiles, c_tiles = _cdiv(k, m), _cdiv(c, n)
        tiles = k_tiles * c_tiles * groups * runs_of_taps(problem, taps)
        along = problem.output_size[-1] / pixels if pixels > 1 else outputs(taps) / columns
        steps = lines * along * _cdiv(problem.batch, config["BLOCK_N"])
        # Tiles of a share run together as far as multiprocessors do; later ones find it in L2, or read it again.
        passes = _cdiv(tiles, gpu.multiprocessors) if operands > splits * gpu.l2_bytes // 2 else 1
        return Work(
            programs=tiles * splits,
            steps=ceil(steps / splits),
            step_flops=2 * m * n * products * rows,
            step_elements=_pixels_wgrad_step(config),
            # Of a tile that goes past the last channel nothing is read there.
            step_bytes=(columns * _cdiv(k, k_tiles) + boxes * _cdiv(c, c_tiles)) * rows * element,
            dram_bytes=passes * operands + weight * element,
            shared_memory=config["num_stages"] * _pixels_wgrad_step(config) * element,
            registers=40 + m * n * products // (32 * config["num_warps"]) + single,
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=matrix_share(problem.dtype, "ieee"),
            extra_bytes=2 * splits * weight * 4 if splits > 1 else 0,
        )

    space = PIXELS_WGRAD
    if problem.filter_size[-1] >= 3:
        space = PIXELS_WGRAD_PAIR if pairs_of_outputs(problem, 3) else PIXELS_WGRAD_ROW
    narrow: dict[str, tuple[int, ...]] = {"BLOCK_N": (64, 32), "PIXELS": (1,)}
    if problem.batch < 16 and few_images(problem):
        narrow = {**few_images(problem), "COLUMNS": (1,)}
    space = replace(space, ranges={**space.ranges, **narrow})
    return _fitting(space, BLOCK_K=k, BLOCK_C=c), problem, work, gpu, {}


def few_images(problem: ConvProblem) -> dict[str, tuple[int, ...]]:
    """Of boxes that are filled by fewer than 16 images and neighbouring pixels: the images, all or one, and the
    pixels. Empty where the problem has none."""
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


def _fitting(space: Space, **widths: int) -> Space:
    """``space`` without the sides that so many channels leave half empty; 64 stays."""
    sides = {
        name: tuple(side for side in space.ranges[name] if side == 64 or side < 2 * width)
        for name, width in widths.items()
    }
    return replace(space, ranges={**space.ranges, **sides})


def gemm_tile(direction: str, problem: ConvProblem, precision: str, gpu: Gpu) -> Choice:
    """The tile of a flat GEMM, fprop or dgrad, and into how many parts its reduction is split."""
    return _choose(*_gemm(direction, problem, precision, gpu))


def _gemm(direction: str, problem: ConvProblem, precision: str, gpu: Gpu) -> Asked:
    """What `gemm_tile` chooses from."""
    c, k, pixels = problem.in_channels, problem.out_channels, problem.output_pixels
    if direction == "dgrad":
        c, k = k, c
    element, share = problem.dtype.itemsize, matrix_share(problem.dtype, precision)
    stays = resident(c, problem.dtype)

    def work(config: Config) -> Work:
        m, n, depth, splits = config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"], config["SPLITS"]
        tiles, columns = _cdiv(pixels, m), _cdiv(k, n)
        if stays:
            walking = walkers(problem, tiles, columns, config, gpu)
            programs, steps = walking * columns, _cdiv(tiles, walking)
            elements = m * depth + m * min(n, k)
            shared_memory = resident_bytes(problem, config)
        else:
            programs, steps = tiles * columns * splits, _cdiv(_cdiv(c, depth), splits)
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
            # (With an epilogue in parts; without one as few as 26 beside the accumulators.)
            registers=64 + m * n // (32 * config["num_warps"]),
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=share,
            extra_bytes=(2 * splits * 4 + element) * pixels * k if splits > 1 else 0,
        )

    space = _fitting(GEMM_RESIDENT if stays else GEMM, BLOCK_K=k)
    if vector(problem.dtype, k) == 1:
        space = GEMM_RESIDENT_SINGLE if stays else _fitting(GEMM, BLOCK_K=min(k, 128))
    return space, (direction, problem, precision), work, gpu, {"BLOCK_C": LINE // element}


def gemm_wgrad_tile(problem: ConvProblem, gpu: Gpu) -> Choice:
    """The tile of a flat GEMM's wgrad, and into how many parts its pixels are split."""
    return _choose(*_gemm_wgrad(problem, gpu))


def _gemm_wgrad(problem: ConvProblem, gpu: Gpu) -> Asked:
    """What `gemm_wgrad_tile` chooses from."""
    c, k, element = problem.in_channels, problem.out_channels, problem.dtype.itemsize

    def work(config: Config) -> Work:
        m, n, depth, splits = config["BLOCK_K"], config["BLOCK_C"], config["BLOCK_M"], config["SPLITS"]
        return Work(
            programs=_cdiv(k, m) * _cdiv(c, n) * splits,
            steps=_cdiv(_cdiv(problem.output_pixels, depth), splits),
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

    # Beside a wider side one of 64 may be half of 128, which reads the wider one's operand half as often.
    least = 128 if max(c, k) > 64 else 64
    # (128x256 spills where results are stored one element at a time.)
    most = max(c, least) if vector(problem.dtype, c) > 1 else least
    return _fitting(GEMM_WGRAD, BLOCK_K=max(k, least), BLOCK_C=most), problem, work, gpu, {}


def spatial_tile(direction: str, problem: ConvProblem, precision: str, gpu: Gpu) -> Choice:
    """The tile of fprop or dgrad over rows or rectangles of pixels, and into how many parts its reduction is split."""
    return _choose(*_spatial(direction, problem, precision, gpu))


def _spatial(direction: str, problem: ConvProblem, precision: str, gpu: Gpu) -> Asked:
    """What `spatial_tile` chooses from."""
    k, c, phases = problem.out_channels, problem.in_channels, 1
    if direction == "dgrad":
        k, c, phases = c, k, prod(map(min, problem.stride, problem.input_size))
    pixels = problem.input_pixels if direction == "dgrad" else problem.output_pixels
    element = problem.dtype.itemsize

    def work(config: Config) -> Work:
        m, n, depth, splits = config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"], config["SPLITS"]
        return Work(
            programs=rectangles(direction, problem, config) * _cdiv(k, n) * splits,
            steps=max(1, _cdiv(problem.taps * _cdiv(c, depth), phases * splits)),
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

    # Of strided rows a copy takes one.
    single = {"ROWS": 1} if direction == "fprop" and problem.lifted.stride[1] > 1 else {}
    space, width = _fitting(SPATIAL, BLOCK_K=k), {"BLOCK_C": LINE // element, **single}
    return space, (direction, problem, precision), work, gpu, width


def predicted_faster(direction: str, problem: ConvProblem, precision: str, gpu: Gpu) -> bool:
    """Whether the gather is not predicted to take less time than rows or rectangles of pixels."""
    tile = _predicted(*_spatial(direction, problem, precision, gpu))
    return tile <= _predicted(*_gather(direction, problem, precision, gpu, 1))


def copies_slower(
    family: str, direction: str, problem: ConvProblem, precision: str, gpu: Gpu, copied: Sequence[int]
) -> str | None:
    """The cost model's reason to gather where a family of bulk copies is to have operands copied first, each of which
    moves so many bytes, or its result afterwards: all together is predicted to take longer."""
    if direction == "wgrad":
        asked = (_gemm_wgrad if family == "gemm" else _pixels_wgrad)(problem, gpu)
        gather = _wgrad(problem, precision, gpu, 1)
    else:
        asked = {"gemm": _gemm, "pixels": _pixels, "spatial": _spatial}[family](direction, problem, precision, gpu)
        gather = _gather(direction, problem, precision, gpu, 1)
    copying = sum(predict_pass(moved, gpu) for moved in copied)
    ratio = (_predicted(*asked) + copying) / _predicted(*gather)
    if ratio <= 1:
        return None
    return f"with {copying * 1e6:.0f} us of copies predicted to take {ratio:.2f} times as long as a gather"


def depthwise_tile(direction: str, problem: ConvProblem, gpu: Gpu) -> Choice:
    """The tile of a depthwise fprop or dgrad."""
    if mirrors(direction, problem):
        direction, problem = "fprop", mirrored(problem)
    dgrad = direction == "dgrad"
    lifted = problem.lifted
    _, k, *sizes = lifted.input_shape if dgrad else lifted.output_shape
    stride = lifted.stride if dgrad else (1, 1, 1)
    phases = prod(map(min, stride[:2], sizes[:2]))
    lines = problem.batch * prod(map(_cdiv, sizes[:2], stride[:2]))
    rows = _cdiv(prod(lifted.filter_size[:2]) * (problem.out_channels // k if dgrad else 1), phases)
    # Elements that are loaded one by one have addresses of their own.
    single = 0 if vector(problem.dtype, k) > 1 and problem.in_channels == problem.out_channels else 8
    taps = problem.filter_size[-1]

    def work(config: Config) -> Work:
        m, n, warps = config["BLOCK_M"], config["BLOCK_K"], config["num_warps"]
        outputs = outputs_of(direction, problem, config)
        plan = row_schedule(direction, problem, outputs)
        products = sum(tap >= 0 for met in plan.taps for tap in met)
        columns = len(plan.columns)
        strip, groups = strips(sizes[2], outputs)
        height = max(1, m // strip)
        step = 1 if dgrad else lifted.stride[1]
        # The rows and columns of x that a block covers, each from L2 once.
        covered = ((height - 1) * step + rows) * ((strip - 1) * plan.advance + columns)
        return Work(
            programs=_cdiv(lines * groups, m) * phases * _cdiv(k, n),
            steps=rows,
            # A product, an operand widened and its share of a load and its mask, a weight widened.
            step_flops=2 * m * n * products + 4 * m * n * columns + 2 * m * n * len(plan.first),
            step_elements=columns * m * n,
            step_bytes=_cdiv((covered + m * outputs) * n * problem.dtype.itemsize, rows),
            dram_bytes=problem.bytes,
            shared_memory=0,
            # (With rows of seven taps one or the other version of the compiler spills seven outputs.)
            registers=int(36 + (8 * outputs + (5.5 + single) * columns) * m * n / (256 * warps))
            + 128 * (outputs > 4 and taps > 6),
            warps=warps,
            stages=config["num_stages"],
            matrix_share=0.0,
        )

    return _choose(DEPTHWISE, (direction, problem), work, gpu)


def depthwise_wgrad_tile(problem: ConvProblem, gpu: Gpu) -> Choice:
    """The tile of a depthwise wgrad, and into how many parts its pixels are split."""
    lifted = problem.lifted
    _, k, *sizes = lifted.output_shape

    def work(config: Config) -> Work:
        m, n, rows, outputs, splits = (config[name] for name in ("BLOCK_M", "BLOCK_K", "ROWS", "OUTPUTS", "SPLITS"))
        plan = row_schedule("wgrad", problem, outputs)
        columns, taps = len(plan.columns), len(plan.outputs[0])
        strip, groups = strips(sizes[2], outputs)
        tiles = _cdiv(problem.batch * sizes[0] * sizes[1] * groups, m)
        covered = ((max(1, m // strip) - 1) * lifted.stride[1] + rows) * ((strip - 1) * plan.advance + columns)
        per_thread = m * n // (32 * config["num_warps"])
        single = 0 if vector(problem.dtype, k) > 1 and k == problem.in_channels else 12 * per_thread
        return Work(
            programs=_cdiv(k, n) * filter_parts(problem, config) * splits,
            steps=_cdiv(tiles, splits),
            step_flops=2 * m * n * rows * taps * outputs + 4 * m * n * (columns * rows + outputs),
            step_elements=(columns * rows + outputs) * m * n,
            step_bytes=(covered + m * outputs) * n * problem.dtype.itemsize,
            dram_bytes=problem.bytes,
            shared_memory=0,
            registers=int(32 + per_thread * rows * taps + 8 * (outputs + rows) + 1.5 * columns) + single,
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=0.0,
            extra_bytes=2 * splits * problem.taps * k * 4 if splits > 1 else 0,
        )

    space = DEPTHWISE_WGRAD if problem.filter_size[-1] <= 3 else DEPTHWISE_WGRAD_LONG
    return _choose(space, problem, work, gpu)


def rows_tile(problem: ConvProblem, form: Rows, precision: str, gpu: Gpu) -> Choice:
    """The tile of fprop by rows."""
    return _choose(*_rows(problem, form, precision, gpu))


def _rows(problem: ConvProblem, form: Rows, precision: str, gpu: Gpu) -> Asked:
    """What `rows_tile` chooses from."""
    element, share = problem.dtype.itemsize, matrix_share(problem.dtype, precision)
    runs = problem.output_pixels // problem.output_size[-1] * _cdiv(problem.output_size[-1], form.columns)

    def work(config: Config) -> Work:
        m, n, depth, warps = config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"], config["num_warps"]
        columns = form.columns * n
        threads = 32 * warps
        registers = 40 + m * columns // threads + 5 * m * depth // (form.vec * threads)
        if _single(problem, problem.out_channels):
            registers += 3 * m * columns // threads
        if gpu.arch < 90:
            registers += (m + 2 * columns) * depth // 256
        return Work(
            programs=_cdiv(runs, m) * _cdiv(problem.out_channels, n),
            steps=_cdiv(rows_of(problem) * form.run, depth),
            step_flops=2 * m * columns * depth,
            step_elements=(m + columns) * depth,
            # Of a run its neighbour's part comes from L1.
            step_bytes=(m * depth // 2 + columns * depth) * element,
            dram_bytes=problem.bytes,
            shared_memory=config["num_stages"] * (m + columns) * depth * element,
            registers=registers,
            warps=warps,
            stages=config["num_stages"],
            matrix_share=share,
        )

    return ROWS, (problem, form, precision), work, gpu, {"BLOCK_C": max(32, form.run)}


def row_boxes_tile(problem: ConvProblem, form: Rows, gpu: Gpu) -> Choice:
    """The tile of fprop by rows that bulk copies bring."""
    return _choose(*_row_boxes(problem, form, gpu))


def row_boxes_slower(problem: ConvProblem, form: Rows, rows: Rows | str, gpu: Gpu) -> str | None:
    """The cost model's reason against bulk copies of rows: plain loads of them, or a gather, are predicted faster."""
    boxes = _predicted(*_row_boxes(problem, form, gpu))
    gather = isinstance(rows, str)
    other = _gather("fprop", problem, "ieee", gpu, 1) if isinstance(rows, str) else _rows(problem, rows, "ieee", gpu)
    ratio = boxes / _predicted(*other)
    return None if ratio <= 1 else f"predicted to take {ratio:.1f} times as long as {'a gather' if gather else 'rows'}"


def _row_boxes(problem: ConvProblem, form: Rows, gpu: Gpu) -> Asked:
    """What `row_boxes_tile` chooses from."""
    element = problem.dtype.itemsize
    *lines, outputs = problem.output_size
    runs = prod(lines) * _cdiv(outputs, form.columns)

    def work(config: Config) -> Work:
        n, k = config["BLOCK_N"], form.columns * config["BLOCK_K"]
        return Work(
            programs=runs * _cdiv(problem.batch, n) * _cdiv(problem.out_channels, config["BLOCK_K"]),
            steps=rows_of(problem),
            step_flops=2 * n * k * form.run,
            step_elements=(n + k) * form.run,
            step_bytes=(n + k) * form.run * element,
            dram_bytes=problem.bytes,
            shared_memory=config["num_stages"] * (n + k) * form.run * element,
            # (As the walk of a NaN's tile has.)
            registers=96 + n * k // (32 * config["num_warps"]),
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=1.0,
        )

    return ROW_BOXES, (problem, form), work, gpu, {}


def rows_wgrad_tile(problem: ConvProblem, form: Rows, precision: str, gpu: Gpu) -> Choice:
    """The tile of wgrad by rows, and into how many parts its pixels are split."""
    element, share = problem.dtype.itemsize, matrix_share(problem.dtype, precision)
    runs = problem.output_pixels // problem.output_size[-1] * _cdiv(problem.output_size[-1], form.columns)
    rows, columns = form.columns * problem.out_channels, rows_of(problem) * form.run
    single = 8 / form.vec, _single(problem, problem.out_channels), 0

    def work(config: Config) -> Work:
        m, n, depth, splits = config["BLOCK_K"], config["BLOCK_C"], config["BLOCK_M"], config["SPLITS"]
        partials = splits * form.columns
        return Work(
            programs=_cdiv(rows, m) * _cdiv(columns, n) * splits,
            steps=_cdiv(_cdiv(runs, depth), splits),
            step_flops=2 * m * n * depth,
            step_elements=(m + n) * depth,
            step_bytes=(m + n) * depth * element,
            dram_bytes=problem.bytes,
            shared_memory=config["num_stages"] * (m + n) * depth * element,
            registers=_registers(config, "BLOCK_C", "BLOCK_K", "BLOCK_M", single, share == 0, gpu),
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=share,
            extra_bytes=2 * partials * prod(problem.weight_shape) * 4 if partials > 1 else 0,
        )

    # All rows of a filter in one program where registers and shared memory allow, so that dy is read once.
    most = 128 if 4 * (128 + 128) * 32 * element <= gpu.shared_memory else 64
    width = {"BLOCK_K": min(most, rows), "BLOCK_C": min(most, columns)}
    return _choose(ROWS_WGRAD, (problem, form, precision), work, gpu, width)


def pass_tile(pixels: int, channels: int, element: int, moved: int, split: bool, gpu: Gpu) -> Choice:
    """The tile of a pass over [pixels, channels] that moves ``moved`` such tensors; ``split``: it sums over pixels."""

    def work(config: Config) -> Work:
        m, n, splits = config["BLOCK_M"], config["BLOCK_K"], config["SPLITS"]
        tiles = _cdiv(pixels, m)
        return Work(
            programs=_cdiv(channels, n) * (splits if split else tiles),
            steps=_cdiv(tiles, splits) if split else 1,
            step_flops=m * n,
            step_elements=moved * m * n,
            step_bytes=moved * m * n * element,
            dram_bytes=moved * pixels * channels * element,
            shared_memory=0,
            registers=40 + moved * m * n // (32 * config["num_warps"]),
            warps=config["num_warps"],
            stages=config["num_stages"],
            matrix_share=0.0,
            extra_bytes=2 * splits * channels * 4 if splits > 1 else 0,
        )

    return _choose(PASS_SPLIT if split else PASS, (pixels, channels, element, moved), work, gpu)


def pool_tile(direction: str, problem: PoolProblem, channels_last: bool, gpu: Gpu) -> Choice:
    """The tile of a pool, forward or backward, and into how many parts its windows are split."""
    view = problem.lifted if channels_last else problem.lifted.planes
    size, taps = (view.output_size, view.taps) if direction == "forward" else (blocks_of(problem), prod(view.windows))
    space = POOL_SINGLE
    if direction == "forward" and taps > UNROLLED:
        space = POOL_SPLIT if channels_last or size[2] >= 16 else POOL_PLANES
    elif (
        direction == "forward" and taps <= 9 and view.dilation[1] == 1 and not problem.adaptive and size[1] >= 4
        # (Powers by logarithms take most registers as it is.)
        and problem.norm in (0, 1, 2)
    ):  # fmt: skip
        space = POOL if problem.kind == "average" or problem.index is not None else POOL_PAIR
    element, outputs = problem.dtype.itemsize, view.output_pixels * view.channels

    def work(config: Config) -> Work:
        block, splits = config["BLOCK"], config["SPLITS"]
        partial = 4 if problem.index is None else 8
        return Work(
            programs=pool_blocks(view, size, channels_last, config)[0] * splits,
            steps=_cdiv(taps, config["LANES"] * splits) * config["LINES"],
            step_flops=8 * block,
            step_elements=block,
            step_bytes=block * element,
            # A norm's gradient reads the input and the norms too.
            dram_bytes=problem.bytes * (2 if problem.kind == "lp" and direction == "backward" else 1),
            shared_memory=0,
            registers=64,
            warps=config["num_warps"],
            stages=9,  # as many loads under way as are unrolled, and the one in use
            matrix_share=0.0,
            extra_bytes=2 * splits * outputs * partial if splits > 1 else 0,
        )

    # One load of 16 bytes a thread; where each element is a load of its own, half as many.
    vectors = channels_last and problem.channels * element % 16 == 0
    width = {} if gpu.interpreted else {"BLOCK": 2048 // element if vectors else 512}
    if problem.kind == "lp":
        width["SPLITS"] = 1  # a root is of the whole sum
    return _choose(space, (direction, problem, channels_last), work, gpu, width)


# Given a space, the problem's features, what its configs make of it, the GPU and what was chosen: what is taken.
Consider = Callable[[Space, Hashable, Callable[[Config], Work], Gpu, Choice], Choice]
_considering: list[Consider] = []


@contextlib.contextmanager
def considering(consider: Consider) -> Iterator[None]:
    """Let ``consider`` have the last word on every tile inside the block, on any thread: to see them all, to try one.

    Calls that are kept stay as they are: collect `decisions` inside.
    """
    _considering.append(consider)
    try:
        yield
    finally:
        _considering.remove(consider)


def _choose(
    space: Space, features: Hashable, work: Callable[[Config], Work], gpu: Gpu, width: Mapping[str, int] = {}
) -> Choice:
    """``width``: what a parameter must cover, and with its smallest value that does."""
    space = _covering(space, width, gpu)
    choice = choose(space, features, work, gpu)
    for consider in _considering:
        choice = consider(space, features, work, gpu, choice)
    return decided(choice)


def _predicted(
    space: Space, features: Hashable, work: Callable[[Config], Work], gpu: Gpu, width: Mapping[str, int]
) -> float:
    """Seconds by the cost model alone, whatever was measured: families are compared the same way on every machine."""
    return by_cost_model(_covering(space, width, gpu), work, gpu).seconds


def _covering(space: Space, width: Mapping[str, int], gpu: Gpu) -> Space:
    space = INTERPRETED[space.name] if gpu.interpreted else space
    fitted = {name: (min(v for v in space.ranges[name] if v >= least),) for name, least in width.items()}
    return replace(space, ranges={**space.ranges, **fitted}) if fitted else space
