"""Activations, their derivatives, and the torch line that each equals.

Both take fp32 ``x`` and two parameters and let a NaN through as torch's do. A derivative equals that of torch's
backward, at kinks too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

ALL: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low, propagate_nan=ALL), high, propagate_nan=ALL)


@triton.jit
def tanh(x):
    # Near 0 the quotient loses digits that the series keeps.
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.15, series, tl.where(x < 0, -y, y))


@triton.jit
def identity(x, a, b):
    return x


@triton.jit
def identity_derivative(x, a, b):
    return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def relu(x, a, b):
    return tl.maximum(x, 0.0, propagate_nan=ALL)


@triton.jit
def relu_derivative(x, a, b):
    return tl.where(x <= 0, 0.0, 1.0)


@triton.jit
def hardtanh(x, a, b):
    return clamp(x, a, b)


@triton.jit
def hardtanh_derivative(x, a, b):
    return tl.where((x <= a) | (x >= b), 0.0, 1.0)


@triton.jit
def leaky_relu(x, a, b):
    return tl.where(x > 0, x, x * a)


@triton.jit
def leaky_relu_derivative(x, a, b):
    return tl.where(x > 0, 1.0, a)


@triton.jit
def elu(x, a, b):
    return tl.where(x > 0, x, a * (tl.exp(tl.minimum(x, 0.0, propagate_nan=ALL)) - 1.0))


@triton.jit
def elu_derivative(x, a, b):
    return tl.where(x > 0, 1.0, a * tl.exp(tl.minimum(x, 0.0, propagate_nan=ALL)))


@triton.jit
def silu(x, a, b):
    return x * tl.sigmoid(x)


@triton.jit
def silu_derivative(x, a, b):
    s = tl.sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def hardswish(x, a, b):
    return x * clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@triton.jit
def hardswish_derivative(x, a, b):
    return tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x * (1.0 / 3.0) + 0.5, 1.0))


@triton.jit
def hardsigmoid(x, a, b):
    return clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@triton.jit
def hardsigmoid_derivative(x, a, b):
    return tl.where((x > -3.0) & (x < 3.0), 1.0 / 6.0, 0.0)


@triton.jit
def sigmoid(x, a, b):
    return tl.sigmoid(x)


@triton.jit
def sigmoid_derivative(x, a, b):
    s = tl.sigmoid(x)
    return s * (1.0 - s)


@triton.jit
def tanh_(x, a, b):
    return tanh(x)


@triton.jit
def tanh_derivative(x, a, b):
    y = tanh(x)
    return 1.0 - y * y


@triton.jit
def gelu(x, a, b):
    return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_derivative(x, a, b):
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def gelu_tanh(x, a, b):
    return x * 0.5 * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def gelu_tanh_derivative(x, a, b):
    t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)


@triton.jit
def softplus(x, a, b):
    return tl.where(x * a > b, x, tl.log(1.0 + tl.exp(tl.minimum(x * a, b, propagate_nan=ALL))) / a)


@triton.jit
def softplus_derivative(x, a, b):
    return tl.where(x * a > b, 1.0, tl.sigmoid(x * a))


@triton.jit
def mish(x, a, b):
    # tanh(log(1 + e)) without a logarithm: n / (n + 2), n = e (e + 2).
    e = tl.exp(tl.minimum(x, 20.0, propagate_nan=ALL))
    n = e * (e + 2.0)
    return tl.where(x > 20.0, x, x * n / (n + 2.0))


@triton.jit
def mish_derivative(x, a, b):
    e = tl.exp(tl.minimum(x, 20.0, propagate_nan=ALL))
    n = e * (e + 2.0)
    w = n / (n + 2.0)
    return tl.where(x > 20.0, 1.0, w + x * (1.0 - w * w) * tl.sigmoid(x))


@dataclass(frozen=True)
class Activation:
    """An activation that kernels fuse; it equals ``torch(x, a, b)``."""

    name: str
    forward: Any  # jit functions of (x, a, b)
    derivative: Any
    torch: Callable[[torch.Tensor, Any, Any], torch.Tensor]
    from_output: bool = False  # the derivative at x is that at the output, so that backward needs no x


ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("identity", identity, identity_derivative, lambda x, a, b: x, True),
        Activation("relu", relu, relu_derivative, lambda x, a, b: F.relu(x), True),
        Activation("hardtanh", hardtanh, hardtanh_derivative, lambda x, a, b: F.hardtanh(x, a, b), True),
        Activation("leaky_relu", leaky_relu, leaky_relu_derivative, lambda x, a, b: F.leaky_relu(x, a)),
        # leaky_relu with a slope for each channel
        Activation("prelu", leaky_relu, leaky_relu_derivative, lambda x, a, b: F.prelu(x, a)),
        Activation("elu", elu, elu_derivative, lambda x, a, b: F.elu(x, a)),
        Activation("silu", silu, silu_derivative, lambda x, a, b: F.silu(x)),
        Activation("hardswish", hardswish, hardswish_derivative, lambda x, a, b: F.hardswish(x)),
        Activation("hardsigmoid", hardsigmoid, hardsigmoid_derivative, lambda x, a, b: F.hardsigmoid(x)),
        Activation("sigmoid", sigmoid, sigmoid_derivative, lambda x, a, b: torch.sigmoid(x)),
        Activation("tanh", tanh_, tanh_derivative, lambda x, a, b: torch.tanh(x)),
        Activation("gelu", gelu, gelu_derivative, lambda x, a, b: F.gelu(x)),
        Activation("gelu_tanh", gelu_tanh, gelu_tanh_derivative, lambda x, a, b: F.gelu(x, approximate="tanh")),
        Activation("softplus", softplus, softplus_derivative, lambda x, a, b: F.softplus(x, a, b)),
        Activation("mish", mish, mish_derivative, lambda x, a, b: F.mish(x)),
    )
}
