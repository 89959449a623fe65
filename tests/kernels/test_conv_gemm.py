"""The flat GEMM of filters of one tap, against fp64 and bit for bit against the gather."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from convolutions import DEVICE, RESULTS, Case, check_random, computed, depths, expected
from fastconv.autotune import Gpu, gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families import conv_gemm
from fastconv.kernels.jit.activations import ACTIVATIONS
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import call, conv
from fastconv.kernels.problem.conv import DIRECTIONS, ConvProblem
from reference import assert_equal, exact_limit, integers
from tests.tiles import take_tile

pytestmark = [pytest.mark.usefixtures("bulk_copies"), *[pytest.mark.gpu] * (not interpreter.interpreting())]
HALVES = (torch.bfloat16, torch.float16)
# A program walks many tiles.
SMALL = replace(gpus.H200, name="a GPU of one multiprocessor", multiprocessors=1)
KERNELS = {"fprop": "conv_gemm_kernel", "dgrad": "conv_gemm_kernel", "wgrad": "conv_gemm_wgrad_kernel"}


def _sizes() -> Iterator[Case]:
    """Every width of one tile and of several, tails and none, with every number of pixels."""
    widths = (8, 16, 24, 64, 72, 128, 136, 256, 264, 520)
    pixels = ((1, (1, 1)), (1, (3, 5)), (2, (8, 8)), (3, (7, 9)), (1, (16, 17)))
    for i, c in enumerate(widths):
        for j, (n, size) in enumerate(pixels):
            k = widths[(3 * i + 2 * j) % len(widths)]
            yield Case(f"{c} to {k} channels, {n} images of {size[0]}x{size[1]}", n, c, k, size, (1, 1))


CASES = (
    *_sizes(),
    Case("1d", 3, 40, 24, (50,), (1,)),
    Case("1d, deep", 1, 272, 64, (130,), (1,)),
    Case("3d", 2, 24, 40, (3, 4, 5), (1, 1, 1)),
    Case("3d, deep", 1, 320, 16, (5, 3, 5), (1, 1, 1)),
    Case("dilated, which one tap does not see", 2, 16, 32, (6, 5), (1, 1), dilation=(2, 3)),
)


def _integers(problem: ConvProblem) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    limit = exact_limit(problem.dtype, max(depths(problem)))
    shapes = problem.input_shape, problem.output_shape, problem.weight_shape
    return [integers(shape, limit, generator) for shape in shapes]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_on_integers(case: Case, record_property) -> None:
    index = CASES.index(case)
    problem = case.problem(HALVES[index % 2])
    operands = _integers(problem)
    # Every third case in the plain format, whose edges are copies.
    with record() as records, dispatch.only_family("gemm"):
        values = computed(problem, *operands, channels_last=index % 3 > 0)
    with dispatch.only_family("gather"):
        others = computed(problem, *operands, channels_last=index % 3 > 0)
    for name, value, reference, other in zip(RESULTS, values, expected(problem, *operands), others, strict=True):
        assert_equal(value, reference, f"{name} of {problem.describe()}")
        assert torch.equal(value, other), f"{name} by the gather"
    assert set(KERNELS.values()) <= {r.name for r in records}
    for direction in DIRECTIONS:
        assert dispatch.plan(direction, problem, gpus.H200).family == "gemm"
        record_property("problem", ("gemm", direction, case.name))


@pytest.mark.parametrize("case", CASES[::9], ids=lambda case: case.name)
def test_random_values_within_rounding(case: Case) -> None:
    check_random(case.problem(HALVES[CASES.index(case) % 2]))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_direction_has_fifty_problems(direction: str) -> None:
    plans = [dispatch.plan(direction, case.problem(torch.bfloat16), gpus.H200) for case in CASES]
    assert sum(plan.family == "gemm" for plan in plans) >= 50


@pytest.mark.parametrize("c", [20, 64, 136])
def test_fp32_goes_by_tf32_forward(c: int, set_fp32_precision: Callable[[str], None]) -> None:
    problem = Case("", 2, c, 24, (9, 8), (1, 1)).problem()
    operands = _integers(problem)
    with record() as records:
        values = computed(problem, *operands)
    for name, value, reference in zip(RESULTS, values, expected(problem, *operands), strict=True):
        assert_equal(value, reference, f"{name} of {problem.describe()}")
    assert records[0].name == "conv_gemm_kernel" and records[0].launch.constants["PRECISION"] == "tf32"
    set_fp32_precision("ieee")
    assert ("gemm", "fp32 products outside the tensor cores") in dispatch.plan("fprop", problem, gpus.H200).reasons


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case("", 2, 64, 64, (9, 8), (3, 3), padding=(1, 1)), "a filter of 9 taps"),
        (Case("", 2, 64, 64, (9, 8), (1, 1), (2, 1)), "pixels of input and output that are not the same"),
        (Case("", 2, 64, 64, (9, 8), (1, 1), padding=(1, 0)), "pixels of input and output that are not the same"),
        (Case("", 2, 64, 64, (9, 1), (1, 1), (1, 2)), "pixels of input and output that are not the same"),
        (Case("", 2, 192, 192, (9, 8), (1, 1), groups=2), "2 groups"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_serve(case: Case, reason: str) -> None:
    for direction in DIRECTIONS:
        assert ("gemm", reason) in dispatch.plan(direction, case.problem(torch.bfloat16), gpus.H200).reasons
    served = Case("", 2, 64, 64, (9, 8), (1, 1)).problem(torch.bfloat16)
    assert ("gemm", "no tensor cores that read what bulk copies bring") in dispatch.plan(
        "fprop", served, gpus.A100
    ).reasons


def test_pixels_are_read_where_they_lie() -> None:
    """Channels of a wider tensor, and a crop of images; a crop of rows has no one distance, an odd one no alignment."""
    generator = torch.Generator().manual_seed(0)
    whole = integers((3, 6, 5, 48), 9, generator).bfloat16().to(DEVICE)
    for crop, served in (
        (whole[..., 8:40], True),
        (whole[1:, ..., 16:], True),
        (whole[:1, :1, :1, 8:40], True),
        (whole[..., 4:36], False),
        (whole[:, 1:, :, :32], False),
        (whole[:1, :1, :1, :32].expand(3, 6, 5, 32), False),
    ):
        x = crop.permute(0, 3, 1, 2)
        weight = integers((24, 32, 1, 1), 9, generator).bfloat16().to(DEVICE)
        with record() as records:
            y = conv.conv_fprop(x, weight, None, (1, 1), (0,) * 4, (1, 1), 1)
        assert_equal(y, torch.conv2d(x.double().cpu(), weight.double().cpu()), "fprop of a slice")
        assert (records[0].name == "conv_gemm_kernel") is served
        assert records[0].shapes[0] == tuple(x.shape)


def test_wgrad_reads_both_where_they_lie() -> None:
    generator = torch.Generator().manual_seed(0)
    x, dy = (integers((3, 6, 5, 48), 9, generator).bfloat16().to(DEVICE).permute(0, 3, 1, 2) for _ in range(2))
    for dy_part, name in ((dy[:, 8:40], "conv_gemm_wgrad_kernel"), (dy[:, 4:36], "conv_wgrad_kernel")):
        with record() as records:
            dw = conv.conv_wgrad(x[:, 16:], dy_part, (1, 1), (1, 1), (0, 0), (1, 1), 1, 1)
        reference = torch.einsum("nchw,nkhw->kc", x[:, 16:].double().cpu(), dy_part.double().cpu())
        assert_equal(dw, reference[..., None, None], "wgrad of slices")
        assert records[0].name == name


@pytest.mark.parametrize(
    ("channels", "splits", "gpu"),
    [((40, 56), 1, gpus.H200), ((40, 56), 5, SMALL), ((296, 136), 1, SMALL), ((296, 136), 3, SMALL)],
    ids=["tiles of programs", "walks of programs", "deep", "splits"],
)
def test_tile_edges(channels: tuple[int, int], splits: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tails of every side, splits that have no step, programs that walk several tiles."""
    tile = {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_C": 64, "SPLITS": splits}
    take_tile(monkeypatch, tile)
    take_tile(monkeypatch, {**tile, "SPLITS": 1}, ("conv_gemm_resident",))
    problem = Case("", 3, *channels, (7, 9), (1, 1)).problem(torch.bfloat16)
    operands = _integers(problem)
    with dispatch.use_target(gpu), record() as records:
        values = computed(problem, *operands)
    for name, value, reference in zip(RESULTS, values, expected(problem, *operands), strict=True):
        assert_equal(value, reference, f"{name} of {problem.describe()}")
    launch = next(r.launch for r in records if r.name == "conv_gemm_kernel")
    stay = max(channels) < 128
    tiles = -(-3 * 7 * 9 // 32) * -(-channels[1] // 32)
    assert launch.constants["RESIDENT"] is stay
    assert launch.grid[0] == (tiles * splits if not stay else tiles if gpu is gpus.H200 else 2)


def test_wgrad_is_the_same_bit_for_bit() -> None:
    problem = Case("", 4, 72, 136, (16, 17), (1, 1)).problem(torch.float16)
    shapes = problem.input_shape, problem.output_shape, problem.weight_shape
    operands = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    first, second = computed(problem, *operands), computed(problem, *operands)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _fused(
    direction: str, families: tuple[str, ...], act: str, how: str, residual_after: bool, c: int, k: int, gpu: Gpu
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """conv + bias + what ``how`` names, then ``act``: by PyTorch in fp64, and by each family."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, c, 7, 9, generator=generator).half()
    weight = (torch.randn(k, c, 1, 1, generator=generator) / math.sqrt(c)).half()
    if direction == "dgrad":
        weight = weight.transpose(0, 1).contiguous()
    bias, mean, gamma, beta, slope = torch.randn(5, k, generator=generator).unbind()
    var = torch.rand(k, generator=generator) + 0.5
    bias, residual = bias.half(), torch.randn(3, k, 7, 9, generator=generator).half()
    norm = (mean, var, gamma, beta) if "norm" in how else (None,) * 4
    added = residual if "residual" in how else None
    a, b = {"hardtanh": (-0.5, 1.5), "leaky_relu": (0.1, 0.0), "elu": (1.2, 0.0), "softplus": (1.0, 20.0)}.get(
        act, (0.0, 0.0)
    )

    def on(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t.to(DEVICE).contiguous(memory_format=_format(t))

    found = []
    for family in families:
        with dispatch.use_target(gpu), dispatch.only_family(family):
            found.append(
                conv.conv_act(
                    *(on(x), on(weight), on(bias), tuple(map(on, norm)), on(slope) if act == "prelu" else None),
                    *(on(added), None if direction == "fprop" else (7, 9), (1, 1)),
                    *((0,) * (4 if direction == "fprop" else 2), (1, 1), 1, 1e-5, act, a, b, residual_after),
                ).cpu()
            )
    transposed = direction == "dgrad"
    reference = torch.einsum("nchw,ck->nkhw" if transposed else "nchw,kc->nkhw", x.double(), weight[..., 0, 0].double())
    reference += bias.double()[:, None, None]
    if "norm" in how:
        reference = torch.batch_norm(
            reference, gamma.double(), beta.double(), mean.double(), var.double(), False, 0.0, 1e-5, False
        )
    if added is not None and not residual_after:
        reference = reference + added
    reference = ACTIVATIONS[act].torch(reference, slope.double() if act == "prelu" else a, b)
    if added is not None and residual_after:
        reference = reference + added
    return reference, found


def _format(t: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if t.dim() == 4 else torch.contiguous_format


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(act: str) -> None:
    """Of a program that walks several tiles; the gather's epilogue is the same, and so is its result."""
    index = list(ACTIVATIONS).index(act)
    direction, after = ("fprop", "dgrad")[index % 2], index % 3 == 0
    how = ("norm", "norm residual", "residual")[index % 3]
    reference, (y, other) = _fused(direction, ("gemm", "gather"), act, how, after, 24, 136, SMALL)
    assert torch.equal(y, other)
    torch.testing.assert_close(y.double(), reference, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
@pytest.mark.parametrize("after", [False, True])
def test_epilogue_of_a_long_and_of_a_split_reduction(
    direction: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for splits in (1, 2):
        take_tile(monkeypatch, {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_C": 64, "SPLITS": splits, "num_stages": 4})
        reference, (y,) = _fused(direction, ("gemm",), "silu", "norm residual", after, 264, 72, gpus.H200)
        torch.testing.assert_close(y.double(), reference, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("gpu", [gpus.H200, SMALL], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(("c", "splits"), [(24, 1), (264, 1), (264, 3)])
def test_statistics_count_no_row_past_the_last_pixel(
    c: int, splits: int, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    if splits > 1:
        take_tile(monkeypatch, {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_C": 64, "SPLITS": splits, "num_stages": 4})
        monkeypatch.setattr(call, "_calls", {})
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, c, 7, 9, generator=generator).half().to(DEVICE).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(136, c, 1, 1, generator=generator) / math.sqrt(c)).half().to(DEVICE)
    bias = 3 * torch.randn(136, generator=generator).half().to(DEVICE)
    for output_size, w in ((None, weight), ((7, 9), weight.transpose(0, 1).contiguous())):
        padding = (0,) * (4 if output_size is None else 2)
        with dispatch.use_target(gpu), dispatch.only_family("gemm"), record() as records:
            y, mean, var = conv.conv_statistics(x, w, bias, output_size, (1, 1), padding, (1, 1), 1)
        exact = torch.conv2d(x.double().cpu(), weight.double().cpu(), bias.double().cpu())
        true_var, true_mean = torch.var_mean(exact, (0, 2, 3), correction=0)
        torch.testing.assert_close(y.cpu().double(), exact, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(mean.cpu().double(), true_mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(var.cpu().double(), true_var, rtol=1e-4, atol=1e-4)
        assert records[0].launch.constants["RESIDENT"] is (c == 24)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_infinity_stays_in_its_row_or_column(direction: str) -> None:
    problem = Case("", 1, 24, 72, (7, 9), (1, 1)).problem(torch.float16)
    operands = _integers(problem)
    operands[0][0, 3, 6, 8] = operands[1][0, 5, 6, 8] = operands[2][71, 23] = math.inf
    index = DIRECTIONS.index(direction)
    with dispatch.only_family("gemm"):
        value = computed(problem, *operands)[index].double().cpu()
    reference = expected(problem, *operands)[index]
    assert torch.equal(value.isnan(), reference.isnan())
    assert torch.equal(value.nan_to_num(0, 1e9, -1e9), reference.half().double().nan_to_num(0, 1e9, -1e9))


def test_wide_offsets_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for c in (24, 264):
        problem = Case("", 2, c, 72, (7, 9), (1, 1)).problem(torch.bfloat16)
        operands = _integers(problem)
        monkeypatch.setattr(conv_gemm, "INT32_MAX", 0)
        monkeypatch.setattr(call, "_calls", {})
        with record() as records:
            values = computed(problem, *operands)
        assert records[0].launch.constants["WIDE"]
        for name, value, reference in zip(RESULTS, values, expected(problem, *operands), strict=True):
            assert_equal(value, reference, name)
