"""A fused layer as it stands in the graph of a module's forward, and which of the graph's nodes can be steps of one."""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fastconv.activations import MODULES, has_fused_form, register_activation
from fastconv.nn.fused_call import NORMS, SKIPPED, ActFunction

CONVS = (
    *(torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d),
    *(torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d),
)
ADD: dict[Any, str] = {operator.add: "+", torch.add: "+", "add": "+", operator.iadd: "+=", "add_": "+="}


class Step(NamedTuple):
    """One of ``fastconv.nn.fused_call.Steps``, as a graph has it."""

    kind: str
    operand: Any  # a module's target, a module in place of a function, or the node that is added
    label: str | None  # what a report calls it


@dataclass(frozen=True)
class FusedLayer:
    """Calls of a graph that become one call."""

    head: str  # the target of a convolution, or of a module that ends in a fused layer
    of_conv: bool
    steps: tuple[Step, ...]
    done: frozenset[str]  # which of "norm", "act" and "+" it and what it continues do
    ends: str | None  # why it does not take the next call, if that is an activation
    is_result: bool  # of the module
    nodes: tuple[Node, ...]  # the head first
    passed: tuple[str, ...]  # modules between the head's call and the last, called before the head once it is fused

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for the same layer in any graph of the module."""
        steps = ((kind, label, operand if isinstance(operand, str) else None) for kind, operand, label in self.steps)
        return self.head, *steps, self.is_result


def skip(node: Node) -> Step:
    return Step("skip", str(node.target), None)


def may_skip(module: torch.nn.Module) -> bool:
    """Whether a call of ``module`` can do nothing, as a dropout's in inference."""
    learn_library_class(type(module))
    return type(module) in SKIPPED


def is_result(node: Node) -> bool:
    """Whether ``node`` is what its graph returns, and nothing else reads it."""
    return [(user.op, user.args) for user in node.users] == [("output", (node,))]


def called_with(node: Node) -> Node | None:
    """The value that ``node`` is called with, by position or by name, if that is all."""
    values = [*node.args, *node.kwargs.values()]
    return values[0] if len(values) == 1 and isinstance(values[0], Node) else None


def activation_in(node: Node, module: torch.nn.Module) -> str | torch.nn.Module | None:
    """The target of the module that ``node`` calls, or a module that does what its function does, if an activation."""
    if node.op == "call_module":
        act = module.get_submodule(str(node.target))
        learn_library_class(type(act))
        is_act = type(act).__module__ == "torch.nn.modules.activation" or has_fused_form(act)
        is_act = is_act and type(act) is not torch.nn.Identity and called_with(node) is not None
        return str(node.target) if is_act else None
    if node.op not in ("call_function", "call_method") or node.target not in MODULES:
        return None
    if not node.args or len(node.all_input_nodes) != 1:
        return None
    try:
        act = MODULES[node.target](*node.args[1:], **node.kwargs)
    except (TypeError, ValueError, AssertionError):  # the module is stricter than the function
        return None
    vars(act)["forward"] = ActFunction(node.target, node.args[1:], dict(node.kwargs))
    return act


def added_in(node: Node, value: Node) -> Node | None:
    """What ``node`` adds to ``value``; None if it is no addition, or changes the other operand in place."""
    if node.op not in ("call_function", "call_method") or node.target not in ADD:
        return None
    if len(node.args) != 2 or node.kwargs or not all(isinstance(arg, Node) for arg in node.args):
        return None
    first, second = node.args
    if first is second or (second is value and ADD[node.target] == "+="):
        return None
    return second if first is value else first  # type: ignore[return-value]


def describe(node: Node) -> str:
    if node.op == "output":
        return "the result"
    if node.op == "placeholder":
        return f"the argument {node.target}"
    if node.op == "call_module":
        return str(node.target)
    return (node.target if isinstance(node.target, str) else node.target.__name__).rstrip("_")


def learn_library_class(kind: type) -> None:
    """Let a class of timm's or torchvision's be known; its library is never imported here."""
    package, name = kind.__module__, kind.__name__
    if (package, name) == ("torchvision.ops.stochastic_depth", "StochasticDepth"):
        SKIPPED[kind] = "p"
    elif (package, name) == ("timm.layers.drop", "DropPath"):
        SKIPPED[kind] = "drop_prob"
    elif package == "timm.layers.activations":
        register_activation(kind)
    elif package == "timm.layers.norm_act" and name in ("BatchNormAct2d", "SyncBatchNormAct"):
        NORMS[sys.modules[package].BatchNormAct2d] = 4
        NORMS[sys.modules[package].SyncBatchNormAct] = None  # what the other may become later
