"""Convolution + batch norm + activation (+ residual) as one call of modules that stay what they are.

``run_fused`` looks at its modules at each call: what they are, whether something hooks into them, train or eval.
Modules that it cannot fuse run as they are, so that a fused layer found once is never wrong later. If its result is a
module's result, the fused layer continues in the module that calls that one: ``run_continued``.
"""

from __future__ import annotations

from collections.abc import Callable
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
from fastconv.kernels.problem.windows import least_input_size, output_size
from fastconv.nn.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from fastconv.nn.patches import patched

# "norm", "act" and "skip" with a module, "+" and "+=" with what is added.
Steps = tuple[tuple[str, Any], ...]
_FUNCTIONS: dict[type, Any] = {
    **{Conv1d: functional.conv1d, ConvTranspose1d: functional.conv_transpose1d},
    **{Conv2d: functional.conv2d, ConvTranspose2d: functional.conv_transpose2d},
    **{Conv3d: functional.conv3d, ConvTranspose3d: functional.conv_transpose3d},
}
# Batch norms with the axes of their input, None: any. ``fuse`` adds timm's, which has children ``drop`` and ``act``.
NORMS: dict[type, int | None] = {
    torch.nn.BatchNorm1d: 3,
    torch.nn.BatchNorm2d: 4,
    torch.nn.BatchNorm3d: 5,
    torch.nn.SyncBatchNorm: None,
}
# Modules that may do nothing, with the attribute that is their rate in training. ``fuse`` adds DropPath and its like.
SKIPPED: dict[type, str] = {
    torch.nn.Identity: "",
    **dict.fromkeys((torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d), "p"),
}
SUMS = ("+", "+=")
# Observers that replace `run_fused`; the last one wins. Used by `explain`.
watchers: list[Callable[[Any, Any, Steps], Any]] = []


def run_fused(x: Any, conv: Any, steps: Steps, tail: Steps = ()) -> Any:
    """``steps``, then ``tail``, on ``conv(x)``: x [N, C, spatial]; what is added has the result's shape.

    As many steps as possible are one call of fastconv's; the rest are calls of the modules. Raises what the modules
    would.
    """
    steps = (*steps, *tail)
    if torch.compiler.is_exporting():
        conv, steps = _unwrapped(conv), tuple((kind, _unwrapped(operand)) for kind, operand in steps)
    if watchers:
        return watchers[-1](x, conv, steps)
    return call_fused(x, conv, steps, steps_fused(x, conv, steps)[0])


def steps_fused(x: Any, conv: Any, steps: Steps) -> tuple[int, str | None]:
    """How many of ``steps`` one call takes behind ``conv(x)`` (0: not even the batch norm), and why no more."""
    if not isinstance(x, Tensor) or _intercepted(x):
        return 0, f"called with a {type(x).__name__}, or in a mode, that sees each function"
    dtype = autocast_dtype(x) or x.dtype
    reason = why_not_served(x, dtype)
    if reason is None and type(conv) in _FUNCTIONS and x.dim() != len(conv.kernel_size) + 2:
        reason = f"its input has {x.dim()} axes"
    if reason is not None:
        return 0, reason
    end, reason = steps_fusible(conv, steps)
    for index, (kind, operand) in enumerate(steps[:end]):
        if kind in SUMS and not _adds_as_it_is(x, operand, conv, dtype):
            return index, "what is added has another shape or dtype"
    return end, reason


def call_fused(x: Any, conv: Any, steps: Steps, end: int) -> Any:
    """``steps`` on ``conv(x)``, the first ``end`` of them in one call with it."""
    return run_steps(_fused(x, conv, steps[:end]) if end else conv(x), steps[end:])


def run_continued(child: Any, args: tuple[Any, ...], steps: Steps, tail: Steps = ()) -> Any:
    """``steps``, then ``tail``, on ``child(*args)``, in one call with the fused layer at the child's end if it has one.

    Looks at each call, as `run_fused` does, at what the child's own call would do beside its forward.
    """
    steps = (*steps, *tail)
    continued = getattr(type(child).forward, "continued", None)
    if continued is None or _has_any_global_hook() or why_not_bypassed(child) is not None:
        return run_steps(child(*args), steps)
    return continued(child, args, steps)


def run_steps(value: Any, steps: Steps) -> Any:
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


def steps_fusible(conv: Any, steps: Steps) -> tuple[int, str | None]:
    """How many of ``steps`` one call can take, as the modules are now (0: not even "norm"), and why no more."""
    if _has_any_global_hook():
        return 0, "a hook on every module"
    reason = why_not_bypassed(conv)
    if reason is None and type(conv) not in _FUNCTIONS:
        reason = f"its convolution is a {type(conv).__name__}"
    end = 0
    done: set[str] = set()
    for index, (kind, operand) in enumerate(steps):
        if reason is not None:
            break
        new = does(kind)
        if kind == "norm":
            reason, active = _why_not_norm(operand, len(conv.kernel_size) + 2)
            new |= {"act"} if active else set()
        elif kind == "act":
            reason = _why_not_act(operand)
        elif kind == "skip":
            reason = _why_not_skip(operand)
        if reason is None and new and kind != "norm" and "norm" not in done:
            reason = "no batch norm in front of it"
        if reason is None and done & new:
            second = {"norm": "batch norm", "act": f"activation, {type(operand).__name__}"}
            reason = f"a second {second.get(kind, 'addition')}"
        done |= new
        if reason is None and "norm" in done:
            end = index + 1
    return end, reason


def does(kind: str) -> set[str]:
    """Which of "norm", "act" and "+", each done once by a fused layer, a step of this kind does."""
    return {"+"} if kind in SUMS else {kind} - {"skip"}


class ActFunction(NamedTuple):
    """torch's function that is a fused layer's activation: the forward of the module that stands for it."""

    target: Any  # a function, or the name of a tensor's method
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, value: Any) -> Any:
        function = getattr(type(value), self.target) if isinstance(self.target, str) else self.target
        return function(value, *self.args, **self.kwargs)


def stands_for_function(act: Any) -> bool:
    """Whether ``act`` stands for a function that the user's forward calls."""
    return type(getattr(act, "__dict__", {}).get("forward")) is ActFunction


def why_not_bypassed(module: torch.nn.Module | None) -> str | None:
    """Why ``module`` must be called: something of the user's would otherwise not run, or not see the value."""
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


def process_group(norm: Any) -> Any:
    """The process group over which ``norm`` takes statistics; None: this process is the only one."""
    distributed = torch.distributed
    if not isinstance(norm, torch.nn.SyncBatchNorm) or not norm.training:
        return None
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def _unwrapped(operand: Any) -> Any:
    """The module itself: torch.export puts a stand-in in the place of one with several names."""
    from torch.fx.experimental.proxy_tensor import _AttrProxy

    return operand.get_base() if isinstance(operand, _AttrProxy) else operand  # type: ignore[attr-defined]


def _intercepted(x: Tensor) -> bool:
    """Whether a tensor subclass or a mode, not torch's own, sees each of torch's functions on ``x``."""
    if not has_torch_function_unary(x):
        return False
    if type(x) is not Tensor and type(x).__torch_function__ is not _disabled_torch_function_impl:
        return True
    # torch's own modes, for example torch.export's, change nothing of a convolution.
    return not all(type(mode).__module__.startswith("torch.") for mode in _get_current_function_mode_stack())


def _why_not_norm(norm: Any, axes: int) -> tuple[str | None, bool]:
    """Why ``norm`` is not fused, and whether it has an activation of its own."""
    if type(norm) not in NORMS:
        return f"{type(norm).__name__} is not a batch norm that is fused", False
    if NORMS[type(norm)] not in (None, axes):
        return f"a {type(norm).__name__} behind a convolution of {axes - 2} axes", False
    reason, active = why_not_bypassed(norm), False
    act = norm._modules.get("act")
    if act is not None and reason is None:
        active = type(act) is not torch.nn.Identity
        reason = _why_not_skip(norm.drop) or _why_not_act(act)
    return reason, active


def _why_not_act(act: torch.nn.Module) -> str | None:
    reason = None if stands_for_function(act) else why_not_bypassed(act)
    if reason is None and not has_fused_form(act):
        reason = f"{type(act).__name__} has no fused form"
    return reason


def _why_not_skip(module: Any) -> str | None:
    """Why ``module`` may not be passed over: it does something now, or is hooked."""
    rate = SKIPPED.get(type(module))
    if rate is None:
        return f"a {type(module).__name__} in between"
    if rate and module.training and getattr(module, rate) != 0:
        return f"a {type(module).__name__} in between, in training"
    return why_not_bypassed(module)


def _adds_as_it_is(x: Tensor, residual: Any, conv: Any, dtype: torch.dtype) -> bool:
    """Whether ``residual`` has the result's shape and dtype, so that PyTorch would neither broadcast nor promote."""
    if not isinstance(residual, Tensor) or residual.dtype != dtype or residual.device != x.device:
        return False
    if residual.dim() != x.dim() or residual.shape[0] != x.shape[0] or residual.shape[1] != conv.out_channels:
        return False
    sizes = zip(x.shape[2:], residual.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
    for axis, (size, added, filter_size, stride, dilation) in enumerate(sizes):
        padding = 0 if isinstance(conv.padding, str) else 2 * conv.padding[axis]
        if conv.transposed:
            size = least_input_size(size, filter_size, stride, padding, dilation) + conv.output_padding[axis]
        elif conv.padding != "same":
            size = output_size(size, filter_size, stride, padding, dilation)
        if added != size:
            return False
    return True


def _fused(x: Tensor, conv: Any, steps: Steps) -> Tensor:
    """``conv(x)`` and ``steps`` in one call; statistics are kept as torch.nn's batch norms keep them."""
    norm: Any = None
    act = residual = None
    residual_after = False
    for kind, operand in steps:
        if kind == "norm":
            norm, act = operand, operand._modules.get("act")  # timm's have one
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
