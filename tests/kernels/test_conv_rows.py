"""Convolution of few input channels by the rows of its filter, against fp64; the gather serves their dgrad.

A run begins before the window and ends after it; what lies there, infinities included, must stay out.
"""

import math
from collections.abc import Iterator

import pytest
import torch

from convolutions import DEVICE, Case, check_exact, check_infinities, check_random, check_wide_offsets, exact_operands
from fastconv.autotune import gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families import conv_rows, conv_rows_wgrad
from fastconv.kernels.families.row_form import RowForm, row_form
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


def _few_channels() -> Iterator[Case]:
    """Every number of channels with every stride, filter and padding: each alignment of a run."""
    for c in (1, 2, 3, 4):
        for stride in (1, 2, 3):
            for s, padding in ((2, 0), (3, 1), (5, 1), (7, 3)):
                index = c + stride + s
                yield Case(
                    f"{c} channels stride {stride} filter {s} padding {padding}",
                    *(1 + index % 2, c, 5 + 3 * (index % 4), (4 + index % 3, 8 + 2 * (index % 3)), (1 + s % 3, s)),
                    *((1 + index % 2, stride), (index % 2, padding), (1 + index % 2, 1)),
                )


CASES = (
    *_few_channels(),
    Case("ResNet", 2, 3, 16, (14, 16), (7, 7), (2, 2), (3, 3)),
    Case("odd outputs", 2, 3, 8, (5, 14), (3, 3), (2, 2), (0, 0)),
    Case("one column of outputs", 2, 3, 8, (5, 4), (3, 4)),
    Case("1d", 2, 1, 3, (40,), (9,), (2,), (4,)),
    Case("1d, 3 channels", 3, 3, 20, (22,), (4,), (2,), (1,)),
    Case("3d", 1, 1, 4, (6, 5, 8), (3, 2, 3), (2, 1, 2), (1, 0, 2), (1, 2, 1)),
    Case("3d, 3 channels", 1, 3, 8, (3, 5, 6), (3, 3, 3), (1, 2, 2), (1, 1, 1)),
    Case("uneven padding", 1, 3, 16, (5, 6), (4, 2), (2, 2), (1, 0), after=(2, 1)),
    Case("filter larger than the image", 2, 3, 8, (2, 4), (5, 5), (1, 1), (2, 2)),
    Case("padding larger than the filter", 1, 2, 8, (3, 4), (2, 2), (1, 1), (3, 4)),
    Case("stride larger than the filter", 2, 3, 8, (9, 8), (2, 1), (4, 3)),
    Case("11x11 stride 4", 1, 3, 8, (12, 16), (11, 11), (4, 4), (2, 2)),
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


@pytest.mark.parametrize("direction", ["fprop", "wgrad"])
def test_each_direction_has_fifty_problems(direction: str) -> None:
    plans = [dispatch.plan(direction, case.problem(dtype), gpus.H200) for case in CASES for dtype in DTYPES]
    assert sum(plan.family == "rows" for plan in plans) >= 50


@pytest.mark.parametrize(
    ("case", "form"),
    [
        (Case("", 8, 3, 64, (224, 224), (7, 7), (2, 2), (3, 3)), RowForm(columns=2, vec=4, shift=3, used=30, run=32)),
        (Case("", 8, 3, 32, (224, 224), (3, 3), (2, 2), (1, 1)), RowForm(columns=2, vec=4, shift=1, used=16, run=16)),
        (Case("", 8, 3, 64, (224, 224), (3, 3), (1, 1), (1, 1)), RowForm(columns=2, vec=2, shift=1, used=13, run=16)),
        (Case("", 8, 4, 64, (224, 224), (7, 7), (2, 2), (3, 3)), RowForm(columns=1, vec=8, shift=4, used=32, run=32)),
        (Case("", 8, 1, 6, (28, 28), (5, 5), (1, 1), (2, 2)), RowForm(columns=2, vec=2, shift=0, used=6, run=8)),
    ],
    ids=["ResNet", "EfficientNet", "VGG", "4 channels", "LeNet"],
)
def test_the_run_of_a_row(case: Case, form: RowForm) -> None:
    assert row_form(case.problem(torch.bfloat16)) == form


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("", 8, 5, 8, (9, 8), (3, 3)), "5 input channels"),
        (Case("", 8, 3, 8, (9, 8), (1, 1)), "one tap"),
        (Case("", 8, 96, 96, (9, 8), (3, 3), groups=2), "2 groups"),
        (Case("", 8, 3, 8, (9, 8), (3, 3), dilation=(1, 2)), "a dilated row is no run"),
        (Case("", 8, 3, 8, (9, 9), (3, 3)), "rows of 27 elements of 2 bytes: no copy of 4 bytes begins each run"),
        (Case("", 8, 4, 8, (9, 64), (3, 17)), "68 elements a row of the filter, more than 64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_serve(case: Case, reason: str) -> None:
    for direction in ("fprop", "wgrad"):
        assert ("rows", reason) in dispatch.plan(direction, case.problem(torch.bfloat16), gpus.H200).reasons


@pytest.mark.parametrize("splits", [1, 3, 40])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("channels", [3, 4])
def test_tile_edges(splits: int, channels_last: bool, channels: int, monkeypatch) -> None:
    """Tails of runs, channels, rows of a step, and of splits that have no step."""
    take_tile(monkeypatch, {"BLOCK_M": 16, "BLOCK_K": 32, "BLOCK_C": 64, "SPLITS": splits})
    problem = Case("", 2, channels, 40, (9, 14), (5, 3), (2, 2), (2, 1)).problem(torch.bfloat16)
    records = check_exact(problem, channels_last)
    names = [r.name for r in records]
    assert {"conv_rows_weight_kernel", "conv_rows_kernel", "conv_rows_wgrad_kernel"} <= set(names)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan], ids=str)
def test_infinity_beside_the_window_stays_out(channels: int, value: float) -> None:
    problem = Case("", 1, channels, 8, (6, 20), (3, 3), (1, 2), (1, 1)).problem()
    operands = exact_operands(problem)
    for column in (0, 7, 14, 19):
        operands[0][0, column % channels, 2, column] = value
    check_infinities(problem, operands)


def test_epilogue_and_statistics() -> None:
    """An odd number of outputs a row: the last run's second is no pixel, and is not counted."""
    layer = fused_layer((3, 3, 6, 16), 40, (3, 3), stride=(2, 2), padding=(1, 0))
    assert layer.exact.shape[-1] == 7
    tolerance = (1e-4, 1e-4) if interpreting() else (1e-2, 3e-2)
    with record() as records:
        layer.check_statistics(tolerance)
    assert records[1].launch.constants["RUN_OUTPUTS"] == 2
    rtol, atol = tolerance
    torch.testing.assert_close(layer.computed("relu").double(), layer.expected("relu"), rtol=rtol, atol=atol)


def test_rows_apart_are_read_where_they_lie() -> None:
    """A crop of rows, images or columns has runs; pixels of a wider tensor have none and are gathered."""
    generator = torch.Generator().manual_seed(0)
    whole = integers((3, 8, 20, 4), 9, generator).float().to(DEVICE)
    weight = integers((16, 4, 3, 3), 9, generator).float().to(DEVICE)
    for x, channels, family in (
        (whole[1:, 1:7:2], 4, "conv_rows_kernel"),
        (whole[:, :, 3:17], 4, "conv_rows_kernel"),
        (whole[..., :3], 3, "conv_gather_kernel"),
    ):
        x = x.permute(0, 3, 1, 2)
        with record() as records:
            y = conv.conv_fprop(x, weight[:, :channels], None, (1, 1), (1, 1, 1, 1), (1, 1), 1)
        reference = torch.conv2d(x.double().cpu(), weight[:, :channels].double().cpu(), padding=1)
        assert_equal(y, reference, "fprop of a slice")
        assert records[-1].name == family


@pytest.mark.parametrize("direction", ["fprop", "wgrad"])
def test_wide_offsets_give_the_same(direction: str, monkeypatch) -> None:
    problem = Case("", 2, 3, 16, (5, 8), (3, 3), (2, 1), (1, 1)).problem()
    check_wide_offsets(monkeypatch, problem, [conv_rows, conv_rows_wgrad], (direction,))
