"""Bulk copies of channels that are no multiple of 16 bytes: from where pixels have room behind them, after a copy where
they have none. Bit for bit PyTorch's on integers, and taken where the cost model says so."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from convolutions import DEVICE, Case, depths, expected, trailing
from fastconv.autotune import gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families import conv_pixels
from fastconv.kernels.families.family import Layout
from fastconv.kernels.jit.epilogue import Epilogue
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import conv
from fastconv.kernels.problem.conv import DIRECTIONS, ConvProblem
from fastconv.kernels.problem.layout import strides_like
from reference import assert_equal, exact_limit, integers

pytestmark = [pytest.mark.usefixtures("bulk_copies"), *[pytest.mark.gpu] * (not interpreter.interpreting())]
SERVED = {"gemm": DIRECTIONS, "pixels": DIRECTIONS, "spatial": DIRECTIONS[:2]}
CASES = (
    ("gemm", Case("both odd", 2, 19, 21, (5, 7), (1, 1))),
    ("gemm", Case("two classes", 1, 64, 2, (9, 8), (1, 1))),
    ("gemm", Case("odd input, two steps", 3, 130, 72, (7, 5), (1, 1))),
    ("gemm", Case("one pixel", 1, 19, 5, (1, 1), (1, 1))),
    ("gemm", Case("3d", 2, 5, 7, (3, 2, 4), (1, 1, 1))),
    ("pixels", Case("both odd", 17, 19, 21, (2, 3), (3, 3), (1, 1), (1, 1))),
    ("pixels", Case("three channels, stride 2", 16, 24, 3, (3, 4), (3, 3), (2, 2), (1, 1))),
    ("pixels", Case("1d, to one channel", 16, 5, 1, (4,), (3,), (1,), (1,))),
    ("pixels", Case("3d", 18, 3, 9, (2, 1, 3), (1, 1, 3), (1, 1, 1), (0, 0, 1))),
    ("spatial", Case("both odd", 2, 19, 21, (4, 6), (3, 3), (1, 1), (1, 1))),
    ("spatial", Case("odd input, stride 2", 2, 5, 72, (4, 6), (3, 2), (2, 2), (1, 1))),
    ("spatial", Case("3d, to one channel", 1, 24, 1, (3, 2, 4), (2, 1, 2), (1, 1, 1))),
)


def shapes_of(problem: ConvProblem) -> tuple[tuple[int, ...], ...]:
    return problem.input_shape, problem.output_shape, problem.weight_shape


def called(direction: str, problem: ConvProblem, x: Tensor, dy: Tensor, weight: Tensor, last: bool = True) -> Tensor:
    """One direction of operands that are first laid out channels_last or plainly."""
    x, dy, weight = (t.new_empty_strided(t.shape, strides_like(t.shape, last)).copy_(t) for t in (x, dy, weight))
    _, padding, *rest = geometry = problem.stride, problem.padding, problem.dilation, problem.groups
    if direction == "fprop":
        return conv.conv_fprop(x, weight, None, problem.stride, padding + trailing(problem), *rest)
    if direction == "dgrad":
        return conv.conv_dgrad(dy, weight, None, problem.input_size, *geometry, last)
    return conv.conv_wgrad(x, dy, problem.filter_size, *geometry, last)


@pytest.mark.parametrize(("family", "case"), CASES, ids=lambda value: getattr(value, "name", value))
def test_exact_on_integers(family: str, case: Case) -> None:
    index = [it for _, it in CASES].index(case)
    problem = case.problem((torch.bfloat16, torch.float16)[index % 2])
    limit, generator = exact_limit(problem.dtype, max(depths(problem))), torch.Generator().manual_seed(0)
    exact = [integers(shape, limit, generator) for shape in shapes_of(problem)]
    # Every third case in the plain format, whose edges are copies anyway.
    last = index % 3 > 0
    operands = [t.to(problem.dtype).to(DEVICE) for t in exact]
    with dispatch.only_family(family), record() as records:
        values = [called(direction, problem, *operands, last) for direction in SERVED[family]]
    for name, value, reference in zip(DIRECTIONS, values, expected(problem, *exact), strict=False):
        assert_equal(value, reference, f"{name} of {problem.describe()}")
        dense = strides_like(value.shape, last)
        assert all(n == 1 or s == d for n, s, d in zip(value.shape, value.stride(), dense, strict=True))
    assert {it.name for it in records} <= {f"conv_{family}_kernel", f"conv_{family}_wgrad_kernel", "split_sum_kernel"}


@pytest.mark.parametrize("family", ["gemm", "pixels", "spatial"])
def test_fused(family: str) -> None:
    """Batch norm, activation and residual; statistics."""
    n, taps = (17, 3) if family == "pixels" else (2, 1 if family == "gemm" else 3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 19, 2, 3, generator=generator).half()
    weight = torch.randn(21, 19, taps, taps, generator=generator).half() * 0.1
    residual = torch.randn(n, 21, 2, 3, generator=generator).half()
    mean, gamma, beta, var = (torch.randn(21, generator=generator) for _ in range(4))
    var = var.abs() + 0.5
    exact = torch.conv2d(x.double(), weight.double(), padding=taps // 2)
    fused = torch.batch_norm(exact, *(t.double() for t in (gamma, beta, mean, var)), False, 0.1, 1e-5, False)
    fused = torch.relu(fused + residual.double())
    x, weight, residual = (t.to(DEVICE).contiguous(memory_format=torch.channels_last) for t in (x, weight, residual))
    norm = tuple(t.to(DEVICE) for t in (mean, var, gamma, beta))
    geometry = (None, (1, 1), (taps // 2,) * 4, (1, 1), 1)
    with dispatch.only_family(family):
        z = conv.conv_act(x, weight, None, norm, None, residual, *geometry, 1e-5, "relu", 0.0, 0.0, False)
        y, y_mean, y_var = conv.conv_statistics(x, weight, None, *geometry)
    torch.testing.assert_close(z.cpu().double(), fused, rtol=2e-3, atol=5e-3)
    torch.testing.assert_close(y.cpu().double(), exact, rtol=2e-3, atol=2e-3)
    assert z.stride() == y.stride() == strides_like(y.shape, True)
    true_var, true_mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    for value, reference in ((y_mean, true_mean), (y_var, true_var)):
        torch.testing.assert_close(value.cpu().double(), reference, rtol=1e-4, atol=1e-4)


HEAD = Case("a segmentation head", 16, 512, 21, (65, 65), (1, 1))
FEW = Case("19 channels", 128, 19, 19, (64, 64), (3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("case", "families"),
    [
        (HEAD, ("gemm", "gemm", "gemm")),
        (replace(HEAD, n=4), ("gemm", "gather", "gather")),
        (Case("a U-Net's last layer", 16, 64, 2, (388, 388), (1, 1)), ("gemm", "gemm", "gemm")),
        (Case("100 channels, one tap", 64, 100, 100, (56, 56), (1, 1)), ("gemm", "gemm", "gather")),
        (FEW, ("pixels", "pixels", "pixels")),
        (replace(FEW, n=16), ("gather", "gather", "pixels")),
        (replace(FEW, n=64, c=256), ("gather", "pixels", "pixels")),
        (Case("300 channels, few images", 4, 300, 300, (28, 28), (3, 3), padding=(1, 1)), ("spatial",) * 2),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_the_cost_model_decides(case: Case, families: tuple[str, ...]) -> None:
    """And says so where it is the gather; calls of operands without data are planned alike."""
    problem = case.problem(torch.bfloat16)
    for direction, family in zip(DIRECTIONS, families, strict=False):
        plan = dispatch.plan(direction, problem, gpus.H200)
        assert plan.family == family, (direction, plan.reasons)
        assert any("predicted to take" in why for _, why in plan.reasons) == (family == "gather")
        with FakeTensorMode(), record() as records:
            called(direction, problem, *(torch.empty(shape, dtype=problem.dtype) for shape in shapes_of(problem)))
        assert [(it.name, it.launch.grid) for it in records] == [(it.name, it.grid) for it in plan.launches]


def test_what_is_copied_is_known_of_the_plan() -> None:
    """Nothing where only produced channels are odd or pixels have room, and nothing twice."""
    problem = Case("", 64, 100, 100, (28, 28), (3, 3), (1, 1), (1, 1)).problem(torch.bfloat16)
    roomy = (28 * 28 * 104, 0, 28 * 104, 104)
    plan = dispatch.plan("fprop", problem, gpus.H200)
    assert (plan.layout.source_strides, plan.layout.other_strides) == (roomy, roomy)
    assert dispatch.plan("fprop", problem, gpus.H200, Layout(source_strides=roomy)).layout.source_strides is roomy
    wide = (28 * 28 * 160, 0, 28 * 160, 160)
    assert dispatch.plan("wgrad", problem, gpus.H200, Layout(source_strides=wide)).layout == Layout(
        source_strides=wide, other_strides=roomy
    )
    assert dispatch.plan("fprop", HEAD.problem(torch.bfloat16), gpus.H200).layout == Layout()
    copied = {
        layout: dispatch._padded_layout(conv_pixels.FAMILY, "fprop", problem, layout)[1]
        for layout in (Layout(), Layout(precopied=("source", "other")), Layout(epilogue=Epilogue(residual="*bf16")))
    }
    image, weight = 2 * 2 * 64 * 100 * 28 * 28, 2 * 2 * 100 * 100 * 9
    assert list(copied.values()) == [[image, image, weight], [weight], [image, image, weight, image]]
