"""Chains of convolution -> batch norm (-> activation, addition) in the graphs of one module's forward."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fastconv.activations import has_fused_form
from fastconv.fuse.trace import Kinds, Untraceable, class_of, is_sequential, parameters, trace
from fastconv.nn.fused import NORMS, ConvBNAct, Steps

_CONVS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
_CONTAINERS = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)
_ADD: dict[Any, str] = {operator.add: "+", torch.add: "+", "add": "+", operator.iadd: "+=", "add_": "+="}
# Functions and methods, each with the module of the same arguments.
_ACTIVATIONS: dict[Any, type[torch.nn.Module]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), torch.nn.ReLU),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), torch.nn.Sigmoid),
    **dict.fromkeys((F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), torch.nn.Tanh),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), torch.nn.LeakyReLU),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), torch.nn.Hardtanh),
    **dict.fromkeys((F.elu, F.elu_), torch.nn.ELU),
    F.relu6: torch.nn.ReLU6,
    F.silu: torch.nn.SiLU,
    F.hardswish: torch.nn.Hardswish,
    F.hardsigmoid: torch.nn.Hardsigmoid,
    F.gelu: torch.nn.GELU,
    F.softplus: torch.nn.Softplus,
    F.mish: torch.nn.Mish,
}
# Of the operator module's functions that begin with an i, those that write nothing.
_PURE = ("index", "indexOf", "inv", "invert", "is_", "is_not", "itemgetter")


@dataclass(frozen=True)
class Chain:
    """Calls of a graph, by the targets of the modules called, that one call can take the place of."""

    conv: str
    norm: str
    act: str | torch.nn.Module | None  # a module in place of a function
    others: tuple[str, ...]
    steps: Steps
    parts: tuple[str | None, ...]  # what a report calls each step
    ends: str | None  # why it does not take the next call, if that is an activation
    residual: Node | None
    nodes: tuple[Node, ...]  # the convolution first

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is in any graph of the same module."""
        return self.conv, self.norm, self.others, self.steps, self.parts


@dataclass(frozen=True)
class Study:
    """What there is to fuse in one module. ``graphs`` by training and what it is called with, the usual first."""

    graphs: dict[tuple[bool, Kinds], tuple[Graph, list[Chain]]]
    chains: list[Chain]  # those of the usual call, the same in training and in eval
    apart: dict[str, str]  # the other batch norms, and why
    reads: frozenset[str]  # the attributes by which the forward may have decided what to call


def may_hold_chains(module: torch.nn.Module) -> bool:
    """Whether a convolution and a batch norm are among its children, in containers or not."""
    if isinstance(module, torch.jit.ScriptModule | torch.nn.ModuleList | torch.nn.ModuleDict | ConvBNAct):
        return False
    children = list(_reach(module))
    return any(isinstance(m, _CONVS) for m in children) and any(isinstance(m, _BatchNorm) for m in children)


def _reach(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    for child in module.children():
        yield child
        if isinstance(child, _CONTAINERS):
            yield from _reach(child)


def study(module: torch.nn.Module) -> Study:
    """Trace ``module``'s forward in training and in eval, with a tensor or, where it asks, a list, and find chains."""
    reads: set[str] = set()
    graphs: dict[tuple[bool, Kinds], Graph] = {}
    required, optional = parameters(class_of(module).forward)
    kinds: Kinds = (Tensor,) * len(required)
    try:
        if "forward" in vars(module):
            raise Untraceable("is the instance's own")
        try:
            graph, asks = trace(module, True, kinds, reads)
        except Untraceable as why:
            # What cannot be called with a tensor may be with a list, as DLA's roots are.
            kinds = (list, *kinds[1:])
            try:
                graph, asks = trace(module, True, kinds, reads)
            except Untraceable:
                raise why from None
        graphs[True, kinds] = graph
        if is_sequential(module):
            graphs[False, kinds] = graph
            reads |= set(module._modules)
        else:
            graphs[False, kinds], _ = trace(module, False, kinds, reads)
            with torch.set_grad_enabled(not torch.is_grad_enabled()):
                again, _ = trace(module, True, kinds, reads)
            if again.python_code("self").src != graph.python_code("self").src:
                raise Untraceable("asks for the grad mode")
            # It may also be called with a list, or with one more tensor, as a shortcut that its caller has computed.
            for other in ((list, *kinds[1:]) if asks else kinds, (*kinds, Tensor) if optional else kinds):
                with suppress(Untraceable):
                    if (True, other) not in graphs:
                        graphs |= {(mode, other): trace(module, mode, other, reads)[0] for mode in (True, False)}
    except Untraceable as why:
        names = {child: name for name, child in module.named_modules()}
        reason = f"{class_of(module).__name__}.forward {why}"
        return Study({}, [], {names[m]: reason for m in _reach(module) if isinstance(m, _BatchNorm)}, frozenset())

    apart: dict[str, str] = {}
    in_graph = {graph: list(_chains(graph, module, apart)) for graph in graphs.values()}
    in_eval = {chain.key for chain in in_graph[graphs[False, kinds]]}
    # Later ones are found first.
    chains = [chain for chain in reversed(in_graph[graph]) if chain.key in in_eval]
    for found in in_graph.values():
        apart |= {chain.norm: "called otherwise in training than in eval" for chain in found}
    apart = {norm: reason for norm, reason in apart.items() if norm not in {chain.norm for chain in chains}}
    found_in = {which: (graph, in_graph[graph]) for which, graph in graphs.items()}
    return Study(found_in, chains, apart, frozenset(reads - {"training"}))


def _chains(graph: Graph, module: torch.nn.Module, apart: dict[str, str]) -> Iterator[Chain]:
    """The chains of ``graph``, the last first; why a batch norm is in none is added to ``apart``."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    taken: set[Node] = set()
    # From the end, so that where two chains meet in an addition, the later, for which the other is computed, takes it.
    for node in reversed(graph.nodes):
        if node.op != "call_module" or not isinstance(module.get_submodule(str(node.target)), _BatchNorm):
            continue
        behind = _back_to_convolution(node, module)
        if isinstance(behind, str):
            apart.setdefault(str(node.target), behind)
            continue
        chain = _chain(behind, node, module, order, taken)
        if chain is None:
            apart.setdefault(str(node.target), "something in between may write in place")
            continue
        taken.update(chain.nodes)
        yield chain


def _back_to_convolution(norm: Node, module: torch.nn.Module) -> list[Node] | str:
    """The calls from a convolution to ``norm``, or why there are none that can be one."""
    nodes = [norm]
    while True:
        before = _called_with(nodes[0])
        if before is None or before.op != "call_module":
            return "not behind a convolution"
        source = module.get_submodule(str(before.target))
        if not isinstance(source, _ConvNd) and type(source) is not torch.nn.Identity:
            return f"not behind a convolution but a {type(source).__name__}"
        if len(before.users) != 1:
            others = ", ".join(sorted(_describe(user) for user in before.users if user is not nodes[0]))
            return f"the result of {before.target} also goes to {others}"
        nodes.insert(0, before)
        if isinstance(source, _ConvNd):
            break
    kind = type(module.get_submodule(str(norm.target)))
    _know(kind)
    if kind not in NORMS:
        return f"a class of its own: {kind.__module__}.{kind.__qualname__}"
    if not isinstance(source, _CONVS) or NORMS[kind] not in (None, len(source.kernel_size) + 2):
        return f"behind a {type(source).__name__}"
    if _called_with(nodes[0]) is None:
        return f"{nodes[0].target} is called with more than its input"
    return nodes


def _chain(
    nodes: list[Node], norm: Node, module: torch.nn.Module, order: dict[Node, int], taken: set[Node]
) -> Chain | None:
    """What can follow ``nodes``, a convolution to its batch norm; None where not even these can be one call."""
    conv = nodes[0]
    others = [str(node.target) for node in nodes[1:-1]]
    steps: list[str | int] = [*range(len(others)), "norm"]
    parts: list[str | None] = [*(None for _ in others), str(norm.target)]
    least = len(nodes)
    act: str | torch.nn.Module | None = None
    residual: Node | None = None
    own = module.get_submodule(str(norm.target))._modules.get("act")
    active = own is not None and type(own) is not torch.nn.Identity
    ends = None
    while len(nodes[-1].users) == 1:
        (user,) = nodes[-1].users
        if user in taken:
            break
        found = _activation(user, module)
        if found is not None:
            if not has_fused_form(module.get_submodule(found) if isinstance(found, str) else found):
                ends = f"{_describe(user)} has no fused form"
            if active or ends:
                break
            act, active = found, True
            steps.append("act")
            parts.append(_describe(user))
        elif residual is None and (added := _added(user, nodes[-1])) is not None:
            residual = added
            steps.append(_ADD[user.target])
            parts.append("residual")
        elif user.op == "call_module" and type(module.get_submodule(str(user.target))) is torch.nn.Identity:
            steps.append(len(others))
            parts.append(None)
            others.append(str(user.target))
        else:
            break
        nodes.append(user)
    # The convolution moves to where the chain ends: nothing that it reads may be written on the way.
    while len(nodes) > least and (parts[-1] is None or _writes_between(nodes, module, order)):
        nodes.pop()
        parts.pop()
        steps.pop()
    if _writes_between(nodes, module, order):
        return None
    return Chain(
        conv=str(conv.target),
        norm=str(norm.target),
        act=act if "act" in steps else None,
        others=tuple(others[: sum(isinstance(step, int) for step in steps)]),
        steps=tuple(steps),
        parts=tuple(parts),
        ends=ends,
        residual=residual if "+" in steps or "+=" in steps else None,
        nodes=tuple(nodes),
    )


def _called_with(node: Node) -> Node | None:
    """The value that ``node`` is called with, if that is all."""
    only = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], Node)
    return node.args[0] if only else None  # type: ignore[return-value]


def _activation(node: Node, module: torch.nn.Module) -> str | torch.nn.Module | None:
    """The target of a module of torch.nn's activations, or a module that does what a function does."""
    if node.op == "call_module":
        act = module.get_submodule(str(node.target))
        is_act = type(act).__module__ == "torch.nn.modules.activation" and _called_with(node) is not None
        return str(node.target) if is_act else None
    if node.op not in ("call_function", "call_method") or node.target not in _ACTIVATIONS:
        return None
    if not node.args or len(node.all_input_nodes) != 1:
        return None
    return _ACTIVATIONS[node.target](*node.args[1:], **node.kwargs)


def _added(node: Node, value: Node) -> Node | None:
    """What is added to ``value``; None where ``node`` is something else, or changes the other in place."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADD:
        return None
    if len(node.args) != 2 or node.kwargs or not all(isinstance(arg, Node) for arg in node.args):
        return None
    first, second = node.args
    if first is second or (second is value and _ADD[node.target] == "+="):
        return None
    return second if first is value else first  # type: ignore[return-value]


def _writes_between(nodes: list[Node], module: torch.nn.Module, order: dict[Node, int]) -> bool:
    """Whether something called between the first and the last of ``nodes``, but for these, may write in place."""
    chain = set(nodes)
    between = islice(order, order[nodes[0]] + 1, order[nodes[-1]])
    return any(_may_write(node, module) for node in between if node not in chain)


def _may_write(node: Node, module: torch.nn.Module) -> bool:
    if node.op == "call_module":
        return _module_may_write(module.get_submodule(str(node.target)))
    if node.op == "call_method":
        return str(node.target).endswith("_") or str(node.target) == "__setitem__"
    if node.op != "call_function":
        return False
    function: Any = node.target
    package = (getattr(function, "__module__", None) or "torch").split(".")[0]
    if package == "_operator":
        return function.__name__ == "setitem" or (function.__name__[0] == "i" and function.__name__ not in _PURE)
    if package not in ("torch", "builtins"):
        return True
    flags = *node.args[1:], node.kwargs.get("inplace"), node.kwargs.get("out") is not None
    return function.__name__.endswith("_") or any(flag is True for flag in flags)


def _module_may_write(module: torch.nn.Module) -> bool:
    """Whether a call of ``module`` may change its input."""
    if is_sequential(module):
        for child in module.children():
            if isinstance(child, _ConvNd | _BatchNorm):
                return False
            if _module_may_write(child):
                return True
        return False
    theirs = type(module).__module__.startswith(("torch.nn.modules.", "fastconv.nn."))
    return not theirs or bool(getattr(module, "inplace", False))


def _describe(node: Node) -> str:
    if node.op == "output":
        return "the result"
    if node.op == "call_module":
        return str(node.target)
    return (node.target if isinstance(node.target, str) else node.target.__name__).rstrip("_")


def _know(norm: type) -> None:
    """Let timm's BatchNormAct2d be a batch norm: only a model that has one makes it importable here."""
    module = sys.modules.get("timm.layers.norm_act")
    if module is not None and norm is module.BatchNormAct2d:
        NORMS[norm] = 4
