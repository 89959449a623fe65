"""Helpers of the pools' kernels: a tile's place, windows along an axis, powers."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fastconv.autotune import Config
from fastconv.kernels.jit.walk import unravel
from fastconv.kernels.problem.pool import PoolProblem

# Taps of the largest window that is unrolled, so that all its loads are under way at once.
UNROLLED = 27


@triton.jit
def place(
    M, C, O, P, Q,
    PLANES: tl.constexpr,
    RANK: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(mask, n, o, p, q, c) of this program's tile of an [N, O, P, Q, C] tensor of M rows, each row LANES times."""
    columns = C
    if PLANES:
        columns = Q
    blocks = tl.cdiv(columns, BLOCK_C)
    program = tl.program_id(0)
    row = (program // blocks * BLOCK_M + tl.arange(0, BLOCK_M * LANES) // LANES)[:, None]
    column = (program % blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mask = (row < M) & (column < columns)
    if PLANES:
        q = column
        c = column * 0
        n = row // P
        p = row % P
        o = 0
        if RANK == 3:
            o = n % O
            n = n // O
    else:
        c = column
        n, o, p, q = unravel(row, O, P, Q, RANK)
    return mask, n, o, p, q, c


@triton.jit
def line_of(n, o, p, O, P, RANK: tl.constexpr):
    """The number of a line of an [N, O, P, Q, C] tensor."""
    if RANK == 3:
        return (n * O + o) * P + p
    else:
        return n * P + p


@triton.jit
def window_bounds(p, size, outputs, stride, padding, ADAPTIVE: tl.constexpr):
    """(begin, end) of window ``p`` along an axis; a window that is not adaptive ends with the input."""
    if ADAPTIVE:
        return p * size // outputs, ((p + 1) * size + outputs - 1) // outputs
    else:
        return p * stride - padding, size


@triton.jit
def extent(
    p, size, outputs, stride, padding, window, ADAPTIVE: tl.constexpr, INCLUDE_PADDING: tl.constexpr
):  # fmt: skip
    """The count of pixels along an axis that an average divides window ``p`` by."""
    first, last = window_bounds(p, size, outputs, stride, padding, ADAPTIVE)
    if not ADAPTIVE:
        last = first + window
        if INCLUDE_PADDING:
            last = tl.minimum(last, size + padding)
        else:
            first, last = tl.maximum(first, 0), tl.minimum(last, size)
    return last - first


@triton.jit
def first_inside(start, dilation):
    """The first tap along an axis that is inside the input: the maximum's, if all are -inf."""
    return (tl.maximum(-start, 0) + dilation - 1) // dilation


@triton.jit
def power(x, exponent, sign):
    """x ** exponent; ``sign`` is (-1) ** exponent, NaN if that is no real number."""
    y = tl.exp2(exponent * tl.log2(tl.abs(x)))
    return tl.where(x < 0, sign * y, y)


def norm_form(norm: float) -> int:
    """The kernels' NORM: 0, 1, 2, or 3 for any other norm."""
    return int(norm) if norm in (0, 1, 2) else 3


def exponents(exponent: float) -> tuple[float, float]:
    """(exponent, (-1) ** exponent): the arguments of `power`."""
    return exponent, (-1.0) ** (exponent % 2) if exponent.is_integer() else math.nan


def pool_blocks(
    view: PoolProblem, size: tuple[int, ...], channels_last: bool, config: Config
) -> tuple[int, int, dict[str, int]]:
    """(programs, rows, block sizes) of a tile over [N, C, *size]: columns along the dense axis, rows over the rest."""
    d, h, w = size
    columns = view.channels if channels_last else w
    rows = view.batch * view.channels * d * triton.cdiv(h, config.get("LINES", 1)) * w // columns
    block_c = min(triton.next_power_of_2(columns), 64 if channels_last else 128, config["BLOCK"])
    block_m = max(1, config["BLOCK"] // (block_c * config.get("LANES", 1)))
    return triton.cdiv(rows, block_m) * triton.cdiv(columns, block_c), rows, {"BLOCK_M": block_m, "BLOCK_C": block_c}
