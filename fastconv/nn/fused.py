"""Layers of convolution + batch norm + activation (+ residual), as modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastconv.activations import NAMED
from fastconv.nn.conv import Conv1d, Conv2d, Conv3d
from fastconv.nn.fused_call import Steps, run_fused

Size = int | tuple[int, ...]
MakeNorm = Callable[[int], torch.nn.Module]


class ConvBNAct(torch.nn.Module):
    """Children ``conv``, ``bn`` and ``act``, which may be hooked, replaced and loaded like any others.

    It takes the arguments of torch.nn's convolution, without a bias by default, since batch norm subtracts the mean.
    ``norm``: makes the batch norm for a number of channels, None: torch.nn's of the same rank; ``act``: a name, a
    module or None. Raises ValueError on another name, else what the modules raise.
    """

    _conv: Any
    _norm: MakeNorm

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        norm: MakeNorm | None = None,
        act: str | torch.nn.Module | None = "relu",
    ) -> None:
        super().__init__()
        if isinstance(act, str) and act not in NAMED:
            raise ValueError(f"act must be a module, None or one of {', '.join(NAMED)}, but got {act!r}")
        shape = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        self.conv = self._conv(*shape, bias, padding_mode, device, dtype)
        self.bn = (norm or self._norm)(out_channels).to(self.conv.weight.device, self.conv.weight.dtype)
        self.act = NAMED[act].module() if isinstance(act, str) else act

    def steps(self, residual: Tensor | None = None) -> Steps:
        """The steps on the convolution's result."""
        added: Steps = () if residual is None else (("+", residual),)
        return ("norm", self.bn), *added, *(() if self.act is None else (("act", self.act),))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return run_fused(x, self.conv, self.steps(residual))


def _continued(layer: Any, args: tuple[Any, ...], steps: Steps) -> Any:
    return run_fused(args[0], layer.conv, layer.steps(*args[1:]), steps)


# Set on the function, so that a subclass with a forward of its own does not have it.
ConvBNAct.forward.continued = _continued  # type: ignore[attr-defined]


class ConvBNAct1d(ConvBNAct):
    """``act(bn(conv(x)) + residual)``: x [N, C, W], result [N, K, Q]. Arguments: `ConvBNAct`."""

    _conv, _norm = Conv1d, torch.nn.BatchNorm1d


class ConvBNAct2d(ConvBNAct):
    """``act(bn(conv(x)) + residual)``: x [N, C, H, W], result [N, K, P, Q]. Arguments: `ConvBNAct`."""

    _conv, _norm = Conv2d, torch.nn.BatchNorm2d


class ConvBNAct3d(ConvBNAct):
    """``act(bn(conv(x)) + residual)``: x [N, C, D, H, W], result [N, K, O, P, Q]. Arguments: `ConvBNAct`."""

    _conv, _norm = Conv3d, torch.nn.BatchNorm3d


torch.serialization.add_safe_globals([ConvBNAct1d, ConvBNAct2d, ConvBNAct3d])
