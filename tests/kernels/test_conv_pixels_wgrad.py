"""wgrad of the pixel GEMM, on integers: bit for bit PyTorch's in fp64, and the gather's."""

import math
from collections.abc import Iterator, Sequence
from itertools import cycle

import pytest
import torch

from convolutions import DEVICE, Case, check_exact, check_random, computed, exact_operands, expected, random_operands
from fastconv.autotune import Config, gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families.conv_pixels_wgrad import outputs_of_taps, pairs_of_outputs, row_outputs
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import conv
from fastconv.kernels.problem.conv import ConvProblem
from reference import assert_equal, integers
from tests.marks import runs_kernels
from tests.tiles import take_tile

pytestmark = runs_kernels
DTYPES = (torch.bfloat16, torch.float16)
WGRAD = ("wgrad",)


def _geometry() -> Iterator[Case]:
    """Every stride with every filter, dilation and padding; batches and channels of whole tiles and of tails."""
    batches, channels = cycle((16, 17, 33)), cycle(((16, 24), (8, 40), (24, 16), (40, 8), (72, 8)))
    for stride in (1, 2, 3):
        for s, padding in ((1, 0), (2, 1), (3, 0), (3, 1), (4, 2), (5, 2)):
            for dilation in (1, 2) if s > 1 else (1,):
                if dilation * (s - 1) + 1 <= 4 + 2 * padding:
                    yield Case(
                        f"stride {stride} filter {s} padding {padding} dilation {dilation}",
                        *(next(batches), *next(channels), (3, 4), (2 if s > 1 else 1, s)),
                        *((stride, stride), (padding % 2, padding), (dilation, dilation)),
                    )


CASES = (
    *_geometry(),
    Case("one pixel", 16, 8, 16, (1, 1), (1, 1)),
    Case("one row", 17, 16, 8, (1, 7), (1, 3), (1, 1), (0, 1)),
    Case("one row, stride 2", 16, 16, 8, (1, 8), (1, 4), (1, 2), (0, 1)),
    Case("one column", 16, 8, 8, (6, 1), (3, 1), (2, 1), (1, 0)),
    Case("a 7x7 map in small", 40, 16, 16, (3, 3), (3, 3), (1, 1), (1, 1)),
    Case("more padding than filter", 16, 8, 8, (2, 3), (2, 2), (1, 1), (3, 2)),
    Case("taps that meet no pixel", 16, 8, 16, (2, 1), (5, 5), (1, 1), (2, 2)),
    Case("taps that meet none, dilated", 17, 16, 8, (2, 2), (3, 3), (1, 1), (3, 3), (3, 3)),
    Case("stride larger than the filter", 16, 8, 8, (4, 4), (1, 2), (3, 3)),
    Case("uneven strides and dilations", 18, 8, 16, (4, 4), (2, 3), (1, 2), (1, 2), (2, 1)),
    Case("uneven padding", 16, 24, 8, (3, 4), (2, 3), (1, 1), (0, 1), after=(1, 2)),
    Case("columns left over", 16, 8, 8, (4, 4), (2, 2), (3, 3)),
    Case("two groups", 16, 64, 80, (3, 3), (3, 3), (1, 1), (1, 1), groups=2),
    Case("two groups, stride 2", 17, 80, 64, (4, 3), (3, 3), (2, 2), (1, 1), groups=2),
    Case("three groups of one tap", 16, 96, 120, (2, 2), (1, 1), groups=3),
    Case("1d", 16, 8, 16, (9,), (3,), (1,), (1,)),
    Case("1d, stride 3", 33, 16, 8, (11,), (5,), (3,), (2,)),
    Case("1d, dilated", 16, 8, 8, (9,), (3,), (1,), (2,), (2,)),
    Case("1d, groups", 16, 64, 64, (6,), (3,), (1,), (1,), groups=2),
    Case("3d", 16, 8, 16, (2, 3, 4), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    Case("3d, one line", 17, 16, 8, (1, 1, 2), (1, 1, 2)),
    Case("3d, stride 2", 16, 8, 8, (3, 4, 3), (2, 3, 2), (2, 1, 2), (1, 0, 1)),
    Case("3d, dilated", 16, 8, 24, (4, 2, 3), (2, 1, 2), (1, 1, 1), (1, 0, 1), (2, 1, 2)),
    Case("3d, groups", 16, 64, 64, (2, 2, 2), (1, 2, 3), (1, 1, 1), (0, 1, 1), groups=2),
    Case("3d, taps that meet no pixel", 16, 8, 8, (1, 2, 2), (3, 1, 3), (1, 1, 1), (1, 0, 1)),
)
TILES: tuple[Config, ...] = tuple(
    dict(zip(("BLOCK_K", "BLOCK_C", "BLOCK_N", "TAPS", "COLUMNS", "SPLITS"), values, strict=True))
    for values in (
        (64, 32, 32, 3, 2, 1),
        (64, 64, 32, 1, 1, 2),
        (32, 64, 32, 3, 1, 3),
        (64, 64, 16, 3, 2, 1),
        (64, 32, 64, 3, 1, 1),
        (128, 128, 64, 1, 1, 1),
        (64, 64, 32, 3, 2, 9),
    )
)


def name_tile(monkeypatch, tile: Config) -> None:
    """Let wgrad take this tile, with one output a step if a problem's rows do not come in pairs."""

    def tile_of(problem: ConvProblem) -> Config:
        columns = tile["COLUMNS"] if pairs_of_outputs(problem, tile["TAPS"]) else 1
        return {"PIXELS": 1, **tile, "COLUMNS": columns}

    take_tile(monkeypatch, tile_of, ("conv_pixels_wgrad",))


def drawn(problem: ConvProblem) -> list[torch.Tensor]:
    return exact_operands(problem, WGRAD)


def wgrad(problem: ConvProblem, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weight's gradient by the pixel GEMM, as an H200 plans it."""
    with dispatch.use_target(gpus.H200), dispatch.only_family("pixels"):
        return computed(problem, *operands, results=WGRAD)[0]


def check_wgrad(problem: ConvProblem, channels_last: bool = True) -> None:
    with dispatch.use_target(gpus.H200), dispatch.only_family("pixels"):
        records = check_exact(problem, channels_last, WGRAD)
    assert records[0].name == "conv_pixels_wgrad_kernel"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_on_integers(case: Case, record_property, monkeypatch) -> None:
    index = CASES.index(case)
    problem = case.problem(DTYPES[index % 2])
    name_tile(monkeypatch, TILES[index % len(TILES)])
    # Every third case in the plain format, whose edges are copies.
    check_wgrad(problem, index % 3 > 0)
    with dispatch.only_family("gather"):
        check_exact(problem, index % 3 > 0, WGRAD)
    record_property("problem", ("pixels", "wgrad", case.name))


def test_there_are_fifty_problems() -> None:
    plans = [dispatch.plan("wgrad", case.problem(dtype), gpus.H200) for case in CASES for dtype in DTYPES]
    assert sum("pixels" not in dict(plan.reasons) for plan in plans) == len(plans)
    assert len(CASES) >= 50


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "x".join(map(str, tile.values())))
@pytest.mark.parametrize("channels_last", [True, False])
def test_every_tile(tile: Config, channels_last: bool, monkeypatch) -> None:
    """Pairs of outputs, which only even rows have; tails of every side; more splits than steps."""
    name_tile(monkeypatch, tile)
    problem = Case("", 18, 40, 48, (2, 4), (3, 3), (1, 1), (1, 1)).problem(torch.bfloat16)
    assert pairs_of_outputs(problem, 3)
    check_wgrad(problem, channels_last)


# (case of few images, images of a box, neighbours of a box)
FEW = (
    (Case("3 images, rows of 8", 3, 16, 24, (3, 8), (3, 3), (1, 1), (1, 1)), 4, 8),
    (Case("1 image, a row of 32", 1, 8, 40, (2, 32), (2, 3), (1, 1), (0, 1)), 1, 32),
    (Case("one of 2 images at a time", 2, 24, 8, (2, 64), (1, 2), (1, 1), (0, 1), after=(0, 0)), 1, 64),
    (Case("stride 2", 5, 40, 8, (4, 16), (3, 3), (2, 2), (1, 1)), 8, 8),
    (Case("stride 2, 4 taps", 2, 8, 8, (2, 32), (2, 4), (1, 2), (1, 1)), 2, 16),
    (Case("no padding", 4, 8, 16, (3, 10), (3, 3)), 4, 8),
    (Case("dilated", 7, 8, 8, (2, 4), (1, 3), (1, 1), (0, 2), (1, 2)), 8, 4),
    (Case("groups", 4, 64, 64, (2, 8), (3, 3), (1, 1), (1, 1), groups=2), 4, 8),
    (Case("1d", 2, 16, 8, (32,), (5,), (1,), (2,)), 2, 16),
    (Case("3d", 2, 8, 16, (2, 3, 16), (3, 3, 3), (1, 1, 1), (1, 1, 1)), 2, 16),
)


@pytest.mark.parametrize(("case", "images", "pixels"), FEW, ids=[case.name for case, *_ in FEW])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_few_images(case: Case, images: int, pixels: int, record_property, monkeypatch) -> None:
    """Exact, and an infinite pixel of x reaches only taps that meet it."""
    problem = case.problem(torch.bfloat16)
    sides = {"BLOCK_K": 64, "BLOCK_C": 32, "BLOCK_N": images, "PIXELS": pixels, "COLUMNS": 1}
    for taps, splits in ((1, 1), (3, 2)):
        name_tile(monkeypatch, {**sides, "TAPS": taps, "SPLITS": splits})
        check_wgrad(problem)
    with dispatch.only_family("gather"):
        check_exact(problem, results=WGRAD)
    operands = drawn(problem)
    operands[0][0, 5, ..., 0] = operands[0][-1, 6, ..., -1] = math.inf
    assert torch.equal(wgrad(problem, operands).cpu().isfinite(), expected(problem, *operands)[2].isfinite())
    record_property("problem", ("pixels", "wgrad", case.name))


def test_few_images_are_taken_if_rows_are_long() -> None:
    for n, size, family in ((2, (256, 256), "pixels"), (1, (64, 64, 64), "pixels"), (1, (14, 14), "gather")):
        ones = (1,) * len(size)
        problem = Case("", n, 64, 64, size, tuple(3 * one for one in ones), ones, ones).problem(torch.bfloat16)
        for gpu in (gpus.H200, gpus.B200):
            plan = dispatch.plan("wgrad", problem, gpu)
            assert plan.family == family
            if family == "pixels":
                config = plan.choice.config
                assert config["BLOCK_N"] <= n and config["BLOCK_N"] * config["PIXELS"] in (32, 64)


@pytest.mark.parametrize("case", CASES[::9], ids=lambda case: case.name)
def test_random_values_within_rounding_at_the_chosen_tile(case: Case) -> None:
    with dispatch.use_target(gpus.H200), dispatch.only_family("pixels"):
        check_random(case.problem(DTYPES[CASES.index(case) % 2]), WGRAD)


def test_the_same_from_run_to_run(monkeypatch) -> None:
    name_tile(monkeypatch, TILES[2])
    problem = Case("", 33, 16, 16, (3, 4), (3, 3), (1, 1), (1, 1)).problem(torch.bfloat16)
    operands = random_operands(problem)
    assert torch.equal(wgrad(problem, operands), wgrad(problem, operands))


def test_outputs_of_taps_are_those_inside_the_image() -> None:
    for case in CASES:
        problem = case.problem()
        for axis, (size, outputs) in enumerate(zip(problem.input_size, problem.output_size, strict=True)):
            stride, padding, dilation = (getattr(problem, name)[axis] for name in ("stride", "padding", "dilation"))
            met = [
                [0 <= p * stride - padding + tap * dilation < size for p in range(outputs)]
                for tap in range(problem.filter_size[axis])
            ]
            found = [outputs_of_taps(problem, axis, tap, tap) for tap in range(len(met))]
            assert found == list(map(sum, met)), (case.name, axis)
        assert row_outputs(problem, 1) == found


@pytest.mark.parametrize(
    ("case", "taps", "pairs"),
    [
        (Case("", 16, 8, 8, (4, 56), (3, 3), (1, 1), (1, 1)), 3, True),
        (Case("", 16, 8, 8, (4, 7), (3, 3), (1, 1), (1, 1)), 3, False),
        (Case("", 16, 8, 8, (4, 7), (3, 2), (1, 1)), 3, True),
        (Case("", 16, 8, 8, (4, 8), (3, 3), (2, 2), (1, 1)), 3, False),
        (Case("", 16, 8, 8, (4, 8), (3, 3), (2, 2), (1, 2), (1, 2)), 3, True),
        (Case("", 16, 8, 8, (4, 8), (3, 3), (1, 1), (1, 1)), 1, False),
    ],
)
def test_outputs_come_in_pairs(case: Case, taps: int, pairs: bool) -> None:
    assert pairs_of_outputs(case.problem(), taps) == pairs


@pytest.mark.parametrize("tile", TILES[:2], ids=["pairs", "single"])
@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_infinity_reaches_only_taps_that_meet_it(tile: Config, value: float, monkeypatch) -> None:
    """In padded rows, in rows whose last columns no output meets, in a group beside the tile's own."""
    name_tile(monkeypatch, tile)
    for case in (
        Case("", 17, 8, 8, (2, 4), (3, 3), (1, 1), (1, 1)),
        Case("", 16, 8, 8, (2, 7), (1, 3), (1, 1), (0, 0)),
        Case("", 16, 80, 80, (1, 4), (1, 3), (1, 1), (0, 1), groups=2),
    ):
        problem = case.problem(torch.bfloat16)
        operands = drawn(problem)
        for column in (0, problem.input_size[1] - 1):
            operands[0][3, 5, 0, column] = value
        reference = expected(problem, *operands)[2]
        dw = wgrad(problem, operands).double().cpu()
        assert reference.isfinite().any() and not reference.isfinite().all()
        assert torch.equal(dw.isfinite(), reference.isfinite())
        assert torch.equal(dw[dw.isfinite()], reference[dw.isfinite()].bfloat16().double())


def test_operands_are_read_where_they_lie() -> None:
    """So are crops and channels that begin at 16 bytes; operands that begin elsewhere, or step by 0, are gathered."""
    generator = torch.Generator().manual_seed(0)
    whole = integers((18, 4, 6, 32), 3, generator).bfloat16().to(DEVICE)
    dy = integers((18, 4, 4, 8), 3, generator).bfloat16().to(DEVICE).permute(0, 3, 1, 2)
    for x, family in (
        (whole[:, :, 1:5], "pixels"),
        (whole[:, :, 2:, 8:24], "pixels"),
        (whole[:, :, 2:, 4:20], "gather"),
        (whole[:1, :, 2:].expand(18, -1, -1, -1), "gather"),
    ):
        x = x.permute(0, 3, 1, 2)
        with dispatch.use_target(gpus.H200), record() as records:
            dw = conv.conv_wgrad(x, dy, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1)
        problem = Case("", 18, x.shape[1], 8, (4, 4), (3, 3), (1, 1), (1, 1)).problem(torch.bfloat16)
        zeros = torch.zeros(problem.weight_shape, dtype=torch.float64)
        assert_equal(dw, expected(problem, x.double().cpu(), dy.double().cpu(), zeros)[2], "wgrad of a slice")
        assert records[0].name == {"pixels": "conv_pixels_wgrad_kernel", "gather": "conv_wgrad_kernel"}[family]


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (Case("", 16, 8, 8, (4, 4), (3, 3)), torch.float32, "tensor cores do not transpose float32 in shared memory"),
        (
            Case("", 16, 72, 64, (4, 4), (3, 3), groups=2),
            torch.bfloat16,
            "groups of 36 to 32 channels do not begin at multiples of 16 bytes",
        ),
        (
            Case("", 16, 128, 64, (4, 4), (3, 3), groups=4),
            torch.bfloat16,
            "groups of 32 to 16 channels leave most of a tile empty",
        ),
        (Case("", 15, 8, 8, (5, 5), (3, 3)), torch.bfloat16, "15 images leave most of a step empty"),
    ],
    ids=["fp32", "channels", "groups", "batch"],
)
def test_what_it_does_not_serve(case: Case, dtype: torch.dtype, reason: str) -> None:
    with dispatch.only_family("pixels"):
        assert dispatch.plan("wgrad", case.problem(dtype), gpus.H200).reasons == (("pixels", reason),)


def test_dispatch_takes_it_on_gpus_with_bulk_copies() -> None:
    problem = Case("", 64, 64, 64, (56, 56), (3, 3), (1, 1), (1, 1)).problem(torch.bfloat16)
    families = [dispatch.plan("wgrad", problem, gpu).family for gpu in (gpus.A100, gpus.H200, gpus.B200)]
    assert families == ["gather", "pixels", "pixels"]
