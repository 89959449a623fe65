"""Convolution of groups that share tensor-core tiles, in every direction against fp64.

Every width of a group with every other; what is not the group's own must stay out, infinities included.
"""

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch

from convolutions import DEVICE, RESULTS, Case, check_exact, check_random, computed, expected
from fastconv.autotune import gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families import conv_gather, conv_gather_wgrad
from fastconv.kernels.families.conv_gather import packed_groups
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import call, conv
from fastconv.kernels.problem.conv import DIRECTIONS
from reference import assert_equal, integers
from tests.marks import runs_kernels
from tests.tiles import take_tile

pytestmark = runs_kernels
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _widths() -> Iterator[Case]:
    """Among strides, paddings, dilations, ranks and counts of groups."""
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
def test_so_many_groups_share_a_tile(groups: int, c: int, k: int, direction: str, pack: int) -> None:
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
    generator = torch.Generator().manual_seed(0)
    operands = [
        integers(shape, 9, generator) for shape in (problem.input_shape, problem.output_shape, problem.weight_shape)
    ]
    values = computed(problem, *operands, channels_last)
    for name, value, reference in zip(RESULTS, values, expected(problem, *operands), strict=True):
        assert_equal(value, reference, f"{name} of {problem.describe()}")


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_infinity_stays_in_its_group(rank: int, value: float) -> None:
    """Beside the diagonal zeros meet the other groups' channels, and zero times infinity is no number."""
    problem = Case("", 1, 16, 24, (4, 5, 4)[:rank], (3, 2, 3)[:rank], (2, 1, 1)[:rank], (1, 1, 0)[:rank], groups=4)
    problem = problem.problem()
    generator = torch.Generator().manual_seed(0)
    x, dy, weight = (
        integers(shape, 9, generator) for shape in (problem.input_shape, problem.output_shape, problem.weight_shape)
    )
    for tensor, channel in ((x, 5), (dy, 13)):
        tensor[(0, channel, *(1,) * rank)] = value
    with record() as records:
        values = computed(problem, x, dy, weight)
    assert all(r.launch.constants["PACKED"] for r in records if r.name.startswith("conv"))
    for name, result, reference in zip(RESULTS, values, expected(problem, x, dy, weight), strict=True):
        result = result.double().cpu()
        assert torch.equal(result.isnan(), reference.isnan()), name
        assert torch.equal(result.nan_to_num(), reference.float().double().nan_to_num()), name


def test_epilogue_and_statistics_of_packed_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 24, 5, 6, generator=generator), torch.randn(24, 4, 3, 3, generator=generator)
    bias, mean, gamma, beta = torch.randn(4, 24, generator=generator).unbind()
    var = torch.rand(24, generator=generator) + 0.5
    arguments = (1, 1), (1, 1, 1, 1), (1, 1), 6
    on = [t.to(DEVICE) for t in (x, weight, bias, mean, var, gamma, beta)]
    y, found_mean, found_var = conv.conv_statistics(*on[:3], None, *arguments)
    exact = torch.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=6)
    true_var, true_mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if DEVICE == "cpu" else {"rtol": 1e-2, "atol": 3e-2}
    for value, reference in ((y, exact), (found_mean, true_mean), (found_var, true_var)):
        torch.testing.assert_close(value.cpu().double(), reference, **tolerance)
    z = conv.conv_act(
        *(*on[:3], tuple(on[3:]), None, on[0].new_ones(exact.shape), None), *(*arguments, 1e-5, "relu", 0.0, 0.0, False)
    )
    normal = torch.batch_norm(exact, *(t.double() for t in (gamma, beta, mean, var)), False, 0.1, 1e-5, False)
    torch.testing.assert_close(z.cpu().double(), (normal + 1).relu(), **tolerance)


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
    generator = torch.Generator().manual_seed(0)
    operands = [
        integers(shape, 9, generator) for shape in (problem.input_shape, problem.output_shape, problem.weight_shape)
    ]
    for module in (conv_gather.conv_gather, conv_gather_wgrad.conv_wgrad):
        monkeypatch.setitem(module.__globals__, "wide", lambda *operands: True)
    monkeypatch.setattr(call, "_calls", {})
    index = DIRECTIONS.index(direction)
    assert_equal(computed(problem, *operands)[index], expected(problem, *operands)[index], direction)
