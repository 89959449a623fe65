"""What follows the convolution of a fused layer, by PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastconv.kernels.families.batch_norm import Activated
from fastconv.kernels.jit.activations import ACTIVATIONS


def all_but_channels(y: Tensor) -> list[int]:
    return [0, *range(2, y.dim())]


def normalise_and_activate(
    y: Tensor,
    norm: Sequence[Tensor | None],
    slope: Tensor | None,
    residual: Tensor | None,
    how: Activated,
    training: bool = False,
) -> Tensor:
    """The kernels' epilogue in plain PyTorch, differentiable to any order; in fp32 for narrower types.

    In training the statistics are those of y, not ``norm``'s.
    """

    def by_channel(t: Tensor) -> Tensor:
        return t.to(x.dtype).view(-1, *(1,) * (y.dim() - 2))

    x = y if y.dtype == torch.float64 else y.float()
    mean, var, gamma, beta = norm
    if training:
        var, mean = torch.var_mean(x, all_but_channels(x), correction=0)
    if mean is not None and var is not None:
        x = (x - by_channel(mean)) * torch.rsqrt(by_channel(var) + how.eps)
    if gamma is not None:
        x = x * by_channel(gamma)
    if beta is not None:
        x = x + by_channel(beta)
    if residual is not None and not how.residual_after:
        x = x + residual.to(x.dtype)
    x = ACTIVATIONS[how.act].torch(x, how.a if slope is None else slope.to(x.dtype), how.b)
    if residual is not None and how.residual_after:
        x = x + residual.to(x.dtype)
    return x.to(y.dtype)
