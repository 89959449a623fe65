"""Depthwise convolution in every direction against fp64, at the tiles of a GPU: exact on integers, then random values.

The interpreter's own tiles hold one output a thread, so tiles are named here: groups of neighbours, tails, splits.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from convolutions import DEVICE, Case, check_exact, check_random
from fastconv import functional
from fastconv.autotune import gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families import depthwise_schedule
from fastconv.kernels.launch.interpreter import interpreting
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import conv
from fastconv.kernels.problem.conv import DIRECTIONS
from fastconv.kernels.problem.layout import TAPS_OUTERMOST, taps_outermost, weight_format
from reference import integers
from tests.marks import runs_kernels
from tests.tiles import take_tile

pytestmark = runs_kernels
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = {"fprop": "conv_depthwise_kernel", "dgrad": "conv_depthwise_kernel", "wgrad": "conv_depthwise_wgrad_kernel"}


def depthwise(
    name: str, channels: int, size: tuple[int, ...], filter: tuple[int, ...], *rest: Any, **more: Any
) -> Case:
    multiplier = more.pop("multiplier", 1)
    return Case(name, 2, channels, channels * multiplier, size, filter, *rest, groups=channels, **more)


def _strides_and_dilations() -> Iterator[Case]:
    for stride in (1, 2, 3, 4):
        for dilation in (1, 2, 3):
            for s in (1, 2, 3, 5):
                if s == 1 and dilation > 1:
                    continue
                size = 5 + dilation * (s - 1)
                yield depthwise(
                    f"stride {stride} dilation {dilation} filter {s}",
                    *(8, (size - 1, size), (1 + s % 3, s), (1 + stride % 3, stride), (0, s // 2)),
                    (1 + dilation % 2, dilation),
                )


CASES = (
    depthwise("3x3", 24, (6, 9), (3, 3), (1, 1), (1, 1)),
    depthwise("3x3 stride 2", 16, (8, 9), (3, 3), (2, 2), (1, 1)),
    depthwise("5x5", 8, (7, 7), (5, 5), (1, 1), (2, 2)),
    depthwise("5x5 stride 2", 8, (9, 14), (5, 5), (2, 2), (2, 2)),
    depthwise("7x7", 8, (7, 7), (7, 7), (1, 1), (3, 3)),
    depthwise("9x9, in parts of a row", 8, (5, 6), (9, 9), (1, 1), (4, 4)),
    depthwise("31 columns", 8, (2, 9), (2, 31), (1, 1), (1, 15)),
    depthwise("31 rows", 8, (5, 3), (31, 2), (1, 1), (15, 1)),
    depthwise("rows of several strips", 8, (3, 37), (3, 3), (1, 1), (1, 1)),
    depthwise("7 channels", 7, (6, 6), (3, 3), (1, 1), (1, 1)),
    depthwise("2 channels", 2, (6, 6), (3, 3), (1, 1), (1, 1)),
    depthwise("33 channels", 33, (4, 6), (3, 2), (1, 2), (1, 1)),
    depthwise("2 outputs a channel", 5, (8, 7), (3, 3), (2, 2), (1, 1), multiplier=2),
    depthwise("3 outputs a channel, 3d", 4, (3, 3, 4), (2, 2, 3), (1, 1, 2), (1, 0, 1), multiplier=3),
    depthwise("pointwise", 16, (5, 4), (1, 1)),
    depthwise("pointwise stride 2", 8, (5, 6), (1, 1), (2, 2)),
    depthwise("one pixel", 16, (1, 1), (3, 3), (1, 1), (1, 1)),
    depthwise("filter larger than the image", 8, (2, 3), (5, 5), (1, 1), (2, 2)),
    depthwise("padding larger than the filter", 8, (3, 3), (2, 2), (1, 1), (3, 4)),
    depthwise("stride larger than the filter", 8, (9, 8), (2, 1), (4, 3)),
    depthwise("stride larger than the image", 8, (2, 3), (2, 2), (5, 4), (1, 1)),
    depthwise("stride that leaves pixels over", 8, (8, 9), (3, 3), (3, 4)),
    depthwise("trailing padding only", 8, (5, 6), (2, 2), (1, 1), (0, 0), after=(1, 1)),
    depthwise("dilation shares a factor with the stride", 8, (13, 14), (3, 4), (4, 6), (2, 3), (2, 4)),
    depthwise("1d", 16, (13,), (3,), (1,), (1,)),
    depthwise("1d stride 3 dilation 2", 8, (23,), (4,), (3,), (2,), (2,)),
    depthwise("3d", 8, (3, 4, 5), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    depthwise("3d stride 2", 8, (5, 4, 3), (3, 2, 1), (2, 2, 2), (1, 1, 0)),
    depthwise("3d, everything uneven", 3, (6, 5, 7), (3, 2, 3), (2, 1, 3), (1, 0, 2), (1, 2, 1)),
    *_strides_and_dilations(),
)
TILES = (
    {"OUTPUTS": 4, "BLOCK_M": 16, "BLOCK_K": 16, "ROWS": 2, "SPLITS": 3},
    {"OUTPUTS": 7, "BLOCK_M": 64, "BLOCK_K": 32, "ROWS": 3, "SPLITS": 1},
    {"OUTPUTS": 2, "BLOCK_M": 128, "BLOCK_K": 16, "ROWS": 1, "SPLITS": 7},
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_on_integers(case: Case, record_property, monkeypatch) -> None:
    """Dtypes, tiles and formats in turn: each meets each."""
    number = CASES.index(case)
    problem = case.problem(DTYPES[number % 3])
    take_tile(monkeypatch, TILES[number // 3 % 3])
    records = check_exact(problem, channels_last=number % 2 == 0)
    names = [record.name for record in records]
    assert names[:2] == ["conv_depthwise_kernel"] * 2 and names[2] == "conv_depthwise_wgrad_kernel"
    assert not {"conv_gather_kernel", "conv_wgrad_kernel"} & set(names)
    for direction in DIRECTIONS:
        record_property("problem", ("depthwise", direction, case.name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[:29:4], ids=lambda case: case.name)
def test_random_values_within_rounding(case: Case, dtype: torch.dtype, monkeypatch) -> None:
    if interpreting():
        take_tile(monkeypatch, TILES[0])
    check_random(case.problem(dtype))


def test_each_direction_has_fifty_problems() -> None:
    problems = {case.problem() for case in CASES}
    for direction in DIRECTIONS:
        served = [p for p in problems if dispatch.plan(direction, p, gpus.H200).family == "depthwise"]
        assert len(served) >= 50, direction


@pytest.mark.parametrize(
    ("case", "direction", "reason"),
    [
        (Case("", 1, 8, 8, (9, 9), (3, 3)), "fprop", "8 input channels a group"),
        (Case("", 1, 1, 8, (9, 9), (3, 3)), "dgrad", "1 input channels a group"),
        (depthwise("", 8, (9, 40), (3, 32)), "fprop", "a filter of more than 31 columns"),
        (depthwise("", 8, (9, 40), (3, 3), (1, 9)), "dgrad", "a stride of more than 8 columns"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_serve(case: Case, direction: str, reason: str) -> None:
    plan = dispatch.plan(direction, case.problem(), gpus.H200)
    assert plan.family == "gather" and plan.reasons[0] == ("depthwise", reason)


@pytest.mark.parametrize(("stride", "outputs"), [(1, 4), (2, 4), (3, 6)])
def test_no_tap_multiplies_a_zero(stride: int, outputs: int) -> None:
    """In dgrad an output meets only its own taps: as many neighbours as the stride share all taps of the filter."""
    plan = depthwise_schedule.schedule(outputs, 5, stride, 2, 1, True)
    met = [tap for taps in plan.taps for tap in taps if tap >= 0]
    assert len(met) == 5 * outputs // stride
    # A column is loaded once, a weight too.
    assert len(set(plan.columns)) == len(plan.columns)
    assert sorted(tap for taps in plan.first for tap in taps) == [0, 1, 2, 3, 4]


def test_infinity_beside_the_window_stays_out(monkeypatch) -> None:
    take_tile(monkeypatch, TILES[0])
    x = torch.zeros(1, 8, 3, 9)
    x[..., 6] = math.inf
    weight = torch.ones(8, 1, 3, 3)
    y = functional.conv2d(x.to(DEVICE), weight.to(DEVICE), groups=8)
    assert torch.equal(y.cpu(), torch.conv2d(x, weight, groups=8))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_weight_with_its_taps_outermost_is_not_copied(rank: int, multiplier: int, monkeypatch) -> None:
    weight = torch.randn(6 * multiplier, 1, *(3, 2, 2)[:rank]).to(DEVICE)
    outermost = weight.new_empty_strided(weight.shape, taps_outermost(weight.shape)).copy_(weight)
    assert (
        weight_format(outermost.shape, outermost.stride())
        == TAPS_OUTERMOST
        != weight_format(weight.shape, weight.stride())
    )
    x = torch.randn(2, 6, *(5, 4, 3)[:rank]).to(DEVICE).requires_grad_()
    x = x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    found = []
    copies: list[Any] = []
    copy = torch.Tensor.copy_
    for w in (weight, outermost):
        w.requires_grad_()
        monkeypatch.setattr(torch.Tensor, "copy_", lambda *a: copies.append(a) or copy(*a))
        y = getattr(functional, f"conv{rank}d")(x, w, groups=6)
        dx, dw = torch.autograd.grad(y.square().sum(), (x, w))
        monkeypatch.undo()
        assert dw.stride() == w.stride()
        found.append((y, dx, dw))
        assert len(copies) == 2, "the plain weight's, once forward and once backward"
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_statistics_leave_out_pixels_past_the_row(monkeypatch) -> None:
    """Outputs past the end of a row, or past the last image, would hold the bias."""
    take_tile(monkeypatch, TILES[1])
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 24, 5, 9, generator=generator), torch.randn(24, 1, 3, 3, generator=generator)
    bias = torch.full((24,), 7.0)
    operands = (t.to(DEVICE) for t in (x, weight, bias))
    y, mean, var = conv.conv_statistics(*operands, None, (1, 1), (1, 1, 1, 1), (1, 1), 24)
    exact = torch.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=24)
    true_var, true_mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    torch.testing.assert_close(y.cpu().double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean.cpu().double(), true_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var.cpu().double(), true_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    ("act", "after", "stride"),
    [("relu", False, 1), ("silu", True, 2), (torch.nn.PReLU(24, init=0.3), False, 1), (None, False, 2)],
    ids=str,
)
def test_fused_layers(act: Any, after: bool, stride: int, training: bool, monkeypatch) -> None:
    """Batch norm, activation and residual on groups of neighbours, the last of a row partly past its end."""
    take_tile(monkeypatch, TILES[0])
    generator = torch.Generator().manual_seed(0)
    # Integers: no sum is rounded, so that no value falls on the other side of a kink.
    x, weight = integers((2, 24, 5, 9), 4, generator), integers((24, 1, 3, 3), 2, generator)
    size = (5, 9) if stride == 1 else (3, 5)
    residual = torch.randn(2, 24, *size, generator=generator, dtype=torch.float64)
    mean, var, gamma, beta = (torch.rand(24, generator=generator, dtype=torch.float64) + 0.5 for _ in range(4))

    def step(module: Any, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in (x, weight, residual, gamma, beta)]
        running = [t.to(device, dtype, copy=True) for t in (mean, var)]
        one = act.to(device, dtype) if isinstance(act, torch.nn.Module) else act
        z = module(*leaves, *running, one)
        gradients = torch.autograd.grad(z.square().sum(), leaves)
        return [t.detach().cpu().double() for t in (z, *gradients, *running)]

    def ours(x, weight, residual, gamma, beta, mean, var, act) -> torch.Tensor:
        return functional.conv2d_bn_act(
            *(x, weight, None, gamma, beta, mean, var),
            **{"training": training, "momentum": 0.3, "eps": 1e-3, "act": act, "residual": residual},
            **{"residual_after": after, "stride": stride, "padding": 1, "groups": 24},
        )

    def theirs(x, weight, residual, gamma, beta, mean, var, act) -> torch.Tensor:
        F = torch.nn.functional
        y = F.conv2d(x, weight, stride=stride, padding=1, groups=24)
        z = F.batch_norm(y, mean, var, gamma, beta, training, 0.3, 1e-3)
        apply = {"relu": F.relu, "silu": F.silu, None: lambda t: t}.get(act, act)
        return apply(z) + residual if after else apply(z + residual)

    with record() as records:
        values = step(ours, torch.float32, DEVICE)
    assert records[0].name == "conv_depthwise_kernel"
    for value, reference in zip(values, step(theirs, torch.float64, "cpu"), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=2e-5 * float(reference.abs().max()))
