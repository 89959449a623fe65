"""The pixel GEMM's fprop and dgrad, interpreted with small tiles: bit for bit PyTorch's on integers, and the gather's.

Maps are small: every program takes the interpreter's time. Plans are those of a GPU with bulk copies.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from convolutions import DEVICE, Case, check_exact, check_random, expected
from fastconv.autotune import Config, gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families import conv_pixels
from fastconv.kernels.families.conv_pixels import taps_walked
from fastconv.kernels.jit.boxes import has_parities
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import conv
from fastconv.kernels.problem.conv import ConvProblem
from reference import assert_equal, integers
from tests.fused_layers import fused_layer
from tests.marks import runs_kernels
from tests.tiles import take_tile

pytestmark = runs_kernels
DTYPES = (torch.bfloat16, torch.float16)
BOTH = ("fprop", "dgrad")
# (BLOCK_N, BLOCK_K, BLOCK_C, PIXELS, whether in PAIRS)
ONE, FOUR, PAIRS = (16, 32, 16, 1, 0), (16, 16, 32, 4, 0), (32, 16, 16, 1, 1)


def _strides_and_dilations() -> Iterator[Case]:
    """Every stride with every dilation and filter: the phases of dgrad, with their first and last taps."""
    for stride in (1, 2, 3):
        for dilation in (1, 2, 3):
            for taps in (1, 2, 3):
                if taps > 1 or dilation == 1:
                    size = min(4, 1 + dilation * (taps - 1))
                    name = f"stride {stride} dilation {dilation} filter {taps}"
                    padding = (dilation * (taps - 1) + 1) // 2
                    yield Case(name, 16, 8, 8, (1, size), (1, taps), (1, stride), (0, padding), (1, dilation))


CASES = (
    Case("pointwise stride 2", 16, 16, 16, (3, 4), (1, 1), (2, 2)),
    Case("one pixel", 17, 24, 40, (1, 1), (1, 1), (2, 2)),
    Case("one pixel, 3x3 filter", 16, 16, 16, (1, 1), (3, 3), (1, 1), (1, 1)),
    Case("3x3 padding 1", 16, 16, 16, (4, 4), (3, 3), (1, 1), (1, 1)),
    Case("3x3 padding 1, odd rows", 18, 16, 8, (2, 3), (3, 3), (1, 1), (1, 1)),
    Case("3x3 padding 1, tails of images and channels", 20, 40, 24, (2, 3), (3, 3), (1, 1), (1, 1)),
    Case("3x3 stride 2", 16, 16, 8, (4, 4), (3, 3), (2, 2), (1, 1)),
    Case("3x3 stride 2, odd size", 17, 8, 16, (3, 3), (3, 3), (2, 2), (1, 1)),
    Case("3x3 stride 2, no padding", 16, 8, 8, (4, 4), (3, 3), (2, 2)),
    Case("3x3 stride 3", 16, 8, 8, (4, 4), (3, 3), (3, 3), (1, 1)),
    Case("3x3 stride 2 of rows alone", 16, 8, 8, (4, 3), (3, 3), (2, 1), (1, 1)),
    Case("3x3 dilation 2", 16, 8, 8, (3, 3), (3, 3), (1, 1), (2, 2), (2, 2)),
    Case("3x3 dilation 2 of rows alone", 16, 8, 8, (4, 3), (3, 3), (1, 1), (2, 1), (2, 1)),
    Case("5x5", 16, 8, 8, (3, 3), (5, 5), (1, 1), (2, 2)),
    Case("1x7 and 3 rows", 16, 8, 8, (3, 3), (1, 7), (1, 1), (0, 3)),
    Case("7x1", 16, 8, 8, (4, 2), (7, 1), (1, 1), (3, 0)),
    Case("asymmetric filter, stride, padding, dilation", 17, 8, 24, (4, 4), (3, 2), (1, 2), (2, 0), (2, 3)),
    Case("uneven padding", 16, 8, 8, (3, 3), (2, 2), (1, 1), (0, 1), after=(1, 0)),
    Case("uneven padding, stride 2", 16, 8, 8, (4, 3), (4, 2), (2, 2), (1, 0), after=(2, 1)),
    Case("padding larger than the filter", 16, 8, 8, (2, 2), (2, 2), (1, 1), (3, 2)),
    Case("stride larger than the filter", 16, 8, 8, (4, 4), (2, 1), (4, 3)),
    Case("stride that leaves pixels over", 16, 8, 8, (4, 4), (2, 2), (3, 3)),
    Case("dilation shares a factor with the stride", 16, 8, 8, (4, 4), (2, 2), (4, 2), (2, 1), (2, 2)),
    Case("2 groups", 16, 128, 128, (2, 2), (3, 3), (1, 1), (1, 1), groups=2),
    Case("3 groups, stride 2, 64 to 128 channels", 16, 192, 384, (2, 2), (2, 2), (2, 2), groups=3),
    Case("33 images", 33, 8, 8, (2, 2), (2, 2), (1, 1), (1, 1)),
    Case("1d", 16, 16, 24, (4,), (3,), (1,), (1,)),
    Case("1d stride 3 dilation 2", 19, 8, 8, (9,), (3,), (3,), (2,), (2,)),
    Case("1d, one pixel", 16, 8, 8, (1,), (3,), (1,), (1,)),
    Case("3d", 16, 8, 8, (2, 2, 2), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    Case("3d, 1x1x2", 16, 16, 16, (1, 1, 2), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    Case("3d stride 2", 16, 8, 8, (3, 2, 3), (3, 2, 1), (2, 2, 2), (1, 1, 0)),
    Case("3d, everything asymmetric", 17, 8, 16, (3, 2, 2), (3, 1, 2), (2, 1, 3), (1, 0, 2), (1, 2, 1)),
    *_strides_and_dilations(),
)


def name_tile(monkeypatch, sides: tuple[int, ...]) -> None:
    names = ("BLOCK_N", "BLOCK_K", "BLOCK_C", "PIXELS", "PAIRS")
    config: Config = dict(zip(names, sides, strict=True))

    def tile(features: tuple[str, ConvProblem, str]) -> Config:
        return {**config, "PAIRS": features[1].filter_size[-1] if config["PAIRS"] else 0}

    take_tile(monkeypatch, tile, ("conv_pixels",))
    monkeypatch.setattr(conv_pixels, "why_slower", lambda *a: None)


def suits(sides: tuple[int, ...], problem: ConvProblem) -> bool:
    """Whether tiles of neighbouring pixels serve the problem."""
    *_, pixels, pairs = sides
    if pairs:
        return problem.stride[-1] == problem.dilation[-1] == 1
    return pixels == 1 or problem.stride[-1] == 1 or has_parities(problem)


@contextlib.contextmanager
def by_pixels() -> Iterator[None]:
    """Inside, only the pixel GEMM serves, as an H200 plans it."""
    with dispatch.use_target(gpus.H200), dispatch.only_family("pixels"):
        yield


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_on_integers(case: Case, monkeypatch, record_property) -> None:
    index = CASES.index(case)
    problem = case.problem(DTYPES[index % 2])
    sides = next(it for it in (PAIRS, FOUR, ONE)[index % 3 :] if suits(it, problem))
    name_tile(monkeypatch, sides)
    # Every fourth case in the plain format, whose edges are copies.
    with dispatch.only_family("gather"):
        check_exact(problem, index % 4 > 0, BOTH)
    with by_pixels():
        records = check_exact(problem, index % 4 > 0, BOTH)
    assert [it.name for it in records] == ["conv_pixels_kernel"] * 2
    for direction in BOTH:
        record_property("problem", ("pixels", direction, case.name))


def test_each_direction_has_fifty_problems() -> None:
    assert len({case.name for case in CASES}) >= 50


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_cost_model_counts_the_taps_that_are_walked(case: Case) -> None:
    """One at a time; of neighbours in a box those of any, of a pair whole rows."""
    problem = case.problem()
    ones = (torch.ones(1, 1, *problem.input_size, dtype=torch.double), torch.ones(1, 1, *problem.output_size).double())
    one = replace(problem, batch=1, in_channels=1, out_channels=1, groups=1)
    weight = torch.ones(one.weight_shape, dtype=torch.double)
    for direction, met in zip(BOTH, expected(one, *ones, weight), strict=False):
        assert taps_walked(direction, problem, 1, 0) == pytest.approx(met.mean().item())
        assert not suits(FOUR, problem) or taps_walked(direction, problem, 4, 0) >= met.mean().item() * (1 - 1e-9)
        rows = problem.taps // problem.filter_size[-1]
        assert 0 < taps_walked(direction, problem, 1, 1) <= rows or not met.any()


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("sides", [ONE, FOUR, PAIRS, (32, 16, 16, 2, 0)], ids=str)
def test_every_tile_at_its_edges(direction: str, sides: tuple[int, ...], monkeypatch) -> None:
    """Images, channels of both sides and an odd number of pixels past their tiles, in each rank."""
    name_tile(monkeypatch, sides)
    for case in (
        Case("", 37, 24, 40, (2, 3), (3, 3), (1, 1), (1, 1)),
        Case("", 16, 40, 8, (5,), (3,), (1,), (1,)),
        Case("", 16, 8, 8, (2, 1, 3), (1, 1, 3), (1, 1, 1), (0, 0, 1)),
        Case("", 17, 24, 8, (1, 5), (2, 5), (1, 1), (1, 2)),
        Case("", 17, 24, 40, (2, 6), (3, 3), (1, 2), (1, 1)),
        Case("", 16, 8, 8, (14,), (4,), (2,), (3,)),
    ):
        problem = case.problem(torch.bfloat16)
        if not suits(sides, problem):
            continue
        with by_pixels():
            check_exact(problem, results=(direction,))


@pytest.mark.skipif(not interpreter.interpreting(), reason="the interpreter runs one program after the other")
def test_programs_that_share_what_they_read_follow_each_other(monkeypatch) -> None:
    """Channel tiles of one pixel, then the pixels of a row, rows, and images last."""
    from triton.runtime.interpreter import InterpreterBuilder

    name_tile(monkeypatch, ONE)
    store, written = InterpreterBuilder.create_descriptor_store, []

    def noted(self, desc, value, indices):
        written.append([index.data.item() for index in indices])
        return store(self, desc, value, indices)

    monkeypatch.setattr(InterpreterBuilder, "create_descriptor_store", noted)
    problem = Case("", 20, 8, 64, (2, 3), (1, 1)).problem(torch.bfloat16)
    with by_pixels():
        check_exact(problem, results=("fprop",))
    assert written == [[h, w, n, k] for n in (0, 16) for h in range(2) for w in range(3) for k in (0, 32)]


def test_fp32_in_fprop(monkeypatch) -> None:
    name_tile(monkeypatch, ONE)
    problem = Case("", 17, 12, 20, (2, 2), (3, 3), (1, 1), (1, 1)).problem(torch.float32)
    with by_pixels():
        check_exact(problem, results=("fprop",))


@pytest.mark.parametrize("direction", BOTH)
def test_products_that_add_to_each_others_sums(direction: str, monkeypatch) -> None:
    """A pair's tile that has no registers for a sum of each product."""
    sides = (64, 128, 16, 1, 1)
    name_tile(monkeypatch, sides)
    problem = Case("", 17, 24, 24, (1, 3), (1, 5), (1, 1), (0, 2)).problem(torch.bfloat16)
    with by_pixels():
        records = check_exact(problem, results=(direction,))
    assert records[0].launch.constants["SUMS"] == 1


@pytest.mark.parametrize("direction", BOTH)
def test_random_values_within_rounding(direction: str, monkeypatch) -> None:
    name_tile(monkeypatch, ONE)
    problem = Case("", 17, 24, 40, (2, 2), (3, 3), (1, 1), (1, 1)).problem(torch.bfloat16)
    with by_pixels():
        check_random(problem, (direction,))


@pytest.mark.parametrize("transposed", [False, True], ids=BOTH)
@pytest.mark.parametrize("sides", [ONE, FOUR, PAIRS], ids=str)
@pytest.mark.parametrize(("act", "after"), [("relu", False), ("silu", True), ("prelu", False), ("hardtanh", False)])
def test_epilogue(act: str, after: bool, sides: tuple[int, ...], transposed: bool, monkeypatch) -> None:
    """Bias, batch norm, activation and residual; images, channels and pixels all leave a tail."""
    name_tile(monkeypatch, sides)
    layer = fused_layer((17, 24, 1, 3), 40, (3, 3), torch.float16, transposed=transposed, padding=(1, 1))
    with by_pixels():
        z = layer.computed(act, after)
    torch.testing.assert_close(z.double(), layer.expected(act, after), rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("sides", "transposed", "step"),
    [*((sides, transposed, 1) for sides in (ONE, FOUR, PAIRS) for transposed in (False, True)), (FOUR, True, 2)],
    ids=str,
)
def test_statistics(sides: tuple[int, ...], transposed: bool, step: int, monkeypatch) -> None:
    """Only images and pixels that are there count, a transposed convolution's pixels without any tap too."""
    name_tile(monkeypatch, sides)
    # Stride 2 of rows: every other row of the transposed one meets no tap.
    how = {"transposed": transposed, "stride": (2, step), "padding": (0, 1), "extra": (1, step - 1)}
    layer = fused_layer((18, 16, 2, 3), 24, (1, 3), torch.bfloat16, **how)
    with by_pixels():
        layer.check_statistics((1e-2, 1e-2), (1e-5, 1e-5))


BIG = Case("", 64, 128, 128, (28, 28), (3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("case", "direction", "dtype", "reason"),
    [
        (replace(BIG, n=15), "fprop", torch.bfloat16, "15 images leave most of a box empty"),
        (replace(BIG, groups=4), "dgrad", torch.float16, "groups of 32 to 32 channels fill no tile"),
        (BIG, "dgrad", torch.float32, "tensor cores do not transpose float32 in shared memory"),
    ],
    ids=["images", "groups", "fp32"],
)
def test_what_it_does_not_serve(case: Case, direction: str, dtype: torch.dtype, reason: str) -> None:
    problem = case.problem(dtype)
    assert ("pixels", reason) in dispatch.plan(direction, problem, gpus.H200).reasons
    assert dispatch.plan("fprop", BIG.problem(dtype), gpus.H200).family == "pixels"
    assert dispatch.plan("fprop", BIG.problem(dtype), gpus.A100).family == "gather"


@pytest.mark.parametrize("gpu", [gpus.H200, gpus.B200], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("images", [16, 24, 32, 48, 64, 100, 128, 256])
def test_boxes_are_filled(images: int, gpu: gpus.Gpu) -> None:
    """Few images lie in boxes of several pixels, and never in one that could be half as large."""
    for stride, size in ((1, 28), (2, 56), (2, 55)):
        problem = replace(BIG, n=images, size=(28 * stride, size), stride=(stride, stride)).problem(torch.bfloat16)
        for direction in BOTH:
            plan = dispatch.plan(direction, problem, gpu)
            if plan.family != "pixels":
                assert any("times as long as a gather" in why for _, why in plan.reasons)
                assert size == 55 or images in (24, 48, 100)
                continue
            config = plan.choice.config
            assert config["BLOCK_N"] < 2 * images
            assert config["PIXELS"] == 1 or size % 2 == 0
            if size % 2 == 0 and images < 64:
                assert config["PIXELS"] * config["BLOCK_N"] == 128 or config["PAIRS"]


def test_operands_apart_are_read_where_they_lie() -> None:
    """A crop, and channels that begin at a multiple of 16 bytes; channels that begin elsewhere are gathered."""
    generator = torch.Generator().manual_seed(0)
    whole = integers((20, 4, 5, 40), 9, generator).bfloat16().to(DEVICE)
    weight = integers((16, 16, 1, 1), 9, generator).bfloat16().to(DEVICE)
    for x, name in (
        (whole[:18, 1:3, 1:4, 8:24], "conv_pixels_kernel"),
        (whole[::2, :1, ::2, 16:32][:, :, :, :], "conv_gather_kernel"),
        (whole[:, :2, :2, 4:20], "conv_gather_kernel"),
    ):
        x = x.permute(0, 3, 1, 2)
        with dispatch.use_target(gpus.H200), record() as records, pytest.MonkeyPatch.context() as patch:
            name_tile(patch, ONE)
            y = conv.conv_fprop(x, weight, None, (2, 2), (0,) * 4, (1, 1), 1)
        reference = torch.conv2d(x.double().cpu(), weight.double().cpu(), stride=2)
        assert_equal(y, reference, "fprop of a slice")
        assert [it.name for it in records] == [name]
