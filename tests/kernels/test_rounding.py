"""TF32 products are of the nearest TF32 factors, not of truncated ones, where a kernel rounds them for nothing."""

import pytest
import torch

from convolutions import Case, computed, expected, rounds_to_tf32
from fastconv.kernels import dispatch
from fastconv.kernels.launch.launch import record
from tests.marks import DEVICE, runs_kernels

CASES = {
    "gather": (Case("", 2, 32, 32, (9, 9), (3, 3), (2, 2), (1, 1)), ("fprop", "dgrad", "wgrad")),
    "grouped": (Case("", 2, 32, 32, (9, 9), (3, 3), padding=(1, 1), groups=4), ("fprop", "dgrad", "wgrad")),
    "rows": (Case("", 2, 3, 32, (20, 20), (7, 7), (2, 2), (3, 3)), ("fprop", "wgrad")),
    "gemm": (Case("", 2, 64, 64, (8, 8), (1, 1)), ("fprop",)),
    "pixels": (Case("", 16, 32, 32, (6, 6), (3, 3), padding=(1, 1)), ("fprop",)),
    "spatial": (Case("", 2, 32, 32, (16, 16), (3, 3), padding=(1, 1)), ("fprop",)),
}
EACH = [(family, direction) for family, (_, directions) in CASES.items() for direction in directions]

pytestmark = runs_kernels


@pytest.mark.gpu  # the interpreter has no TF32
@pytest.mark.parametrize(("family", "direction"), EACH)
def test_sums_of_positive_products_are_not_drawn_to_zero(family: str, direction: str) -> None:
    problem = CASES[family][0].problem()
    generator = torch.Generator().manual_seed(0)
    shapes = problem.input_shape, problem.output_shape, problem.weight_shape
    operands = [(torch.rand(shape, generator=generator) + 0.5).double() for shape in shapes]
    with dispatch.only_family(family), record() as records:
        plan = dispatch.plan(direction, problem, dispatch.target(torch.device(DEVICE)))
        if plan.family == "pytorch":
            pytest.skip(f"{plan.reasons[-1]}")
        (value,) = computed(problem, *operands, results=(direction,))
    index = ("fprop", "dgrad", "wgrad").index(direction)
    reference = expected(problem, *operands)[index]
    inside = reference > 0
    error = float(((value.cpu().double() - reference) / reference)[inside].mean())
    product = next(it.launch for it in records if "PRECISION" in it.launch.constants)
    assert product.constants["PRECISION"] == "tf32"
    if rounds_to_tf32(product):
        assert abs(error) < 2.0**-14, error
    else:
        # Two factors, each too small by less than 2^-10.
        assert -(2.0**-9) < error < 0, error
