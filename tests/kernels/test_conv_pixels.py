"""The pixel GEMM's fprop and dgrad, interpreted with small tiles: bit for bit PyTorch's on integers, and the gather's.

Maps are small: every program takes the interpreter's time. Plans are those of a GPU with bulk copies.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from convolutions import DEVICE, Case, depths, expected, trailing
from fastconv.autotune import Config, gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families import conv_pixels
from fastconv.kernels.families.conv_pixels import taps_walked
from fastconv.kernels.jit.boxes import has_parities
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import conv
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import strides_like
from reference import assert_close, assert_equal, exact_limit, integers
from tests.marks import runs_kernels
from tests.tiles import take_tile

pytestmark = runs_kernels
DTYPES = (torch.bfloat16, torch.float16)
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


def name_tile(monkeypatch: pytest.MonkeyPatch, sides: tuple[int, ...]) -> None:
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


def operands_of(problem: ConvProblem, channels_last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x, dy and weight of integers whose sums are exact."""
    limit = exact_limit(problem.dtype, max(depths(problem)))
    generator = torch.Generator().manual_seed(0)

    def operand(shape: tuple[int, ...]) -> Tensor:
        t = integers(shape, limit, generator).to(problem.dtype).to(DEVICE)
        return t.new_empty_strided(shape, strides_like(shape, channels_last)).copy_(t)

    return operand(problem.input_shape), operand(problem.output_shape), operand(problem.weight_shape)


def computed(direction: str, problem: ConvProblem, operands: tuple[Tensor, Tensor, Tensor], family: str) -> Tensor:
    """One direction by one family: the pixel GEMM as an H200 plans it, the gather as the interpreter does."""
    x, dy, weight = operands
    stride, padding, dilation, groups = problem.stride, problem.padding, problem.dilation, problem.groups
    gpu = gpus.H200 if family == "pixels" else dispatch.target(x.device)
    with dispatch.use_target(gpu), dispatch.only_family(family):
        if direction == "fprop":
            return conv.conv_fprop(x, weight, None, stride, padding + trailing(problem), dilation, groups)
        size = problem.input_size
        return conv.conv_dgrad(dy, weight, None, size, stride, padding, dilation, groups, x.stride()[1] == 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_on_integers(case: Case, monkeypatch, record_property) -> None:
    index = CASES.index(case)
    problem = case.problem(DTYPES[index % 2])
    sides = next(it for it in (PAIRS, FOUR, ONE)[index % 3 :] if suits(it, problem))
    name_tile(monkeypatch, sides)
    # Every fourth case in the plain format, whose edges are copies.
    operands = operands_of(problem, channels_last=index % 4 > 0)
    references = expected(problem, *(t.double().cpu() for t in operands))
    for direction, reference in zip(("fprop", "dgrad"), references, strict=False):
        with record() as records:
            value = computed(direction, problem, operands, "pixels")
        assert [it.name for it in records] == ["conv_pixels_kernel"]
        assert_equal(value, reference, f"{direction} of {problem.describe()} by {sides}")
        gathered = computed(direction, problem, operands, "gather")
        assert torch.equal(value, gathered) and value.stride() == gathered.stride()
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
    for direction, met in zip(("fprop", "dgrad"), expected(one, *ones, weight), strict=False):
        assert taps_walked(direction, problem, 1, 0) == pytest.approx(met.mean().item())
        assert not suits(FOUR, problem) or taps_walked(direction, problem, 4, 0) >= met.mean().item() * (1 - 1e-9)
        rows = problem.taps // problem.filter_size[-1]
        assert 0 < taps_walked(direction, problem, 1, 1) <= rows or not met.any()


@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
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
        operands = operands_of(problem, channels_last=True)
        reference = expected(problem, *(t.double().cpu() for t in operands))[direction == "dgrad"]
        value = computed(direction, problem, operands, "pixels")
        assert_equal(value, reference, f"{direction} of {problem.describe()}")


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
    computed("fprop", problem, operands_of(problem, channels_last=True), "pixels")
    assert written == [[h, w, n, k] for n in (0, 16) for h in range(2) for w in range(3) for k in (0, 32)]


def test_fp32_in_fprop(monkeypatch) -> None:
    name_tile(monkeypatch, ONE)
    problem = Case("", 17, 12, 20, (2, 2), (3, 3), (1, 1), (1, 1)).problem(torch.float32)
    operands = operands_of(problem, channels_last=True)
    value = computed("fprop", problem, operands, "pixels")
    assert_equal(value, expected(problem, *(t.double().cpu() for t in operands))[0], "fprop")


@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
def test_products_that_add_to_each_others_sums(direction: str, monkeypatch) -> None:
    """A pair's tile that has no registers for a sum of each product."""
    sides = (64, 128, 16, 1, 1)
    name_tile(monkeypatch, sides)
    problem = Case("", 17, 24, 24, (1, 3), (1, 5), (1, 1), (0, 2)).problem(torch.bfloat16)
    operands = operands_of(problem, channels_last=True)
    with record() as records:
        value = computed(direction, problem, operands, "pixels")
    assert records[0].launch.constants["SUMS"] == 1
    reference = expected(problem, *(t.double().cpu() for t in operands))[direction == "dgrad"]
    assert_equal(value, reference, f"{direction} of {problem.describe()}")


@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
def test_random_values_within_rounding(direction: str, monkeypatch) -> None:
    name_tile(monkeypatch, ONE)
    problem = Case("", 17, 24, 40, (2, 2), (3, 3), (1, 1), (1, 1)).problem(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    shapes = problem.input_shape, problem.output_shape, problem.weight_shape
    exact = [torch.randn(shape, generator=generator).to(problem.dtype).double() for shape in shapes]
    index = direction == "dgrad"
    magnitude = expected(problem, *(t.abs() for t in exact))[index]
    x, dy, weight = (t.to(problem.dtype).to(DEVICE) for t in exact)
    value = computed(direction, problem, (x, dy, weight), "pixels")
    assert_close(value, expected(problem, *exact)[index], magnitude, depths(problem)[index], direction)


EPILOGUES = {
    "relu": ("relu", 0.0, 0.0, False),
    "silu, residual after": ("silu", 0.0, 0.0, True),
    "prelu": ("prelu", 0.0, 0.0, False),
    "hardtanh": ("hardtanh", -1.0, 2.0, False),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["fprop", "dgrad"])
@pytest.mark.parametrize("sides", [ONE, FOUR, PAIRS], ids=str)
@pytest.mark.parametrize("how", EPILOGUES.values(), ids=EPILOGUES.keys())
def test_epilogue(how, sides: tuple[int, ...], transposed: bool, monkeypatch) -> None:
    """Bias, batch norm, activation and residual, where images, channels and pixels all leave a tail."""
    act, a, b, after = how
    name_tile(monkeypatch, sides)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(17, 24, 1, 3, generator=generator).half()
    weight = torch.randn(24, 40, 3, 3, generator=generator).half() * 0.1
    bias, mean, gamma, beta, slope = torch.randn(5, 40, generator=generator).unbind()
    var = torch.rand(40, generator=generator) + 0.5
    if not transposed:
        weight = weight.transpose(0, 1)
    convolve = torch.conv_transpose2d if transposed else torch.conv2d
    exact = convolve(x.double(), weight.double(), bias.double(), 1, 1)
    residual = torch.randn(exact.shape, generator=generator).half()
    exact = torch.batch_norm(exact, *(t.double() for t in (gamma, beta, mean, var)), False, 0.1, 1e-5, False)
    function = {
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "prelu": lambda z: torch.prelu(z, slope.double()),
        "hardtanh": lambda z: z.clamp(a, b),
    }[act]
    exact = function(exact) + residual.double() if after else function(exact + residual.double())
    on = [t.to(DEVICE) for t in (x, weight, bias, mean, var, gamma, beta, slope, residual)]
    operands = on[0].contiguous(memory_format=torch.channels_last), on[1], on[2].half(), tuple(on[3:7])
    sizes = ((1, 3), (1, 1), (1, 1)) if transposed else (None, (1, 1), (1, 1, 1, 1))
    with dispatch.use_target(gpus.H200), dispatch.only_family("pixels"):
        z = conv.conv_act(
            *operands, on[7] if act == "prelu" else None, on[8], *sizes, (1, 1), 1, 1e-5, act, a, b, after
        )
    # The bias is an operand in the input's dtype.
    torch.testing.assert_close(z.cpu().double(), exact, rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("sides", "transposed", "step"),
    [*((sides, transposed, 1) for sides in (ONE, FOUR, PAIRS) for transposed in (False, True)), (FOUR, True, 2)],
    ids=str,
)
def test_statistics(sides: tuple[int, ...], transposed: bool, step: int, monkeypatch) -> None:
    """Only images and pixels that are there count, and of a transposed convolution pixels without any tap too."""
    name_tile(monkeypatch, sides)
    generator = torch.Generator().manual_seed(0)
    # Stride 2 of rows: every other row of the transposed one meets no tap.
    stride = (2, step)
    x = torch.randn(18, 16, 2, 3, generator=generator)
    weight = torch.randn(16, 24, 1, 3, generator=generator)
    if not transposed:
        weight = weight.transpose(0, 1)
    bias = torch.randn(24, generator=generator)
    x, weight, bias = (t.bfloat16() for t in (x, weight, bias))
    size = (4, 3 * step) if transposed else None
    if transposed:
        exact = torch.conv_transpose2d(x.double(), weight.double(), bias.double(), stride, (0, 1), (1, step - 1))
    else:
        exact = torch.conv2d(x.double(), weight.double(), bias.double(), stride, (0, 1))
    padding = (0, 1) if transposed else (0, 1, 0, 1)
    operands = [t.to(DEVICE) for t in (x.contiguous(memory_format=torch.channels_last), weight, bias)]
    with dispatch.use_target(gpus.H200), dispatch.only_family("pixels"):
        y, mean, var = conv.conv_statistics(*operands, size, stride, padding, (1, 1), 1)
    torch.testing.assert_close(y.cpu().double(), exact, rtol=1e-2, atol=1e-2)
    true_var, true_mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    for value, reference in ((mean, true_mean), (var, true_var)):
        torch.testing.assert_close(value.cpu().double(), reference, rtol=1e-5, atol=1e-5)


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
        for direction in ("fprop", "dgrad"):
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
    """A crop, and channels that begin at a multiple of 16 bytes; what begins elsewhere is gathered."""
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
