"""Bulk copies of channels that are no multiple of 16 bytes: an operand is copied first unless its pixels are padded to
16 bytes. Bit for bit PyTorch's on integers, and taken if the cost model says so."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from convolutions import Case, check_exact, computed, exact_operands
from fastconv.autotune import gpus
from fastconv.kernels import dispatch
from fastconv.kernels.families import conv_pixels
from fastconv.kernels.families.family import Layout
from fastconv.kernels.jit.epilogue import Epilogue
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.launch import record
from fastconv.kernels.problem.conv import DIRECTIONS
from fastconv.kernels.problem.layout import strides_like
from tests.fused_layers import fused_layer

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


@pytest.mark.parametrize(("family", "case"), CASES, ids=lambda value: getattr(value, "name", value))
def test_exact_on_integers(family: str, case: Case) -> None:
    index = [it for _, it in CASES].index(case)
    problem = case.problem((torch.bfloat16, torch.float16)[index % 2])
    # Every third case in the plain format, whose edges are copies anyway.
    last = index % 3 > 0
    with dispatch.only_family(family):
        records = check_exact(problem, last, SERVED[family])
        values = computed(problem, *exact_operands(problem), last, SERVED[family])
    for value in values:
        dense = strides_like(value.shape, last)
        assert all(n == 1 or s == d for n, s, d in zip(value.shape, value.stride(), dense, strict=True))
    assert {it.name for it in records} <= {f"conv_{family}_kernel", f"conv_{family}_wgrad_kernel", "split_sum_kernel"}


@pytest.mark.parametrize("family", ["gemm", "pixels", "spatial"])
def test_fused(family: str) -> None:
    """Batch norm, activation and residual; statistics."""
    n, taps = (17, 3) if family == "pixels" else (2, 1 if family == "gemm" else 3)
    layer = fused_layer((n, 19, 2, 3), 21, (taps, taps), torch.float16, padding=(taps // 2,) * 2)
    with dispatch.only_family(family):
        torch.testing.assert_close(layer.computed("relu").double(), layer.expected("relu"), rtol=2e-3, atol=5e-3)
        layer.check_statistics((2e-3, 2e-3), (1e-4, 1e-4))


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
    """If it takes the gather it says so; calls of operands without data are planned alike."""
    problem = case.problem(torch.bfloat16)
    shapes = problem.input_shape, problem.output_shape, problem.weight_shape
    for direction, family in zip(DIRECTIONS, families, strict=False):
        plan = dispatch.plan(direction, problem, gpus.H200)
        assert plan.family == family, (direction, plan.reasons)
        assert any("predicted to take" in why for _, why in plan.reasons) == (family == "gather")
        with FakeTensorMode(), record() as records:
            computed(problem, *(torch.empty(shape) for shape in shapes), results=(direction,))
        assert [(it.name, it.launch.grid) for it in records] == [(it.name, it.grid) for it in plan.launches]


def test_the_plan_tells_what_is_copied() -> None:
    """Nothing is copied if only produced channels are odd or pixels have room, and nothing twice."""
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
