"""Convolution in every direction against fp64: exact on integers, within fp32's roundings on random values.

Each case runs fprop, dgrad and wgrad by the family that dispatch picks. Outputs are poisoned, so an element that no
program wrote is a NaN and fails.
"""

from collections.abc import Iterator
from math import prod

import pytest
import torch

from convolutions import (
    DEVICE,
    Case,
    check_exact,
    check_random,
    check_wide_offsets,
    computed,
    expected,
    products_of,
    random_operands,
)
from fastconv.autotune import gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families import conv_gather, conv_gather_wgrad
from fastconv.kernels.launch.interpreter import interpreting
from fastconv.kernels.launch.launch import Launch, record
from fastconv.kernels.ops import conv
from fastconv.kernels.problem.conv import DIRECTIONS
from reference import assert_equal, integers
from tests.marks import runs_kernels
from tests.tiles import take_tile

pytestmark = runs_kernels
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _strides_and_dilations() -> Iterator[Case]:
    """Every stride with every dilation and filter: the phases of dgrad."""
    for stride in (1, 2, 3, 4):
        for dilation in (1, 2, 3, 4, 6):
            for r in (1, 2, 3):
                if r == 1 and dilation > 1:
                    continue
                size = 7 + dilation * (r - 1)
                yield Case(
                    f"stride {stride} dilation {dilation} filter {r}",
                    *(1, 16, 16, (size, size - 1), (r, 1 + r % 3)),
                    (stride, 1 + stride % 3),
                    (r // 2, 0),
                    (dilation, 1 + dilation % 2),
                )


CASES = (
    Case("pointwise", 2, 16, 32, (5, 4), (1, 1)),
    Case("pointwise, 17 to 19 channels", 3, 17, 19, (5, 3), (1, 1)),
    Case("pointwise, 24 to 40 channels", 1, 24, 40, (6, 6), (1, 1)),
    Case("pointwise stride 2", 2, 16, 16, (5, 6), (1, 1), (2, 2)),
    Case("pointwise padding 1", 2, 16, 16, (3, 4), (1, 1), (1, 1), (1, 1)),
    Case("one pixel", 5, 16, 16, (1, 1), (1, 1)),
    Case("one pixel, 3x3 filter", 2, 16, 16, (1, 1), (3, 3), (1, 1), (1, 1)),
    Case("one channel to one", 1, 1, 1, (5, 5), (3, 3)),
    Case("one of everything", 1, 1, 1, (1, 1), (1, 1)),
    Case("3x3 padding 1", 2, 16, 24, (6, 7), (3, 3), (1, 1), (1, 1)),
    Case("3x3 stride 2 padding 1", 2, 32, 16, (8, 7), (3, 3), (2, 2), (1, 1)),
    Case("7x7 stride 2 padding 3, 3 channels", 2, 3, 16, (15, 13), (7, 7), (2, 2), (3, 3)),
    Case("5x5, 1 channel", 2, 1, 6, (12, 12), (5, 5), (1, 1), (2, 2)),
    Case("2 channels to 2", 2, 2, 2, (6, 5), (3, 2)),
    Case("4 channels", 1, 4, 20, (6, 5), (3, 3), (2, 2), (1, 1)),
    Case("8 channels", 1, 8, 8, (6, 5), (3, 3), (1, 2), (1, 1)),
    Case("12 to 12 channels", 1, 12, 12, (5, 5), (3, 3), (1, 1), (1, 1)),
    Case("primes", 3, 37, 41, (7, 11), (3, 5), (2, 3), (1, 2)),
    Case("filter larger than the image", 2, 16, 16, (2, 3), (5, 5), (1, 1), (2, 2)),
    Case("filter as large as the image", 2, 16, 16, (4, 3), (4, 3)),
    Case("padding larger than the filter", 1, 16, 16, (3, 3), (2, 2), (1, 1), (3, 4)),
    Case("stride larger than the filter", 2, 16, 16, (9, 8), (2, 1), (4, 3)),
    Case("stride larger than the image", 2, 16, 16, (2, 3), (2, 2), (5, 4), (1, 1)),
    Case("stride that leaves pixels over", 1, 16, 16, (8, 9), (3, 3), (3, 4)),
    Case("asymmetric filter, stride, padding, dilation", 2, 20, 12, (9, 10), (3, 2), (1, 2), (2, 0), (2, 3)),
    Case("trailing padding only", 1, 16, 16, (5, 6), (2, 2), (1, 1), (0, 0), after=(1, 1)),
    Case("uneven padding, stride 2", 1, 16, 16, (5, 6), (4, 2), (2, 2), (1, 0), after=(2, 1)),
    Case("dilation shares a factor with the stride", 1, 16, 16, (13, 14), (3, 4), (4, 6), (2, 3), (2, 4)),
    Case("dilation equals the stride", 1, 16, 16, (9, 9), (3, 3), (2, 2), (2, 2), (2, 2)),
    Case("2 groups", 2, 32, 32, (5, 4), (3, 3), (1, 1), (1, 1), groups=2),
    Case("4 groups of 5 to 3 channels", 2, 20, 12, (6, 5), (3, 3), (2, 1), (1, 1), groups=4),
    Case("depthwise", 2, 7, 7, (6, 6), (3, 3), (1, 1), (1, 1), groups=7),
    Case("depthwise, 2 channels each, stride 2", 2, 5, 10, (8, 7), (3, 3), (2, 2), (1, 1), groups=5),
    Case("1d", 2, 16, 20, (13,), (3,), (1,), (1,)),
    Case("1d stride 3 dilation 2", 2, 17, 9, (23,), (4,), (3,), (2,), (2,)),
    Case("1d, 1 channel", 2, 1, 3, (40,), (9,), (2,), (4,)),
    Case("1d, 2 groups", 2, 8, 6, (11,), (3,), (2,), (1,), groups=2),
    Case("1d, one pixel", 4, 16, 16, (1,), (1,)),
    Case("3d", 1, 16, 16, (3, 4, 5), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    Case("3d stride 2", 2, 16, 8, (5, 4, 3), (3, 2, 1), (2, 2, 2), (1, 1, 0)),
    Case("3d pointwise", 1, 18, 16, (2, 3, 4), (1, 1, 1)),
    Case("3d, 1 channel, everything asymmetric", 1, 1, 4, (6, 5, 7), (3, 2, 3), (2, 1, 3), (1, 0, 2), (1, 2, 1)),
    Case("3d, 3 groups", 1, 9, 6, (4, 4, 4), (2, 2, 2), (1, 2, 1), (1, 0, 0), groups=3),
    Case("3d dilation and stride share a factor", 1, 16, 16, (9, 5, 5), (3, 2, 2), (4, 1, 2), (2, 0, 1), (2, 1, 2)),
    *_strides_and_dilations(),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_on_integers(case: Case, dtype: torch.dtype, record_property) -> None:
    problem = case.problem(dtype)
    # Every other case in the plain format, whose edges are copies.
    records = check_exact(problem, channels_last=CASES.index(case) % 2 == 0)
    assert {"conv_gather_kernel", "conv_wgrad_kernel", "channel_sum_kernel"} <= set(products_of(records))
    names = {record.name for record in records}
    for direction in DIRECTIONS:
        plan = dispatch.plan(direction, problem, dispatch.target(torch.device(DEVICE)))
        # A call may copy its operands to where another family serves them.
        if {launch.name for launch in plan.launches} <= names:
            record_property("problem", (plan.family, direction, case.name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.name)
def test_random_values_within_rounding(case: Case, dtype: torch.dtype) -> None:
    check_random(case.problem(dtype))


def test_each_direction_has_fifty_problems() -> None:
    problems = {case.problem() for case in CASES}
    for direction in DIRECTIONS:
        served = [p for p in problems if dispatch.plan(direction, p, gpus.A100).family == "gather"]
        assert len(served) >= 50, direction


TILES = {
    "tails of every axis": {"BLOCK_M": 16, "BLOCK_K": 16, "BLOCK_C": 16, "SPLITS": 3},
    "one tile over everything": {"BLOCK_M": 256, "BLOCK_K": 64, "BLOCK_C": 64, "SPLITS": 1},
    "more splits than steps": {"BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_C": 32, "SPLITS": 7},
}


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize(
    "case",
    [
        Case("dense", 2, 40, 24, (5, 6), (3, 2), (2, 1), (1, 1)),
        Case("few channels", 2, 5, 40, (6, 5), (3, 3), (1, 2), (1, 1)),
        Case("few outputs", 2, 40, 5, (6, 5), (3, 3), (1, 2), (1, 1)),
        Case("3d, groups", 2, 36, 38, (3, 3, 2), (2, 2, 2), (1, 2, 1), (1, 0, 1), groups=2),
        Case("1d", 3, 20, 20, (21,), (4,), (2,), (1,), (2,)),
    ],
    ids=lambda case: case.name,
)
def test_tile_edges(case: Case, tile: dict[str, int], monkeypatch) -> None:
    """The interpreter's own tiles cover small problems whole; here tiles are small."""
    problem = case.problem()
    take_tile(monkeypatch, tile, ("conv", "pass"))
    with dispatch.only_family("gather"):
        records = check_exact(problem)
    second = ["conv_finish_kernel", "split_sum_kernel"]
    assert all(r.launch.constants["BLOCK_K"] == tile["BLOCK_K"] for r in records if r.name not in second)
    assert [name for name in second if name in {r.name for r in records}] == (second if tile["SPLITS"] > 1 else [])


def test_strides_are_taken_from_the_tensors() -> None:
    """A slice of a wider channels_last tensor is read where it lies: without a copy, and without its neighbours."""
    generator = torch.Generator().manual_seed(0)
    whole = integers((2, 6, 8, 24), 50, generator).float().to(DEVICE)
    x = whole[:, 1:, ::2, 4:20].permute(0, 3, 1, 2)
    weight = integers((16, 16, 3, 3), 50, generator).float().to(DEVICE)
    with dispatch.only_family("gather"), record() as records:
        y = conv.conv_fprop(x, weight, None, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    reference = torch.conv2d(x.double().cpu(), weight.double().cpu(), padding=1)
    assert_equal(y, reference, "fprop of a slice")
    assert records[0].launch.constants["VEC_C"] == 4  # 16 bytes
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_expanded_gradient() -> None:
    """The gradient that ``y.sum().backward()`` hands back has strides of zero."""
    generator = torch.Generator().manual_seed(0)
    x, weight = integers((2, 16, 5, 5), 9, generator).float(), integers((16, 16, 3, 3), 9, generator).float()
    dy = torch.ones(()).expand(2, 16, 3, 3)
    problem = Case("", 2, 16, 16, (5, 5), (3, 3)).problem()
    dw = conv.conv_wgrad(x.to(DEVICE), dy.to(DEVICE), (3, 3), (1, 1), (0, 0), (1, 1), 1, False)
    assert_equal(dw, expected(problem, x.double(), dy.double(), weight.double())[2], "wgrad")


@pytest.mark.parametrize("linear", [True, False])
def test_wgrad_of_uneven_pixels(linear: bool) -> None:
    """A crop of dy, whose pixels are not evenly spaced, is copied; a crop of x is read where it lies."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (integers((2, 5, 6, 16), 9, generator).float().to(DEVICE).permute(0, 3, 1, 2) for _ in range(2))
    if not linear:
        x, dy = x[..., 1:], dy[..., :5]
    problem = Case("", 2, 16, 16, tuple(x.shape[2:]), (1, 1)).problem()
    with record() as records:
        dw = conv.conv_wgrad(x, dy, (1, 1), (1, 1), (0, 0), (1, 1), 1, True)
    zeros = torch.zeros(problem.weight_shape, dtype=torch.float64)
    assert_equal(dw, expected(problem, x.cpu().double(), dy.cpu().double(), zeros)[2], "wgrad")
    assert_equal(conv.channel_sum(dy), dy.cpu().double().sum((0, 2, 3)), "bias gradient")
    assert records[0].launch.constants["LINEAR"] is linear


def test_wgrad_is_the_same_bit_for_bit() -> None:
    problem = Case("", 3, 20, 24, (9, 9), (3, 3), padding=(1, 1)).problem()
    operands = random_operands(problem)
    first, second = computed(problem, *operands), computed(problem, *operands)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bias_is_added_before_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 16, 4, 4), (20, 16, 1, 1), (20,)))
    x, weight, bias = (t.bfloat16().to(DEVICE) for t in (x, weight, bias))
    y = conv.conv_fprop(x, weight, bias, (1, 1), (0,) * 4, (1, 1), 1)
    assert_equal(y, torch.conv2d(x.double().cpu(), weight.double().cpu(), bias.double().cpu()), "fprop with bias")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_offsets_past_2_to_31_elements_are_wide(direction: str) -> None:
    """Only on the host, because the tensors fit no test machine. A size less by one stays narrow."""

    def launch(size: int) -> Launch:
        problem = Case("", 2, 64, 64, (size, size), (3, 3), padding=(1, 1)).problem(torch.bfloat16)
        return dispatch.plan(direction, problem, gpus.A100).launches[0]

    assert launch(4096).constants["WIDE"] is False  # 2^31 elements, the last at 2^31 - 1
    assert launch(4097).constants["WIDE"] is True


@pytest.mark.parametrize(("c", "k"), [(256, 64), (64, 256)])
def test_linear_wgrad_is_wide_if_either_operand_is(c: int, k: int) -> None:
    """A 1x1 layer's pixels are walked by one stride; with 2^25 pixels only the wider operand passes 2^31 elements."""
    problem = Case("", 2, c, k, (4096, 4096), (1, 1)).problem(torch.bfloat16)
    constants = dispatch.plan("wgrad", problem, gpus.A100).launches[0].constants
    assert constants["LINEAR"] is True and constants["WIDE"] is True


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_wide_offsets_give_the_same(direction: str, monkeypatch) -> None:
    problem = Case("", 2, 16, 16, (5, 4), (3, 3), (2, 1), (1, 1)).problem()
    with dispatch.only_family("gather"):
        check_wide_offsets(monkeypatch, problem, [conv_gather, conv_gather_wgrad], (direction,))


@pytest.mark.skipif(not interpreting(), reason="counts the interpreter's products")
@pytest.mark.parametrize(("stride", "dilation"), [(2, 1), (3, 1), (4, 2), (2, 2)])
def test_dgrad_multiplies_no_zeros(stride: int, dilation: int, monkeypatch) -> None:
    """All phases together multiply each tap once; with zeros between pixels each phase would."""
    from triton.runtime.interpreter import InterpreterBuilder

    products = []
    dot = InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *a: products.append(a) or dot(*a))
    problem = Case("", 1, 16, 16, (9, 9), (3, 3), (stride,) * 2, (1, 1), (dilation,) * 2).problem()
    dy, weight = torch.zeros(problem.output_shape), torch.zeros(problem.weight_shape)
    arguments = problem.input_size, problem.stride, problem.padding, problem.dilation
    conv.conv_dgrad(dy, weight, None, *arguments, 1, True)
    assert len(products) == 9


def test_empty_batch_launches_nothing() -> None:
    problem = Case("", 0, 16, 8, (5, 4), (3, 3), padding=(1, 1)).problem()
    operands = [torch.zeros(shape) for shape in (problem.input_shape, problem.output_shape, problem.weight_shape)]
    with record() as records:
        y, dx, dw, db = computed(problem, *operands)
    assert not records
    assert y.shape == (0, 8, 5, 4) and dx.shape == (0, 16, 5, 4)
    assert torch.equal(dw.cpu(), torch.zeros(8, 16, 3, 3)) and torch.equal(db.cpu(), torch.zeros(8))


def test_uncovered_problems_say_why() -> None:
    problem = Case("", 1, 300000, 300000, (1, 1), (1, 1), groups=100000).problem()
    plan = dispatch.plan("fprop", problem, gpus.A100)
    assert plan.family == "pytorch"
    assert plan.reasons[-1] == ("gather", "100000 groups are more than a grid's second axis holds")
    huge = Case("", 2, 1, 1, (2**16, 2**15), (1, 1)).problem()
    assert "2^31 pixels" in dispatch.plan("fprop", huge, gpus.A100).reasons[-1][1]
    old = gpus.describe("an older GPU", 75, 40, 64 << 10, 4 << 20, None)
    assert "7.5" in dispatch.plan("fprop", Case("", 1, 16, 16, (4, 4), (1, 1)).problem(), old).reasons[-1][1]


def test_flops_and_bytes() -> None:
    problem = Case("", 2, 8, 16, (5, 5), (3, 3), groups=2).problem(torch.bfloat16)
    assert problem.flops == 2 * 2 * 9 * 16 * 4 * 9
    assert problem.bytes == 2 * (2 * 8 * 25 + 16 * 4 * 9 + 2 * 16 * 9)
    assert prod(problem.output_shape) == 2 * 16 * 9
