"""The problems of ``fastconv check``: each a way in which an index, a mask or a tail can be wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

import fastconv
import fastconv.functional as ours
from fastconv.cli.measure.accuracy import fp32_convolutions, max_error, tolerance
from fastconv.kernels import launch

DIRECTIONS = ("forward", "input gradient", "weight gradient", "bias gradient")
TF32_EPS = 2.0**-10  # products of operands rounded to 11 bits


@dataclass(frozen=True)
class Case:
    """One call of ``conv{rank}d`` or ``conv_transpose{rank}d``; ``weight`` as that function takes it."""

    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False
    layout: str = "channels_last"  # of the input, or "contiguous", or "strided"

    @property
    def function(self) -> str:
        return f"conv{'_transpose' if self.transposed else ''}{len(self.weight) - 2}d"


CASES = (
    Case("3x3, padding 1", (2, 16, 9, 9), (32, 16, 3, 3), {"padding": 1}),
    Case("1x1, tails of 3 channels", (3, 19, 7, 5), (35, 19, 1, 1)),
    Case("C=1, 5x5", (4, 1, 12, 12), (6, 1, 5, 5), {"padding": 2}),
    Case("C=3, 7x7, stride 2", (2, 3, 17, 19), (8, 3, 7, 7), {"stride": 2, "padding": 3}),
    Case("1x1, stride 2: pixels no tap reaches", (2, 16, 8, 7), (32, 16, 1, 1), {"stride": 2}),
    Case("stride 3 over 2x2", (2, 8, 11, 10), (16, 8, 2, 2), {"stride": 3}),
    Case(
        "asymmetric everything",
        *((2, 6, 13, 8), (10, 6, 3, 2)),
        {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)},
    ),
    Case("dilation 3 beyond the image", (1, 8, 5, 6), (8, 8, 3, 3), {"padding": 3, "dilation": 3}),
    Case("dilation 2, stride 3", (2, 5, 14, 13), (9, 5, 3, 3), {"padding": 2, "dilation": 2, "stride": 3}),
    Case("padding 'same', even filter", (2, 5, 8, 8), (7, 5, 4, 4), {"padding": "same"}),
    Case("padding larger than the filter", (1, 4, 5, 5), (4, 4, 3, 3), {"padding": 4}),
    Case("filter as large as the image", (3, 6, 6, 7), (11, 6, 6, 7)),
    Case("4 groups", (2, 20, 6, 6), (12, 5, 3, 3), {"padding": 1, "groups": 4}),
    Case("depthwise, stride 2", (2, 7, 8, 8), (14, 1, 3, 3), {"padding": 1, "stride": 2, "groups": 7}),
    Case("one pixel, filter larger than the image", (5, 4, 1, 1), (3, 4, 3, 3), {"padding": 1}),
    Case("one channel to one", (1, 1, 5, 5), (1, 1, 1, 1)),
    Case("primes", (3, 37, 7, 11), (41, 37, 3, 1), {"padding": (1, 0)}),
    Case("many channels", (2, 150, 4, 4), (130, 150, 3, 3), {"padding": 1}),
    Case("many pixels", (1, 4, 61, 67), (5, 4, 3, 3), {"padding": 1}),
    Case("contiguous (NCHW) input", (2, 12, 9, 9), (16, 12, 3, 3), {"padding": 1}, layout="contiguous"),
    Case("every second pixel of a wider input", (2, 12, 9, 9), (16, 12, 3, 3), {"padding": 1}, layout="strided"),
    Case("unbatched", (6, 9, 9), (8, 6, 3, 3), {"padding": 1}, layout="contiguous"),
    Case("1d", (2, 12, 31), (10, 12, 5), {"stride": 2, "padding": 2}),
    Case("1d, dilation, groups", (2, 8, 40), (12, 4, 3), {"dilation": 4, "groups": 2}),
    Case("3d, stride 2", (1, 4, 5, 6, 7), (6, 4, 3, 3, 3), {"stride": 2, "padding": 1}),
    Case("3d, asymmetric", (1, 5, 4, 7, 6), (7, 5, 1, 3, 2), {"stride": (1, 2, 1), "padding": (0, 1, 1)}),
    Case("transposed 1d", (2, 6, 9), (6, 4, 4), {"stride": 3, "padding": 1, "output_padding": 2}, transposed=True),
    Case("transposed 2d", (2, 9, 5, 6), (9, 7, 4, 4), {"stride": 2, "padding": 1}, transposed=True),
    Case(
        "transposed 2d, groups",
        *((2, 8, 5, 6), (8, 3, 3, 3)),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
        transposed=True,
    ),
    Case("transposed 2d, stride over filter", (1, 5, 4, 3), (5, 6, 2, 2), {"stride": 3}, transposed=True),
    Case("transposed 2d, dilation", (1, 5, 6, 5), (5, 6, 3, 3), {"dilation": 2, "padding": 1}, transposed=True),
    Case("transposed 3d", (1, 3, 3, 4, 3), (3, 5, 2, 2, 2), {"stride": 2}, transposed=True),
)
QUICK_NAMES = (
    "3x3",
    "1x1",
    "C=3",
    "asymmetric",
    "4 groups",
    "primes",
    "contiguous",
    "1d",
    "3d",
    "transposed 2d, groups",
)
QUICK = tuple(case for case in CASES if case.name.startswith(QUICK_NAMES))


def precisions(device: torch.device) -> dict[str, tuple[torch.dtype, float]]:
    """What is checked on ``device``: name, dtype and rounding unit. The interpreter does not model TF32."""
    names = {
        "float32": (torch.float32, torch.finfo(torch.float32).eps),
        "tf32": (torch.float32, TF32_EPS),
        "float16": (torch.float16, torch.finfo(torch.float16).eps),
        "bfloat16": (torch.bfloat16, torch.finfo(torch.bfloat16).eps),
    }
    return names if device.type == "cuda" else {name: value for name, value in names.items() if name != "tf32"}


def compare(case: Case, precision: str, device: torch.device) -> Iterator[dict[str, Any]]:
    """Forward and every gradient of ``case`` against PyTorch in fp64 on the same values: one row each, with the
    kernels that computed it."""
    dtype, eps = precisions(device)[precision]
    generator = torch.Generator().manual_seed(0)
    bias = case.weight[1] * case.arguments.get("groups", 1) if case.transposed else case.weight[0]
    operands = [torch.randn(shape, generator=generator).to(dtype) for shape in (case.input, case.weight, (bias,))]
    wide = [operand.double().requires_grad_() for operand in operands]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same'")  # about a copy that PyTorch makes
        exact = getattr(F, case.function)(*wide, **case.arguments)
    seed = torch.randn(exact.shape, generator=generator).to(dtype)
    exact_gradients = torch.autograd.grad(exact, wide, seed.double())

    x, weight, b = (operand.to(device) for operand in operands)
    x, weight = _laid_out(x, case.layout), _laid_out(weight, "channels_last")
    function, seed = getattr(ours, case.function), seed.to(device)
    with fastconv.settings(strict=True), fp32_convolutions("tf32" if precision == "tf32" else "ieee"):
        with launch.record() as records:
            results = [function(x, weight, b, **case.arguments)]
        kernels = [[record.name for record in records]]
        for index in range(3):
            # One at a time, as where the others are frozen: each by its own kernels.
            leaves = [leaf.detach().requires_grad_(index == i) for i, leaf in enumerate((x, weight, b))]
            output = function(*leaves, **case.arguments)
            with launch.record() as records:
                results += torch.autograd.grad(output, leaves[index], seed)
            kernels.append([record.name for record in records])
    taps, pixels = math.prod(case.weight[2:]), exact.numel() // exact.shape[exact.dim() - len(case.weight) + 1]
    depths = (case.weight[1] * taps, case.weight[0] * taps, pixels, pixels)
    references = (exact.detach(), *exact_gradients)
    for direction, value, reference, names, depth in zip(DIRECTIONS, results, references, kernels, depths, strict=True):
        error, bound = max_error(value.cpu(), reference), tolerance(eps, depth)
        yield {
            "case": case.name,
            "function": case.function,
            "direction": direction,
            "precision": precision,
            "error": error,
            "tolerance": bound,
            "launches": names,
            # A NaN compares false; without a launch PyTorch computed what we were asked for.
            "right": error <= bound and bool(names) and value.dtype == dtype and value.shape == reference.shape,
        }


def _laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another layout. Tensors of three dimensions have no channels_last."""
    if layout == "strided":
        return torch.stack((tensor, torch.full_like(tensor, float("nan"))), -1).flatten(-2)[..., ::2]
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if layout == "contiguous" or tensor.dim() not in formats:
        return tensor.contiguous()
    return tensor.contiguous(memory_format=formats[tensor.dim()])
