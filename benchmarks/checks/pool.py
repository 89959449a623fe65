"""Pools of every kind and rank: forward, PyTorch's indices if they are asked for, and the input's gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

import fastconv.functional as ours
from fastconv.benchmarks.checks.check import FORWARD, Check, CheckCase, Tensors, gradient_of, laid_out

INDICES = "indices"


@dataclass(frozen=True, kw_only=True)
class PoolCase(CheckCase):
    """One call of a pool of ``torch.nn.functional``."""

    function: str
    input: tuple[int, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    layout: str = "channels_last"  # of the input


def case(
    name: str,
    function: str,
    input: tuple[int, ...],
    *,
    layout: str = "channels_last",
    quick: bool = False,
    precisions: tuple[str, ...] = (),
    **arguments: Any,
) -> PoolCase:
    return PoolCase(
        name=name,
        quick=quick,
        precisions=precisions,
        function=function,
        input=input,
        layout=layout,
        arguments=arguments,
    )


# Interpreted, each of a window's hundreds of taps takes its time: one precision is enough.
ONE = ("bfloat16",)
IMAGE, ODD = (2, 16, 9, 10), (2, 5, 11, 7)
MAX = (
    case("3x3, stride 2, padding 1", "max_pool2d", IMAGE, kernel_size=3, stride=2, padding=1, quick=True),
    case("2x2, tails of 5 channels", "max_pool2d", ODD, kernel_size=2, quick=True),
    case("overlapping, ceil_mode", "max_pool2d", IMAGE, kernel_size=3, stride=1, padding=1, ceil_mode=True),
    case(
        "everything asymmetric",
        "max_pool2d",
        ODD,
        kernel_size=(2, 3),
        stride=(3, 1),
        padding=(1, 0),
        dilation=(1, 2),
        ceil_mode=True,
        quick=True,
    ),
    case("indices", "max_pool2d", ODD, kernel_size=3, stride=2, padding=1, return_indices=True, quick=True),
    case("contiguous (NCHW)", "max_pool2d", ODD, layout="contiguous", kernel_size=3, stride=2, padding=1, quick=True),
    case("contiguous, indices", "max_pool2d", ODD, layout="contiguous", kernel_size=2, return_indices=True),
    case("every second pixel of a wider input", "max_pool2d", ODD, layout="strided", kernel_size=2),
    case("unbatched", "max_pool2d", (5, 9, 8), layout="contiguous", kernel_size=3, stride=2),
    case(
        "more taps than a byte counts",
        "max_pool2d",
        (1, 3, 20, 19),
        precisions=ONE,
        kernel_size=17,
        stride=2,
        padding=8,
    ),
    case("global", "max_pool2d", (2, 6, 7, 7), kernel_size=7),
    case("adaptive, equal shares", "adaptive_max_pool2d", (2, 8, 8, 9), output_size=(4, 3)),
    case("adaptive, overlapping shares", "adaptive_max_pool2d", ODD, output_size=(4, 5), return_indices=True),
    case("adaptive, contiguous", "adaptive_max_pool2d", ODD, layout="contiguous", output_size=(4, 5)),
    case("1d, dilation", "max_pool1d", (2, 6, 23), kernel_size=3, stride=2, padding=1, dilation=3),
    case("1d, ceil_mode, indices", "max_pool1d", (2, 6, 12), kernel_size=3, ceil_mode=True, return_indices=True),
    case("1d, adaptive", "adaptive_max_pool1d", (2, 6, 13), output_size=5),
    case("3d, padding", "max_pool3d", (1, 4, 5, 6, 7), kernel_size=3, stride=2, padding=1, quick=True),
    case("3d, dilation, ceil_mode", "max_pool3d", (1, 4, 7, 6, 8), kernel_size=2, dilation=2, ceil_mode=True),
    case(
        "3d, contiguous, indices",
        "max_pool3d",
        (1, 3, 4, 6, 5),
        layout="contiguous",
        kernel_size=2,
        return_indices=True,
    ),
    case("3d, adaptive", "adaptive_max_pool3d", (1, 4, 5, 4, 7), output_size=(2, 4, 3)),
)
AVERAGE = (
    case("3x3, stride 2, padding 1", "avg_pool2d", IMAGE, kernel_size=3, stride=2, padding=1, quick=True),
    case("2x2, tails of 5 channels", "avg_pool2d", ODD, kernel_size=2, quick=True),
    case("padding not counted", "avg_pool2d", ODD, kernel_size=3, padding=1, count_include_pad=False, quick=True),
    case("everything asymmetric", "avg_pool2d", ODD, kernel_size=(2, 3), stride=(3, 2), padding=(1, 0), ceil_mode=True),
    case("ceil_mode, a divisor", "avg_pool2d", IMAGE, kernel_size=3, stride=2, ceil_mode=True, divisor_override=5),
    case("contiguous (NCHW)", "avg_pool2d", ODD, layout="contiguous", kernel_size=3, stride=2, padding=1),
    case("every second pixel of a wider input", "avg_pool2d", ODD, layout="strided", kernel_size=2),
    case("a large window", "avg_pool2d", (1, 3, 20, 19), precisions=ONE, kernel_size=17, stride=2, padding=8),
    case("global", "adaptive_avg_pool2d", (3, 20, 7, 7), output_size=1, quick=True),
    case("global, contiguous", "adaptive_avg_pool2d", (3, 5, 7, 6), layout="contiguous", output_size=1, quick=True),
    case("adaptive, overlapping shares", "adaptive_avg_pool2d", ODD, output_size=(4, 5)),
    case("adaptive, more outputs than inputs", "adaptive_avg_pool2d", (2, 6, 3, 4), output_size=(5, 4)),
    case("1d", "avg_pool1d", (2, 6, 23), kernel_size=4, stride=3, padding=2, ceil_mode=True),
    case("1d, adaptive", "adaptive_avg_pool1d", (2, 6, 13), output_size=5),
    case("3d, padding not counted", "avg_pool3d", (1, 4, 5, 6, 7), kernel_size=3, padding=1, count_include_pad=False),
    case(
        "3d, contiguous, a divisor",
        "avg_pool3d",
        (1, 3, 4, 6, 5),
        layout="contiguous",
        kernel_size=2,
        divisor_override=3,
    ),
    case("3d, adaptive", "adaptive_avg_pool3d", (1, 4, 5, 4, 7), output_size=(2, 4, 3)),
)
LP = (
    case("norm 2, stride 2", "lp_pool2d", IMAGE, norm_type=2.0, kernel_size=3, stride=2, quick=True),
    case(
        "norm 3, ceil_mode, contiguous",
        "lp_pool2d",
        ODD,
        layout="contiguous",
        norm_type=3.0,
        kernel_size=2,
        ceil_mode=True,
    ),
    case("norm 1", "lp_pool2d", ODD, norm_type=1.0, kernel_size=3, stride=1),
    case("norm 2.5, a large window", "lp_pool2d", (1, 8, 14, 13), norm_type=2.5, kernel_size=12),
    case("the largest", "lp_pool2d", ODD, norm_type=math.inf, kernel_size=2),
    case("1d", "lp_pool1d", (2, 6, 23), norm_type=2.0, kernel_size=4),
    case("3d", "lp_pool3d", (1, 4, 5, 6, 7), norm_type=2.0, kernel_size=2),
)


def operands(case: PoolCase, dtype: torch.dtype, device: torch.device) -> Tensors:
    drawn = torch.randn(case.input, generator=torch.Generator().manual_seed(0))
    # Powers and roots take numbers that are not near zero.
    drawn = drawn.abs() + 0.5 if "lp" in case.function else drawn
    return {"input": laid_out(drawn.to(device, dtype), case.layout)}


def by_us(case: PoolCase, operands: Tensors) -> Tensors:
    return _named(getattr(ours, case.function)(*operands.values(), **case.arguments))


def by_pytorch(case: PoolCase, operands: Tensors) -> Tensors:
    return _named(getattr(F, case.function)(*operands.values(), **case.arguments))


def _named(result: Any) -> Tensors:
    return dict(zip((FORWARD, INDICES), result, strict=True)) if isinstance(result, tuple) else {FORWARD: result}


def depths(case: PoolCase, output: torch.Tensor) -> dict[str, int]:
    # No window has more pixels, and no pixel is in more windows.
    rank = int(case.function[-2])
    pixels = max(math.prod(case.input[-rank:]), math.prod(output.shape[-rank:]))
    return {FORWARD: pixels, gradient_of("input"): pixels}


def _check(name: str, cases: tuple[PoolCase, ...], stored: int = 1) -> Check:
    return Check(name=name, cases=cases, operands=operands, ours=by_us, theirs=by_pytorch, depths=depths, stored=stored)


MAX_POOL, AVERAGE_POOL = _check("max pool", MAX), _check("average pool", AVERAGE)
# Rounded on the way to a gradient: the gradient, and the norm it is computed from, which enters twice in norm 3.
LP_POOL = _check("lp pool", LP, stored=3)
