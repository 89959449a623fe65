"""Convolution of few images over rows and rectangles of pixels, against fp64 and bit for bit against the gather."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from convolutions import DEVICE, Case, depths, expected, trailing
from fastconv.autotune import Config, gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families import conv_spatial
from fastconv.kernels.jit.activations import ACTIVATIONS
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import conv
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import strides_like
from reference import assert_close, assert_equal, exact_limit, integers
from tests.tiles import take_tile

pytestmark = [pytest.mark.usefixtures("bulk_copies"), *[pytest.mark.gpu] * (not interpreter.interpreting())]
HALVES = (torch.bfloat16, torch.float16)
BOTH = ("fprop", "dgrad")


def _walks() -> Iterator[Case]:
    """Every stride with every filter and dilation, on maps of few rows."""
    for stride in (1, 2, 3):
        for r, padding in ((1, 0), (2, 1), (3, 1), (5, 2)):
            for dilation in (1, 2, 3):
                index = stride + r + dilation
                yield Case(
                    f"{r}x{r} stride {stride} padding {padding} dilation {dilation}",
                    *(1 + index % 3, 8 * (1 + index % 4), 8 * (1 + index % 3)),
                    *((dilation * (r - 1) + 1 + index % 2, 6 * (1 + dilation * r // 6) + 6), (r, r)),
                    *((stride,) * 2, (padding,) * 2, (dilation,) * 2),
                )


CASES = (
    *_walks(),
    Case("uneven padding", 1, 16, 24, (4, 6), (4, 2), (2, 2), (1, 0), after=(2, 1)),
    Case("filter larger than the image", 2, 8, 16, (2, 4), (5, 5), (1, 1), (2, 2)),
    Case("padding larger than the filter", 1, 16, 8, (3, 4), (2, 2), (1, 1), (3, 4)),
    Case("stride larger than the filter", 2, 16, 8, (9, 8), (2, 1), (4, 4)),
    Case("stride and dilation of one factor", 1, 8, 8, (7, 12), (3, 3), (4, 2), (2, 2), (2, 4)),
    Case("rows and columns unlike", 2, 24, 8, (5, 9), (1, 3), (1, 3), (0, 1), (1, 2)),
    Case("channels of two steps", 1, 72, 80, (3, 4), (3, 3), padding=(1, 1)),
    Case("one pixel", 1, 16, 16, (1, 1), (3, 3), padding=(1, 1)),
    Case("one column", 3, 16, 16, (7, 1), (3, 1), padding=(1, 0)),
    Case("1d", 3, 24, 16, (40,), (5,), (2,), (2,)),
    Case("1d, dilated", 2, 16, 8, (35,), (3,), (1,), (4,), (4,)),
    Case("1d, stride 3", 1, 8, 24, (33,), (4,), (3,), (1,)),
    Case("3d", 2, 8, 16, (3, 4, 5), (3, 3, 3), padding=(1, 1, 1)),
    Case("3d, strides", 1, 16, 8, (5, 4, 6), (3, 2, 3), (2, 1, 2), (1, 0, 1)),
    Case("3d, dilated depth", 2, 8, 8, (5, 3, 4), (3, 1, 2), (1, 1, 1), (2, 0, 1), (2, 1, 1)),
    Case("3d, depth of stride 3", 2, 8, 8, (7, 2, 3), (2, 2, 2), (3, 1, 1), (1, 1, 0)),
)


def _operands(problem: ConvProblem, generator: torch.Generator | None = None) -> list[torch.Tensor]:
    """x, dy and weight: integers whose sums are exact, or random values."""
    shapes = problem.input_shape, problem.output_shape, problem.weight_shape
    if generator is not None:
        return [torch.randn(shape, generator=generator).to(problem.dtype).double() for shape in shapes]
    limit, generator = exact_limit(problem.dtype, max(depths(problem)[:2])), torch.Generator().manual_seed(0)
    return [integers(shape, limit, generator) for shape in shapes]


def _computed(
    problem: ConvProblem, x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, last: bool = True
) -> tuple:
    def operand(t: torch.Tensor) -> torch.Tensor:
        t = t.to(problem.dtype).to(DEVICE)
        return t.new_empty_strided(t.shape, strides_like(t.shape, last)).copy_(t)

    x, dy, weight = map(operand, (x, dy, weight))
    rest = problem.dilation, problem.groups
    return (
        conv.conv_fprop(x, weight, None, problem.stride, problem.padding + trailing(problem), *rest),
        conv.conv_dgrad(dy, weight, None, problem.input_size, problem.stride, problem.padding, *rest, last),
    )


def name_tile(monkeypatch: pytest.MonkeyPatch, rows: int, block_m: int, block_k: int = 32, splits: int = 1) -> None:
    """Of strided rows a copy takes one."""

    def chosen(features: tuple[str, ConvProblem, str]) -> Config:
        direction, problem, _ = features
        one = direction == "fprop" and problem.as_rank3.stride[1] > 1
        return {"ROWS": 1 if one else rows, "BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_C": 64, "SPLITS": splits}

    take_tile(monkeypatch, chosen, ("conv_spatial",))
    monkeypatch.setattr(conv_spatial, "predicted", lambda candidates: 0.0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_on_integers(case: Case, record_property, monkeypatch: pytest.MonkeyPatch) -> None:
    index = CASES.index(case)
    problem = case.problem(HALVES[index % 2])
    operands = _operands(problem)
    rows, block_m = ((1, 16), (4, 16), (8, 64), (1, 64))[index % 4]
    name_tile(monkeypatch, rows, block_m)
    # Every third case in the plain format, whose edges are copies.
    with record() as records, dispatch.only_family("spatial"):
        values = _computed(problem, *operands, index % 3 > 0)
    with dispatch.only_family("gather"):
        others = _computed(problem, *operands, index % 3 > 0)
    for name, value, reference, other in zip(BOTH, values, expected(problem, *operands), others, strict=False):
        assert_equal(value, reference, f"{name} of {problem.describe()}")
        assert torch.equal(value, other), f"{name} by the gather"
    assert [r.name for r in records] == ["conv_spatial_kernel"] * 2
    for direction in BOTH:
        record_property("problem", ("spatial", direction, case.name))


@pytest.mark.parametrize("direction", BOTH)
def test_each_direction_has_fifty_problems(direction: str) -> None:
    with dispatch.only_family("spatial"):
        plans = [dispatch.plan(direction, case.problem(torch.bfloat16), gpus.H200) for case in CASES]
    slower = "tiles of rows and rectangles that fit the image badly: predicted slower than the gather's"
    assert sum(plan.family == "spatial" or plan.reasons == (("spatial", slower),) for plan in plans) >= 50


@pytest.mark.parametrize("case", CASES[::9], ids=lambda case: case.name)
def test_random_values_within_rounding(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case.problem(HALVES[CASES.index(case) % 2])
    name_tile(monkeypatch, 4, 32)
    operands = _operands(problem, torch.Generator().manual_seed(0))
    magnitudes = expected(problem, *(operand.abs() for operand in operands))
    for name, value, reference, magnitude, depth in zip(
        BOTH, _computed(problem, *operands), expected(problem, *operands), magnitudes, depths(problem), strict=False
    ):
        assert_close(value, reference, magnitude, depth, f"{name} of {problem.describe()}")


def test_tiles_as_they_are_chosen() -> None:
    """Rows where they are long, rectangles where they are not, and nothing where the gather is predicted faster."""
    long = Case("", 2, 64, 128, (512, 512), (3, 3), padding=(1, 1)).problem(torch.bfloat16)
    plan = dispatch.plan("fprop", long, gpus.H200)
    assert plan.family == "spatial" and plan.choice.config["ROWS"] == 1
    plan = dispatch.plan("fprop", Case("", 8, 64, 128, (28, 28), (3, 3), padding=(1, 1)).problem(HALVES[0]), gpus.H200)
    assert plan.family == "spatial" and plan.choice.config["ROWS"] > 1
    narrow = Case("", 8, 256, 256, (28, 28), (3, 3), (2, 2), (1, 1)).problem(torch.bfloat16)
    reasons = dict(dispatch.plan("fprop", narrow, gpus.H200).reasons)
    assert reasons["spatial"].endswith("predicted slower than the gather's")


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize(
    "case",
    [
        Case("2d", 1, 72, 40, (5, 6), (3, 2), (2, 1), (1, 1)),
        Case("3d", 1, 72, 24, (3, 2, 4), (2, 1, 2), (2, 1, 2), (1, 0, 1)),
    ],
    ids=lambda case: case.name,
)
def test_splits_and_tails(case: Case, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits that have no step, tails of rows, columns and both channels, a phase without a tap."""
    name_tile(monkeypatch, 2, 32, 32, splits)
    problem = case.problem(torch.bfloat16)
    operands = _operands(problem)
    with record() as records, dispatch.only_family("spatial"):
        values = _computed(problem, *operands)
    for name, value, reference in zip(BOTH, values, expected(problem, *operands), strict=False):
        assert_equal(value, reference, f"{name} of {problem.describe()}")
    assert [r.name for r in records] == ["conv_spatial_kernel", "conv_finish_kernel"] * 2


def test_fp32_goes_by_tf32_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    name_tile(monkeypatch, 2, 16)
    problem = Case("", 2, 20, 24, (4, 6), (3, 3), (1, 2), (1, 1)).problem()
    operands = _operands(problem)
    with record() as records:
        values = _computed(problem, *operands)
    for name, value, reference in zip(BOTH, values, expected(problem, *operands), strict=False):
        assert_equal(value, reference, f"{name} of {problem.describe()}")
    assert [r.name for r in records] == ["conv_spatial_kernel", "conv_gather_kernel"]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("", 16, 64, 64, (9, 8), (3, 3)), "16 images, more than 15"),
        (Case("", 2, 192, 192, (9, 8), (3, 3), groups=2), "2 groups"),
        (
            Case("", 2, 64, 64, (9, 9), (3, 3), (2, 2)),
            "rows of 9 pixels, of which phases of 2 have not as many each",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_serve(case: Case, reason: str) -> None:
    with dispatch.only_family("spatial"):
        assert dispatch.plan("fprop", case.problem(torch.bfloat16), gpus.H200).reasons == (("spatial", reason),)


def test_pixels_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crop of rows, columns and channels is a view like any; odd channels have no alignment, copies no distance."""
    name_tile(monkeypatch, 2, 16)
    generator = torch.Generator().manual_seed(0)
    whole = integers((3, 6, 8, 48), 9, generator).bfloat16().to(DEVICE)
    weight = integers((24, 32, 3, 3), 9, generator).bfloat16().to(DEVICE)
    for crop, kernel in (
        (whole[1:, 1:5, 2:, 8:40], "conv_spatial_kernel"),
        (whole[:, ::2, ::2, 16:], "conv_spatial_kernel"),
        (whole[..., 4:36], "conv_gather_kernel"),
        (whole[:1, :, :, :32].expand(3, 6, 8, 32), "conv_gather_kernel"),
    ):
        x = crop.permute(0, 3, 1, 2)
        with record() as records:
            y = conv.conv_fprop(x, weight, None, (1, 1), (1,) * 4, (1, 1), 1)
        assert_equal(y, torch.conv2d(x.double().cpu(), weight.double().cpu(), padding=1), "fprop of a slice")
        assert [(r.name, r.shapes[0]) for r in records] == [(kernel, tuple(x.shape))]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bias, batch norm, residual before and after; the gather's epilogue is the same, and so is its result."""
    index = list(ACTIVATIONS).index(act)
    name_tile(monkeypatch, (1, 4)[index // 2 % 2], 32, splits=1 + index % 5 // 4)
    generator = torch.Generator().manual_seed(0)
    transposed, after = index % 2 == 1, index % 3 == 0
    x = torch.randn(2, 24, 5, 6, generator=generator).half()
    weight = (torch.randn(40, 24, 3, 3, generator=generator) / math.sqrt(9 * 24)).half()
    bias, mean, gamma, beta, slope = torch.randn(5, 40, generator=generator).unbind()
    var, bias = torch.rand(40, generator=generator) + 0.5, bias.half()
    a, b = {"hardtanh": (-0.5, 1.5), "leaky_relu": (0.1, 0.0), "elu": (1.2, 0.0), "softplus": (1.0, 20.0)}.get(
        act, (0.0, 0.0)
    )
    function = torch.conv_transpose2d if transposed else torch.conv2d
    w = weight.transpose(0, 1).contiguous() if transposed else weight
    exact = function(x.double(), w.double(), bias.double(), 2, 1)
    residual = torch.randn(exact.shape, generator=generator).half()
    normal = torch.batch_norm(exact, *(t.double() for t in (gamma, beta, mean, var)), False, 0.0, 1e-5, False)
    torch_act = ACTIVATIONS[act].torch
    parameter = slope.double() if act == "prelu" else a
    reference = torch_act(normal + (0 if after else residual), parameter, b) + (residual if after else 0)
    on = [t.to(DEVICE) for t in (x, w, bias, mean, var, gamma, beta)]
    added = residual.to(DEVICE).contiguous(memory_format=torch.channels_last)
    values = []
    for family in ("spatial", "gather"):
        with dispatch.only_family(family):
            values.append(
                conv.conv_act(
                    *(*on[:3], tuple(on[3:]), slope.to(DEVICE) if act == "prelu" else None, added),
                    *(exact.shape[2:] if transposed else None, (2, 2), (1, 1) if transposed else (1,) * 4, (1, 1), 1),
                    *(1e-5, act, a, b, after),
                ).cpu()
            )
    torch.testing.assert_close(values[0].double(), reference, rtol=3e-3, atol=3e-3)
    torch.testing.assert_close(values[0], values[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("rows", [1, 4])
def test_statistics_count_no_pixel_outside(rows: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rectangles reach past the image, and phases have unlike numbers of pixels."""
    name_tile(monkeypatch, rows, 32, 64, splits)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 5, 6, generator=generator).half().to(DEVICE)
    weight = (torch.randn(40, 24, 3, 3, generator=generator) / math.sqrt(9 * 24)).half().to(DEVICE)
    bias = 3 * torch.randn(40, generator=generator).half().to(DEVICE)
    for output_size, stride in ((None, 1), (None, 2), ((9, 11), 2)):
        w = weight if output_size is None else weight.transpose(0, 1).contiguous()
        padding = (1,) * (4 if output_size is None else 2)
        with dispatch.only_family("spatial"):
            y, mean, var = conv.conv_statistics(x, w, bias, output_size, (stride,) * 2, padding, (1, 1), 1)
        function = torch.conv2d if output_size is None else torch.conv_transpose2d
        exact = function(x.double().cpu(), w.double().cpu(), bias.double().cpu(), stride, 1)
        true_var, true_mean = torch.var_mean(exact, (0, 2, 3), correction=0)
        torch.testing.assert_close(y.cpu().double(), exact, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(mean.cpu().double(), true_mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(var.cpu().double(), true_var, rtol=1e-4, atol=1e-4)


def test_wide_offsets_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    name_tile(monkeypatch, 4, 16)
    problem = Case("", 2, 16, 24, (5, 4), (3, 3), (1, 2), (1, 1)).problem(torch.bfloat16)
    operands = _operands(problem)
    monkeypatch.setitem(conv_spatial.conv_spatial.__globals__, "wide", lambda *operands: True)
    with dispatch.only_family("spatial"):
        values = _computed(problem, *operands)
    for name, value, reference in zip(BOTH, values, expected(problem, *operands), strict=False):
        assert_equal(value, reference, name)
