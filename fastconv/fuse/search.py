"""Finds fused layers in the graphs of one module's forward.

A fused layer begins with a call of a convolution, or of a module whose own result is a fused layer's (`Study.end`):
what follows in the caller, as the addition of a residual block, continues it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fastconv.activations import has_fused_form
from fastconv.fuse import writes
from fastconv.fuse.fused import (
    ADD,
    CONVS,
    FusedLayer,
    Step,
    activation_in,
    added_in,
    called_with,
    describe,
    is_result,
    learn_library_class,
    may_skip,
    skip,
)
from fastconv.fuse.stand_ins import MODULE_CONTAINERS, Untraceable, class_of, is_librarys, path_of
from fastconv.fuse.trace import Kinds, Trace, parameters, trace
from fastconv.nn.fused import ConvBNAct
from fastconv.nn.fused_call import NORMS, does


def found_in(module: torch.nn.Module) -> Study | None:
    """What was found in ``module`` when it was fused; None if it is not fused."""
    return type(module).__dict__.get("_fastconv_found")


@dataclass(frozen=True)
class Study:
    """What there is to fuse in one module. ``traces``: by training and the kinds of its arguments, the usual first."""

    traces: dict[tuple[bool, Kinds], tuple[Trace, list[FusedLayer]]]
    layers: list[FusedLayer]  # those of the usual call, the same in training and in eval
    unfused: dict[str, str]  # the other batch norms, and why
    untraceable: str | None = None

    @property
    def end(self) -> FusedLayer | None:
        """The fused layer whose result is the module's."""
        return next((layer for layer in self.layers if layer.is_result), None)


class Studies(dict[torch.nn.Module, Study]):
    """What there is to fuse in each module, found when it is first asked for. With ``as_fused``, a module that is fused
    keeps what was found when that was done."""

    def __init__(self, as_fused: bool = False) -> None:
        super().__init__()
        self.as_fused = as_fused
        self._setting: dict[torch.nn.Module, bool] = {}

    def __missing__(self, module: torch.nn.Module) -> Study:
        self[module] = Study({}, [], {})  # for one that holds itself
        if self.as_fused and (found := found_in(module)) is not None:
            self[module] = found
            return found
        # A scripted module's class has no forward.
        forward = getattr(class_of(module), "forward", None)
        nothing = not module._modules or forward is torch.nn.Module.forward
        if forward is ConvBNAct.forward:
            self[module] = Study({}, [_of_module(module)], {})  # type: ignore[arg-type]
        elif not nothing and not isinstance(module, ConvBNAct | torch.jit.ScriptModule):
            self[module] = study(module, self)
        return self[module]

    def sets_nothing(self, module: torch.nn.Module) -> bool:
        """Whether a call of ``module`` leaves the attributes of all objects as they are, for all that is known."""
        if module not in self._setting:
            self._setting[module] = False  # for one that holds itself
            self._setting[module] = all(map(self._sets_nothing_itself, module.modules()))
        return self._setting[module]

    def _sets_nothing_itself(self, module: torch.nn.Module) -> bool:
        if is_librarys(class_of(module)):
            return True
        found = self[module]
        return bool((found if found.traces else study(module, self)).traces)

    def of(self, model: torch.nn.Module) -> dict[torch.nn.Module, Study]:
        """Studies of the modules whose children are batch norms, or modules that end in a fused layer."""
        return {
            module: self[module]
            for module in model.modules()
            if isinstance(module, ConvBNAct)
            or any(isinstance(child, _BatchNorm) or self.continues(child) for child in reach(module))
        }

    def continues(self, module: torch.nn.Module) -> bool:
        """Whether the caller of ``module`` can add to a fused layer with a batch norm at its end."""
        if isinstance(module, _BatchNorm) or not any(isinstance(part, _BatchNorm) for part in module.modules()):
            return False
        done = self.done(module)
        return done is not None and "norm" in done and done < {"norm", "act", "+"}

    def done(self, module: torch.nn.Module) -> frozenset[str] | None:
        """The kinds of steps done to a convolution in the result of ``module``; None: that is no fused layer's."""
        if isinstance(module, CONVS):
            return frozenset()
        end = self[module].end if class_of(module).__call__ is torch.nn.Module.__call__ else None
        return None if end is None else end.done


def reach(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The children of ``module``, and those of containers among them."""
    for child in module.children():
        yield child
        if isinstance(child, MODULE_CONTAINERS):
            yield from reach(child)


def _of_module(layer: ConvBNAct) -> FusedLayer:
    steps = [Step("norm", "bn", "bn")] + ([] if layer.act is None else [Step("act", "act", "act")])
    return FusedLayer("conv", True, tuple(steps), frozenset(step.kind for step in steps), None, True, (), ())


def study(module: torch.nn.Module, studies: Studies) -> Study:
    """Trace ``module``'s forward in training and in eval, with a tensor, or a list if it asks for one, and find fused
    layers."""
    traces: dict[tuple[bool, Kinds], Trace] = {}

    def traced(training: bool, kinds: Kinds) -> Trace:
        return trace(module, training, kinds, studies.sets_nothing)

    try:
        if "forward" in vars(module):
            raise Untraceable("is the instance's own")
        required, optional = parameters(class_of(module).forward)
        kinds: Kinds = (Tensor,) * len(required)
        try:
            usual = traced(True, kinds)
        except Untraceable as why:
            # What cannot be called with a tensor may be with a list, as DLA's roots are.
            kinds = (list, *kinds[1:])
            try:
                usual = traced(True, kinds)
            except Untraceable:
                raise why from None
        traces[True, kinds] = usual
        traces[False, kinds] = traced(False, kinds)
        # It may also be called with a list, or with one more tensor, as a shortcut that its caller has computed.
        for other in ((list, *kinds[1:]) if usual.asks else kinds, (*kinds, Tensor) if optional else kinds):
            with suppress(Untraceable):
                if (True, other) not in traces:
                    traces |= {(mode, other): traced(mode, other) for mode in (True, False)}
    except Untraceable as why:
        return Study({}, [], {}, untraceable=f"{class_of(module).__name__}.forward {why}")

    unfused: dict[str, str] = {}
    found = {which: (each, _Finder(each, module, studies, unfused).fused_layers()) for which, each in traces.items()}
    in_eval = {layer.key for layer in found[False, kinds][1]}
    layers = [layer for layer in found[True, kinds][1] if layer.key in in_eval]
    others = {norm for _, layers_found in found.values() for layer in layers_found for norm in _norms(layer)}
    unfused |= dict.fromkeys(others, "called otherwise in training than in eval")
    fused = {norm for layer in layers for norm in _norms(layer)}
    return Study(found, layers, {norm: reason for norm, reason in unfused.items() if norm not in fused})


def _norms(layer: FusedLayer) -> list[str]:
    return [step.operand for step in layer.steps if step.kind == "norm"]


class _Finder:
    """Finds the fused layers of a graph; why a batch norm is in none is added to ``unfused``."""

    def __init__(self, traced: Trace, module: torch.nn.Module, studies: Studies, unfused: dict[str, str]) -> None:
        self.graph, self.guards = traced.graph, traced.guards
        self.module, self.studies, self.unfused = module, studies, unfused
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.taken: set[Node] = set()

    def fused_layers(self) -> list[FusedLayer]:
        """In the graph's order."""
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        found = []
        # From the end: if two fused layers meet in an addition, the later takes it, since the other is its operand.
        # This module's own batch norms come before its children's.
        for node in reversed([call for call in calls if isinstance(self._called(call), _BatchNorm)]):
            behind = self._back_to_head(node)
            layer = behind if isinstance(behind, str) else self._layer_from(behind)
            if isinstance(layer, str):
                self.unfused.setdefault(str(node.target), layer)
            else:
                found.append(layer)
                self.taken.update(layer.nodes)
        for node in reversed(calls):
            if node in self.taken or node.kwargs or not self._may_continue(node):
                continue
            layer = self._layer_from([node])
            # A convolution without a batch norm is for the batch norm of a caller.
            if not isinstance(layer, str) and ("norm" in layer.done if layer.steps else layer.is_result):
                found.append(layer)
                self.taken.update(layer.nodes)
        return sorted(found, key=lambda layer: self.order[layer.nodes[0]])

    def _may_continue(self, node: Node) -> bool:
        """Whether ``node`` calls what ends in a fused layer that can take another step, here or in the caller."""
        called = self._called(node)
        if isinstance(called, CONVS):
            return is_result(node) and called_with(node) is not None
        return self.studies.continues(called) or (is_result(node) and self.studies.done(called) is not None)

    def _called(self, node: Node) -> torch.nn.Module:
        return self.module.get_submodule(str(node.target))

    def _back_to_head(self, norm: Node) -> list[Node] | str:
        """The calls from a convolution to ``norm``, or why there are none that can be one."""
        nodes = [norm]
        while True:
            before = called_with(nodes[0])
            if before is None:
                return "not behind a convolution"
            if before.op != "call_module":
                return f"not behind a convolution but {describe(before)}"
            source = self._called(before)
            done = self.studies.done(source)
            is_conv = isinstance(source, _ConvNd)
            if done != frozenset() and not is_conv and type(source) is not torch.nn.Identity:
                return f"not behind a convolution but {before.target}, a {class_of(source).__name__}"
            if len(before.users) != 1:
                others = ", ".join(sorted(describe(user) for user in before.users if user is not nodes[0]))
                return f"the result of {before.target} also goes to {others}"
            nodes.insert(0, before)
            if type(source) is not torch.nn.Identity:
                break
        kind = type(self._called(norm))
        learn_library_class(kind)
        if kind not in NORMS:
            return f"a class of its own: {kind.__module__}.{kind.__qualname__}"
        if done is None or NORMS[kind] not in (None, self._axes(source)):
            return f"behind a {type(source).__name__}"
        if called_with(before) is None if is_conv else before.kwargs:
            return f"{before.target} is called with more than its input"
        return nodes

    def _axes(self, source: torch.nn.Module) -> int:
        """How many axes the result of the convolution in which ``source`` ends has."""
        while not isinstance(source, CONVS):
            end = self.studies[source].end
            assert end is not None
            source = source.get_submodule(end.head)
        return len(source.kernel_size) + 2

    def _layer_from(self, nodes: list[Node]) -> FusedLayer | str:
        """The fused layer that begins with ``nodes``, a head or all up to its batch norm; or why there is none."""
        head = self._called(nodes[0])
        done = set(self.studies.done(head) or ())
        steps: list[Step] = []
        for node in nodes[1:]:
            called = self._called(node)
            if isinstance(called, _BatchNorm):
                steps.append(Step("norm", str(node.target), str(node.target)))
                own = called._modules.get("act", torch.nn.Identity())
                learn_library_class(type(own))
                done |= {"norm"} if type(own) is torch.nn.Identity else {"norm", "act"}
            else:
                steps.append(skip(node))
        least = len(nodes)
        ends = None
        while len(nodes[-1].users) == 1:
            (user,) = nodes[-1].users
            if user in self.taken:
                break
            if (act := activation_in(user, self.module)) is not None:
                if not has_fused_form(self.module.get_submodule(act) if isinstance(act, str) else act):
                    ends = f"{describe(user)} has no fused form"
                step = Step("act", act, describe(user))
            elif (added := added_in(user, nodes[-1])) is not None:
                step = Step(ADD[user.target], added, "residual")
            elif user.op == "call_module" and called_with(user) and may_skip(self._called(user)):
                step = skip(user)
            else:
                break
            new = does(step.kind)
            if ends or done & new:
                break
            steps.append(step)
            done |= new
            nodes.append(user)
        while len(nodes) > least and (
            (steps[-1].kind == "skip" and not is_result(nodes[-1]))
            or self._may_not_move(nodes)
            or self._is_kept_and_written(steps, nodes[-1])
        ):
            done -= does(steps.pop().kind)
            nodes.pop()
        if self._may_not_move(nodes):
            return "something in between may write in place"
        passed = [str(node.target) for node in self._between(nodes) if self._calls_identity(node)]
        self._rely_on_what_is_passed(nodes)
        self._rely_on_what_is_kept(steps, nodes[-1])
        return FusedLayer(
            head=str(nodes[0].target),
            of_conv=isinstance(head, CONVS),
            steps=tuple(steps),
            done=frozenset(done),
            ends=ends,
            is_result=is_result(nodes[-1]),
            nodes=tuple(nodes),
            passed=() if isinstance(head, CONVS) else tuple(passed),
        )

    def _may_not_move(self, nodes: list[Node]) -> bool:
        """Whether the first of ``nodes`` may not be called where the last is: what it reads may be written on the way,
        and a module that is not known may do anything."""
        moved = self._called(nodes[0])
        others = self._passed(nodes)
        known = isinstance(moved, CONVS) or not others or writes.only_computes(moved)
        return (
            not known or any(writes.may_write(node, self.module) for node in others) or self._is_seen_on_the_way(nodes)
        )

    def _is_seen_on_the_way(self, nodes: list[Node]) -> bool:
        """Whether statistics that ``nodes`` update are updated or read by others before the last of them is called."""
        passed = self._passed_by_norms(nodes)
        if any(others for _, others in passed) and any(map(self._is_of_norm, self.order)):
            return True
        return any(
            writes.share_norms(self._called(norm), self._called(node))
            for norm, others in passed
            for node in others
            if node.op == "call_module"
        )

    def _is_of_norm(self, node: Node) -> bool:
        """Whether ``node`` reads a tensor of a batch norm."""
        owner = str(node.target).rpartition(".")[0]
        return node.op == "get_attr" and isinstance(self.module.get_submodule(owner), _BatchNorm)

    def _passed_by_norms(self, nodes: list[Node]) -> list[tuple[Node, list[Node]]]:
        """Those of ``nodes`` that call batch norms, each with the calls between it and the last node."""
        others = self._between(nodes)
        return [
            (norm, [node for node in others if self.order[node] > self.order[norm]])
            for norm in nodes
            if norm.op == "call_module" and writes.norms_in(self._called(norm))
        ]

    def _rely_on_what_is_passed(self, nodes: list[Node]) -> None:
        """Require at each call what `_may_not_move` finds out about modules, which may be replaced or set otherwise."""
        for node in self._between(nodes):
            if self._calls_identity(node):
                self._require(writes.is_identity, True, node, "is no Identity any more")
            elif node.op == "call_module":
                self._require(writes.module_may_write, False, node, "may write in place")
        if not isinstance(self._called(nodes[0]), CONVS) and self._passed(nodes):
            self._require(writes.only_computes, True, nodes[0], "is another module now")
        for norm, passed in self._passed_by_norms(nodes):
            for node in passed:
                if node.op != "call_module":
                    continue
                paths = f"{path_of(str(norm.target))}, {path_of(str(node.target))}"
                shared = f"{norm.target} and {node.target} share a batch norm now"
                self.guards.require(f"not {self.guards.name(writes.share_norms)}({paths})", shared)

    def _rely_on_what_is_kept(self, steps: list[Step], last: Node) -> None:
        """Require at each call what `_is_kept_and_written` finds out about modules."""
        added, act = writes.kept(steps)
        if added is None or act is None:
            return
        for user in self._later(added, last):
            if user.op == "call_module":
                self._require(writes.module_may_write, False, user, "may write in place")
            elif isinstance(act, str) and writes.may_write(user, self.module):
                test = f"{self.guards.name(writes.needs_no_sum)}({path_of(act)})"
                self.guards.require(test, f"{act} is another module now")

    def _require(self, question: Callable[[Any], bool], answer: bool, node: Node, otherwise: str) -> None:
        test = f"{self.guards.name(question)}({path_of(str(node.target))}) is {answer}"
        self.guards.require(test, f"{node.target} {otherwise}")

    def _passed(self, nodes: list[Node]) -> list[Node]:
        return [node for node in self._between(nodes, reads=True) if not self._calls_identity(node)]

    def _between(self, nodes: list[Node], reads: bool = False) -> list[Node]:
        between = islice(self.order, self.order[nodes[0]] + 1, self.order[nodes[-1]])
        return [node for node in between if node not in nodes and (reads or node.op != "get_attr")]

    def _calls_identity(self, node: Node) -> bool:
        return node.op == "call_module" and writes.is_identity(self._called(node))

    def _is_kept_and_written(self, steps: list[Step], last: Node) -> bool:
        """Whether the fused call would keep for backward what is added, and it may be written in place afterwards."""
        added, act = writes.kept(steps)
        if added is None or act is None:
            return False
        if writes.needs_no_sum(self.module.get_submodule(act) if isinstance(act, str) else act):
            return False
        return any(writes.may_write(user, self.module) for user in self._later(added, last))

    def _later(self, value: Node, last: Node) -> list[Node]:
        return [user for user in value.users if self.order[user] > self.order[last]]
