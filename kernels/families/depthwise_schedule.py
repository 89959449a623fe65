"""Which column of x meets which output under which tap, laid out in advance for depthwise kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import triton
import triton.language as tl

from fastconv.kernels.problem.conv import ConvProblem

WGRAD_ROW = 8
# Neighbours along a row that a program of a tall block takes before it goes on to the next row.
STRIP = 4
# Taps of a filter's row that are unrolled; in wgrad, whose accumulators they are, a program takes fewer at once.
MAX_ROW = 31
# In dgrad a thread's outputs are a multiple of the stride.
MAX_STRIDE = 8


@dataclass(frozen=True)
class Schedule:
    """Along a row: each column of x that some of a group of neighbouring outputs meet, and who meets it there.

    Columns count from ``advance`` times the number of the group; -1 stands for nobody.
    """

    columns: tuple[int, ...]
    advance: int
    first: tuple[tuple[int, ...], ...]  # for each column, the taps that none before it has met
    taps: tuple[tuple[int, ...], ...]  # for each column and output, its tap, numbered in the order of ``first``
    outputs: tuple[tuple[int, ...], ...]  # for each column and tap, its output


@cache
def schedule(outputs: int, taps: int, stride: int, padding: int, dilation: int, dgrad: bool) -> Schedule:
    """Of ``outputs`` neighbours, a multiple of the stride in dgrad."""
    met: dict[int, dict[int, int]] = {}
    for output in range(outputs):
        for tap in range(taps):
            if not dgrad:
                met.setdefault(output * stride + tap * dilation - padding, {})[output] = tap
            elif (output + padding - tap * dilation) % stride == 0:
                met.setdefault((output + padding - tap * dilation) // stride, {})[output] = tap
    columns = tuple(sorted(met))
    order: list[int] = []
    first = []
    for column in columns:
        first.append(tuple(tap for tap in sorted(set(met[column].values())) if tap not in order))
        order.extend(first[-1])
    number = {tap: index for index, tap in enumerate(order)}
    output_of = [{tap: output for output, tap in met[column].items()} for column in columns]
    return Schedule(
        columns=columns,
        advance=outputs // stride if dgrad else outputs * stride,
        first=tuple(first),
        taps=tuple(
            tuple(number[met[column][output]] if output in met[column] else -1 for output in range(outputs))
            for column in columns
        ),
        outputs=tuple(tuple(found.get(tap, -1) for tap in range(taps)) for found in output_of),
    )


@triton.jit
def blocks(m, strip, groups, P):
    """Numbers of groups of neighbours -> (group in its row, row, number of the image), by strips of a few columns."""
    strips = tl.cdiv(groups, strip)
    group = m % strip
    m = m // strip
    p = m % P
    m = m // P
    return m % strips * strip + group, p, m // strips


def row_schedule(direction: str, problem: ConvProblem, outputs: int) -> Schedule:
    """How ``outputs`` neighbours meet the filter's row, in wgrad as much of it as a program takes."""
    taps = min(problem.filter_size[-1], WGRAD_ROW) if direction == "wgrad" else problem.filter_size[-1]
    return schedule(outputs, taps, problem.stride[-1], problem.padding[-1], problem.dilation[-1], direction == "dgrad")


def strips(size: int, outputs: int) -> tuple[int, int]:
    """(groups side by side before the next row, groups a row in whole strips) of a row of ``size`` outputs."""
    groups = triton.cdiv(size, outputs)
    strip = min(groups, STRIP)
    return strip, triton.cdiv(groups, strip) * strip
