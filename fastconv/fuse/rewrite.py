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
from torch.fx import Graph

from fastconv.fuse.chains import Chain, Study, study
from fastconv.fuse.trace import Kinds, class_of, subclass
from fastconv.nn.fused import run_chain


def fused_names(module: torch.nn.Module) -> tuple[str, ...]:
    """The convolutions, by their targets, whose chains are one call in ``module``'s forward."""
    return type(module).__dict__.get("_fastconv_names", ())


def fuse_module(module: torch.nn.Module, found: Study, names: Iterable[str]) -> None:
    """Make those of the chains ``found`` one call whose convolution is among ``names``, and no other."""
    wanted = set(names)
    chosen = tuple(chain.conv for chain in found.chains if chain.conv in wanted)
    original = class_of(module)
    if not chosen:
        module.__class__ = original
        return
    done: dict[Graph, _Source] = {}
    for graph, chains in found.graphs.values():
        if graph not in done:
            done[graph] = _rewrite(graph, [chain for chain in chains if chain.conv in chosen])
    sources = tuple((which, done[graph]) for which, (graph, _) in found.graphs.items())
    prefixes = {target.rpartition(".")[0] for _, source in sources for target in source.targets}
    sizes = tuple(sorted((name, len(module.get_submodule(name)._modules)) for name in {"", *prefixes}))
    module.__class__ = _fused_class(original, chosen, sources, found.reads, sizes)


@dataclass(frozen=True)
class _Source:
    """A rewritten forward; ``meaning`` tells apart what the same text would mean with other globals."""

    text: str
    meaning: tuple[tuple[str, Any], ...]
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
    """Put one call of ``run_chain`` in the place of each chain's calls; the code of the result."""
    constants: dict[str, torch.nn.Module] = {}
    for chain in chains:
        last = chain.nodes[-1]
        act: Any = chain.act
        if isinstance(act, torch.nn.Module):
            name = f"fastconv_act_{len(constants)}"
            constants[name] = act
            act = _Constant(name)
        with graph.inserting_after(last):
            call = graph.call_function(run_chain)
        with graph.inserting_before(call):
            child = graph.get_attr
            call.args = (
                *(chain.nodes[0].args[0], chain.residual, child(chain.conv), child(chain.norm)),
                *(child(act) if isinstance(act, str) else act, tuple(map(child, chain.others)), chain.steps),
            )
        last.replace_all_uses_with(call)
        for node in reversed(chain.nodes):
            graph.erase_node(node)
    targets = frozenset(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
    code = graph.python_code("self")
    meaning: list[tuple[str, Any]] = [(name, id(value)) for name, value in code.globals.items()]
    meaning += [(name, repr(value)) for name, value in constants.items()]
    return _Source(code.src, tuple(sorted(meaning)), targets, {**code.globals, **constants})


@cache
def _fused_class(
    original: Any,
    names: tuple[str, ...],
    sources: tuple[tuple[tuple[bool, Kinds], _Source], ...],
    reads: frozenset[str],
    sizes: tuple[tuple[str, int], ...],
) -> Any:
    """The subclass of ``original`` whose forward is ``sources`` where they apply, and ``original``'s elsewhere."""
    compiled = {source: source.compile() for _, source in sources}
    forwards = {which: compiled[source] for which, source in sources}
    # Each with the forwards of eval and of training.
    called_with = [(kinds, (forwards[False, kinds], fused)) for (trains, kinds), fused in forwards.items() if trains]
    # How many children it and the containers that it reaches into had: one more may be one more to call.
    own_size, inner_sizes = sizes[0][1], sizes[1:]

    @wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(self._modules) != own_size:
            return original.forward(self, *args, **kwargs)
        for name, size in inner_sizes:
            if len(self.get_submodule(name)._modules) != size:
                return original.forward(self, *args)
        for kinds, fused in called_with:
            if len(args) == len(kinds) and all(map(isinstance, args, kinds)):
                return fused[self.training](self, *args)
        return original.forward(self, *args)

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
    module.__class__ = _unfinished(original, names)
    return module


@cache
def _unfinished(original: Any, names: tuple[str, ...]) -> Any:
    def __setstate__(self: Any, state: Any) -> None:
        self.__class__ = original
        self.__setstate__(state)
        fuse_module(self, study(self), names)

    cls = subclass(original, {"__setstate__": __setstate__})
    # For torch.load(weights_only=True), which has taken ``original`` to be safe if it comes here.
    torch.serialization.add_safe_globals([(cls, f"fastconv.fuse.{original.__module__}.{original.__qualname__}")])
    return cls


torch.serialization.add_safe_globals([restore])
