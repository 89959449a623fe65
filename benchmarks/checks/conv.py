"""Convolutions and transposed convolutions of every rank: forward, and each gradient by its own kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

import fastconv.functional as ours
from fastconv.benchmarks.checks.check import FORWARD, Check, CheckCase, Tensors, gradient_of, laid_out


@dataclass(frozen=True, kw_only=True)
class ConvCase(CheckCase):
    """One call of ``conv{rank}d`` or ``conv_transpose{rank}d``; ``weight`` as that function takes it."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False
    layout: str = "channels_last"  # of the input

    @property
    def function(self) -> str:
        return f"conv{'_transpose' * self.transposed}{len(self.weight) - 2}d"

    @property
    def output_channels(self) -> int:
        return self.weight[1] * self.arguments.get("groups", 1) if self.transposed else self.weight[0]


def case(
    name: str,
    input: tuple[int, ...],
    weight: tuple[int, ...],
    layout: str = "channels_last",
    quick: bool = False,
    **arguments: Any,
) -> ConvCase:
    return ConvCase(name=name, quick=quick, input=input, weight=weight, layout=layout, arguments=arguments)


def transposed_case(
    name: str, input: tuple[int, ...], weight: tuple[int, ...], quick: bool = False, **arguments: Any
) -> ConvCase:
    return ConvCase(name=name, quick=quick, input=input, weight=weight, arguments=arguments, transposed=True)


CONVOLUTIONS = (
    case("3x3, padding 1", (2, 16, 9, 9), (32, 16, 3, 3), padding=1, quick=True),
    case("1x1, tails of 3 channels", (3, 19, 7, 5), (35, 19, 1, 1), quick=True),
    case("C=1, 5x5", (4, 1, 12, 12), (6, 1, 5, 5), padding=2),
    case("C=3, 7x7, stride 2", (2, 3, 17, 19), (8, 3, 7, 7), stride=2, padding=3, quick=True),
    case("1x1, stride 2: pixels no tap reaches", (2, 16, 8, 7), (32, 16, 1, 1), stride=2, quick=True),
    case("stride 3 over 2x2", (2, 8, 11, 10), (16, 8, 2, 2), stride=3),
    case(
        "asymmetric everything",
        (2, 6, 13, 8),
        (10, 6, 3, 2),
        stride=(1, 2),
        padding=(2, 1),
        dilation=(2, 1),
        quick=True,
    ),
    case("dilation 3 beyond the image", (1, 8, 5, 6), (8, 8, 3, 3), padding=3, dilation=3),
    case("dilation 2, stride 3", (2, 5, 14, 13), (9, 5, 3, 3), padding=2, dilation=2, stride=3),
    case("padding 'same', even filter", (2, 5, 8, 8), (7, 5, 4, 4), padding="same"),
    case("padding larger than the filter", (1, 4, 5, 5), (4, 4, 3, 3), padding=4),
    case("filter as large as the image", (3, 6, 6, 7), (11, 6, 6, 7)),
    case("4 groups", (2, 20, 6, 6), (12, 5, 3, 3), padding=1, groups=4, quick=True),
    case("depthwise, stride 2", (2, 7, 8, 8), (14, 1, 3, 3), padding=1, stride=2, groups=7),
    case("one pixel, filter larger than the image", (5, 4, 1, 1), (3, 4, 3, 3), padding=1),
    case("one channel to one", (1, 1, 5, 5), (1, 1, 1, 1)),
    case("primes", (3, 37, 7, 11), (41, 37, 3, 1), padding=(1, 0), quick=True),
    case("many channels", (2, 150, 4, 4), (130, 150, 3, 3), padding=1),
    case("many pixels", (1, 4, 61, 67), (5, 4, 3, 3), padding=1),
    case("contiguous (NCHW) input", (2, 12, 9, 9), (16, 12, 3, 3), "contiguous", padding=1, quick=True),
    case("every second pixel of a wider input", (2, 12, 9, 9), (16, 12, 3, 3), "strided", padding=1),
    case("unbatched", (6, 9, 9), (8, 6, 3, 3), "contiguous", padding=1),
    case("1d", (2, 12, 31), (10, 12, 5), stride=2, padding=2, quick=True),
    case("1d, dilation, groups", (2, 8, 40), (12, 4, 3), dilation=4, groups=2, quick=True),
    case("3d, stride 2", (1, 4, 5, 6, 7), (6, 4, 3, 3, 3), stride=2, padding=1, quick=True),
    case("3d, asymmetric", (1, 5, 4, 7, 6), (7, 5, 1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), quick=True),
)
DEPTHWISE_CONVOLUTIONS = (
    case("3x3, padding 1", (2, 16, 9, 10), (16, 1, 3, 3), padding=1, groups=16, quick=True),
    case("5x5, stride 2, 3 outputs a channel", (2, 7, 9, 8), (21, 1, 5, 5), padding=2, stride=2, groups=7, quick=True),
    case("2 outputs a channel, dilation", (1, 6, 9, 10), (12, 1, 3, 3), padding=2, dilation=2, groups=6),
    case("stride 3, asymmetric", (2, 5, 11, 9), (5, 1, 2, 4), stride=(3, 2), padding=(1, 0), groups=5),
    case("31 columns", (1, 3, 4, 33), (3, 1, 3, 31), padding=(1, 15), groups=3),
    case("31 rows", (1, 2, 9, 10), (2, 1, 31, 2), padding=(15, 0), groups=2),
    case("contiguous (NCHW) input", (2, 6, 7, 7), (6, 1, 3, 3), "contiguous", padding=1, groups=6),
    case("1d, stride 2", (2, 6, 23), (6, 1, 5), padding=2, stride=2, groups=6, quick=True),
    case("3d", (1, 4, 4, 5, 6), (8, 1, 3, 3, 3), padding=1, groups=4),
)
GROUPED_CONVOLUTIONS = (
    case("4 channels a group", (2, 32, 6, 7), (32, 4, 3, 3), padding=1, groups=8, quick=True),
    case("8 channels a group, stride 2", (1, 64, 7, 6), (64, 8, 3, 3), padding=1, stride=2, groups=8),
    case("16 channels a group", (1, 64, 5, 5), (64, 16, 3, 3), padding=1, groups=4),
    case("32 channels a group", (1, 64, 5, 5), (64, 32, 3, 3), padding=1, groups=2),
    case("2 channels to 3, dilation", (2, 10, 8, 7), (15, 2, 3, 3), padding=2, dilation=2, groups=5, quick=True),
    case("1d", (2, 12, 19), (12, 4, 3), padding=1, groups=3),
    case("3d", (1, 8, 4, 4, 5), (8, 2, 3, 3, 3), padding=1, groups=4),
)
FIRST_LAYERS = (
    case("3 channels, 7x7, stride 2", (2, 3, 18, 17), (16, 3, 7, 7), padding=3, stride=2, quick=True),
    case("3 channels, 3x3", (2, 3, 10, 9), (24, 3, 3, 3), padding=1, quick=True),
    case("1 channel, 5x5", (3, 1, 12, 11), (6, 1, 5, 5)),
    case("2 channels, dilation", (2, 2, 11, 12), (8, 2, 3, 3), padding=2, dilation=2),
    case("4 channels, 4x4, stride 4", (2, 4, 13, 12), (20, 4, 4, 4), stride=4),
    case("3 channels, contiguous (NCHW)", (2, 3, 11, 9), (8, 3, 3, 3), "contiguous", padding=1, stride=2),
    case("1d, 1 channel", (2, 1, 37), (8, 1, 9), padding=4, stride=2),
    case("3d, 3 channels", (1, 3, 4, 8, 9), (8, 3, 3, 5, 5), padding=(1, 2, 2), stride=(1, 2, 2)),
)
TRANSPOSED_CONVOLUTIONS = (
    transposed_case("1d", (2, 6, 9), (6, 4, 4), stride=3, padding=1, output_padding=2),
    transposed_case("2d", (2, 9, 5, 6), (9, 7, 4, 4), stride=2, padding=1),
    transposed_case(
        "2d, groups", (2, 8, 5, 6), (8, 3, 3, 3), stride=2, padding=1, output_padding=1, groups=2, quick=True
    ),
    transposed_case("2d, stride over filter", (1, 5, 4, 3), (5, 6, 2, 2), stride=3),
    transposed_case("2d, dilation", (1, 5, 6, 5), (5, 6, 3, 3), dilation=2, padding=1),
    transposed_case("3d", (1, 3, 3, 4, 3), (3, 5, 2, 2, 2), stride=2),
)


def operands(case: ConvCase, dtype: torch.dtype, device: torch.device) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"input": case.input, "weight": case.weight, "bias": (case.output_channels,)}
    drawn = {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
    drawn["input"] = laid_out(drawn["input"], case.layout)
    drawn["weight"] = laid_out(drawn["weight"])
    return drawn


def by_us(case: ConvCase, operands: Tensors) -> Tensors:
    return {FORWARD: getattr(ours, case.function)(*operands.values(), **case.arguments)}


def by_pytorch(case: ConvCase, operands: Tensors) -> Tensors:
    return {FORWARD: getattr(F, case.function)(*operands.values(), **case.arguments)}


def depths(case: ConvCase, output: torch.Tensor) -> dict[str, int]:
    taps, pixels = math.prod(case.weight[2:]), output.numel() // case.output_channels
    return {
        FORWARD: case.weight[1] * taps,
        gradient_of("input"): case.weight[0] * taps,
        gradient_of("weight"): pixels,
        gradient_of("bias"): pixels,
    }


CONVOLUTION, DEPTHWISE, GROUPED, FIRST_LAYER, TRANSPOSED = (
    Check(name=name, cases=cases, operands=operands, ours=by_us, theirs=by_pytorch, depths=depths)
    for name, cases in (
        ("convolution", CONVOLUTIONS),
        ("depthwise convolution", DEPTHWISE_CONVOLUTIONS),
        ("grouped convolution", GROUPED_CONVOLUTIONS),
        ("first layer", FIRST_LAYERS),
        ("transposed convolution", TRANSPOSED_CONVOLUTIONS),
    )
)
