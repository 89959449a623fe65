"""A call that nobody watches goes past PyTorch's dispatcher, and every other through it, to the same result."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv.functional as F
from fastconv.autograd import operators
from tests.marks import DEVICE, runs_kernels

pytestmark = runs_kernels


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def overloads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What was found of each call."""
    found: list[bool] = []
    unseen = operators._unseen
    monkeypatch.setattr(operators, "_unseen", lambda args: found.append(unseen(args)) or found[-1])
    return found


def _step(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    y = F.max_pool2d(F.conv2d(x, weight, padding=1), 2)
    return y, *torch.autograd.grad(y.sum(), (x, weight))


@pytest.fixture
def operands() -> tuple[Tensor, Tensor]:
    x, weight = (torch.randint(-3, 4, shape, device=DEVICE).float() for shape in ((2, 4, 6, 6), (8, 4, 3, 3)))
    return x.requires_grad_(), weight.requires_grad_()


def test_nobody_watches(operands: tuple[Tensor, Tensor], overloads: list[bool]) -> None:
    _step(*operands)
    assert overloads == [True] * 5  # two forward; the pool's and two of the convolution's gradients


def test_a_profiler_and_a_mode_see_every_operator(operands: tuple[Tensor, Tensor]) -> None:
    expected = _step(*operands)
    names = {
        f"fastconv::{name}" for name in ("conv_fprop", "conv_dgrad", "conv_wgrad", "max_pool", "max_pool_backward")
    }
    with torch.profiler.profile() as profile:
        profiled = _step(*operands)
    assert names <= {event.key for event in profile.key_averages()}
    with torch.autograd.set_multithreading_enabled(False), Seen() as seen:
        watched = _step(*operands)
    assert names <= seen.names
    for each in (profiled, watched):
        assert all(map(torch.equal, each, expected))


def test_a_subclass_decides_what_runs(operands: tuple[Tensor, Tensor]) -> None:
    x, weight = (t.detach() for t in operands)
    y = F.conv2d(TwoTensor(x, 2 * x), weight)
    assert type(y) is TwoTensor
    assert torch.equal(y.a, F.conv2d(x, weight)) and torch.equal(y.b, 2 * y.a)


def test_a_tensor_that_a_transform_left_over_is_unwrapped(operands: tuple[Tensor, Tensor]) -> None:
    x, weight = operands
    left: list[Tensor] = []
    torch.func.grad(lambda t: (left.append(t), (t * 1).sum())[1])(x.detach())
    assert torch.equal(F.conv2d(left[0], weight.detach()), F.conv2d(x, weight))
    (gradient,) = torch.autograd.grad(F.conv2d(left[0], weight).sum(), weight)
    assert torch.equal(gradient, torch.autograd.grad(F.conv2d(x, weight).sum(), weight)[0])
