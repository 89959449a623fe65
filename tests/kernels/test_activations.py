"""Every activation and derivative of the kernels against PyTorch's, over a dense grid, at kinks and past the finite."""

from dataclasses import dataclass
from math import inf, nan

import pytest
import torch
import triton
import triton.language as tl

from fastconv.activations import activation_of, has_fused_form
from fastconv.kernels.jit.activations import ACTIVATIONS
from fastconv.kernels.launch import interpreter
from tests.marks import DEVICE, runs_kernels

if interpreter.interpreting():
    interpreter.apply()
pytestmark = runs_kernels
EPS = torch.finfo(torch.float32).eps


@triton.jit
def both_kernel(
    x_ptr, y_ptr, d_ptr, size, a, b, ACT: tl.constexpr, DERIVATIVE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    tl.store(y_ptr + offs, ACT(x, a, b), mask=mask)
    tl.store(d_ptr + offs, DERIVATIVE(x, a, b), mask=mask)


@dataclass(frozen=True)
class Case:
    act: str
    a: float = 0.0
    b: float = 0.0
    kinks: tuple[float, ...] = (0.0,)

    def __str__(self) -> str:
        return f"{self.act} {self.a:g} {self.b:g}"


CASES = (
    *(Case(name) for name in ("identity", "relu", "silu", "sigmoid", "gelu", "gelu_tanh")),
    Case("tanh", kinks=(0.0, 0.15, -0.15)),  # where its series ends
    Case("hardswish", kinks=(-3.0, 0.0, 3.0)),
    Case("hardsigmoid", kinks=(-3.0, 3.0)),
    Case("hardtanh", -1.0, 1.0, (-1.0, 1.0)),
    Case("hardtanh", 0.0, 6.0, (0.0, 6.0)),
    Case("hardtanh", -0.3, 0.7, (-0.3, 0.7)),
    Case("leaky_relu", 0.01),
    Case("leaky_relu", -0.5),
    Case("prelu", 0.25),
    Case("prelu", -1.5),
    Case("elu", 1.0),
    Case("elu", 0.5),
    Case("softplus", 1.0, 20.0, (20.0,)),
    Case("softplus", 2.0, 5.0, (2.5,)),
    Case("softplus", 0.5, 30.0, (60.0,)),
    Case("mish", kinks=(20.0,)),
)
BOTH = ("forward", "derivative")
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def computed(case: Case, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.float().to(DEVICE)
    y, derivative = torch.full_like(x, nan), torch.full_like(x, nan)
    act = ACTIVATIONS[case.act]
    block = 1 << 16
    grid = (triton.cdiv(x.numel(), block),)
    with interpreter.LOCK:
        both_kernel[grid](x, y, derivative, x.numel(), case.a, case.b, act.forward, act.derivative, block)
    return y.cpu(), derivative.cpu()


def expected(case: Case, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's line and its backward, in x's dtype, with the parameters as the kernels get them, in fp32."""
    a, b = torch.tensor([case.a, case.b]).tolist()
    x = x.detach().clone().requires_grad_()
    y = ACTIVATIONS[case.act].torch(x, torch.tensor([a], dtype=x.dtype) if case.act == "prelu" else a, b)
    (derivative,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), derivative


def assert_within_ulps(value: torch.Tensor, reference: torch.Tensor, x: torch.Tensor, ulps: int, what: str) -> None:
    """Within ``ulps`` fp32 roundings of the result and of the numbers around x and 1 that it is computed from."""
    bound = ulps * EPS * (reference.abs() + x.abs() + 1.0)
    error = (value.double() - reference).abs()
    wrong = ~(error <= bound)  # so that a NaN fails
    if bool(wrong.any()):
        at = int(torch.where(wrong, torch.nan_to_num(error / bound, nan=inf), 0.0).argmax())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} differ; at x = {x[at].item()!r}: {value[at].item()!r}, "
            f"expected {reference[at].item()!r} within {bound[at].item():.1e}"
        )


def neighbours(points: torch.Tensor) -> torch.Tensor:
    up, down = (torch.nextafter(points, torch.full_like(points, end)) for end in (inf, -inf))
    return torch.cat([down, points, up])


@each_case
def test_dense_grid_and_every_magnitude(case: Case) -> None:
    """Numbers every 0.001 about 0, then from the smallest denormal to 10,000."""
    magnitudes = torch.logspace(-45, 4, 1 << 12, dtype=torch.float64).float()
    denormals = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 1.1754942e-38, -1.1754942e-38])
    x = torch.cat([torch.linspace(-30, 30, 60001), magnitudes, -magnitudes, denormals])
    # The next test takes the kinks: fp64 has other neighbours than fp32.
    for value, reference, what in zip(computed(case, x), expected(case, x.double()), BOTH, strict=True):
        assert_within_ulps(value, reference, x.double(), 2, f"{case} {what}")


@each_case
def test_at_its_kinks_and_beside_them(case: Case) -> None:
    """PyTorch chooses which of two derivatives holds at a kink; the size of the jump tells them apart."""
    x = neighbours(torch.tensor([*case.kinks, 0.0, -0.0]))
    for value, reference, what in zip(computed(case, x), expected(case, x), BOTH, strict=True):
        assert_within_ulps(value, reference.double(), x.double(), 4, f"{case} {what}")


@each_case
def test_past_the_finite(case: Case) -> None:
    x = torch.tensor([inf, -inf, nan, 1e18, -1e18])
    # PyTorch's inf * 0 is a NaN in places where the kernels find the limit.
    for value, reference, what in zip(computed(case, x), expected(case, x.double()), BOTH, strict=True):
        sure = ~(reference.isnan() & ~x.isnan())
        if what == "derivative":
            # PyTorch's kernels disagree with themselves about a NaN's derivative, by chunk or by element.
            sure &= ~x.isnan()
        torch.testing.assert_close(value[sure], reference[sure].float(), equal_nan=True, msg=f"{case} {what}")
    assert computed(case, x)[0][x.isnan()].isnan().all(), "a NaN goes through"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if ACTIVATIONS[case.act].from_output], ids=str)
def test_derivative_from_the_output_is_the_one_from_the_input(case: Case, dtype: torch.dtype) -> None:
    """Narrow outputs too: backward takes the derivative from a rounded value, and so must the reference."""
    x = torch.linspace(-8, 8, 4001)
    y, derivative = computed(case, x)
    rounded = Case(case.act, *torch.tensor([case.a, case.b]).to(dtype).tolist())
    from_output = computed(rounded, y.to(dtype))[1]
    # Where rounding moves an inner value onto the bound or over it, PyTorch's in-place form says 0 as well.
    inside = (derivative != 0) & (y.to(dtype).float() != y)
    assert torch.equal(from_output[~inside], derivative[~inside])


def test_every_activation_has_a_case() -> None:
    assert {case.act for case in CASES} == set(ACTIVATIONS)


MODULES = (
    (torch.nn.Identity(), "identity"),
    (torch.nn.ReLU(), "relu"),
    (torch.nn.ReLU(inplace=True), "relu"),
    (torch.nn.ReLU6(), "hardtanh"),
    (torch.nn.Hardtanh(-2.0, 0.5), "hardtanh"),
    (torch.nn.LeakyReLU(0.3), "leaky_relu"),
    (torch.nn.PReLU(4), "prelu"),
    (torch.nn.ELU(0.7), "elu"),
    (torch.nn.SiLU(), "silu"),
    (torch.nn.Hardswish(), "hardswish"),
    (torch.nn.Hardsigmoid(), "hardsigmoid"),
    (torch.nn.Sigmoid(), "sigmoid"),
    (torch.nn.Tanh(), "tanh"),
    (torch.nn.GELU(), "gelu"),
    (torch.nn.GELU(approximate="tanh"), "gelu_tanh"),
    (torch.nn.Softplus(2.0, 7.0), "softplus"),
    (torch.nn.Mish(), "mish"),
)


@pytest.mark.parametrize(("module", "name"), MODULES, ids=lambda value: str(value))
def test_a_module_means_what_it_computes(module: torch.nn.Module, name: str) -> None:
    act, a, b, slope = activation_of(module)
    assert act == name and has_fused_form(module)
    x = torch.linspace(-9, 9, 4 * 50).view(1, 4, 50)
    torch.testing.assert_close(ACTIVATIONS[act].torch(x, a if slope is None else slope, b), module(x))


@pytest.mark.parametrize(
    "name", ["relu", "relu6", "leaky_relu", "elu", "silu", "hardswish", "hardsigmoid", "gelu", "softplus", "mish"]
)
def test_a_name_means_torch_nn_functionals(name: str) -> None:
    act, a, b, _ = activation_of(name)
    x = torch.linspace(-9, 25, 500)
    assert has_fused_form(name)
    torch.testing.assert_close(ACTIVATIONS[act].torch(x, a, b), getattr(torch.nn.functional, name)(x))


def test_nothing_is_the_identity() -> None:
    assert activation_of(None)[0] == "identity" and has_fused_form(None)


class Shouting(torch.nn.ReLU):
    """A subclass may compute anything."""


@pytest.mark.parametrize("act", [torch.nn.CELU(), torch.nn.Softmax(1), Shouting(), "prelu", "swish"], ids=str)
def test_an_activation_without_a_fused_form_is_a_value_error(act: str | torch.nn.Module) -> None:
    assert not has_fused_form(act)
    with pytest.raises(ValueError, match=r"no fused form; these have: .*relu.*ReLU"):
        activation_of(act)
