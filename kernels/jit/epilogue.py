"""The epilogue, all that a kernel does between product and store: statistics, batch norm, residual, activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fastconv.kernels.jit.activations import ACTIVATIONS
from fastconv.kernels.problem.layout import POINTER_TYPES

# Columns that an epilogue takes at a time: with 32 a thread needs no more registers than for the product.
PART_K = 32


@triton.jit
def affine_of(channel, mask, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps):
    """(mean, scale, shift) of batch norm's affine, in fp32; shift is 0 without beta."""
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
    # The difference comes first: a product of a mean far above the deviation would lose it to rounding.
    return (x - mean[None, :]) * scale[None, :] + shift[None, :]


@triton.jit
def activate(
    x,
    channel,
    mask_k,
    offs,
    mask,
    slope_ptr,  # [channels], PReLU's a
    residual_ptr,  # read at offs
    a,
    b,
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,
):
    """act(x + residual), or act(x) + residual with RESIDUAL_AFTER, of x [rows, channels]."""
    residual = None
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return activate_with(x, residual, channel, mask_k, slope_ptr, a, b, ACT, RESIDUAL_AFTER)


@triton.jit
def activate_with(x, residual, channel, mask_k, slope_ptr, a, b, ACT: tl.constexpr, RESIDUAL_AFTER: tl.constexpr):
    """`activate` with a residual that is read already, in fp32, or None."""
    if slope_ptr is not None:
        a = tl.load(slope_ptr + channel, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        if RESIDUAL_AFTER:
            return ACT(x, a, b) + residual
        x += residual
    return ACT(x, a, b)


@triton.jit
def statistics(x, mask_m):
    """(mean, sum of squared differences from it) of each channel of x [rows, channels] over the rows in mask_m."""
    rows = tl.maximum(tl.sum(mask_m.to(tl.float32), axis=0), 1.0)
    mean = tl.sum(tl.where(mask_m[:, None], x, 0.0), axis=0) / rows
    difference = tl.where(mask_m[:, None], x - mean[None, :], 0.0)
    return mean, tl.sum(difference * difference, axis=0)


@triton.jit
def apply_epilogue(
    acc, k, mask_m, y_row, tile, group, K,
    bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual_ptr, y_ptr, tile_mean_ptr, tile_m2_ptr,
    eps, a, b,
    ACT: tl.constexpr,
    RESIDUAL_AFTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART_K: tl.constexpr,
):  # fmt: skip
    """Apply the epilogue to acc [BLOCK_M pixels, BLOCK_K channels], PART_K columns at a time.

    In the accumulator's layout a thread holds few rows and many columns, and as many elements of each vector: all
    columns at once would take twice the product's registers, and half of the programs would no longer fit.
    """
    if BLOCK_K > PART_K:
        HALF: tl.constexpr = BLOCK_K // 2
        first, second = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        apply_epilogue(
            first, k, mask_m, y_row, tile, group, K,
            bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual_ptr, y_ptr,
            tile_mean_ptr, tile_m2_ptr, eps, a, b, ACT, RESIDUAL_AFTER, BLOCK_M, HALF, PART_K,
        )  # fmt: skip
        apply_epilogue(
            second, k + HALF, mask_m, y_row, tile, group, K,
            bias_ptr, mean_ptr, var_ptr, gamma_ptr, beta_ptr, slope_ptr, residual_ptr, y_ptr,
            tile_mean_ptr, tile_m2_ptr, eps, a, b, ACT, RESIDUAL_AFTER, BLOCK_M, HALF, PART_K,
        )  # fmt: skip
    else:
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        channel = group * K + offs_k
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + channel, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        if tile_mean_ptr is not None:
            mean, m2 = statistics(acc, mask_m)
            row = tile * (tl.num_programs(1) * K) + channel
            tl.store(tile_mean_ptr + row, mean, mask=mask_k)
            tl.store(tile_m2_ptr + row, m2, mask=mask_k)
        if mean_ptr is not None:
            acc = normalise(acc, channel, mask_k, mean_ptr, var_ptr, gamma_ptr, beta_ptr, eps)
        offs_y = y_row[:, None] + channel[None, :]
        mask_y = mask_m[:, None] & mask_k[None, :]
        acc = activate(acc, channel, mask_k, offs_y, mask_y, slope_ptr, residual_ptr, a, b, ACT, RESIDUAL_AFTER)
        tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask_y)


@dataclass(frozen=True)
class Epilogue:
    """A convolution's epilogue: the pointer types of its operands, and its numbers."""

    mean: str | None = None  # mean to beta: batch norm's
    var: str | None = None
    gamma: str | None = None
    beta: str | None = None
    slope: str | None = None  # PReLU's
    residual: str | None = None
    residual_after: bool = False  # the residual is added after the activation
    statistics: bool = False  # it writes those of the product
    act: str = "identity"
    eps: float = 0.0
    a: float = 0.0
    b: float = 0.0

    @property
    def pointers(self) -> tuple[str | None, ...]:
        return self.mean, self.var, self.gamma, self.beta, self.slope, self.residual

    @property
    def statistics_pointers(self) -> tuple[str | None, ...]:
        return ("*fp32" if self.statistics else None,) * 3

    @property
    def scalars(self) -> tuple[float, float, float]:
        return self.eps, self.a, self.b

    @property
    def constants(self) -> dict[str, Any]:
        return {"ACT": ACTIVATIONS[self.act].forward, "RESIDUAL_AFTER": self.residual_after}


PLAIN = Epilogue()
_VECTORS = ("running_mean", "running_var", "bn_weight", "bn_bias", "slope")


def check_operands(
    x: torch.Tensor, shape: Sequence[int], vectors: Sequence[torch.Tensor | None], residual: torch.Tensor | None
) -> None:
    """Raise RuntimeError if an epilogue's operands do not fit its output, which has this ``shape`` and x's dtype."""
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
