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
    """Children ``conv``, ``bn`` and ``act`` (None: none), which may be hooked, replaced and loaded as any."""

    def __init__(self, conv: Any, norm: MakeNorm, act: str | torch.nn.Module | None) -> None:
        super().__init__()
        if isinstance(act, str) and act not in NAMED:
            raise ValueError(f"act must be a module, None or one of {', '.join(NAMED)}, but got {act!r}")
        self.conv = conv
        self.bn = norm(conv.out_channels).to(conv.weight.device, conv.weight.dtype)
        self.act = NAMED[act].module() if isinstance(act, str) else act

    def steps(self, residual: Tensor | None = None) -> Steps:
        """What it does to its convolution's result."""
        added: Steps = () if residual is None else (("+", residual),)
        return ("norm", self.bn), *added, *(() if self.act is None else (("act", self.act),))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return run_fused(x, self.conv, self.steps(residual))


def _continued(layer: Any, args: tuple[Any, ...], steps: Steps) -> Any:
    return run_fused(args[0], layer.conv, layer.steps(*args[1:]), steps)


# On the function: a subclass with a forward of its own does not have it.
ConvBNAct.forward.continued = _continued  # type: ignore[attr-defined]


class ConvBNAct1d(ConvBNAct):
    """``act(bn(conv(x)) + residual)``: x [N, C, W], residual, if any, as the result [N, K, Q].

    torch.nn.Conv1d's arguments, but no bias unless asked for (batch norm takes the mean away again); ``norm``:
    what makes the batch norm of so many channels; ``act``: a name, a module or None. Raises what the modules raise.
    """

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
        norm: MakeNorm = torch.nn.BatchNorm1d,
        act: str | torch.nn.Module | None = "relu",
    ) -> None:
        shape = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        super().__init__(Conv1d(*shape, bias, padding_mode, device, dtype), norm, act)  # type: ignore[arg-type]


class ConvBNAct2d(ConvBNAct):
    """``act(bn(conv(x)) + residual)``: x [N, C, H, W], residual, if any, as the result [N, K, P, Q].

    torch.nn.Conv2d's arguments, but no bias unless asked for (batch norm takes the mean away again); ``norm``:
    what makes the batch norm of so many channels; ``act``: a name, a module or None. Raises what the modules raise.
    """

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
        norm: MakeNorm = torch.nn.BatchNorm2d,
        act: str | torch.nn.Module | None = "relu",
    ) -> None:
        shape = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        super().__init__(Conv2d(*shape, bias, padding_mode, device, dtype), norm, act)  # type: ignore[arg-type]


class ConvBNAct3d(ConvBNAct):
    """``act(bn(conv(x)) + residual)``: x [N, C, D, H, W], residual, if any, as the result [N, K, O, P, Q].

    torch.nn.Conv3d's arguments, but no bias unless asked for (batch norm takes the mean away again); ``norm``:
    what makes the batch norm of so many channels; ``act``: a name, a module or None. Raises what the modules raise.
    """

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
        norm: MakeNorm = torch.nn.BatchNorm3d,
        act: str | torch.nn.Module | None = "relu",
    ) -> None:
        shape = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        super().__init__(Conv3d(*shape, bias, padding_mode, device, dtype), norm, act)  # type: ignore[arg-type]


torch.serialization.add_safe_globals([ConvBNAct1d, ConvBNAct2d, ConvBNAct3d])
