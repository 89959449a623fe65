"""Convolution + batch norm + activation (+ residual) as one call of modules that stay what they are.

``run_chain`` looks at its modules at each call: what they are, whether something hooks into them, train or eval. What
it cannot fuse it runs as they are, so that a chain found once is never wrong later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import has_torch_function_unary

from fastconv import functional
from fastconv.activations import has_fused_form
from fastconv.nn.conv import Conv1d, Conv2d, Conv3d

Steps = tuple["str | int", ...]
Size = int | tuple[int, ...]
Norm = Callable[[int], torch.nn.Module]

_FUNCTIONS: dict[type, Any] = {Conv1d: functional.conv1d, Conv2d: functional.conv2d, Conv3d: functional.conv3d}
# Each with the axes of its input, None: any; ``fuse`` adds timm's, which has children ``drop`` and ``act``.
NORMS: dict[type, int | None] = {
    torch.nn.BatchNorm1d: 3,
    torch.nn.BatchNorm2d: 4,
    torch.nn.BatchNorm3d: 5,
    torch.nn.SyncBatchNorm: None,
}


def run_chain(
    x: Any,
    residual: Any,
    conv: Any,
    norm: Any,
    act: Any,
    others: tuple[Any, ...],
    steps: Steps,
) -> Any:
    """What ``steps`` make of ``conv(x)``: "norm", "act", "+" and "+=" the residual, or the number of one of ``others``.

    x [N, C, spatial], residual as the result. As many steps as possible are one call of fastconv's; the rest are calls
    of the modules. Raises what the modules would.
    """
    end = 0
    if isinstance(x, Tensor) and not has_torch_function_unary(x):
        dtype = functional._autocast_dtype(x) or x.dtype
        if functional.served(x, dtype) is None and x.dim() == len(conv.kernel_size) + 2:
            end, _ = fusible(conv, norm, act, others, steps)
            if residual is not None and not _adds_as_it_is(x, residual, conv, dtype):
                end = min(end, steps.index("+" if "+" in steps else "+="))
    value = _fused(x, residual, conv, norm, act, steps[:end]) if end else conv(x)
    for step in steps[end:]:
        if step == "norm":
            value = norm(value)
        elif step == "act":
            value = act(value)
        elif step == "+":
            value = value + residual
        elif step == "+=":
            value += residual
        else:
            value = others[step](value)  # type: ignore[index]
    return value


def fusible(
    conv: Any, norm: Any, act: torch.nn.Module | None, others: tuple[torch.nn.Module, ...], steps: Steps
) -> tuple[int, str | None]:
    """How many of ``steps`` one call can take, as the modules are now (0: not even "norm"), and why no more."""
    if _has_any_global_hook():
        return 0, "a hook on every module"
    reason = _interference(conv)
    if reason is None and type(conv) not in _FUNCTIONS:
        reason = f"its convolution is a {type(conv).__name__}"
    if reason is not None:
        return 0, reason
    end, active = 0, False
    for index, step in enumerate(steps):
        if step == "norm":
            reason, active = _against_norm(norm, len(conv.kernel_size) + 2)
        elif step == "act":
            reason = _against_act(act)
            if active:
                reason = f"a second activation, {type(act).__name__}"
            active = True
        elif step not in ("+", "+="):
            other = others[step]  # type: ignore[index]
            reason = _interference(other)
            if type(other) is not torch.nn.Identity:
                reason = f"a {type(other).__name__} in between"
        if reason is not None:
            return end, reason
        if end or step == "norm":
            end = index + 1
    return end, None


def _interference(module: torch.nn.Module) -> str | None:
    """What of the user's would not be called, or not see the value, if ``module`` was not called."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"a hook on its {type(module).__name__}"
    if "forward" in module.__dict__:
        return f"a forward of its own on its {type(module).__name__}"
    return None


def _against_norm(norm: Any, axes: int) -> tuple[str | None, bool]:
    """Why ``norm`` is not fused, and whether it has an activation of its own."""
    if type(norm) not in NORMS:
        return f"{type(norm).__name__} is not a batch norm that is fused", False
    if NORMS[type(norm)] not in (None, axes):
        return f"a {type(norm).__name__} behind a convolution of {axes - 2} axes", False
    reason, active = _interference(norm), False
    act = norm._modules.get("act")
    if act is not None and reason is None:
        active = type(act) is not torch.nn.Identity
        reason = _interference(norm.drop) or _against_act(act)
        if type(norm.drop) is not torch.nn.Identity:
            reason = f"a {type(norm.drop).__name__} before the activation of its {type(norm).__name__}"
    return reason, active


def _against_act(act: torch.nn.Module | None) -> str | None:
    if act is None:
        return "no activation"
    reason = _interference(act)
    if reason is None and not has_fused_form(act):
        reason = f"{type(act).__name__} has no fused form"
    return reason


def _group(norm: Any) -> Any:
    """The process group over which ``norm`` takes statistics; None where it is alone. As torch.nn.SyncBatchNorm's."""
    distributed = torch.distributed
    if type(norm) is not torch.nn.SyncBatchNorm or not norm.training:
        return None
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def _adds_as_it_is(x: Tensor, residual: Any, conv: Any, dtype: torch.dtype) -> bool:
    """Whether ``residual`` has the result's shape and dtype, and not one that PyTorch would broadcast or promote."""
    if not isinstance(residual, Tensor) or residual.dtype != dtype or residual.device != x.device:
        return False
    if residual.dim() != x.dim() or residual.shape[0] != x.shape[0] or residual.shape[1] != conv.out_channels:
        return False
    for axis, (stride, dilation, filter_size) in enumerate(
        zip(conv.stride, conv.dilation, conv.kernel_size, strict=True)
    ):
        size = x.shape[axis + 2]
        if conv.padding != "same":
            sides = 0 if conv.padding == "valid" else 2 * conv.padding[axis]
            size = (size + sides - dilation * (filter_size - 1) - 1) // stride + 1
        if residual.shape[axis + 2] != size:
            return False
    return True


def _fused(
    x: Tensor,
    residual: Tensor | None,
    conv: Any,
    norm: Any,
    act: torch.nn.Module | None,
    steps: Steps,
) -> Tensor:
    """``steps``, the beginning of a chain, in one call; statistics are kept as torch.nn's batch norms keep them."""
    if "act" not in steps:
        act = norm._modules.get("act")  # timm's have one of their own
    mean, var, count = norm.running_mean, norm.running_var, norm.num_batches_tracked
    training, momentum = norm.training, norm.momentum
    batch = training or (mean is None and var is None)
    if training and not norm.track_running_stats:
        mean = var = count = None
    if momentum is None:
        momentum = 1.0 / float(count + 1) if training and count is not None else 0.0
    padding = conv.padding
    if conv.padding_mode != "zeros":
        x, padding = torch.nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
    added = "+" in steps or "+=" in steps
    z = functional.conv_norm_act(
        *(_FUNCTIONS[type(conv)], x, conv.weight, conv.bias),
        *((mean, var, norm.weight, norm.bias), batch, momentum, norm.eps),
        *(act, residual if added else None, added and steps[-1] != "act"),
        *(conv.stride, padding, conv.dilation, conv.groups, _group(norm)),
    )
    if training and count is not None:
        count.add_(1)
    return z


# Names as functional's, each with the module that it stands for.
_ACTIVATIONS: dict[str, Callable[[], torch.nn.Module]] = {
    "elu": torch.nn.ELU,
    "gelu": torch.nn.GELU,
    "gelu_tanh": partial(torch.nn.GELU, approximate="tanh"),
    "hardsigmoid": torch.nn.Hardsigmoid,
    "hardswish": torch.nn.Hardswish,
    "hardtanh": torch.nn.Hardtanh,
    "identity": torch.nn.Identity,
    "leaky_relu": torch.nn.LeakyReLU,
    "mish": torch.nn.Mish,
    "relu": torch.nn.ReLU,
    "relu6": torch.nn.ReLU6,
    "sigmoid": torch.nn.Sigmoid,
    "silu": torch.nn.SiLU,
    "softplus": torch.nn.Softplus,
    "tanh": torch.nn.Tanh,
}


class ConvBNAct(torch.nn.Module):
    """Children ``conv``, ``bn`` and ``act`` (None: none), which may be hooked, replaced and loaded as any."""

    def __init__(self, conv: Any, norm: Norm, act: str | torch.nn.Module | None) -> None:
        super().__init__()
        if isinstance(act, str) and act not in _ACTIVATIONS:
            raise ValueError(f"act must be a module, None or one of {', '.join(_ACTIVATIONS)}, but got {act!r}")
        self.conv = conv
        self.bn = norm(conv.out_channels).to(conv.weight.device, conv.weight.dtype)
        self.act = _ACTIVATIONS[act]() if isinstance(act, str) else act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        steps: Steps = ("norm",) if residual is None else ("norm", "+")
        return run_chain(x, residual, self.conv, self.bn, self.act, (), steps if self.act is None else (*steps, "act"))


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
        norm: Norm = torch.nn.BatchNorm1d,
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
        norm: Norm = torch.nn.BatchNorm2d,
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
        norm: Norm = torch.nn.BatchNorm3d,
        act: str | torch.nn.Module | None = "relu",
    ) -> None:
        shape = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        super().__init__(Conv3d(*shape, bias, padding_mode, device, dtype), norm, act)  # type: ignore[arg-type]


torch.serialization.add_safe_globals([ConvBNAct1d, ConvBNAct2d, ConvBNAct3d])
