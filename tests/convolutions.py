"""Convolution problems with their references, as the tests of every kernel family that serves them use them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch

from fastconv.kernels import dispatch
from fastconv.kernels.launch.launch import LaunchRecord, record
from fastconv.kernels.ops import conv
from fastconv.kernels.problem.conv import DIRECTIONS, ConvProblem, conv_problem
from fastconv.kernels.problem.layout import strides_like
from fastconv.reference.conv import both_sides, pad_argument
from reference import assert_close, assert_equal, exact_limit, integers
from tests.marks import DEVICE

# What `expected` and `computed` give.
RESULTS = (*DIRECTIONS, "bias gradient")


@dataclass(frozen=True)
class Case:
    name: str
    n: int
    c: int
    k: int
    size: tuple[int, ...]
    filter: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    after: tuple[int, ...] | None = None  # trailing padding; None: as the leading one

    def problem(self, dtype: torch.dtype = torch.float32) -> ConvProblem:
        rank = len(self.size)
        before = self.padding or (0,) * rank
        return conv_problem(
            (self.n, self.c, *self.size),
            (self.k, self.c // self.groups, *self.filter),
            (self.k,),
            self.stride or (1,) * rank,
            (*before, *(before if self.after is None else self.after)),
            self.dilation or (1,) * rank,
            self.groups,
            dtype,
        )


def trailing(problem: ConvProblem) -> tuple[int, ...]:
    """The trailing padding, negative where pixels are left over, that gives exactly the problem's output."""
    sizes = problem.input_size, problem.output_size, problem.filter_size
    return both_sides(sizes, problem.stride, problem.padding, problem.dilation)[problem.rank :]


def expected(problem: ConvProblem, x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """fprop, dgrad, wgrad and the bias's gradient by PyTorch, in the operands' dtype (fp64)."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    sides = pad_argument(problem.padding + trailing(problem))
    function = (torch.conv1d, torch.conv2d, torch.conv3d)[problem.rank - 1]
    padded = torch.nn.functional.pad(x, sides)
    y = function(padded, weight, None, problem.stride, 0, problem.dilation, problem.groups)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    return y.detach(), dx, dw, dy.transpose(0, 1).flatten(1).sum(1)


def computed(
    problem: ConvProblem, x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, channels_last: bool = True
) -> tuple[torch.Tensor, ...]:
    """The same four by our kernels, from tensors in either memory format."""

    def operand(t: torch.Tensor) -> torch.Tensor:
        t = t.to(problem.dtype).to(DEVICE)
        return t.new_empty_strided(t.shape, strides_like(t.shape, channels_last)).copy_(t)

    x, dy, weight = map(operand, (x, dy, weight))
    _, padding, *rest = arguments = problem.stride, problem.padding, problem.dilation, problem.groups
    return (
        conv.conv_fprop(x, weight, None, problem.stride, padding + trailing(problem), *rest),
        conv.conv_dgrad(dy, weight, None, problem.input_size, *arguments, channels_last),
        conv.conv_wgrad(x, dy, problem.filter_size, *arguments, channels_last),
        conv.channel_sum(dy),
    )


def depths(problem: ConvProblem) -> tuple[int, int, int, int]:
    """Products summed for one element of fprop, dgrad, wgrad and the bias's gradient."""
    c, k = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    return c * problem.taps, k * problem.taps, problem.output_pixels, problem.output_pixels


_FAMILIES = ("conv_rows", "conv_depthwise", "conv_pixels", "conv_gemm", "conv_spatial")


def products_of(records: Iterable[LaunchRecord]) -> list[str]:
    """The kernels launched, a convolution's by the gather's name whichever family served it, its weight's packing left
    out."""
    names = [record.name for record in records if record.name != "conv_rows_weight_kernel"]
    for family in _FAMILIES:
        names = [name.replace(f"{family}_wgrad", "conv_wgrad").replace(family, "conv_gather") for name in names]
    return names


def check_exact(problem: ConvProblem, channels_last: bool) -> list[LaunchRecord]:
    """All four on integers, bit for bit; the launches that they took."""
    limit = exact_limit(problem.dtype, max(depths(problem)))
    generator = torch.Generator().manual_seed(0)
    shapes = problem.input_shape, problem.output_shape, problem.weight_shape
    operands = [integers(shape, limit, generator) for shape in shapes]
    with record() as records:
        values = computed(problem, *operands, channels_last)
    for name, value, reference in zip(RESULTS, values, expected(problem, *operands), strict=True):
        assert_equal(value, reference, f"{name} of {problem.describe()}")
    return records


def check_random(problem: ConvProblem) -> None:
    """All four on random values, within the roundings of their sums."""
    generator = torch.Generator().manual_seed(0)
    shapes = problem.input_shape, problem.output_shape, problem.weight_shape
    operands = [torch.randn(shape, generator=generator).to(problem.dtype).double() for shape in shapes]
    magnitudes = expected(problem, *(operand.abs() for operand in operands))
    for name, value, reference, magnitude, depth in zip(
        RESULTS, computed(problem, *operands), expected(problem, *operands), magnitudes, depths(problem), strict=True
    ):
        # The GPU's default for fp32 is TF32, as PyTorch's is: operands of a matrix product keep 10 bits of fraction.
        tf32 = 0.0
        if problem.dtype is torch.float32 and DEVICE == "cuda" and name in DIRECTIONS:
            family = dispatch.plan(name, problem, dispatch.target(value.device)).family
            tf32 = 0.0 if family == "depthwise" else 2.0**-10
        assert_close(value, reference, magnitude, depth, f"{name} of {problem.describe()}", tf32)


@cache
def of_networks(networks: tuple[str, ...], batches: tuple[int, ...]) -> tuple[tuple[ConvProblem, bool], ...]:
    """The distinct convolutions of the layer lists of that name, in bf16, each with whether it has a bias. A transposed
    one is the problem whose dgrad it is, which has none."""
    # Not at the top: what reads lists needs the packages of the command line.
    from fastconv.benchmarks.layer_lists import find

    calls = [call for network in networks for call in find(network).calls if not call.pool]
    biased = [(call, call.shapes[2] is not None and not call.transposed) for call in calls]
    each = ((call.with_batch(n).problem(torch.bfloat16), bias) for n in batches for call, bias in biased)
    return tuple(dict.fromkeys(each))
