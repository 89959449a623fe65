"""Convolution + batch norm + activation (+ residual) in its three ways of use.

Inference is one kernel. Training takes statistics, combines and applies them, and goes back through two sums and a
gradient. Frozen is a batch norm of constant statistics in a network that trains. Inputs and weights are small integers,
which make the convolution exact in every dtype: no rounding moves a value over a ReLU's kink.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

import fastconv.functional as ours
from fastconv.benchmarks.checks.check import FORWARD, Check, Tensors, gradient_of, laid_out
from fastconv.benchmarks.checks.conv import ConvCase

EPS, MOMENTUM = 1e-3, 0.3
RUNNING = ("running mean", "running variance")


@dataclass(frozen=True, kw_only=True)
class FusedCase(ConvCase):
    """One call of ``conv{rank}d_bn_act`` or ``conv_transpose{rank}d_bn_act``."""

    input: tuple[int, ...] = (2, 6, 6, 5)
    weight: tuple[int, ...] = (8, 6, 3, 3)
    act: Callable[[], nn.Module] = nn.ReLU
    residual: Literal["before", "after"] | None = None  # the activation
    bias: int | None = None  # the convolution's, around this value
    affine: bool = True


CASES = (
    FusedCase(name="3x3, ReLU", quick=True),
    FusedCase(
        name="1x1, residual before ReLU", input=(3, 19, 4, 5), weight=(35, 19, 1, 1), residual="before", quick=True
    ),
    FusedCase(name="residual behind SiLU, stride 2", act=nn.SiLU, residual="after", arguments={"stride": 2}),
    FusedCase(name="residual before a smooth one", act=nn.GELU, residual="before"),
    FusedCase(name="residual and no activation", act=nn.Identity, residual="before"),
    FusedCase(name="bias, no affine", bias=3, affine=False),
    FusedCase(name="3 groups, dilation", weight=(9, 2, 3, 2), arguments={"groups": 3, "dilation": 2}),
    FusedCase(
        name="depthwise, residual",
        weight=(12, 1, 3, 3),
        act=nn.ReLU6,
        residual="before",
        arguments={"groups": 6, "padding": 1},
        quick=True,
    ),
    FusedCase(
        name="depthwise, stride 2, bias",
        weight=(6, 1, 5, 5),
        bias=2,
        arguments={"groups": 6, "stride": 2, "padding": 2},
    ),
    FusedCase(name="8 channels a group", input=(2, 32, 5, 5), weight=(32, 8, 3, 3), arguments={"groups": 4}),
    FusedCase(name="contiguous (NCHW) input and residual", residual="before", layout="contiguous"),
    FusedCase(name="many pixels", input=(2, 3, 37, 31), weight=(5, 3, 3, 3), quick=True),
    FusedCase(name="1d", input=(3, 6, 11), weight=(10, 6, 3), residual="before", arguments={"padding": 1}),
    FusedCase(name="3d", input=(1, 4, 3, 4, 5), weight=(8, 4, 3, 3, 3), arguments={"padding": 1}),
    FusedCase(
        name="transposed",
        input=(2, 6, 4, 3),
        weight=(6, 8, 4, 4),
        arguments={"stride": 2, "padding": 1},
        transposed=True,
    ),
)
ACTIVATIONS = tuple(
    FusedCase(name=str(act()), act=act, weight=(8, 6, 1, 1), precisions=("float32",))
    for act in (
        nn.Identity,
        nn.ReLU,
        nn.ReLU6,
        partial(nn.Hardtanh, -0.3, 0.7),
        partial(nn.LeakyReLU, 0.2),
        partial(nn.PReLU, 8),
        partial(nn.ELU, 0.8),
        nn.SiLU,
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.Sigmoid,
        nn.Tanh,
        nn.GELU,
        partial(nn.GELU, approximate="tanh"),
        partial(nn.Softplus, 2.0, 3.0),
        nn.Mish,
    )
)
STATISTICS = (
    # E[x^2] - E[x]^2 loses four digits.
    FusedCase(name="mean far over the deviation", bias=300, precisions=("float32", "tf32")),
    # Only a GPU's tiles are small enough for two levels of partials; TF32 is checked only there.
    FusedCase(name="partials for two levels", input=(2, 3, 201, 190), weight=(5, 3, 3, 3), precisions=("tf32",)),
)


def operands(case: FusedCase, dtype: torch.dtype, device: torch.device) -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def integers(shape: tuple[int, ...], limit: int) -> torch.Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=generator).to(device, dtype)

    k = case.output_channels
    drawn = {
        "input": laid_out(integers(case.input, 2), case.layout),
        "weight": laid_out(integers(case.weight, 1), case.layout),
    }
    if case.bias is not None:
        drawn["bias"] = integers((k,), 3) + case.bias
    if case.residual:
        shape = _convolved(case, {name: torch.empty(t.shape, device="meta") for name, t in drawn.items()}).shape
        drawn["residual"] = laid_out(torch.randn(shape, generator=generator).to(device, dtype), case.layout)
    if isinstance(case.act(), nn.PReLU):
        drawn["slope"] = (torch.rand(k, generator=generator) - 0.5).to(device)
    if case.affine:
        drawn["BN weight"] = (torch.rand(k, generator=generator) + 0.5).to(device)
        drawn["BN bias"] = (torch.rand(k, generator=generator) - 0.5).to(device)
    mean, variance = torch.rand(k, generator=generator) * 4, torch.rand(k, generator=generator) * 20 + 1
    return drawn | dict(zip(RUNNING, (mean.to(device), variance.to(device)), strict=True))


def by_us(case: FusedCase, operands: Tensors, training: bool) -> Tensors:
    running = [operands[name].clone() for name in RUNNING]
    z = getattr(ours, f"{case.function}_bn_act")(
        *(operands.get(name) for name in ("input", "weight", "bias", "BN weight", "BN bias")),
        *running,
        training=training,
        momentum=MOMENTUM,
        eps=EPS,
        act=_activation(case, operands),
        residual=operands.get("residual"),
        residual_after=case.residual == "after",
        **case.arguments,
    )
    return {FORWARD: z, **(dict(zip(RUNNING, running, strict=True)) if training else {})}


def by_pytorch(case: FusedCase, operands: Tensors, training: bool) -> Tensors:
    running = mean, variance = [operands[name].clone() for name in RUNNING]
    affine = operands.get("BN weight"), operands.get("BN bias")
    z = F.batch_norm(_convolved(case, operands), mean, variance, *affine, training, MOMENTUM, EPS)
    z = z + operands["residual"] if case.residual == "before" else z
    z = _activation(case, operands)(z)
    z = z + operands["residual"] if case.residual == "after" else z
    return {FORWARD: z, **(dict(zip(RUNNING, running, strict=True)) if training else {})}


def depths(case: FusedCase, output: torch.Tensor) -> dict[str, int]:
    products, pixels = max(case.weight[:2]) * math.prod(case.weight[2:]), output.numel() // case.output_channels
    gradients = map(gradient_of, ("input", "weight", "bias", "residual", "slope", "BN weight", "BN bias"))
    return dict.fromkeys((FORWARD, *RUNNING, *gradients), max(products, pixels))


def _convolved(case: FusedCase, operands: Tensors) -> torch.Tensor:
    x, weight, bias = (operands.get(name) for name in ("input", "weight", "bias"))
    return getattr(F, case.function)(x, weight, bias, **case.arguments)


def _activation(case: FusedCase, operands: Tensors) -> nn.Module:
    act = case.act()
    if "slope" in operands:
        act._parameters["weight"] = operands["slope"]  # type: ignore[assignment]  # with the call's dtype and graph
    return act


def _check(way: str, cases: tuple[FusedCase, ...], training: bool, gradients: Literal["together", "none"]) -> Check:
    return Check(
        name=f"conv + BN + act, {way}",
        cases=cases,
        operands=operands,
        ours=partial(by_us, training=training),
        theirs=partial(by_pytorch, training=training),
        depths=depths,
        gradients=gradients,
        # In training batch norm takes the bias away again, and so its gradient.
        constants=(*RUNNING, "bias") if training else RUNNING,
        stored=1 if gradients == "none" else 2,  # backward stores the gradient of the convolution's output
    )


INFERENCE = _check("inference", (*CASES, *ACTIVATIONS), training=False, gradients="none")
TRAINING = _check("training", (*CASES, *ACTIVATIONS, *STATISTICS), training=True, gradients="together")
FROZEN = _check("frozen", CASES[:6], training=False, gradients="together")
