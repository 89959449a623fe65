"""Convolution of groups that share tensor-core tiles, in every direction against fp64.

Every width of a group with every other; values of other groups, infinities included, must stay out.
"""

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch

from convolutions import DEVICE, Case, check_exact, check_infinities, check_random, check_wide_offsets, exact_operands
from fastconv.autotune import gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families import conv_gather, conv_gather_wgrad
from fastconv.kernels.families.conv_gather import packed_groups
from fastconv.kernels.launch.interpreter import interpreting
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import conv
from fastconv.kernels.problem.conv import DIRECTIONS
from reference import assert_equal, integers
from tests.fused_layers import fused_layer
from tests.marks import runs_kernels
from tests.tiles import take_tile

pytestmark = runs_kernels
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _widths() -> Iterator[Case]:
    """Every pair of widths; strides, paddings, dilations, ranks and counts of groups in turn."""
    widths = (1, 2, 3, 4, 5, 8, 16, 32)
    shapes = (
        ((5, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
        ((6, 5), (3, 2), (2, 1), (0, 1), (1, 2)),
        ((9,), (3,), (2,), (1,), (2,)),
        ((5, 6), (1, 1), (1, 1), (0, 0), (1, 1)),
        ((3, 2, 4), (2, 1, 3), (1, 1, 2), (1, 0, 1), (1, 1, 1)),
    )
    for index, (c, k) in enumerate(product(widths, widths)):
        groups = (2, 4, 3, 6, 8)[index % 5] if max(c, k) <= 8 else (2, 3)[index % 2]
        yield Case(
            f"{groups} groups of {c} to {k}",
            *(1 + index % 2, groups * c, groups * k, *shapes[index % len(shapes)]),
            groups=groups,
        )


CASES = (
    *_widths(),
    Case("16 groups of 4, several tiles", 1, 64, 64, (3, 4), (3, 3), (1, 1), (1, 1), groups=16),
    Case("8 groups of 8, stride 2", 1, 64, 64, (4, 5), (3, 3), (2, 2), (1, 1), groups=8),
    Case("12 groups of 4 to 2, dilated", 2, 48, 24, (5, 5), (2, 2), (1, 1), (1, 1), (2, 2), groups=12),
    Case("9 groups of 6 to 3, one pixel", 3, 54, 27, (1, 1), (3, 3), (1, 1), (1, 1), groups=9),
    Case("10 groups of 6", 1, 60, 60, (4, 4), (3, 3), (1, 1), (1, 1), groups=10),
    Case("13 groups of 2", 1, 26, 26, (4, 3), (3, 3), (1, 1), (1, 1), groups=13),
    Case("17 groups of 2", 1, 34, 34, (4,), (3,), (1,), (1,), groups=17),
    Case("2 groups of 2, stride 2", 1, 4, 4, (4, 3), (3, 3), (2, 2), (1, 1), groups=2),
    Case("4 groups of 3 to 2, asymmetric", 1, 12, 8, (5, 3), (2, 2), (1, 1), (1, 0), groups=4),
    Case("5 groups of 12 to 10", 1, 60, 50, (3, 3), (1, 1), groups=5),
    Case("4 groups of 16 to 8, uneven padding", 1, 64, 32, (4, 3), (2, 2), (1, 1), (0, 1), groups=4, after=(1, 0)),
    Case("6 groups of 2, filter larger than the image", 1, 12, 12, (2, 3), (5, 5), (1, 1), (2, 2), groups=6),
    Case("6 groups of 4, dilation shares a factor", 1, 24, 24, (9, 8), (3, 3), (4, 2), (2, 3), (2, 4), groups=6),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_on_integers(case: Case, record_property) -> None:
    index = CASES.index(case)
    problem = case.problem(DTYPES[index % 3])
    # Every other case in the plain format, whose edges are copies.
    check_exact(problem, channels_last=index % 2 == 0)
    for direction in DIRECTIONS:
        family = dispatch.plan(direction, problem, dispatch.target(torch.device(DEVICE))).family
        record_property("problem", (family, direction, case.name))


@pytest.mark.parametrize("case", CASES[::5], ids=lambda case: case.name)
def test_random_values_within_rounding(case: Case) -> None:
    check_random(case.problem(DTYPES[CASES.index(case) % 3]))


def test_each_direction_has_fifty_problems() -> None:
    for direction in DIRECTIONS:
        plans = [dispatch.plan(direction, case.problem(), gpus.H200) for case in CASES]
        assert sum(plan.family == "grouped" for plan in plans) >= 50, direction


@pytest.mark.parametrize(
    ("groups", "c", "k", "direction", "pack"),
    [
        (32, 4, 4, "fprop", 8),
        (32, 8, 8, "dgrad", 4),
        (32, 16, 16, "fprop", 2),
        (32, 32, 32, "fprop", 1),
        (32, 32, 32, "wgrad", 2),
        (32, 4, 8, "fprop", 4),
        (12, 4, 4, "fprop", 6),
        (13, 4, 4, "fprop", 1),
        (7, 4, 4, "fprop", 7),
        (8, 48, 48, "fprop", 1),
    ],
)
def test_how_many_groups_share_a_tile(groups: int, c: int, k: int, direction: str, pack: int) -> None:
    problem = Case("", 8, groups * c, groups * k, (14, 14), (3, 3), (1, 1), (1, 1), groups=groups).problem()
    assert packed_groups(direction, problem) == pack
    plan = dispatch.plan(direction, problem, gpus.H200)
    assert plan.family == ("grouped" if pack > 1 else "gather")
    assert plan.launches[0].grid[1] == groups // pack
    if pack == 1:
        reason = f"{groups} groups of {c} to {k} channels: no two share a tile"
        assert ("grouped", reason) in plan.reasons


TILES = {
    "tails of every axis": {"BLOCK_M": 16, "BLOCK_K": 16, "BLOCK_C": 32, "SPLITS": 3},
    "more splits than steps": {"BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_C": 32, "SPLITS": 7},
}


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("channels_last", [True, False])
def test_tile_edges(tile: dict[str, int], channels_last: bool, monkeypatch) -> None:
    problem = Case("", 2, 32, 48, (5, 6), (3, 2), (2, 1), (1, 1), groups=8).problem()
    take_tile(monkeypatch, {**tile, "SPLITS": 1}, ("conv_gather",))
    take_tile(monkeypatch, tile, ("conv_wgrad",))
    check_exact(problem, channels_last)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_infinity_stays_in_its_group(rank: int, value: float) -> None:
    """Zeros beside the diagonal meet other groups' channels, and zero times infinity is a NaN."""
    problem = Case("", 1, 16, 24, (4, 5, 4)[:rank], (3, 2, 3)[:rank], (2, 1, 1)[:rank], (1, 1, 0)[:rank], groups=4)
    problem = problem.problem()
    operands = exact_operands(problem)
    for tensor, channel in zip(operands, (5, 13), strict=False):
        tensor[(0, channel, *(1,) * rank)] = value
    records = check_infinities(problem, operands)
    assert all(r.launch.constants["PACKED"] for r in records if r.name.startswith("conv"))


def test_epilogue_and_statistics_of_packed_groups() -> None:
    layer = fused_layer((3, 24, 5, 6), 24, (3, 3), padding=(1, 1), groups=6)
    rtol, atol = (1e-4, 1e-4) if interpreting() else (1e-2, 3e-2)
    layer.check_statistics((rtol, atol))
    torch.testing.assert_close(layer.computed("relu").double(), layer.expected("relu"), rtol=rtol, atol=atol)


def test_a_slice_of_channels_is_read_where_it_lies() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = integers((2, 6, 8, 48), 9, generator).float().to(DEVICE)
    x = whole[:, 1:, ::2, 8:40].permute(0, 3, 1, 2)
    weight = integers((32, 4, 3, 3), 9, generator).float().to(DEVICE)
    with record() as records:
        y = conv.conv_fprop(x, weight, None, (1, 1), (1, 1, 1, 1), (1, 1), 8)
    assert_equal(y, torch.conv2d(x.double().cpu(), weight.double().cpu(), padding=1, groups=8), "fprop of a slice")
    assert records[0].launch.constants["VEC_C"] == 4 and records[0].launch.constants["PACKED"]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_wide_offsets_give_the_same(direction: str, monkeypatch) -> None:
    problem = Case("", 2, 16, 16, (5, 4), (3, 3), (2, 1), (1, 1), groups=4).problem()
    check_wide_offsets(monkeypatch, problem, [conv_gather, conv_gather_wgrad], (direction,))
