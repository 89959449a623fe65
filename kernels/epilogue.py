"""What a kernel does to its accumulator before the store: batch norm's affine, activation, residual, statistics.

Each activation stands with its derivative and the torch line that it equals; both take fp32 ``x`` and two parameters
and let a NaN through as torch's do. A derivative is that of torch's backward, at its kinks too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastconv.kernels.layout import POINTER_TYPES

ALL: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low, propagate_nan=ALL), high, propagate_nan=ALL)


@triton.jit
def tanh(x):
    # Near 0 the quotient loses what the series keeps.
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
    """An activation with a fused form. ``torch(x, a, b)`` is what it equals."""

    name: str
    forward: Any  # jit functions of (x, a, b)
    derivative: Any
    torch: Callable[[torch.Tensor, Any, Any], torch.Tensor]
    # Whether its derivative at x is its derivative at its output: then backward needs no x.
    from_output: bool = False


ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("identity", identity, identity_derivative, lambda x, a, b: x, True),
        Activation("relu", relu, relu_derivative, lambda x, a, b: F.relu(x), True),
        Activation("hardtanh", hardtanh, hardtanh_derivative, lambda x, a, b: F.hardtanh(x, a, b), True),
        Activation("leaky_relu", leaky_relu, leaky_relu_derivative, lambda x, a, b: F.leaky_relu(x, a)),
        # As leaky_relu, with a slope for each channel.
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


@dataclass(frozen=True)
class Epilogue:
    """What a convolution's kernel does after the product: pointer types of its operands, and its numbers."""

    mean: str | None = None  # batch norm's, with var, gamma and beta
    var: str | None = None
    gamma: str | None = None
    beta: str | None = None
    slope: str | None = None  # PReLU's
    residual: str | None = None
    residual_after: bool = False  # the activation
    statistics: bool = False
    act: str = "identity"
    eps: float = 0.0
    a: float = 0.0
    b: float = 0.0

    @property
    def pointers(self) -> tuple[str | None, ...]:
        return self.mean, self.var, self.gamma, self.beta, self.slope, self.residual

    @property
    def scalars(self) -> tuple[float, float, float]:
        return self.eps, self.a, self.b


PLAIN = Epilogue()

_VECTORS = ("running_mean", "running_var", "bn_weight", "bn_bias", "slope")


def check_operands(
    x: torch.Tensor, shape: Sequence[int], vectors: Sequence[torch.Tensor | None], residual: torch.Tensor | None
) -> None:
    """Raise RuntimeError where what an epilogue reads does not fit its output, of ``shape`` and of x's dtype."""
    for name, vector in zip(_VECTORS, vectors, strict=True):
        if vector is None:
            continue
        if tuple(vector.shape) != (shape[1],):
            raise RuntimeError(
                f"{name} should contain {shape[1]} elements not {list(vector.shape)}, "
                f"as many as the output {list(shape)} has channels"
            )
        if vector.dtype not in POINTER_TYPES:
            raise RuntimeError(f"mixed dtype: {name} is {vector.dtype} where the input is {x.dtype}")
    if residual is not None and (tuple(residual.shape) != tuple(shape) or residual.dtype != x.dtype):
        raise RuntimeError(
            f"residual is {residual.dtype} of shape {list(residual.shape)}, but the output it is added to {x.dtype} of "
            f"shape {list(shape)}"
        )
    for name, operand in (*zip(_VECTORS, vectors, strict=True), ("residual", residual)):
        if operand is not None and operand.device != x.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found input {list(x.shape)} on {x.device} and "
                f"{name} {list(operand.shape)} on {operand.device}"
            )


@triton.jit
def affine_of(channel, mask, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps):
    """(mean, scale, shift) of batch norm's affine, in fp32; shift is 0 where there is no beta."""
    scale = tl.rsqrt(tl.load(var_ptr + channel, mask=mask, other=1.0).to(tl.float32) + eps)
    if gamma_ptr is not None:
        scale *= tl.load(gamma_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    shift = tl.zeros(channel.shape, dtype=tl.float32)
    if beta_ptr is not None:
        shift = tl.load(beta_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    return tl.load(mean_ptr + channel, mask=mask, other=0.0).to(tl.float32), scale, shift


@triton.jit
def normalise(x, channel, mask, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps):
    """Batch norm's affine of x [rows, channels], in fp32: (x - mean) / sqrt(var + eps) * gamma + beta."""
    mean, scale, shift = affine_of(channel, mask, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps)
    # The difference first: a mean far larger than the deviation must not meet the rounded product.
    return (x - mean[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def activate(
    x,
    channel,
    mask_k,
    offs,
    mask,
    slope_ptr,  # [channels] of PReLU, in place of a
    residual_ptr,  # read at offs
    a,
    b,
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,
):
    """act(x + residual), or act(x) + residual, of x [rows, channels]."""
    residual = None
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return activated(x, residual, channel, mask_k, slope_ptr, a, b, ACT, RESIDUAL_AFTER)


@triton.jit
def activated(x, residual, channel, mask_k, slope_ptr, a, b, ACT: tl.constexpr, RESIDUAL_AFTER: tl.constexpr):
    """`activate` of a residual that was read, fp32, or of None."""
    if slope_ptr is not None:
        a = tl.load(slope_ptr + channel, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        if RESIDUAL_AFTER:
            return ACT(x, a, b) + residual
        x += residual
    return ACT(x, a, b)


@triton.jit
def statistics(x, mask_m):
    """(mean, sum of squared differences from it) of each column of x [rows, channels] over the rows of ``mask_m``."""
    rows = tl.maximum(tl.sum(mask_m.to(tl.float32), axis=0), 1.0)
    mean = tl.sum(tl.where(mask_m[:, None], x, 0.0), axis=0) / rows
    difference = tl.where(mask_m[:, None], x - mean[None, :], 0.0)
    return mean, tl.sum(difference * difference, axis=0)
