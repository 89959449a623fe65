"""Convolution of few images over rows and rectangles of pixels, against fp64 and bit for bit against the gather."""

from collections.abc import Iterator

import pytest
import torch

from convolutions import DEVICE, Case, check_exact, check_random, check_wide_offsets
from fastconv.autotune import Config, gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families import conv_spatial
from fastconv.kernels.jit.activations import ACTIVATIONS
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import conv
from fastconv.kernels.problem.conv import ConvProblem
from reference import assert_equal, integers
from tests.fused_layers import fused_layer
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


def name_tile(monkeypatch, rows: int, block_m: int, block_k: int = 32, splits: int = 1) -> None:
    """A copy takes one row of strided ones."""

    def chosen(features: tuple[str, ConvProblem, str]) -> Config:
        direction, problem, _ = features
        one = direction == "fprop" and problem.as_rank3.stride[1] > 1
        return {"ROWS": 1 if one else rows, "BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_C": 64, "SPLITS": splits}

    take_tile(monkeypatch, chosen, ("conv_spatial",))
    monkeypatch.setattr(conv_spatial, "predicted", lambda candidates: 0.0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_on_integers(case: Case, record_property, monkeypatch) -> None:
    index = CASES.index(case)
    problem = case.problem(HALVES[index % 2])
    rows, block_m = ((1, 16), (4, 16), (8, 64), (1, 64))[index % 4]
    name_tile(monkeypatch, rows, block_m)
    # Every third case in the plain format, whose edges are copies.
    with dispatch.only_family("gather"):
        check_exact(problem, index % 3 > 0, BOTH)
    with dispatch.only_family("spatial"):
        records = check_exact(problem, index % 3 > 0, BOTH)
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
def test_random_values_within_rounding(case: Case, monkeypatch) -> None:
    problem = case.problem(HALVES[CASES.index(case) % 2])
    name_tile(monkeypatch, 4, 32)
    check_random(problem, BOTH)


def test_tiles_as_they_are_chosen() -> None:
    """Rows if they are long, rectangles if not, and nothing if the gather is predicted faster."""
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
def test_splits_and_tails(case: Case, splits: int, monkeypatch) -> None:
    """Splits that have no step, tails of rows, columns and both channels, a phase without a tap."""
    name_tile(monkeypatch, 2, 32, 32, splits)
    problem = case.problem(torch.bfloat16)
    with dispatch.only_family("spatial"):
        records = check_exact(problem, results=BOTH)
    assert [r.name for r in records] == ["conv_spatial_kernel", "conv_finish_kernel"] * 2


def test_fp32_goes_by_tf32_forward(monkeypatch) -> None:
    name_tile(monkeypatch, 2, 16)
    problem = Case("", 2, 20, 24, (4, 6), (3, 3), (1, 2), (1, 1)).problem()
    records = check_exact(problem, results=BOTH)
    assert [r.name for r in records] == ["conv_spatial_kernel", "conv_gather_kernel"]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("", 16, 64, 64, (9, 8), (3, 3)), "16 images, more than 15"),
        (Case("", 2, 192, 192, (9, 8), (3, 3), groups=2), "2 groups"),
        (Case("", 2, 64, 64, (9, 9), (3, 3), (2, 2)), "rows of 9 pixels, of which phases of 2 have not as many each"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_serve(case: Case, reason: str) -> None:
    with dispatch.only_family("spatial"):
        assert dispatch.plan("fprop", case.problem(torch.bfloat16), gpus.H200).reasons == (("spatial", reason),)


def test_pixels_are_read_where_they_lie(monkeypatch) -> None:
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
def test_every_activation(act: str, monkeypatch) -> None:
    """Bias, batch norm, residual before and after; the gather's epilogue is the same, and so is its result."""
    index = list(ACTIVATIONS).index(act)
    name_tile(monkeypatch, (1, 4)[index // 2 % 2], 32, splits=1 + index % 5 // 4)
    transposed, after = index % 2 == 1, index % 3 == 0
    layer = fused_layer((2, 24, 5, 6), 40, (3, 3), torch.float16, transposed=transposed, stride=(2, 2), padding=(1, 1))
    values = []
    for family in ("spatial", "gather"):
        with dispatch.only_family(family):
            values.append(layer.computed(act, after))
    torch.testing.assert_close(values[0].double(), layer.expected(act, after), rtol=3e-3, atol=3e-3)
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("rows", [1, 4])
def test_statistics_count_no_pixel_outside(rows: int, splits: int, monkeypatch) -> None:
    """Rectangles reach past the image, and phases have unlike numbers of pixels."""
    name_tile(monkeypatch, rows, 32, 64, splits)
    for transposed, stride in ((False, 1), (False, 2), (True, 2)):
        layer = fused_layer(
            (2, 24, 5, 6), 40, (3, 3), torch.float16, transposed=transposed, stride=(stride,) * 2, padding=(1, 1)
        )
        with dispatch.only_family("spatial"):
            layer.check_statistics((2e-3, 2e-3), (1e-4, 1e-4))


def test_wide_offsets_give_the_same(monkeypatch) -> None:
    name_tile(monkeypatch, 4, 16)
    problem = Case("", 2, 16, 24, (5, 4), (3, 3), (1, 2), (1, 1)).problem(torch.bfloat16)
    with dispatch.only_family("spatial"):
        check_wide_offsets(monkeypatch, problem, [conv_spatial], BOTH)
