"""The flat GEMM of filters of one tap, bit for bit as fp64 and the gather."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from convolutions import (
    DEVICE,
    Case,
    check_exact,
    check_infinities,
    check_random,
    computed,
    exact_operands,
    random_operands,
)
from fastconv.autotune import Gpu, gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families import conv_gemm
from fastconv.kernels.jit.activations import ACTIVATIONS
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import call, conv
from fastconv.kernels.problem.conv import DIRECTIONS
from reference import assert_equal, integers
from tests.fused_layers import fused_layer
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


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_on_integers(case: Case, record_property) -> None:
    index = CASES.index(case)
    problem = case.problem(HALVES[index % 2])
    # Every third case in the plain format, whose edges are copies.
    with dispatch.only_family("gather"):
        check_exact(problem, index % 3 > 0)
    with dispatch.only_family("gemm"):
        records = check_exact(problem, index % 3 > 0)
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
def test_fp32_goes_by_tf32_forward(c: int, set_fp32_precision) -> None:
    problem = Case("", 2, c, 24, (9, 8), (1, 1)).problem()
    records = check_exact(problem)
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
    """Channels of a wider tensor, and a crop of images; a crop of rows is not evenly spaced, an odd one not aligned."""
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
def test_tile_edges(channels: tuple[int, int], splits: int, gpu: Gpu, monkeypatch) -> None:
    """Tails of every side, splits that have no step, programs that walk several tiles."""
    tile = {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_C": 64, "SPLITS": splits}
    take_tile(monkeypatch, tile)
    take_tile(monkeypatch, {**tile, "SPLITS": 1}, ("conv_gemm_resident",))
    problem = Case("", 3, *channels, (7, 9), (1, 1)).problem(torch.bfloat16)
    with dispatch.use_target(gpu):
        records = check_exact(problem)
    launch = next(r.launch for r in records if r.name == "conv_gemm_kernel")
    stay = max(channels) < 128
    tiles = -(-3 * 7 * 9 // 32) * -(-channels[1] // 32)
    assert launch.constants["RESIDENT"] is stay
    assert launch.grid[0] == (tiles * splits if not stay else tiles if gpu is gpus.H200 else 2)


def test_wgrad_is_the_same_bit_for_bit() -> None:
    problem = Case("", 4, 72, 136, (16, 17), (1, 1)).problem(torch.float16)
    operands = random_operands(problem)
    first, second = computed(problem, *operands), computed(problem, *operands)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(act: str) -> None:
    """A program walks several tiles; the gather's epilogue is the same, and so is its result."""
    index = list(ACTIVATIONS).index(act)
    layer = fused_layer((3, 24, 7, 9), 136, (1, 1), torch.float16, transposed=index % 2 == 1)
    how = {"after": index % 3 == 0, "norm": index % 3 < 2, "residual": index % 3 > 0}
    values = []
    for family in ("gemm", "gather"):
        with dispatch.use_target(SMALL), dispatch.only_family(family):
            values.append(layer.computed(act, **how))
    assert torch.equal(*values)
    torch.testing.assert_close(values[0].double(), layer.expected(act, **how), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("transposed", [False, True], ids=["fprop", "dgrad"])
@pytest.mark.parametrize("after", [False, True])
def test_epilogue_of_a_long_and_of_a_split_reduction(transposed: bool, after: bool, monkeypatch) -> None:
    layer = fused_layer((3, 264, 7, 9), 72, (1, 1), torch.float16, transposed=transposed)
    for splits in (1, 2):
        take_tile(monkeypatch, {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_C": 64, "SPLITS": splits, "num_stages": 4})
        with dispatch.only_family("gemm"):
            y = layer.computed("silu", after)
        torch.testing.assert_close(y.double(), layer.expected("silu", after), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("gpu", [gpus.H200, SMALL], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize(("c", "splits"), [(24, 1), (264, 1), (264, 3)])
def test_statistics_count_no_row_past_the_last_pixel(c: int, splits: int, gpu: Gpu, monkeypatch) -> None:
    if splits > 1:
        take_tile(monkeypatch, {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_C": 64, "SPLITS": splits, "num_stages": 4})
    for transposed in (False, True):
        layer = fused_layer((5, c, 7, 9), 136, (1, 1), torch.float16, transposed=transposed)
        with dispatch.use_target(gpu), dispatch.only_family("gemm"), record() as records:
            layer.check_statistics((2e-3, 2e-3), (1e-4, 1e-4))
        assert records[0].launch.constants["RESIDENT"] is (c == 24)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_infinity_stays_in_its_row_or_column(direction: str) -> None:
    problem = Case("", 1, 24, 72, (7, 9), (1, 1)).problem(torch.float16)
    operands = exact_operands(problem)
    operands[0][0, 3, 6, 8] = operands[1][0, 5, 6, 8] = operands[2][71, 23] = math.inf
    with dispatch.only_family("gemm"):
        check_infinities(problem, operands, (direction,))


def test_wide_offsets_give_the_same(monkeypatch) -> None:
    for c in (24, 264):
        problem = Case("", 2, c, 72, (7, 9), (1, 1)).problem(torch.bfloat16)
        monkeypatch.setattr(conv_gemm, "INT32_MAX", 0)
        monkeypatch.setattr(call, "_calls", {})
        assert check_exact(problem)[0].launch.constants["WIDE"]
