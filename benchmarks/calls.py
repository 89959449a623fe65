"""A convolution or a pool as a network calls it, and how calls are read off a network without computing anything."""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fastconv.functional
from fastconv.arguments import expand
from fastconv.functional.conv import padding_sides
from fastconv.kernels.problem.conv import ConvProblem, conv_problem, conv_transpose_problem

FIRST_LAYER_CHANNELS = 4
TENSORS = ("input", "weight", "bias")
LARGE = 2**28  # bytes of an input that no cache holds a part of, so that a share of the bandwidth is owed
MOST_BATCHES = 8  # the largest factor by which a batch is enlarged for that
TINY = {"batch": 2, "groups": 8, "width": 32, "size": 4}  # limits of what an interpreter runs; the size is the least
KEEPING = "forward, training"  # a pass forward that keeps what backward reads
TOGETHER = "together"  # forward and all gradients, as a training step has them
ORDER = ("fprop", "dgrad", "wgrad", "forward", KEEPING, "backward", TOGETHER)


@dataclass(frozen=True)
class Operator:
    """A call of a function that torch.nn.functional and fastconv.functional both have."""

    function: str  # "conv2d"
    shapes: tuple[tuple[int, ...] | None, ...]  # the input's; a convolution's weight's and bias's
    arguments: tuple[tuple[str, Any], ...]  # all but the tensors
    needs_dx: bool  # false for an image, a first layer's input

    @property
    def input(self) -> tuple[int, ...]:
        assert self.shapes[0] is not None
        return self.shapes[0]

    @property
    def batch(self) -> int:
        return self.input[0]

    @property
    def pool(self) -> bool:
        return "pool" in self.function

    @property
    def transposed(self) -> bool:
        return "transpose" in self.function

    @property
    def groups(self) -> int:
        return dict(self.arguments).get("groups", 0)

    @property
    def output(self) -> tuple[int, ...]:
        """The shape of its result. Raises what torch raises for an impossible call."""
        return _output(self)

    def problem(self, dtype: torch.dtype) -> ConvProblem:
        """A convolution as a kernel's problem; a transposed one is its dgrad. Raises what torch raises for an
        impossible call."""
        weight, bias = self.shapes[1:]
        assert weight is not None
        arguments, rank = dict(self.arguments), len(self.input) - 2
        groups, padding = arguments.pop("groups"), arguments.pop("padding")
        sides: dict[str, tuple[int, ...]] = {name: expand(name, value, rank) for name, value in arguments.items()}
        if self.transposed:
            sides["padding"] = expand("padding", padding, rank)
            return conv_transpose_problem(self.input, weight, bias, groups=groups, dtype=dtype, **sides)
        sides["padding"] = padding_sides(padding, weight[2:], sides["stride"], sides["dilation"])
        return conv_problem(self.input, weight, bias, groups=groups, dtype=dtype, **sides)

    @property
    def elements(self) -> int:
        """How many input, weight and output have together."""
        return sum(math.prod(shape) for shape in (*self.shapes[:2], self.output) if shape)

    @property
    def multiplications(self) -> int:
        """One direction's; a pool has none."""
        if self.pool:
            return 0
        weight = self.shapes[1]
        assert weight is not None
        outputs = self.input if self.transposed else self.output
        return math.prod(outputs) * math.prod(weight[1:])

    @property
    def first(self) -> bool:
        """Whether it is a network's first layer: few channels, of an image."""
        return self.groups == 1 and self.input[1] <= FIRST_LAYER_CHANNELS and not self.needs_dx

    @property
    def directions(self) -> tuple[str, ...]:
        """What autograd runs for it, one by one, then all of a training step together."""
        if not self.pool:
            return ("fprop", *["dgrad"] * self.needs_dx, "wgrad", TOGETHER)
        # Only a maximum keeps something for backward.
        return ("forward", *[KEEPING] * ("max" in self.function), *["backward", TOGETHER] * self.needs_dx)

    @property
    def streams(self) -> bool:
        """Whether it can be held to a copy's bandwidth: pools and convolutions of stride 1."""
        return self.pool or dict(self.arguments).get("stride") == 1

    def with_batch(self, batch: int) -> Operator:
        return replace(self, shapes=((batch, *self.input[1:]), *self.shapes[1:]))

    def enlarged(self, itemsize: int) -> Operator | None:
        """With a batch that makes its input `LARGE`; None if it already is, or `MOST_BATCHES` do not suffice."""
        bytes_of_one = math.prod(self.input) * itemsize
        batches = next((2**i for i in range(8) if bytes_of_one << i >= LARGE), MOST_BATCHES + 1)
        return self.with_batch(self.batch * batches) if 1 < batches <= MOST_BATCHES else None

    def tiny(self) -> Operator:
        """The operator with a small batch, few channels and an image as small as its window allows."""
        arguments = dict(self.arguments)
        batch, channels, *sizes = self.input
        batch = min(batch, TINY["batch"])
        if self.pool:
            window = arguments.get("kernel_size", arguments.get("output_size"))
            least = _each(window, len(sizes)), _each(arguments.get("dilation", 1), len(sizes))
            shapes: tuple[tuple[int, ...] | None, ...] = (
                (batch, min(channels, TINY["width"]), *map(_tiny_size, sizes, *least)),
            )
            return replace(self, shapes=shapes)
        weight = self.shapes[1]
        assert weight is not None
        groups = min(self.groups, TINY["groups"])
        mine, others = (min(c, TINY["width"]) for c in (weight[0] // self.groups, weight[1]))
        inside, outside = (mine, others) if self.transposed else (others, mine)
        least = weight[2:], _each(arguments["dilation"], len(sizes))
        return replace(
            self,
            shapes=(
                (batch, groups * inside, *map(_tiny_size, sizes, *least)),
                (groups * mine, others, *weight[2:]),
                None if self.shapes[2] is None else (groups * outside,),
            ),
            arguments=tuple((arguments | {"groups": groups}).items()),
        )


@cache
def _output(operator: Operator) -> tuple[int, ...]:
    if operator.pool:
        call = getattr(F, operator.function)
        return tuple(call(torch.empty(operator.input, device="meta"), **dict(operator.arguments)).shape)
    problem = operator.problem(torch.float32)
    return problem.input_shape if operator.transposed else problem.output_shape


def _each(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(v or 1 for v in value) if isinstance(value, tuple) else (value,) * rank


def _tiny_size(size: int, window: int, dilation: int) -> int:
    return min(size, max(TINY["size"], dilation * (window - 1) + 1))


class _CallCounter(TorchFunctionMode):
    """Counts the calls of functions that fastconv has too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Operator] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in fastconv.functional.__all__ and hasattr(F, name):
            bound = inspect.signature(getattr(fastconv.functional, name)).bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            operator = Operator(
                name,
                tuple(None if given[key] is None else tuple(given[key].shape) for key in TENSORS if key in given),
                tuple((key, plain(value)) for key, value in given.items() if key not in TENSORS),
                given["input"].requires_grad,
            )
            self.found[operator] += 1
        return func(*args, **kwargs)


def plain(value: Any) -> Any:
    """An argument in the one spelling that is kept: a number if all axes share it, else a tuple."""
    if not isinstance(value, (list, tuple)):
        return value
    return value[0] if len(set(value)) == 1 and value[0] is not None else tuple(value)


def read_off(model: nn.Module, input_shape: tuple[int, ...]) -> Counter[Operator]:
    """The distinct calls of ``model`` on one batch, with how often it makes each. Runs it on the meta device: no
    arithmetic. Raises whatever the model raises there."""
    model = copy.deepcopy(model).to("meta").eval()  # a small image may have maps of one pixel
    with _CallCounter() as calls:
        model(torch.empty(input_shape, device="meta"))
    return calls.found
