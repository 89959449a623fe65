"""What the calls of a graph may write, and so whether one of them may be moved behind others."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fastconv.activations import activation_of, has_fused_form, is_activation
from fastconv.fuse.fused import Step
from fastconv.fuse.stand_ins import class_of, is_librarys, is_sequential, unpacked
from fastconv.kernels.jit.activations import ACTIVATIONS
from fastconv.nn.fused import ConvBNAct
from fastconv.nn.fused_call import SUMS

# The operator module's functions that begin with an i and write nothing.
_PURE = ("index", "indexOf", "inv", "invert", "is_", "is_not", "itemgetter")


def norms_in(module: torch.nn.Module) -> set[torch.nn.Module]:
    found: set[torch.nn.Module] = {module} if isinstance(module, _BatchNorm) else set()
    for child in module._modules.values():
        if child is not None and (child._modules or isinstance(child, _BatchNorm)):
            found |= norms_in(child)
    return found


def share_norms(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether a call of either updates the same statistics."""
    theirs = norms_in(b)
    return bool(theirs) and not theirs.isdisjoint(norms_in(a))


def is_identity(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Identity and not _is_seen(module)


def _is_seen(module: torch.nn.Module) -> bool:
    """Whether a hook gets what ``module`` is called with."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def kept(steps: list[Step]) -> tuple[Node | None, str | torch.nn.Module | None]:
    """What is added in front of an activation, and the activation, whose derivative may need the sum; else Nones."""
    kinds = [step.kind for step in steps]
    sums = [kinds.index(kind) for kind in SUMS if kind in kinds]
    if not sums or "act" not in kinds[sums[0] :]:
        return None, None
    return steps[sums[0]].operand, steps[kinds.index("act", sums[0])].operand


def needs_no_sum(act: torch.nn.Module) -> bool:
    """Whether backward takes the activation's derivative from its result, and so keeps no residual in front of it."""
    return has_fused_form(act) and ACTIVATIONS[activation_of(act).name].from_output


def only_computes(module: torch.nn.Module) -> bool:
    """Whether a call of ``module`` does nothing but compute: it writes no input, draws no random numbers."""
    return not module_may_write(module) and _has_known_parts(module)


def _has_known_parts(module: torch.nn.Module) -> bool:
    children = module._modules.values()
    return _is_known_class(class_of(module)) and all(child is None or _has_known_parts(child) for child in children)


@cache
def _is_known_class(kind: type[torch.nn.Module]) -> bool:
    theirs = kind.__module__.startswith(("torch.nn.", "fastconv.nn."))
    return (
        getattr(kind, "forward", None) is torch.nn.Sequential.forward
        or issubclass(kind, torch.nn.Identity | ConvBNAct)
        or is_activation(kind)
        or (theirs and issubclass(kind, _ConvNd | _BatchNorm))
    )


def may_write(node: Node, module: torch.nn.Module) -> bool:
    if node.op == "call_module":
        return module_may_write(module.get_submodule(str(node.target)))
    if node.op == "call_method":
        return str(node.target).endswith("_") or str(node.target) == "__setitem__"
    if node.op != "call_function":
        return False
    function: Any = node.target
    package = (getattr(function, "__module__", None) or "torch").split(".")[0]
    if package == "_operator":
        return function.__name__ == "setitem" or (function.__name__[0] == "i" and function.__name__ not in _PURE)
    if package not in ("torch", "builtins"):
        return function is not unpacked
    flags = *node.args[1:], node.kwargs.get("inplace"), node.kwargs.get("out") is not None
    return function.__name__.endswith("_") or any(flag is True for flag in flags)


def module_may_write(module: torch.nn.Module) -> bool:
    """Whether a call of ``module`` may change its input."""
    if _is_seen(module):
        return True
    if is_sequential(module):
        for child in module._modules.values():
            if isinstance(child, _ConvNd | _BatchNorm):
                return False
            if child is None or module_may_write(child):
                return True
        return False
    return not is_librarys(type(module)) or bool(vars(module).get("inplace"))
