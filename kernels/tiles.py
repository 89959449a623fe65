"""The tiles each kernel may be launched with, and what a tile makes of a problem: what ``autotune`` chooses from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from math import prod

import torch

from fastconv.autotune import Choice, Config, Gpu, Space, Work, choose
from fastconv.kernels.conv_gather import flat
from fastconv.kernels.launch import decided
from fastconv.kernels.layout import vector
from fastconv.kernels.pool_gradient import blocks_of
from fastconv.kernels.pool_window import UNROLLED
from fastconv.kernels.pool_window import tile as pool_blocks
from fastconv.kernels.problem import ConvProblem, PoolProblem

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
        "BLOCK_M": (128, 64),
        "BLOCK_K": (128, 64, 32, 256),
        "BLOCK_C": (64, 32),
        "num_warps": (4, 8),
        "num_stages": (3, 4),
    },
    _matrix_tile("BLOCK_M", "BLOCK_K", "BLOCK_C"),
)
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
PIXELS = Space(
    "pixels",
    {"BLOCK_M": (32,), "BLOCK_K": (64,), "SPLITS": (1,), "num_warps": (4,), "num_stages": (3,)},
)
PIXELS_SPLIT = Space(
    "pixels_split",
    {**PIXELS.ranges, "SPLITS": tuple(2**i for i in range(11))},
)
# A small window is unrolled, for LINES outputs at once; of a large one LANES rows and SPLITS programs may take a part.
POOL = Space(
    "pool",
    {"BLOCK": (512, 1024), "LINES": (4, 1), "LANES": (1,), "SPLITS": (1,), "num_warps": (4,), "num_stages": (1,)},
)
POOL_SINGLE = Space("pool_single", {**POOL.ranges, "LINES": (1,)})
POOL_SPLIT = Space(
    "pool_split",
    {**POOL_SINGLE.ranges, "LANES": (1, 16), "SPLITS": tuple(2**i for i in range(11))},
)
# Planes whose outputs are few: neighbouring threads read neighbours only as lanes of one window.
POOL_PLANES = Space("pool_planes", {**POOL_SPLIT.ranges, "LANES": (32,)})
# In the interpreter a step costs much the same whatever its size, so tiles are as large as the problem.
INTERPRETED = {
    "conv_gather": Space(
        "conv_gather",
        {
            "BLOCK_M": tuple(2**i for i in range(4, 15)),
            "BLOCK_K": (16, 64, 256),
            "BLOCK_C": (16, 64, 256, 1024),
            "num_warps": (4,),
            "num_stages": (1,),
        },
        _fits_interpreter,
    ),
    "conv_wgrad": Space(
        "conv_wgrad",
        {
            "BLOCK_K": (16, 64, 256),
            "BLOCK_C": (16, 64, 256, 1024),
            "BLOCK_M": tuple(2**i for i in range(4, 15)),
            "SPLITS": (1, 2),
            "num_warps": (4,),
            "num_stages": (1,),
        },
        _fits_interpreter,
    ),
    **{
        name: Space(name, {**POOL_SINGLE.ranges, "BLOCK": tuple(2**i for i in range(6, 19, 2))})
        for name in ("pool", "pool_single", "pool_split", "pool_planes")
    },
    "pixels": Space(
        "pixels",
        {
            "BLOCK_M": tuple(2**i for i in range(4, 13)),
            "BLOCK_K": (16, 64, 256),
            "SPLITS": (1,),
            "num_warps": (4,),
            "num_stages": (1,),
        },
        _fits_interpreter,
    ),
    "pixels_split": Space(
        "pixels_split",
        {
            "BLOCK_M": tuple(2**i for i in range(4, 13)),
            "BLOCK_K": (16, 64, 256),
            "SPLITS": (1, 2),
            "num_warps": (4,),
            "num_stages": (1,),
        },
        _fits_interpreter,
    ),
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
    single: tuple[int, int, int],
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
    registers += single[2] * m * n // threads
    for side, wide, each in ((m, 6, single[0]), (n, 3, single[1])):
        registers += each * side * k // threads if each else wide * side * k // (8 * threads)
    if fma:
        # Above 16 accumulators a thread or 32 of depth one or the other version of the compiler spills.
        registers += 3 * m * n // threads + 2 * k if m * n // threads <= 16 and k <= 32 else 256
    elif gpu.arch < 90:
        registers += (m + 2 * n) * k // 256
    return registers


def _single(problem: ConvProblem, channels: int) -> int:
    """Registers for an element of runs of so many channels, 0 where they are read by 16 bytes.

    Else each has an address of its own and, under 4 bytes, waits in a register, since no asynchronous copy is so small.
    """
    return 5 if problem.dtype.itemsize < 4 and vector(problem.dtype, channels) == 1 else 0


def gather_tile(direction: str, problem: ConvProblem, precision: str, gpu: Gpu) -> Choice:
    """The tile of fprop or dgrad."""
    k, c = problem.out_channels // problem.groups, problem.in_channels // problem.groups
    pixels, phases = problem.output_pixels, 1
    if direction == "dgrad":
        k, c = c, k
        phases = prod(map(min, problem.stride, problem.input_size))
        pixels = _cdiv(problem.input_pixels, phases)
    element, share = problem.dtype.itemsize, matrix_share(problem.dtype, precision)
    # (Tap, channel) pairs have coordinates of their own as well.
    source = (8 if problem.rank == 3 else 5) if flat(problem.taps, c) else _single(problem, c)
    result = 6 if _single(problem, k) else 0
    single = source, _single(problem, k) if direction == "dgrad" else source, result

    def work(config: Config) -> Work:
        m, n, depth, warps = config["BLOCK_M"], config["BLOCK_K"], config["BLOCK_C"], config["num_warps"]
        steps = _cdiv(problem.taps * c, depth) if flat(problem.taps, c) else problem.taps * _cdiv(c, depth)
        return Work(
            programs=_cdiv(pixels, m) * phases * _cdiv(k, n) * problem.groups,
            steps=max(1, steps // phases),
            step_flops=2 * m * n * depth,
            step_elements=(m + n) * depth,
            step_bytes=(m + n) * depth * element,
            dram_bytes=problem.bytes,
            shared_memory=config["num_stages"] * (m + n) * depth * element,
            registers=_registers(config, "BLOCK_M", "BLOCK_K", "BLOCK_C", single, share == 0, gpu),
            warps=warps,
            stages=config["num_stages"],
            matrix_share=share,
        )

    return _choose(GATHER, (direction, problem, precision), work, gpu)


def wgrad_tile(problem: ConvProblem, precision: str, gpu: Gpu) -> Choice:
    """The tile of wgrad, and into how many parts its pixels are split."""
    k, c = problem.out_channels // problem.groups, problem.in_channels // problem.groups
    element, share = problem.dtype.itemsize, matrix_share(problem.dtype, precision)
    single = 8 if flat(problem.taps, c) else _single(problem, c), _single(problem, k), 0

    def work(config: Config) -> Work:
        m, n, depth, warps = config["BLOCK_K"], config["BLOCK_C"], config["BLOCK_M"], config["num_warps"]
        splits = config["SPLITS"]
        columns = _cdiv(problem.taps * c, n) if flat(problem.taps, c) else problem.taps * _cdiv(c, n)
        steps = _cdiv(problem.output_pixels, depth)
        workspace = 2 * splits * problem.out_channels * problem.taps * c * 4 if splits > 1 else 0
        return Work(
            programs=_cdiv(k, m) * columns * problem.groups * splits,
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

    return _choose(WGRAD, (problem, precision), work, gpu)


def pixel_tile(pixels: int, channels: int, element: int, moved: int, split: bool, gpu: Gpu) -> Choice:
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

    return _choose(PIXELS_SPLIT if split else PIXELS, (pixels, channels, element, moved), work, gpu)


def pool_tile(direction: str, problem: PoolProblem, channels_last: bool, gpu: Gpu) -> Choice:
    """The tile of a pool, forward or backward, and into how many parts its windows are split."""
    view = problem.lifted if channels_last else problem.lifted.planes
    size, taps = (view.output_size, view.taps) if direction == "forward" else (blocks_of(problem), prod(view.windows))
    space = POOL_SINGLE
    if direction == "forward" and taps > UNROLLED:
        space = POOL_SPLIT if channels_last or size[2] >= 16 else POOL_PLANES
    elif direction == "forward" and taps <= 9 and view.dilation[1] == 1 and not problem.adaptive and size[1] > 1:
        space = POOL
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
            dram_bytes=problem.bytes,
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
    return _choose(space, (direction, problem, channels_last), work, gpu, width)


def _choose(
    space: Space, features: Hashable, work: Callable[[Config], Work], gpu: Gpu, width: Mapping[str, int] = {}
) -> Choice:
    """``width``: what a parameter must cover, and with its smallest value that does."""
    space = INTERPRETED[space.name] if gpu.interpreted else space
    if width:
        fitted = {name: (min(v for v in space.ranges[name] if v >= least),) for name, least in width.items()}
        space = replace(space, ranges={**space.ranges, **fitted})
    return decided(choose(space, features, work, gpu))
