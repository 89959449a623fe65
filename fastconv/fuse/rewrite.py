"""Gives a module a class whose forward is the graph of its own forward, with each fused layer as one call."""

from __future__ import annotations

import copy
import copyreg
import itertools
import linecache
import threading
from abc import ABCMeta
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, lru_cache, wraps
from typing import Any

import torch
from torch.fx import Node
from torch.nn.modules.module import _has_any_global_hook

from fastconv.fuse.fused import FusedLayer, Step
from fastconv.fuse.guards import Guards
from fastconv.fuse.search import Studies, Study, found_in
from fastconv.fuse.stand_ins import class_of, path_of
from fastconv.fuse.trace import Kinds, Trace, parameters
from fastconv.nn.fused_call import Steps, run_continued, run_fused, run_steps, why_not_bypassed


def why_not_fused(module: torch.nn.Module) -> str | None:
    """Why ``module``'s own forward runs, in the mode that it is in; None: the fused one runs, or it has none."""
    if "forward" in vars(module):
        return f"a forward of its own on its {type(module).__name__}"
    study = found_in(module)
    if study is None:
        return None
    if "forward" not in vars(type(module)):
        return "it is patched"
    traced = next(traced for (training, _), (traced, _) in study.traces.items() if training == module.training)
    return traced.guards.why_not(module)


def fused_names(module: torch.nn.Module) -> tuple[str, ...]:
    """The heads of the fused layers in ``module``'s forward."""
    return type(module).__dict__.get("_fastconv_names", ())


def fuse_module(module: torch.nn.Module, found: Study, names: Iterable[str]) -> None:
    """Fuse those layers of ``found`` whose head is among ``names``, and no others."""
    wanted = set(names)
    chosen = tuple(layer.head for layer in found.layers if layer.head in wanted)
    original = class_of(module)
    if not chosen:
        module.__class__ = original
        return
    sources = tuple(
        (which, _rewrite(traced, [layer for layer in layers if layer.head in chosen]))
        for which, (traced, layers) in found.traces.items()
    )
    module.__class__ = kind = _fused_class(original, chosen, sources, _Found(found))
    # A patch of it may have been taken back on another class.
    type.__setattr__(kind, "forward", kind._fastconv_forward)


class _Found:
    """What was found in a module when it was fused: the same for a class's modules, so no part of the key."""

    def __init__(self, study: Study) -> None:
        self.study = study

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Found)

    def __hash__(self) -> int:
        return 0


def _subclass(original: Any, body: dict[str, Any]) -> Any:
    """A class that looks like ``original``, also to code that patches it. No ``__init_subclass__`` or metaclass of the
    user's is told of it."""
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    kind: Any = type(original)
    make: Any = ABCMeta.__new__ if issubclass(kind, ABCMeta) else type.__new__
    tells = any("__init_subclass__" in vars(each) for each in original.__mro__[:-1])
    base: Any = torch.nn.Module if tells else original
    made = make(_seen_through(kind), original.__name__, (base,), {**names, **body})
    if tells:
        type.__setattr__(made, "__bases__", (original,))
    return made


@cache
def _seen_through(kind: Any) -> Any:
    """A class of classes: what is set on one of them is set on the class behind it; what is set on a class that
    somebody derives from one stays there."""

    def behind(cls: Any) -> Any:
        return vars(cls).get("_fastconv_original", cls)

    def __setattr__(cls: Any, name: str, value: Any) -> None:
        if behind(cls) is not cls and name == "forward":
            ours = cls._fastconv_forward
            # A patch wraps the forward that it finds, ours, and puts it back in the end; a second patch finds the
            # first.
            if value is ours:
                type.__setattr__(cls, name, ours)
                value = ours.__wrapped__
            elif name in vars(cls):
                type.__delattr__(cls, name)
        kind.__setattr__(behind(cls), name, value)

    def __delattr__(cls: Any, name: str) -> None:
        kind.__delattr__(behind(cls), name)

    return type(kind.__name__, (kind,), {"__setattr__": __setattr__, "__delattr__": __delattr__})


@dataclass(frozen=True)
class _Source:
    """A rewritten forward; ``meaning`` tells apart what the same text would mean with other globals or guards."""

    text: str
    meaning: tuple[Any, ...]
    continues: bool  # it takes further steps as its last argument
    guards: Guards = field(compare=False)
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


def _rewrite(traced: Trace, layers: list[FusedLayer]) -> _Source:
    """The code of the graph with each fused layer's calls replaced by one of ``run_fused`` or ``run_continued``."""
    graph, guards = traced.graph, traced.guards
    constants: dict[str, torch.nn.Module] = {}
    calls: dict[Node, Node] = {}

    def operand(step: Step) -> Any:
        if isinstance(step.operand, torch.nn.Module):
            name = f"fastconv_act_{len(constants)}"
            constants[name] = step.operand
            return _Constant(name)
        # What is added may be another fused layer's result.
        return graph.get_attr(step.operand) if isinstance(step.operand, str) else calls.get(step.operand, step.operand)

    nodes = [node for layer in layers for node in layer.nodes]
    # Modules whose hooks would see arguments by position instead of by name, or another order of calls.
    unhooked = {str(node.target) for node in nodes if node.op == "call_module" and node.kwargs}
    for target in sorted(unhooked.union(*(layer.passed for layer in layers))):
        guards.require(f"{guards.name(_is_unhooked)}({path_of(target)})", f"a hook on {target}")
    continues = False
    for layer in layers:
        first, last = layer.nodes[0], layer.nodes[-1]
        with graph.inserting_after(last):
            call = graph.call_function(run_fused if layer.of_conv else run_continued)
        with graph.inserting_before(call):
            head = graph.get_attr(layer.head)
            steps = tuple((step.kind, operand(step)) for step in layer.steps)
        call.args = (*first.args, *first.kwargs.values(), head, steps) if layer.of_conv else (head, first.args, steps)
        if layer.is_result:
            continues = True
            with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
                call.args = (*call.args, graph.placeholder("fastconv_tail", default_value=()))
        last.replace_all_uses_with(call)
        calls[last] = call
        for node in reversed(layer.nodes):
            graph.erase_node(node)
    code = graph.python_code("self")
    meaning = *((name, id(value)) for name, value in code.globals.items()), guards.key
    meaning += tuple((name, repr(value), repr(value.forward)) for name, value in constants.items())
    return _Source(code.src, meaning, continues, guards, {**code.globals, **constants})


def _is_unhooked(module: torch.nn.Module) -> bool:
    return not _has_any_global_hook() and why_not_bypassed(module) is None


# The size bounds the kinds of blocks in a program, not its models.
@lru_cache(maxsize=1024)
def _fused_class(
    original: Any, names: tuple[str, ...], sources: tuple[tuple[tuple[bool, Kinds], _Source], ...], found: _Found
) -> Any:
    """The subclass of ``original`` whose forward is the one of ``sources`` that applies, else ``original``'s."""
    compiled = {source: (source.guards.compile(), source.compile(), source.continues) for _, source in sources}
    forwards = {which: compiled[source] for which, source in sources}
    # Kinds of arguments, with the forwards of eval and of training.
    called_with = [(kinds, (forwards[False, kinds], fused)) for (trains, kinds), fused in forwards.items() if trains]
    required, optional = parameters(original.forward)

    def chosen(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool, tuple[Any, ...]]:
        """The fused forward for this call or None, whether it continues, and its arguments."""
        if kwargs:
            given = [*required, *optional][len(args) : len(args) + len(kwargs)]
            if set(given) != set(kwargs):
                return None, False, args
            args = (*args, *(kwargs[name] for name in given))
        while len(args) > len(required) and args[-1] is None:
            args = args[:-1]
        for kinds, fused in called_with:
            if len(args) == len(kinds) and all(map(isinstance, args, kinds)):
                holds, forward, continues = fused[self.training]
                return (forward, continues, args) if holds(self) else (None, False, args)
        return None, False, args

    own, within = original.forward, threading.local()

    @wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run, _, given = chosen(self, args, kwargs)
        if run is not None:
            return run(self, *given)
        is_own = vars(fused).get("forward") is forward and isinstance(self, fused)
        if original.forward is own or not is_own or getattr(within, "module", None) is self:
            return own(self, *args, **kwargs)
        # The original was patched since, and the patch may call the forward that it found here.
        within.module, before = self, getattr(within, "module", None)
        try:
            return original.forward(self, *args, **kwargs)
        finally:
            within.module = before

    def continued(self: Any, args: tuple[Any, ...], steps: Steps) -> Any:
        run, continues, given = chosen(self, args, {})
        return run(self, *given, steps) if continues else run_steps(forward(self, *args), steps)

    forward.continued = continued  # type: ignore[attr-defined]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        # A new instance, as a slice of a Sequential is, has children of its own.
        if type(self) is fused:
            self.__class__ = original
        original.__init__(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        function, args, *rest = original.__reduce_ex__(self, max(2, int(protocol)))
        if function is copyreg.__newobj__ and args == (fused,):  # type: ignore[attr-defined]
            function, args = restore, (original, names)
        return function, args, *rest

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = self.__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__dict__, memo))
        return twin

    body = {
        "_fastconv_original": original,
        "_fastconv_names": names,
        "_fastconv_found": found.study,
        "_fastconv_forward": forward,
        "forward": forward,
        "__init__": __init__,
        "__reduce_ex__": __reduce_ex__,
    }
    # A class that defines none of the four is copied as copy does it, without pickling, which a parametrised module
    # refuses.
    says = (getattr(original, name, None) for name in ("__reduce_ex__", "__reduce__", "__getstate__", "__deepcopy__"))
    if tuple(says) == (object.__reduce_ex__, object.__reduce__, getattr(object, "__getstate__", None), None):
        body["__deepcopy__"] = __deepcopy__
    fused = _subclass(original, body)
    return fused


def restore(original: Any, names: tuple[str, ...]) -> torch.nn.Module:
    """What a pickle of a fused module calls: an instance that is fused again once it has its state."""
    module = original.__new__(original)
    module.__class__ = unfinished = _unfinished(original, names)
    # For torch.load(weights_only=True), which held ``original`` to be safe if it called this. Added each time: torch's
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

    return _subclass(original, {"__setstate__": __setstate__})


torch.serialization.add_safe_globals([restore])
