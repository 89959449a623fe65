"""Gives a module a class whose forward is its own forward's graph with each chain as one call."""

from __future__ import annotations

import copy
import copyreg
import itertools
import linecache
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.nn.modules.module import _has_any_global_hook

from fastconv.fuse.chains import Chain, Step, Studies, Study
from fastconv.fuse.trace import Kinds, class_of, parameters, subclass
from fastconv.nn.fused import Steps, interference, run_chain, run_open, take


def fused_names(module: torch.nn.Module) -> tuple[str, ...]:
    """The heads of the chains that are one call in ``module``'s forward."""
    return type(module).__dict__.get("_fastconv_names", ())


def fuse_module(module: torch.nn.Module, found: Study, names: Iterable[str]) -> None:
    """Make those of the chains ``found`` one call whose head is among ``names``, and no other."""
    wanted = set(names)
    chosen = tuple(chain.head for chain in found.chains if chain.head in wanted)
    original = class_of(module)
    if not chosen:
        module.__class__ = original
        return
    done: dict[Graph, _Source] = {}
    for graph, chains in found.graphs.values():
        if graph not in done:
            done[graph] = _rewrite(graph, [chain for chain in chains if chain.head in chosen])
    sources = tuple((which, done[graph]) for which, (graph, _) in found.graphs.items())
    prefixes = {target.rpartition(".")[0] for _, source in sources for target in source.targets}
    sizes = tuple(sorted((name, len(module.get_submodule(name)._modules)) for name in {"", *prefixes}))
    module.__class__ = _fused_class(original, chosen, sources, found.reads, sizes)


@dataclass(frozen=True)
class _Source:
    """A rewritten forward; ``meaning`` tells apart what the same text would mean with other globals."""

    text: str
    meaning: tuple[tuple[str, Any], ...]
    goes_on: bool  # whether it takes further steps as its last argument
    unhooked: tuple[str, ...]  # modules whose hooks would see that they are called by position, or in another order
    targets: frozenset[str] = field(compare=False)
    globals: dict[str, Any] = field(compare=False)

    def compile(self) -> Callable[..., Any]:
        name = f"<fastconv fused forward {next(_numbers)}>"
        # For tracebacks.
        linecache.cache[name] = len(self.text), None, self.text.splitlines(keepends=True), name
        space = dict(self.globals)
        exec(compile(self.text, name, "exec", dont_inherit=True), space)
        return space["forward"]


_numbers = itertools.count()


class _Constant:
    """A value in a graph's code, which names it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def _rewrite(graph: Graph, chains: list[Chain]) -> _Source:
    """Put one call of ``run_chain`` or ``run_open`` in the place of each chain's calls; the code of the result."""
    constants: dict[str, torch.nn.Module] = {}
    calls: dict[Node, Node] = {}

    def operand(step: Step) -> Any:
        if isinstance(step.operand, torch.nn.Module):
            name = f"fastconv_act_{len(constants)}"
            constants[name] = step.operand
            return _Constant(name)
        # What is added may be a chain's result.
        return graph.get_attr(step.operand) if isinstance(step.operand, str) else calls.get(step.operand, step.operand)

    nodes = [node for chain in chains for node in chain.nodes]
    unhooked = {str(node.target) for node in nodes if node.op == "call_module" and node.kwargs}
    unhooked.update(*(chain.passed for chain in chains))
    goes_on = False
    for chain in chains:
        first, last = chain.nodes[0], chain.nodes[-1]
        with graph.inserting_after(last):
            call = graph.call_function(run_chain if chain.of_conv else run_open)
        with graph.inserting_before(call):
            head = graph.get_attr(chain.head)
            steps = tuple((step.kind, operand(step)) for step in chain.steps)
        call.args = (*first.args, *first.kwargs.values(), head, steps) if chain.of_conv else (head, first.args, steps)
        if chain.is_result:
            goes_on = True
            with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
                call.args = (*call.args, graph.placeholder("fastconv_tail", default_value=()))
        last.replace_all_uses_with(call)
        calls[last] = call
        for node in reversed(chain.nodes):
            graph.erase_node(node)
    targets = frozenset(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
    code = graph.python_code("self")
    meaning: list[tuple[str, Any]] = [(name, id(value)) for name, value in code.globals.items()]
    meaning += [(name, repr(value)) for name, value in constants.items()]
    return _Source(
        code.src, tuple(sorted(meaning)), goes_on, tuple(sorted(unhooked)), targets, {**code.globals, **constants}
    )


@cache
def _fused_class(
    original: Any,
    names: tuple[str, ...],
    sources: tuple[tuple[tuple[bool, Kinds], _Source], ...],
    reads: frozenset[str],
    sizes: tuple[tuple[str, int], ...],
) -> Any:
    """The subclass of ``original`` whose forward is ``sources`` where they apply, and ``original``'s elsewhere."""
    compiled = {source: (source.compile(), source.goes_on) for _, source in sources}
    forwards = {which: compiled[source] for which, source in sources}
    # Each with the forwards of eval and of training.
    called_with = [(kinds, (forwards[False, kinds], fused)) for (trains, kinds), fused in forwards.items() if trains]
    required, optional = parameters(original.forward)
    unhooked = sorted({name for source in compiled for name in source.unhooked})
    # How many children it and the containers that it reaches into had: one more may be one more to call.
    own_size, inner_sizes = sizes[0][1], sizes[1:]

    def chosen(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool, tuple[Any, ...]]:
        """The fused forward for such a call or None, whether it goes on, and its arguments."""
        if kwargs:
            given = [*required, *optional][len(args) : len(args) + len(kwargs)]
            if set(given) != set(kwargs):
                return None, False, args
            args = (*args, *(kwargs[name] for name in given))
        while len(args) > len(required) and args[-1] is None:
            args = args[:-1]
        if len(self._modules) != own_size:
            return None, False, args
        for name, size in inner_sizes:
            if len(self.get_submodule(name)._modules) != size:
                return None, False, args
        for name in unhooked:
            if _has_any_global_hook() or interference(self.get_submodule(name)) is not None:
                return None, False, args
        for kinds, fused in called_with:
            if len(args) == len(kinds) and all(map(isinstance, args, kinds)):
                return *fused[self.training], args
        return None, False, args

    @wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        fused, _, given = chosen(self, args, kwargs)
        return original.forward(self, *args, **kwargs) if fused is None else fused(self, *given)

    def go_on(self: Any, args: tuple[Any, ...], steps: Steps) -> Any:
        fused, goes_on, given = chosen(self, args, {})
        return fused(self, *given, steps) if goes_on else take(forward(self, *args), steps)

    forward.go_on = go_on  # type: ignore[attr-defined]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # A new one, as a slice of a Sequential is, has children of its own.
        self.__class__ = original
        self.__init__(*args, **kwargs)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name in reads and not _replaces_its_like(self, name, value):
            self.__class__ = original
        original.__setattr__(self, name, value)

    def __delattr__(self: Any, name: str) -> None:
        if name in reads:
            self.__class__ = original
        original.__delattr__(self, name)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        function, args, *rest = original.__reduce_ex__(self, max(2, int(protocol)))
        if function is copyreg.__newobj__ and args == (fused,):  # type: ignore[attr-defined]
            function, args = restore, (original, names)
        return function, args, *rest

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = self.__new__(type(self))
        twin.__setstate__(copy.deepcopy(original.__reduce_ex__(self, 4)[2], memo))
        return twin

    body = {
        "_fastconv_original": original,
        "_fastconv_names": names,
        "forward": forward,
        "__init__": __init__,
        "__setattr__": __setattr__,
        "__delattr__": __delattr__,
        "__reduce_ex__": __reduce_ex__,
    }
    own = original.__reduce_ex__, original.__reduce__, hasattr(original, "__deepcopy__")
    if own == (object.__reduce_ex__, object.__reduce__, False):
        body["__deepcopy__"] = __deepcopy__
    fused = subclass(original, body)
    return fused


def _replaces_its_like(module: torch.nn.Module, name: str, value: Any) -> bool:
    """Whether a child, parameter or buffer gives way to one of the same type, which decides nothing otherwise."""
    # DataParallel sets the children of its replicas.
    for kept in (module._modules, module._parameters, module._buffers):
        if name in kept:
            return type(kept[name]) is type(value)
    return False


def restore(original: Any, names: tuple[str, ...]) -> torch.nn.Module:
    """What a pickle of a fused module calls: an instance that, once it has its state, is fused again."""
    module = original.__new__(original)
    module.__class__ = unfinished = _unfinished(original, names)
    # For torch.load(weights_only=True), which has taken ``original`` to be safe if it comes here. Each time, as its
    # context managers forget what was added inside them.
    known_as = ".".join(("fastconv.fuse", original.__module__, original.__qualname__, *names))
    torch.serialization.add_safe_globals([(unfinished, known_as)])
    return module


@cache
def _unfinished(original: Any, names: tuple[str, ...]) -> Any:
    def __setstate__(self: Any, state: Any) -> None:
        self.__class__ = original
        self.__setstate__(state)
        fuse_module(self, Studies()[self], names)

    return subclass(original, {"__setstate__": __setstate__})


torch.serialization.add_safe_globals([restore])
