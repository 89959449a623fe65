"""The first layer's rows by bulk copies.

The interpreter refuses boxes that do not begin at multiples of 16 bytes. With few input channels it then runs only
strides and paddings of 2, 4 or 8 pixels and rows of outputs that one run serves, which no network has. Problems here
are of fewer kinds than another family's for that reason; tests on a GPU take the others.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch

from convolutions import DEVICE, Case, check_exact, check_infinities, exact_operands, expected, trailing
from fastconv.autotune import gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families.row_form import RowForm, box_form
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import conv
from fastconv.kernels.problem.conv import ConvProblem
from reference import assert_equal
from tests.tiles import take_tile

pytestmark = [pytest.mark.usefixtures("bulk_copies"), *[pytest.mark.gpu] * (not interpreter.interpreting())]

FPROP = ("fprop",)
STEM = Case("ResNet's", 32, 3, 64, (224, 224), (7, 7), (2, 2), (3, 3))
EVEN = (
    Case("pairs of outputs", 17, 4, 24, (4, 6), (5, 5), (2, 2), (2, 2)),
    Case("an odd number of outputs", 16, 4, 8, (3, 6), (3, 3), (1, 1), (1, 0)),
    Case("padding larger than the filter", 16, 4, 8, (2, 6), (2, 3), (1, 1), (2, 4)),
    Case("one output at a time", 33, 4, 8, (5, 8), (3, 3), (2, 2), (2, 2), (2, 1)),
    Case("1d, one channel", 16, 1, 16, (24,), (16,), (8,), (8,)),
    Case("3d, two channels", 16, 2, 8, (2, 3, 8), (3, 2, 3), (1, 2, 4), (1, 1, 4), (1, 2, 1)),
)


def _aligned(problem: ConvProblem) -> bool:
    """Whether every run begins at a multiple of 16 bytes."""
    form = box_form(problem)
    assert isinstance(form, RowForm)
    hops = problem.output_size[-1] > form.columns
    pixels = problem.padding[-1], form.columns * problem.stride[-1] * hops
    return all(count * problem.in_channels % 8 == 0 for count in pixels)


def _filters_and_strides() -> Iterator[Case]:
    """Every number of channels with and without padding, rows of outputs in one run and in several."""
    for c in (1, 2, 3, 4):
        least = 8 // math.gcd(c, 8)
        for stride in (1, 2, 4, 8):
            for taps in (2, 3, 7):
                for padding in (0, least):
                    width = least * -(-taps // least)
                    name = f"{c} channels stride {stride} filter {taps} padding {padding}"
                    case = Case(name, 17, c, 8, (2, width), (2, taps), (1, stride), (0, padding))
                    if _aligned(case.problem(torch.bfloat16)):
                        yield case


SMALL = tuple(_filters_and_strides())
ANYWHERE = tuple(
    Case(f"{c} channels stride {stride} filter {s}", 40, c, 72, (6, 16), (3, s), (1, stride), (1, padding))
    for c in (1, 2, 3, 4)
    for stride in (1, 2, 3)
    for s, padding in ((3, 1), (5, 1), (7, 3))
)


@pytest.fixture
def small_tile(monkeypatch) -> None:
    if interpreter.interpreting():
        take_tile(monkeypatch, {"BLOCK_N": 16, "BLOCK_K": 16}, ("conv_row_boxes",))


def operands_of(problem: ConvProblem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x and weight of integers whose sums are exact, and fprop's result."""
    x, dy, weight = exact_operands(problem, FPROP)
    y = expected(problem, x, dy, weight)[0]
    return x.to(problem.dtype).to(DEVICE), weight.to(problem.dtype).to(DEVICE), y


def check_fprop(case: Case, problem: ConvProblem, record_property: Callable[..., None]) -> None:
    """This family's result is PyTorch's and the gather's."""
    with dispatch.only_family("gather"):
        check_exact(problem, results=FPROP)
    with dispatch.only_family("row_boxes"):
        records = check_exact(problem, results=FPROP)
    assert [it.name for it in records] == ["conv_rows_weight_kernel", "conv_row_boxes_kernel"]
    record_property("problem", ("row_boxes", "fprop", case.name))


@pytest.mark.usefixtures("small_tile")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_filter_and_stride(case: Case, record_property) -> None:
    check_fprop(case, case.problem((torch.bfloat16, torch.float16)[SMALL.index(case) % 2]), record_property)


def test_small_problems_are_of_every_kind() -> None:
    cases = {case.name: case for case in SMALL + EVEN}
    forms = [(case.c, box_form(case.problem(torch.bfloat16))) for case in cases.values()]
    found = {(c, form.columns) for c, form in forms if isinstance(form, RowForm)}
    assert found == {(c, columns) for c in (1, 2, 3, 4) for columns in (1, 2)}
    assert len(cases) >= 50


@pytest.mark.usefixtures("small_tile")
@pytest.mark.parametrize("case", EVEN if interpreter.interpreting() else EVEN + ANYWHERE, ids=lambda case: case.name)
def test_exact_on_integers(case: Case, record_property) -> None:
    problem = case.problem(torch.bfloat16)
    check_fprop(case, problem, record_property)
    x, weight, reference = operands_of(problem)
    geometry = problem.stride, problem.padding + trailing(problem), problem.dilation, 1
    with dispatch.only_family("row_boxes"), record() as records:
        y, mean, var = conv.conv_statistics(x, weight, None, None, *geometry)
        fused = conv.conv_act(x, weight, None, (None,) * 4, None, y, None, *geometry, 0.0, "relu", 0.0, 0.0, True)
    assert_equal(y, reference, "fprop with statistics")
    assert_equal(fused, (reference.relu() + y.double().cpu()), "fprop with ReLU and a residual")
    axes = (0, *range(2, reference.dim()))
    true_var, true_mean = torch.var_mean(reference, axes, correction=0)
    torch.testing.assert_close(mean.cpu().double(), true_mean, rtol=0, atol=1e-6 * reference.abs().max().item())
    torch.testing.assert_close(var.cpu().double(), true_var, rtol=1e-5, atol=0)
    products = [it.name for it in records if it.name != "combine_statistics_kernel"]
    assert products == ["conv_rows_weight_kernel", "conv_row_boxes_kernel"] * 2


@pytest.mark.usefixtures("small_tile")
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("case", [EVEN[0], EVEN[3]], ids=lambda case: case.name)
def test_infinity_beside_the_window_stays_out(case: Case, value: float) -> None:
    """Outputs share a run, and a run is longer than the window of one."""
    problem = case.problem(torch.bfloat16)
    form = box_form(problem)
    assert isinstance(form, RowForm) and (form.columns, form.used < form.run) == (
        (2, True) if case is EVEN[0] else (1, True)
    )
    operands = exact_operands(problem, FPROP)
    for column in range(0, problem.input_size[-1], 3):
        operands[0][column % problem.batch, column % problem.in_channels, 0, column] = value
    assert expected(problem, *operands)[0].isnan().any() or not math.isnan(value)
    with dispatch.only_family("row_boxes"):
        check_infinities(problem, operands, FPROP)


def test_it_serves_if_it_is_predicted_faster() -> None:
    problem = STEM.problem(torch.bfloat16)
    plan = dispatch.plan("fprop", problem, gpus.H200)
    assert plan.family == "rows"
    assert dict(plan.reasons)["row_boxes"] == "predicted to take 2.7 times as long as rows"
    vgg = Case("VGG's", 64, 3, 64, (224, 224), (3, 3), (1, 1), (1, 1)).problem(torch.bfloat16)
    assert dispatch.plan("fprop", vgg, gpus.H200).family == "row_boxes"
    with dispatch.only_family("row_boxes"):
        plan = dispatch.plan("fprop", problem, gpus.H200)
        assert plan.family == "row_boxes" and box_form(problem) == RowForm(2, 1, 0, 27, 32)
        assert dispatch.plan("fprop", problem, gpus.A100).family == "pytorch"


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("", 16, 5, 8, (9, 8), (3, 3)), "5 input channels"),
        (Case("", 16, 3, 8, (9, 9), (3, 3)), "rows that do not lie at multiples of 16 bytes"),
        (Case("", 16, 3, 12, (9, 8), (3, 3)), "a result whose pixels do not lie at multiples of 16 bytes"),
        (Case("", 15, 3, 8, (9, 8), (3, 3)), "15 images leave most of a box empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_serve(case: Case, reason: str) -> None:
    with dispatch.only_family("row_boxes"):
        assert dispatch.plan("fprop", case.problem(torch.bfloat16), gpus.H200).reasons == (("row_boxes", reason),)
