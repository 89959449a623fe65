"""The schedule of depthwise kernels: which column of x meets which output under which tap."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import triton
import triton.language as tl

from fastconv.kernels.problem.conv import ConvProblem


@dataclass(frozen=True)
class Schedule:
    """The columns of x that a group of neighbouring outputs of a row meets, and which output meets each by which tap.

    Columns count from ``advance`` times the number of the group; -1 stands for no tap or output.
    """

    columns: tuple[int, ...]
    advance: int
    first: tuple[tuple[int, ...], ...]  # for each column, the taps that no column before it meets
    taps: tuple[tuple[int, ...], ...]  # for each column and output, the tap, numbered in the order of ``first``
    outputs: tuple[tuple[int, ...], ...]  # for each column and tap, the output


@cache
def schedule(outputs: int, taps: int, stride: int, padding: int, dilation: int, dgrad: bool) -> Schedule:
    """The schedule of a group of ``outputs`` neighbours, in dgrad a multiple of the stride."""
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
    """Numbers of groups of neighbours, in strips -> (group in its row, row, number of the image)."""
    strips = tl.cdiv(groups, strip)
    group = m % strip
    m = m // strip
    p = m % P
    m = m // P
    return m % strips * strip + group, p, m // strips


WGRAD_ROW = 8  # taps of a row that a program of wgrad takes: it has accumulators for each


def row_schedule(direction: str, problem: ConvProblem, outputs: int) -> Schedule:
    """The schedule of ``outputs`` neighbours and a filter's row, in wgrad the part of it that a program takes."""
    taps = min(problem.filter_size[-1], WGRAD_ROW) if direction == "wgrad" else problem.filter_size[-1]
    return schedule(outputs, taps, problem.stride[-1], problem.padding[-1], problem.dilation[-1], direction == "dgrad")


STRIP = 4  # groups of neighbours that a program takes along a row before it goes on to the next row


def strips(size: int, outputs: int) -> tuple[int, int]:
    """For a row of ``size`` outputs: groups of a strip, and groups of the row in whole strips."""
    groups = triton.cdiv(size, outputs)
    strip = min(groups, STRIP)
    return strip, triton.cdiv(groups, strip) * strip
