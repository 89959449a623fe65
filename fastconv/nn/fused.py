"""Convolution + batch norm + activation (+ residual) as one call of modules that stay what they are.

``run_chain`` looks at its modules at each call: what they are, whether something hooks into them, train or eval. What
it cannot fuse it runs as they are, so that a chain found once is never wrong later. A chain whose result is a module's
result goes on in the module that calls it: ``run_open``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _disabled_torch_function_impl
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack, has_torch_function_unary

from fastconv import functional
from fastconv.activations import has_fused_form
from fastconv.arguments import autocast_dtype, why_not_served
from fastconv.functional.conv_bn_act import conv_norm_act
from fastconv.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from fastconv.nn.patches import patched

# "norm", "act" and "skip" with a module, "+" and "+=" with what is added.
Steps = tuple[tuple[str, Any], ...]
Size = int | tuple[int, ...]
Norm = Callable[[int], torch.nn.Module]

_FUNCTIONS: dict[type, Any] = {
    **{Conv1d: functional.conv1d, ConvTranspose1d: functional.conv_transpose1d},
    **{Conv2d: functional.conv2d, ConvTranspose2d: functional.conv_transpose2d},
    **{Conv3d: functional.conv3d, ConvTranspose3d: functional.conv_transpose3d},
}
# Each with the axes of its input, None: any; ``fuse`` adds timm's, which has children ``drop`` and ``act``.
NORMS: dict[type, int | None] = {
    torch.nn.BatchNorm1d: 3,
    torch.nn.BatchNorm2d: 4,
    torch.nn.BatchNorm3d: 5,
    torch.nn.SyncBatchNorm: None,
}
# What may do nothing, each with the rate at which it does something in training; ``fuse`` adds DropPath and its like.
SKIPPED: dict[type, str] = {
    torch.nn.Identity: "",
    **dict.fromkeys((torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d), "p"),
}
SUMS = ("+", "+=")
# Called in the place of `run_chain`, the last one alone: explain's.
watchers: list[Callable[[Any, Any, Steps], Any]] = []


def run_chain(x: Any, conv: Any, steps: Steps, tail: Steps = ()) -> Any:
    """``steps``, then ``tail``, on ``conv(x)``: x [N, C, spatial], what is added as the result.

    As many steps as possible are one call of fastconv's; the rest are calls of the modules. Raises what the modules
    would.
    """
    steps = (*steps, *tail)
    if torch.compiler.is_exporting():
        conv, steps = _unwrapped(conv), tuple((kind, _unwrapped(operand)) for kind, operand in steps)
    if watchers:
        return watchers[-1](x, conv, steps)
    return call_chain(x, conv, steps, taken(x, conv, steps)[0])


def taken(x: Any, conv: Any, steps: Steps) -> tuple[int, str | None]:
    """How many of ``steps`` one call takes behind ``conv(x)`` (0: not even the batch norm), and why no more."""
    if not isinstance(x, Tensor) or _intercepted(x):
        return 0, f"called with a {type(x).__name__}, or in a mode, that sees each function"
    dtype = autocast_dtype(x) or x.dtype
    reason = why_not_served(x, dtype)
    if reason is None and type(conv) in _FUNCTIONS and x.dim() != len(conv.kernel_size) + 2:
        reason = f"its input has {x.dim()} axes"
    if reason is not None:
        return 0, reason
    end, reason = fusible(conv, steps)
    for index, (kind, operand) in enumerate(steps[:end]):
        if kind in SUMS and not _adds_as_it_is(x, operand, conv, dtype):
            return index, "what is added has another shape or dtype"
    return end, reason


def call_chain(x: Any, conv: Any, steps: Steps, end: int) -> Any:
    """``steps`` on ``conv(x)``, the first ``end`` of them in one call with it."""
    return take(_fused(x, conv, steps[:end]) if end else conv(x), steps[end:])


def run_open(child: Any, args: tuple[Any, ...], steps: Steps, tail: Steps = ()) -> Any:
    """``steps``, then ``tail``, on ``child(*args)``, at the end of the child's last chain where it has one.

    What the child's own call would do beside its forward is looked at each time, as `run_chain` does.
    """
    steps = (*steps, *tail)
    go_on = getattr(type(child).forward, "go_on", None)
    if go_on is None or _has_any_global_hook() or interference(child) is not None:
        return take(child(*args), steps)
    return go_on(child, args, steps)


def take(value: Any, steps: Steps) -> Any:
    """``steps`` on ``value``, one by one."""
    for kind, operand in steps:
        if kind == "+":
            value = value + operand
        elif kind == "+=":
            value += operand
        elif stands_for_function(operand):
            value = operand.forward(value)
        else:
            value = operand(value)
    return value


def fusible(conv: Any, steps: Steps) -> tuple[int, str | None]:
    """How many of ``steps`` one call can take, as the modules are now (0: not even "norm"), and why no more."""
    if _has_any_global_hook():
        return 0, "a hook on every module"
    reason = interference(conv)
    if reason is None and type(conv) not in _FUNCTIONS:
        reason = f"its convolution is a {type(conv).__name__}"
    end = 0
    done: set[str] = set()
    for index, (kind, operand) in enumerate(steps):
        if reason is not None:
            break
        does = {"+"} if kind in SUMS else {kind} - {"skip"}
        if kind == "norm":
            reason, active = _against_norm(operand, len(conv.kernel_size) + 2)
            does |= {"act"} if active else set()
        elif kind == "act":
            reason = _against_act(operand)
        elif kind == "skip":
            reason = _against_skip(operand)
        if reason is None and does and kind != "norm" and "norm" not in done:
            reason = "no batch norm in front of it"
        if reason is None and done & does:
            second = {"norm": "batch norm", "act": f"activation, {type(operand).__name__}"}
            reason = f"a second {second.get(kind, 'addition')}"
        done |= does
        if reason is None and "norm" in done:
            end = index + 1
    return end, reason


class Function(NamedTuple):
    """A call of torch's that a chain takes for an activation: the forward of the module that stands for it there."""

    target: Any  # a function, or the name of a tensor's method
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, value: Any) -> Any:
        function = getattr(type(value), self.target) if isinstance(self.target, str) else self.target
        return function(value, *self.args, **self.kwargs)


def stands_for_function(act: Any) -> bool:
    """Whether no module of the user's but a function is called where ``act`` stands."""
    return type(getattr(act, "__dict__", {}).get("forward")) is Function


def interference(module: torch.nn.Module | None) -> str | None:
    """What of the user's would not be called, or not see the value, if ``module`` was not called."""
    if module is None:
        return "a None in its place"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"a hook on its {type(module).__name__}"
    own = module.__dict__
    if "forward" in own or "_conv_forward" in own or "_call_impl" in own:
        return f"a forward of its own on its {type(module).__name__}"
    if module._compiled_call_impl is not None:
        return f"its {type(module).__name__} is compiled on its own"
    return patched(type(module))


def _unwrapped(operand: Any) -> Any:
    """What torch.export has a stand-in with a class of its own for: a module that has several names."""
    from torch.fx.experimental.proxy_tensor import _AttrProxy

    return operand.get_base() if isinstance(operand, _AttrProxy) else operand  # type: ignore[attr-defined]


def _intercepted(x: Tensor) -> bool:
    """Whether a tensor subclass or a mode of somebody's is to see each of torch's functions on ``x``."""
    if not has_torch_function_unary(x):
        return False
    if type(x) is not Tensor and type(x).__torch_function__ is not _disabled_torch_function_impl:
        return True
    # torch's own modes, as of torch.export and torch.set_default_device, change nothing of a convolution.
    return not all(type(mode).__module__.startswith("torch.") for mode in _get_current_function_mode_stack())


def _against_norm(norm: Any, axes: int) -> tuple[str | None, bool]:
    """Why ``norm`` is not fused, and whether it has an activation of its own."""
    if type(norm) not in NORMS:
        return f"{type(norm).__name__} is not a batch norm that is fused", False
    if NORMS[type(norm)] not in (None, axes):
        return f"a {type(norm).__name__} behind a convolution of {axes - 2} axes", False
    reason, active = interference(norm), False
    act = norm._modules.get("act")
    if act is not None and reason is None:
        active = type(act) is not torch.nn.Identity
        reason = _against_skip(norm.drop) or _against_act(act)
    return reason, active


def _against_act(act: torch.nn.Module) -> str | None:
    reason = None if stands_for_function(act) else interference(act)
    if reason is None and not has_fused_form(act):
        reason = f"{type(act).__name__} has no fused form"
    return reason


def _against_skip(module: Any) -> str | None:
    """Why ``module`` may not be passed over: it does something now, or is hooked."""
    rate = SKIPPED.get(type(module))
    if rate is None:
        return f"a {type(module).__name__} in between"
    if rate and module.training and getattr(module, rate) != 0:
        return f"a {type(module).__name__} in between, in training"
    return interference(module)


def process_group(norm: Any) -> Any:
    """The process group over which ``norm`` takes statistics; None where it is alone. As torch.nn.SyncBatchNorm's."""
    distributed = torch.distributed
    if not isinstance(norm, torch.nn.SyncBatchNorm) or not norm.training:
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
    sizes = zip(x.shape[2:], residual.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
    for axis, (size, added, filter_size, stride, dilation) in enumerate(sizes):
        # Of the filter, less what is padded.
        reach = dilation * (filter_size - 1) - (0 if isinstance(conv.padding, str) else 2 * conv.padding[axis])
        if conv.transposed:
            size = (size - 1) * stride + reach + conv.output_padding[axis] + 1
        elif conv.padding != "same":
            size = (size - reach - 1) // stride + 1
        if added != size:
            return False
    return True


def _fused(x: Tensor, conv: Any, steps: Steps) -> Tensor:
    """``steps``, the beginning of a chain, in one call; statistics are kept as torch.nn's batch norms keep them."""
    norm: Any = None
    act = residual = None
    residual_after = False
    for kind, operand in steps:
        if kind == "norm":
            norm, act = operand, operand._modules.get("act")  # timm's have one of their own
        elif kind == "act":
            act, residual_after = operand, False
        elif kind in SUMS:
            residual, residual_after = operand, True
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
    return conv_norm_act(
        *(_FUNCTIONS[type(conv)], x, conv.weight, conv.bias),
        *((mean, var, norm.weight, norm.bias), batch, momentum, norm.eps),
        *(act, residual, residual_after),
        *(conv.stride, padding, conv.dilation, conv.groups, process_group(norm)),
        conv.output_padding if conv.transposed else None,
        count if training else None,
    )


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

    def steps(self, residual: Tensor | None = None) -> Steps:
        """What it does to its convolution's result."""
        added: Steps = () if residual is None else (("+", residual),)
        return ("norm", self.bn), *added, *(() if self.act is None else (("act", self.act),))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return run_chain(x, self.conv, self.steps(residual))


def _go_on(layer: Any, args: tuple[Any, ...], steps: Steps) -> Any:
    return run_chain(args[0], layer.conv, layer.steps(*args[1:]), steps)


# On the function: a subclass with a forward of its own does not have it.
ConvBNAct.forward.go_on = _go_on  # type: ignore[attr-defined]


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
