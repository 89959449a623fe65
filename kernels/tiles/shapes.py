"""Search spaces of tiles: their class, and the sides, validity and registers that several families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from fastconv.autotune import Config, Gpu, Space
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import load_width

# Largest tensor that Triton allows, in elements.
MAX_ELEMENTS = 1 << 20

_kernels: dict[str, tuple[Any, ...]] = {}  # each declared space's, by its name


@dataclass(frozen=True)
class TileSpace(Space):
    """The tiles of a family's ``kernels``, whose code is the version of measurements.

    ``interpreted``: ranges for the interpreter. A step costs it much the same whatever its size, so its tiles are as
    large as the problem.
    """

    kernels: tuple[Any, ...] = ()  # triton.jit functions
    interpreted: Mapping[str, tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        _kernels[self.name] = self.kernels

    @property
    def for_interpreter(self) -> TileSpace:
        assert self.interpreted is not None, f"{self.name} is not for the interpreter"
        return replace(self, ranges=self.interpreted, valid=fits_interpreter, free=())


def declared_spaces() -> list[str]:
    """The names of all spaces of imported families."""
    return sorted(_kernels)


def kernels_of(space: str) -> tuple[Any, ...]:
    """The kernels of a space; none if no family declares it, which is so for a space of another release."""
    return _kernels.get(space, ())


def fits_interpreter(config: Config) -> str | None:
    sides = sorted(value for name, value in config.items() if name.startswith("BLOCK_"))
    return "larger than a tensor may be" if prod(sides[-2:]) > MAX_ELEMENTS else None


INTERPRETED_SIDES = {
    "BLOCK_M": tuple(2**i for i in range(4, 15)),
    "BLOCK_K": (16, 64, 256),
    "SPLITS": (1,),
    "num_warps": (4,),
    "num_stages": (1,),
}
INTERPRETED_PRODUCT = {**INTERPRETED_SIDES, "BLOCK_C": (16, 64, 256, 1024)}
INTERPRETED_STENCIL = {name: INTERPRETED_SIDES[name] for name in ("BLOCK_M", "BLOCK_K", "num_warps", "num_stages")}


def matrix_tile(rows: str, columns: str, depth: str) -> Callable[[Config], str | None]:
    """Validity of a tensor-core tile: its sides decide warps and stages, so that few binaries serve many problems."""

    def valid(config: Config) -> str | None:
        elements = config[rows] * config[columns] // (32 * config["num_warps"])
        # Addresses take as many registers as accumulators: eight warps halve what 128x64 takes of a thread.
        if not 16 <= elements <= (32 if config["num_warps"] == 4 else 128):
            return f"{elements} accumulators a thread do not suit {config['num_warps']} warps"
        if config["num_stages"] != (3 if config[depth] > 32 else 4):
            return "copies in flight for another step size"
        return None

    return valid


# (rows, columns) -> (warps, stages) of a tile that bulk copies of matrices feed; families/README.md has the reasons.
BOX_TILES = {(128, 256): (8, 3), (128, 128): (8, 3), (128, 64): (8, 3), (64, 64): (4, 4)}


def fitting(space: TileSpace, **channels: int) -> TileSpace:
    """``space`` without sides that ``channels`` (name of a side -> count) leave half empty; the smallest stays."""
    return space.narrowed(at_most={name: 2 * count - 1 for name, count in channels.items()})


def matrix_share(dtype: torch.dtype, precision: str) -> float:
    """The share of the GPU's fp16 matrix rate that a product of this dtype runs at; 0 without tensor cores."""
    if dtype is not torch.float32:
        return 1.0
    return 0.5 if precision == "tf32" else 0.0


def matrix_registers(
    config: Config, rows: str, columns: str, depth: str, by_element: tuple[float, float, float], fma: bool, gpu: Gpu
) -> int:
    """Registers a thread of a tile rows x columns, fitted to what ptxas reports; rows are the gathered side.

    Counts the accumulator, the addresses and coordinates of 16-byte loads, and operands that tensor cores read from
    registers. ``by_element``: `element_registers` of the rows', the columns' and the result's operand. ``fma``: no
    tensor cores.
    """
    threads = 32 * config["num_warps"]
    m, n, k = config[rows], config[columns], config[depth]
    registers = 36 + m * n // threads
    registers += int(by_element[2] * m * n / threads)
    for side, wide, each in ((m, 6, by_element[0]), (n, 3, by_element[1])):
        registers += int((each or wide / 8) * side * k / threads)
    if fma:
        # Above 16 accumulators a thread or 32 of depth one or the other version of the compiler spills.
        registers += 3 * m * n // threads + 2 * k if m * n // threads <= 16 and k <= 32 else 256
    elif gpu.arch < 90:
        registers += (m + 2 * n) * k // 256
    return registers


def element_registers(problem: ConvProblem, channels: int) -> int:
    """Registers for an element of a run of ``channels`` that is read one element at a time; 0: by 16 bytes.

    Such an element has an address and, below 4 bytes, waits in a register: no asynchronous copy is so small.
    """
    return 5 if problem.dtype.itemsize < 4 and load_width(problem.dtype, channels) == 1 else 0


def is_dense(problem: ConvProblem, share: float, pack: int) -> bool:
    """Whether a tile is one group's, on tensor cores, loaded by 16 bytes."""
    widths = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    return pack == 1 and share > 0 and not any(element_registers(problem, width) for width in widths)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
