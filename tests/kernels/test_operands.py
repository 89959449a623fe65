"""Every operand of every operator as a view: strided, offset, expanded, overlapping. The result is that of its values.

Values are small integers, so that sums are equal whichever kernels serve the two calls.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

import fastconv.functional as F
from convolutions import DEVICE
from fastconv.autograd import operators
from tests.marks import runs_kernels
from views import KEEPING, VIEWS, dense

pytestmark = runs_kernels
WINDOW = [2, 3], [2, 1], [0, 0], [1, 1]
SHARES: tuple[list[int], ...] = [], [], [], []
STRIDE, PADDING, DILATION = [2, 1], [1, 0], [1, 1]
HOW = 0.5, "leaky_relu", 0.25, 0.0, False


def numbers(*shape: int, least: int = -3) -> Tensor:
    return torch.randint(least, 4, shape).float().to(DEVICE)


def norm(k: int) -> tuple[Tensor, ...]:
    """Mean, variance, weight, bias and PReLU's slope [k]."""
    return numbers(k), numbers(k, least=1), numbers(k), numbers(k), numbers(k)


def taps(*shape: int, below: int = 6) -> Tensor:
    return torch.randint(below, shape).to(torch.uint8).to(DEVICE)


def convolution(k: int = 4, c: int = 6, groups: int = 1, filter: tuple[int, int] = (3, 2)) -> tuple[Tensor, ...]:
    """x, weight, bias; y [2, k, 3, 4]."""
    height, width = 2 * 2 + filter[0] - 2, 3 + filter[1]
    return numbers(2, c, height, width), numbers(k, c // groups, *filter), numbers(k)


ARGUMENTS = STRIDE, [*PADDING, *PADDING], DILATION
LEADING = STRIDE, PADDING, DILATION
# Name, which begins with the operator's -> what makes its arguments.
CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "conv_fprop": lambda: (*convolution(), *ARGUMENTS, 1),
    "conv_fprop grouped": lambda: (*convolution(groups=2), *ARGUMENTS, 2),
    "conv_fprop depthwise": lambda: (*convolution(6, 6, 6), *ARGUMENTS, 6),
    "conv_dgrad": lambda: (numbers(2, 4, 3, 4), numbers(4, 6, 3, 2), numbers(6), [4, 5], *LEADING, 1, True),
    "conv_dgrad depthwise": lambda: (numbers(2, 6, 3, 4), numbers(6, 1, 3, 2), None, [4, 5], *LEADING, 6, False),
    "conv_wgrad": lambda: (numbers(2, 6, 4, 5), numbers(2, 4, 3, 4), [3, 2], *LEADING, 2, 0),
    "conv_wgrad depthwise": lambda: (numbers(2, 6, 4, 5), numbers(2, 6, 3, 4), [3, 2], *LEADING, 6, 1),
    "channel_sum": lambda: (numbers(2, 4, 3, 5),),
    "conv_act": lambda: (*convolution(), *norm(4), numbers(2, 4, 3, 4), None, *ARGUMENTS, 1, *HOW),
    "conv_act depthwise": lambda: (
        *(*convolution(6, 6, 6), *norm(6), numbers(2, 6, 3, 4)),
        *(None, *ARGUMENTS, 6, *HOW[:4], True),
    ),
    "conv_act transposed": lambda: (
        *(numbers(2, 4, 3, 4), numbers(4, 6, 3, 2), numbers(6), *norm(6), numbers(2, 6, 4, 5)),
        *([4, 5], *LEADING, 1, *HOW),
    ),
    "conv_statistics": lambda: (*convolution(), None, *ARGUMENTS, 1),
    "batch_norm_act": lambda: (numbers(2, 4, 3, 5), *norm(4), numbers(2, 4, 3, 5), *HOW, True),
    "batch_norm_act_sums": lambda: (*[numbers(2, 4, 3, 5)] * 3, *norm(4), numbers(2, 4, 3, 5), *HOW),
    "batch_norm_act_gradient": lambda: (
        *(*[numbers(2, 4, 3, 5)] * 3, *norm(4), numbers(2, 4, 3, 5)),
        *(numbers(3, 4), 30, *HOW, True),
    ),
    "max_pool": lambda: (numbers(2, 3, 6, 5), [3, 3], *WINDOW, True),
    "max_pool adaptive": lambda: (numbers(2, 3, 6, 5), [3, 2], *SHARES, True),
    "max_pool_backward": lambda: (numbers(2, 3, 3, 3), taps(2, 3, 3, 3), [6, 5], *WINDOW, True),
    "max_pool_backward planes": lambda: (numbers(2, 3, 3, 3), taps(2, 3, 3, 3), [6, 5], *WINDOW, False),
    "max_pool_gather": lambda: (taps(2, 3, 3, 3), numbers(2, 3, 6, 5), *WINDOW, True),
    "max_pool_gather planes": lambda: (taps(2, 3, 3, 3), numbers(2, 3, 6, 5), *WINDOW, False),
    "max_pool_indices": lambda: (taps(2, 3, 3, 3), [6, 5], *WINDOW, True),
    "average_pool": lambda: (numbers(2, 3, 6, 5), [3, 3], *WINDOW[:3], True, 0),
    "average_pool_backward": lambda: (numbers(2, 3, 3, 3), [6, 5], *WINDOW[:3], True, 0, True),
    "lp_pool": lambda: (numbers(2, 3, 6, 5, least=1), [3, 3], *WINDOW[:2], 3.0),
    "lp_pool_backward": lambda: (
        *(numbers(2, 3, 3, 3), numbers(2, 3, 3, 3, least=1), numbers(2, 3, 6, 5, least=1)),
        *(*WINDOW[:2], 3.0, True),
    ),
}


def test_every_operator_is_among_them() -> None:
    assert {overload._schema.name.removeprefix("fastconv::") for overload in operators.implementations} == {
        name.split()[0] for name in CALLS
    }


@pytest.mark.parametrize("name", CALLS)
def test_views_are_their_values(name: str) -> None:
    operator = getattr(torch.ops.fastconv, name.split()[0]).default
    arguments = CALLS[name]()

    def call(view: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        found = operator(*(view(it) if isinstance(it, Tensor) else it for it in arguments))
        return found if isinstance(found, tuple) else (found,)

    values = call(torch.clone)
    for name, view in VIEWS.items():
        expected = values if name in KEEPING else call(lambda t, view=view: dense(view(t)))
        for index, (found, reference) in enumerate(zip(call(view), expected, strict=True)):
            assert torch.equal(found, reference), f"result {index} of operands {name}"


def test_sizes_of_one_have_no_strides() -> None:
    """One image, one channel, one output and one row at once."""
    x, weight, vector = numbers(1, 1, 1, 5), numbers(1, 1, 1, 3), numbers(1)
    odd = count(7)

    def view(t: Tensor) -> Tensor:
        return t.as_strided(
            t.shape, [next(odd) if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
        )

    arguments = [1, 1], [0, 0, 0, 0], [1, 1], 1
    operands = x, weight, *[vector] * 6, numbers(1, 1, 1, 3)
    var = vector.abs() + 1
    operands = (*operands[:4], var, *operands[5:])
    expected = torch.ops.fastconv.conv_act(*operands, None, *arguments, *HOW)
    assert torch.equal(torch.ops.fastconv.conv_act(*map(view, operands), None, *arguments, *HOW), expected)
    y, taps = torch.ops.fastconv.max_pool(x, [1, 2], [1, 3], [1, 2], [0, 0], [1, 1], True)
    viewed = torch.ops.fastconv.max_pool(view(x), [1, 2], [1, 3], [1, 2], [0, 0], [1, 1], True)
    assert torch.equal(viewed[0], y) and torch.equal(viewed[1], taps)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_operands_stored_negated(which: str, requires_grad: bool) -> None:
    """The imaginary part of a conjugate is: its memory holds the other sign, and its type does not tell."""
    x, weight, bias = (t.requires_grad_(requires_grad) for t in convolution())
    operands = {"x": x, "weight": weight, "bias": bias}
    expected = F.conv2d(**{("input" if k == "x" else k): t for k, t in operands.items()})
    operands[which] = torch.complex(numbers(*operands[which].shape), -operands[which]).conj().imag
    assert operands[which].is_neg()
    y = F.conv2d(operands["x"], operands["weight"], operands["bias"])
    assert torch.equal(y, expected)
    parameter = torch.nn.Parameter(operands[which].detach(), requires_grad)
    assert parameter.is_neg()
    assert torch.equal(F.conv2d(*({**operands, which: parameter}).values()), expected)
    if requires_grad:
        dy = numbers(*y.shape)
        negated = torch.complex(dy, -dy).conj().imag
        assert torch.equal(*(torch.autograd.grad(y, x, d, retain_graph=True)[0] for d in (dy, negated)))


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "images of wgrad": (
        lambda: torch.ops.fastconv.conv_wgrad(numbers(3, 6, 4, 5), numbers(2, 4, 3, 4), [3, 2], *LEADING, 1, 0),
        "as many images",
    ),
    "channels of wgrad": (
        lambda: torch.ops.fastconv.conv_wgrad(numbers(2, 5, 4, 5), numbers(2, 4, 3, 4), [3, 2], *LEADING, 2, 0),
        "2 groups",
    ),
    "sums": (
        lambda: torch.ops.fastconv.batch_norm_act_gradient(
            *([numbers(2, 4, 3, 5)] * 2), None, *norm(4), None, numbers(2, 4), 30, *HOW, False
        ),
        r"sums of shape \[3, 4\]",
    ),
    "the output of a batch norm": (
        lambda: torch.ops.fastconv.batch_norm_act_sums(
            numbers(2, 4, 3, 5), numbers(2, 4, 3, 4), None, *norm(4), None, *HOW
        ),
        r"\[2, 4, 3, 4\]",
    ),
    "a mean": (
        lambda: torch.ops.fastconv.batch_norm_act_sums(
            *([numbers(2, 4, 3, 5)] * 2), None, numbers(3), *norm(4)[1:], None, *HOW
        ),
        "running_mean should contain 4 elements",
    ),
    "taps": (
        lambda: torch.ops.fastconv.max_pool_backward(numbers(2, 3, 3, 3), taps(2, 3, 3, 2), [6, 5], *WINDOW, True),
        r"\[2, 3, 3, 2\]",
    ),
    "a type of taps": (
        lambda: torch.ops.fastconv.max_pool_indices(numbers(2, 3, 3, 3), [6, 5], *WINDOW, True),
        "float32",
    ),
    "images of a gather": (
        lambda: torch.ops.fastconv.max_pool_gather(taps(2, 3, 3, 3), numbers(1, 3, 6, 5), *WINDOW, True),
        r"\[1, 3, 6, 5\]",
    ),
    "norms": (
        lambda: torch.ops.fastconv.lp_pool_backward(
            numbers(2, 3, 3, 3), numbers(2, 3, 3, 3).half(), numbers(2, 3, 6, 5), *WINDOW[:2], 3.0, True
        ),
        "float16",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_operands_that_do_not_fit_are_named(name: str) -> None:
    """An operator called without the checks of a user's call must read only its operands."""
    call, message = BAD[name]
    with pytest.raises(RuntimeError, match=message):
        call()
