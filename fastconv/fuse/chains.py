"""Chains of convolution -> batch norm (-> activation, addition) in the graphs of one module's forward.

A chain begins with a call of a convolution, or of a module whose own result is a chain's (`Study.end`), so that what
follows in the caller, as the addition of a residual block, can go on with it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fastconv.activations import activation_of, has_fused_form, is_activation, let_be
from fastconv.fuse.stand_ins import Untraceable, class_of, is_sequential, path_of, unpacked
from fastconv.fuse.trace import Kinds, Trace, parameters, trace
from fastconv.kernels.epilogue import ACTIVATIONS
from fastconv.nn.fused import NORMS, SKIPPED, SUMS, ConvBNAct, Function

_CONVS = (
    *(torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d),
    *(torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d),
)
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
# timm's own, which have an argument ``inplace``.
_TIMMS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "Sigmoid": "sigmoid", "Tanh": "tanh"}
# Of the operator module's functions that begin with an i, those that write nothing.
_PURE = ("index", "indexOf", "inv", "invert", "is_", "is_not", "itemgetter")


class Step(NamedTuple):
    """One of the kinds of ``fastconv.nn.fused.Steps``."""

    kind: str
    operand: Any  # a module's target, a module in place of a function, or the node that is added
    label: str | None  # what a report calls it


@dataclass(frozen=True)
class Chain:
    """Calls of a graph that one call can take the place of."""

    head: str  # the target of a convolution, or of a module that ends in a chain
    of_conv: bool
    steps: tuple[Step, ...]
    done: frozenset[str]  # "norm", "act" and "+", as far as they have been when it ends
    ends: str | None  # why it does not take the next call, if that is an activation
    is_result: bool  # of the module
    nodes: tuple[Node, ...]  # the head first
    passed: tuple[str, ...]  # modules called before the head that would be called after it

    @property
    def key(self) -> tuple[Any, ...]:
        """What it is in any graph of the same module."""
        steps = ((kind, label, operand if isinstance(operand, str) else None) for kind, operand, label in self.steps)
        return self.head, *steps, self.is_result


def found_in(module: torch.nn.Module) -> Study | None:
    """What was found in ``module`` when it was fused; None where it is not."""
    return type(module).__dict__.get("_fastconv_found")


@dataclass(frozen=True)
class Study:
    """What there is to fuse in one module. ``traces`` by training and what it is called with, the usual first."""

    traces: dict[tuple[bool, Kinds], tuple[Trace, list[Chain]]]
    chains: list[Chain]  # those of the usual call, the same in training and in eval
    apart: dict[str, str]  # the other batch norms, and why
    untraceable: str | None = None

    @property
    def end(self) -> Chain | None:
        """The chain whose result is the module's."""
        return next((chain for chain in self.chains if chain.is_result), None)


class Studies(dict[torch.nn.Module, Study]):
    """What there is to fuse in each module, found when it is first asked for; ``as_fused``: in one that is fused, what
    was found then."""

    def __init__(self, as_fused: bool = False) -> None:
        super().__init__()
        self.as_fused = as_fused
        self._setting: dict[torch.nn.Module, bool] = {}

    def __missing__(self, module: torch.nn.Module) -> Study:
        self[module] = Study({}, [], {})  # for one that holds itself
        if self.as_fused and (found := found_in(module)) is not None:
            self[module] = found
            return found
        # (Of a scripted one the class has none.)
        forward = getattr(class_of(module), "forward", None)
        nothing = not module._modules or forward is torch.nn.Module.forward
        if forward is ConvBNAct.forward:
            self[module] = Study({}, [_of_layer(module)], {})  # type: ignore[arg-type]
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
        if class_of(module).__module__.startswith(("torch.nn.modules.", "fastconv.nn.")):
            return True
        found = self[module]
        return bool((found if found.traces else study(module, self)).traces)

    def of(self, model: torch.nn.Module) -> dict[torch.nn.Module, Study]:
        """Those of the modules with a batch norm, or with a module that ends in a chain, among their children."""
        return {
            module: self[module]
            for module in model.modules()
            if isinstance(module, ConvBNAct)
            or any(isinstance(child, _BatchNorm) or self.goes_on(child) for child in reach(module))
        }

    def goes_on(self, module: torch.nn.Module) -> bool:
        """Whether the result of ``module`` is that of a chain with a batch norm, to which something can be added."""
        if isinstance(module, _BatchNorm) or not any(isinstance(part, _BatchNorm) for part in module.modules()):
            return False
        done = self.done(module)
        return done is not None and "norm" in done and done < {"norm", "act", "+"}

    def done(self, module: torch.nn.Module) -> frozenset[str] | None:
        """What has been done to a convolution in the result of ``module``; None where it is no chain's."""
        if isinstance(module, _CONVS):
            return frozenset()
        end = self[module].end if class_of(module).__call__ is torch.nn.Module.__call__ else None
        return None if end is None else end.done


def reach(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The children of ``module``, and those of containers among them."""
    for child in module.children():
        yield child
        if isinstance(child, _CONTAINERS):
            yield from reach(child)


def _of_layer(layer: ConvBNAct) -> Chain:
    steps = [Step("norm", "bn", "bn")] + ([] if layer.act is None else [Step("act", "act", "act")])
    return Chain("conv", True, tuple(steps), frozenset(step.kind for step in steps), None, True, (), ())


def study(module: torch.nn.Module, studies: Studies) -> Study:
    """Trace ``module``'s forward in training and in eval, with a tensor or, where it asks, a list, and find chains."""
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

    apart: dict[str, str] = {}
    found = {which: (each, _Search(each, module, studies, apart).chains()) for which, each in traces.items()}
    in_eval = {chain.key for chain in found[False, kinds][1]}
    chains = [chain for chain in found[True, kinds][1] if chain.key in in_eval]
    others = {norm for _, chains_found in found.values() for chain in chains_found for norm in _norms(chain)}
    apart |= dict.fromkeys(others, "called otherwise in training than in eval")
    fused = {norm for chain in chains for norm in _norms(chain)}
    return Study(found, chains, {norm: reason for norm, reason in apart.items() if norm not in fused})


def _norms(chain: Chain) -> list[str]:
    return [step.operand for step in chain.steps if step.kind == "norm"]


class _Search:
    """For the chains of a graph; why a batch norm is in none is added to ``apart``."""

    def __init__(self, traced: Trace, module: torch.nn.Module, studies: Studies, apart: dict[str, str]) -> None:
        self.graph, self.guards = traced.graph, traced.guards
        self.module, self.studies, self.apart = module, studies, apart
        self.order = {node: index for index, node in enumerate(self.graph.nodes)}
        self.taken: set[Node] = set()

    def chains(self) -> list[Chain]:
        """In the graph's order."""
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        found = []
        # From the end, so that where two chains meet in an addition, the later, for which the other is computed, takes
        # it; and one of this module's own batch norms before one of its children's.
        for node in reversed([call for call in calls if isinstance(self._called(call), _BatchNorm)]):
            behind = self._back_to_head(node)
            chain = behind if isinstance(behind, str) else self._chain(behind)
            if isinstance(chain, str):
                self.apart.setdefault(str(node.target), chain)
            else:
                found.append(chain)
                self.taken.update(chain.nodes)
        for node in reversed(calls):
            if node in self.taken or node.kwargs or not self._may_go_on(node):
                continue
            chain = self._chain([node])
            # A convolution alone is for the batch norm of a caller.
            if not isinstance(chain, str) and ("norm" in chain.done if chain.steps else chain.is_result):
                found.append(chain)
                self.taken.update(chain.nodes)
        return sorted(found, key=lambda chain: self.order[chain.nodes[0]])

    def _may_go_on(self, node: Node) -> bool:
        """Whether ``node`` calls what ends in a chain to which something can be added, here or by the caller."""
        called = self._called(node)
        if isinstance(called, _CONVS):
            return _is_result(node) and _called_with(node) is not None
        return self.studies.goes_on(called) or (_is_result(node) and self.studies.done(called) is not None)

    def _called(self, node: Node) -> torch.nn.Module:
        return self.module.get_submodule(str(node.target))

    def _back_to_head(self, norm: Node) -> list[Node] | str:
        """The calls from a convolution to ``norm``, or why there are none that can be one."""
        nodes = [norm]
        while True:
            before = _called_with(nodes[0])
            if before is None:
                return "not behind a convolution"
            if before.op != "call_module":
                return f"not behind a convolution but {_describe(before)}"
            source = self._called(before)
            done = self.studies.done(source)
            is_conv = isinstance(source, _ConvNd)
            if done != frozenset() and not is_conv and type(source) is not torch.nn.Identity:
                return f"not behind a convolution but {before.target}, a {class_of(source).__name__}"
            if len(before.users) != 1:
                others = ", ".join(sorted(_describe(user) for user in before.users if user is not nodes[0]))
                return f"the result of {before.target} also goes to {others}"
            nodes.insert(0, before)
            if type(source) is not torch.nn.Identity:
                break
        kind = type(self._called(norm))
        _know(kind)
        if kind not in NORMS:
            return f"a class of its own: {kind.__module__}.{kind.__qualname__}"
        if done is None or NORMS[kind] not in (None, self._axes(source)):
            return f"behind a {type(source).__name__}"
        if _called_with(before) is None if is_conv else before.kwargs:
            return f"{before.target} is called with more than its input"
        return nodes

    def _axes(self, source: torch.nn.Module) -> int:
        """How many the result of the convolution has in which ``source`` ends."""
        while not isinstance(source, _CONVS):
            end = self.studies[source].end
            assert end is not None
            source = source.get_submodule(end.head)
        return len(source.kernel_size) + 2

    def _chain(self, nodes: list[Node]) -> Chain | str:
        """What can follow ``nodes``, a head alone or to its batch norm; or why not even these can be one call."""
        head = self._called(nodes[0])
        done = set(self.studies.done(head) or ())
        steps: list[Step] = []
        for node in nodes[1:]:
            called = self._called(node)
            if isinstance(called, _BatchNorm):
                steps.append(Step("norm", str(node.target), str(node.target)))
                own = called._modules.get("act", torch.nn.Identity())
                _know(type(own))
                done |= {"norm"} if type(own) is torch.nn.Identity else {"norm", "act"}
            else:
                steps.append(_skip(node))
        least = len(nodes)
        ends = None
        while len(nodes[-1].users) == 1:
            (user,) = nodes[-1].users
            if user in self.taken:
                break
            if (act := _activation(user, self.module)) is not None:
                if not has_fused_form(self.module.get_submodule(act) if isinstance(act, str) else act):
                    ends = f"{_describe(user)} has no fused form"
                step = Step("act", act, _describe(user))
            elif (added := _added(user, nodes[-1])) is not None:
                step = Step(_ADD[user.target], added, "residual")
            elif user.op == "call_module" and _called_with(user) and _skips(self._called(user)):
                step = _skip(user)
            else:
                break
            does = _does(step)
            if ends or done & does:
                break
            steps.append(step)
            done |= does
            nodes.append(user)
        while len(nodes) > least and (
            (steps[-1].kind == "skip" and not _is_result(nodes[-1]))
            or self._may_not_move(nodes)
            or self._is_kept_and_written(steps, nodes[-1])
        ):
            done -= _does(steps.pop())
            nodes.pop()
        if self._may_not_move(nodes):
            return "something in between may write in place"
        passed = [str(node.target) for node in self._between(nodes) if self._is_identity(node)]
        self._rely_on_what_is_passed(nodes)
        self._rely_on_what_is_kept(steps, nodes[-1])
        return Chain(
            head=str(nodes[0].target),
            of_conv=isinstance(head, _CONVS),
            steps=tuple(steps),
            done=frozenset(done),
            ends=ends,
            is_result=_is_result(nodes[-1]),
            nodes=tuple(nodes),
            passed=() if isinstance(head, _CONVS) else tuple(passed),
        )

    def _may_not_move(self, nodes: list[Node]) -> bool:
        """Whether it matters that the first of ``nodes`` is called where the last is: what it reads may be written on
        the way; a module that is not known may do anything."""
        moved = self._called(nodes[0])
        others = self._passed(nodes)
        known = isinstance(moved, _CONVS) or not others or _is_known(moved)
        return not known or any(_may_write(node, self.module) for node in others) or self._is_seen_on_the_way(nodes)

    def _is_seen_on_the_way(self, nodes: list[Node]) -> bool:
        """Whether statistics that ``nodes`` update are updated or read by others before the last of them is called."""
        passed = self._passed_by_norms(nodes)
        if any(others for _, others in passed) and any(map(self._is_of_norm, self.order)):
            return True
        return any(
            _share_norms(self._called(norm), self._called(node))
            for norm, others in passed
            for node in others
            if node.op == "call_module"
        )

    def _is_of_norm(self, node: Node) -> bool:
        """Whether ``node`` reads a tensor of a batch norm's."""
        owner = str(node.target).rpartition(".")[0]
        return node.op == "get_attr" and isinstance(self.module.get_submodule(owner), _BatchNorm)

    def _passed_by_norms(self, nodes: list[Node]) -> list[tuple[Node, list[Node]]]:
        """Those of ``nodes`` that call batch norms, each with the calls that are between it and the last."""
        others = self._between(nodes)
        return [
            (norm, [node for node in others if self.order[node] > self.order[norm]])
            for norm in nodes
            if norm.op == "call_module" and _norms_in(self._called(norm))
        ]

    def _rely_on_what_is_passed(self, nodes: list[Node]) -> None:
        """Require at each call what `_may_not_move` finds out about modules, which may be replaced or set otherwise."""
        for node in self._between(nodes):
            if self._is_identity(node):
                self._require(_is_identity, True, node, "is no Identity any more")
            elif node.op == "call_module":
                self._require(_module_may_write, False, node, "may write in place")
        if not isinstance(self._called(nodes[0]), _CONVS) and self._passed(nodes):
            self._require(_is_known, True, nodes[0], "is another module now")
        for norm, passed in self._passed_by_norms(nodes):
            for node in passed:
                if node.op != "call_module":
                    continue
                paths = f"{path_of(str(norm.target))}, {path_of(str(node.target))}"
                shared = f"{norm.target} and {node.target} share a batch norm now"
                self.guards.require(f"not {self.guards.name(_share_norms)}({paths})", shared)

    def _rely_on_what_is_kept(self, steps: list[Step], last: Node) -> None:
        """Likewise of `_is_kept_and_written`."""
        added, act = _kept(steps)
        if added is None or act is None:
            return
        for user in self._later(added, last):
            if user.op == "call_module":
                self._require(_module_may_write, False, user, "may write in place")
            elif isinstance(act, str) and _may_write(user, self.module):
                test = f"{self.guards.name(_needs_no_sum)}({path_of(act)})"
                self.guards.require(test, f"{act} is another module now")

    def _require(self, question: Callable[[Any], bool], answer: bool, node: Node, otherwise: str) -> None:
        test = f"{self.guards.name(question)}({path_of(str(node.target))}) is {answer}"
        self.guards.require(test, f"{node.target} {otherwise}")

    def _passed(self, nodes: list[Node]) -> list[Node]:
        return [node for node in self._between(nodes, reads=True) if not self._is_identity(node)]

    def _between(self, nodes: list[Node], reads: bool = False) -> list[Node]:
        between = islice(self.order, self.order[nodes[0]] + 1, self.order[nodes[-1]])
        return [node for node in between if node not in nodes and (reads or node.op != "get_attr")]

    def _is_identity(self, node: Node) -> bool:
        return node.op == "call_module" and _is_identity(self._called(node))

    def _is_kept_and_written(self, steps: list[Step], last: Node) -> bool:
        """Whether the fused call would keep for backward what is added, and it may be written in place afterwards."""
        added, act = _kept(steps)
        if added is None or act is None:
            return False
        if _needs_no_sum(self.module.get_submodule(act) if isinstance(act, str) else act):
            return False
        return any(_may_write(user, self.module) for user in self._later(added, last))

    def _later(self, value: Node, last: Node) -> list[Node]:
        return [user for user in value.users if self.order[user] > self.order[last]]


def _norms_in(module: torch.nn.Module) -> set[torch.nn.Module]:
    found: set[torch.nn.Module] = {module} if isinstance(module, _BatchNorm) else set()
    for child in module._modules.values():
        if child is not None and (child._modules or isinstance(child, _BatchNorm)):
            found |= _norms_in(child)
    return found


def _share_norms(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether a call of either updates the same statistics."""
    theirs = _norms_in(b)
    return bool(theirs) and not theirs.isdisjoint(_norms_in(a))


def _is_identity(module: torch.nn.Module) -> bool:
    return type(module) is torch.nn.Identity and not _is_seen(module)


def _is_seen(module: torch.nn.Module) -> bool:
    """Whether a hook gets what ``module`` is called with."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _kept(steps: list[Step]) -> tuple[Node | None, str | torch.nn.Module | None]:
    """What is added in front of an activation, and that, whose derivative may need the sum."""
    kinds = [step.kind for step in steps]
    sums = [kinds.index(kind) for kind in SUMS if kind in kinds]
    if not sums or "act" not in kinds[sums[0] :]:
        return None, None
    return steps[sums[0]].operand, steps[kinds.index("act", sums[0])].operand


def _needs_no_sum(act: torch.nn.Module) -> bool:
    """Whether backward takes the activation's derivative from its result, and keeps no residual in front of it."""
    return has_fused_form(act) and ACTIVATIONS[activation_of(act)[0]].from_output


def _does(step: Step) -> set[str]:
    return {"+"} if step.kind in SUMS else {step.kind} - {"skip"}


def _skip(node: Node) -> Step:
    return Step("skip", str(node.target), None)


def _skips(module: torch.nn.Module) -> bool:
    """Whether there are times when a call of ``module`` does nothing."""
    _know(type(module))
    return type(module) in SKIPPED


def _is_result(node: Node) -> bool:
    """Whether ``node`` is what its graph returns, and nothing else reads it."""
    return [(user.op, user.args) for user in node.users] == [("output", (node,))]


def _is_known(module: torch.nn.Module) -> bool:
    """Whether a call of ``module`` does nothing but compute: it writes no input, draws no random numbers."""
    return not _module_may_write(module) and _has_known_parts(module)


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


def _called_with(node: Node) -> Node | None:
    """The value that ``node`` is called with, by position or by name, if that is all."""
    values = [*node.args, *node.kwargs.values()]
    return values[0] if len(values) == 1 and isinstance(values[0], Node) else None


def _activation(node: Node, module: torch.nn.Module) -> str | torch.nn.Module | None:
    """The target of a module of torch.nn's activations, or a module that does what a function does."""
    if node.op == "call_module":
        act = module.get_submodule(str(node.target))
        _know(type(act))
        is_act = type(act).__module__ == "torch.nn.modules.activation" or has_fused_form(act)
        is_act = is_act and type(act) is not torch.nn.Identity and _called_with(node) is not None
        return str(node.target) if is_act else None
    if node.op not in ("call_function", "call_method") or node.target not in _ACTIVATIONS:
        return None
    if not node.args or len(node.all_input_nodes) != 1:
        return None
    try:
        act = _ACTIVATIONS[node.target](*node.args[1:], **node.kwargs)
    except (TypeError, ValueError, AssertionError):  # the module is stricter than the function
        return None
    vars(act)["forward"] = Function(node.target, node.args[1:], dict(node.kwargs))
    return act


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
        return function is not unpacked
    flags = *node.args[1:], node.kwargs.get("inplace"), node.kwargs.get("out") is not None
    return function.__name__.endswith("_") or any(flag is True for flag in flags)


def _module_may_write(module: torch.nn.Module) -> bool:
    """Whether a call of ``module`` may change its input."""
    if _is_seen(module):
        return True
    if is_sequential(module):
        for child in module._modules.values():
            if isinstance(child, _ConvNd | _BatchNorm):
                return False
            if child is None or _module_may_write(child):
                return True
        return False
    theirs = type(module).__module__.startswith(("torch.nn.modules.", "fastconv.nn."))
    return not theirs or bool(vars(module).get("inplace"))


def _describe(node: Node) -> str:
    if node.op == "output":
        return "the result"
    if node.op == "placeholder":
        return f"the argument {node.target}"
    if node.op == "call_module":
        return str(node.target)
    return (node.target if isinstance(node.target, str) else node.target.__name__).rstrip("_")


def _know(kind: type) -> None:
    """Let timm's and torchvision's own be known: only a model that has one makes it importable here."""
    package, name = kind.__module__, kind.__name__
    if (package, name) == ("torchvision.ops.stochastic_depth", "StochasticDepth"):
        SKIPPED[kind] = "p"
    elif (package, name) == ("timm.layers.drop", "DropPath"):
        SKIPPED[kind] = "drop_prob"
    elif package == "timm.layers.activations" and name in _TIMMS:
        let_be(kind, _TIMMS[name])
    elif package == "timm.layers.norm_act" and name in ("BatchNormAct2d", "SyncBatchNormAct"):
        NORMS[sys.modules[package].BatchNormAct2d] = 4
        NORMS[sys.modules[package].SyncBatchNormAct] = None  # what the other may become later
