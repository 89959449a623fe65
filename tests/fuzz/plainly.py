"""The fused call made of PyTorch's own operators: what is compared then is which calls are made, when, with what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv import functional
from fastconv import nn as ours


def composed(
    conv: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor | None, ...],
    training: bool,
    momentum: float,
    eps: float,
    act: nn.Module | None,
    residual: Tensor | None,
    residual_after: bool,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    group: Any = None,
    output_padding: Any = None,
    batches: Tensor | None = None,
) -> Tensor:
    """functional.conv_norm_act from PyTorch's operators."""
    mean, var, gamma, beta = norm
    if output_padding is None:
        y = conv(x, weight, bias, stride, padding, dilation, groups)
    else:
        y = conv(x, weight, bias, stride, padding, output_padding, groups, dilation)
    if batches is not None:
        batches.add_(1)
    z = F.batch_norm(y, mean, var, gamma, beta, training, momentum, eps)
    if residual is not None and not residual_after:
        z = z + residual
    if act is not None:
        z = act(z)
    return z if residual is None or not residual_after else z + residual


@contextmanager
def fused_by_torch() -> Iterator[list[str]]:
    """Let torch.nn.functional compute what is fastconv's, float64 too; the names of the fused calls' activations."""
    made: list[str] = []
    served = functional.served

    def fused(*args: Any) -> Tensor:
        made.append(type(args[8]).__name__)
        return composed(*args)

    def serves(x: Tensor, dtype: torch.dtype | None = None) -> str | None:
        return served(x, torch.float32 if x.dtype is torch.float64 else dtype)

    patches = [mock.patch.object(functional, "conv_norm_act", fused), mock.patch.object(functional, "served", serves)]
    for rank in (1, 2, 3):
        for layer, function in ((f"Conv{rank}d", f"conv{rank}d"), (f"ConvTranspose{rank}d", f"conv_transpose{rank}d")):
            theirs = getattr(F, function)
            patches.append(mock.patch.object(functional, function, theirs))
            patches.append(mock.patch.dict(ours.fused._FUNCTIONS, {getattr(ours, layer): theirs}))
    for patch in patches:
        patch.start()
    try:
        yield made
    finally:
        for patch in reversed(patches):
            patch.stop()
