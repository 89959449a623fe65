"""The graph of one module's own forward, with every child a leaf, and the guards under which it stays that graph.

The forward runs once on stand-ins for its arguments, from its source (`fastconv.fuse.source`), so that nothing happens
that is not allowed here and in `fastconv.fuse.allowed`. It may call its own modules, tensors' methods and torch's
functions on its tensors, Python's pure functions, and functions of the user's, which are run likewise. What it reads by
a path, as in ``self.config.flag``, is a guard (`fastconv.fuse.guards`): read again and compared at each call. Whatever
else it does or reads raises Untraceable, and is left undone.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections import OrderedDict
from collections.abc import Callable
from itertools import takewhile
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from fastconv.fuse import allowed, source
from fastconv.fuse.guards import CONTAINERS, Guards, is_constant, is_constant_throughout
from fastconv.fuse.stand_ins import Gone, Names, NotSet, Parent, Part, Reference, Untraceable, Value, class_of, unpacked

Kinds = tuple[type, ...]


def parameters(forward: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """The names of a forward's positional parameters after self: those without a default, and the next whose default is
    None. Raises Untraceable."""
    if not isinstance(forward, FunctionType):
        raise Untraceable("is no function of Python's")
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    positional = [p for p in list(inspect.signature(forward).parameters.values())[1:] if p.kind in kinds]
    required = [p.name for p in positional if p.default is inspect.Parameter.empty]
    return required, [p.name for p in takewhile(lambda p: p.default is None, positional[len(required) :])]


class Trace:
    """``graph``, the ``guards`` under which the forward does that, and whether it ``asks`` for its arguments' types."""

    def __init__(self, graph: Graph, guards: Guards, asks: bool) -> None:
        self.graph, self.guards, self.asks = graph, guards, asks


def trace(
    module: torch.nn.Module, training: bool, kinds: Kinds, sets_nothing: Callable[[torch.nn.Module], bool]
) -> Trace:
    """What ``module``'s forward does in training or in eval, given arguments of ``kinds`` (Tensor or list) by position.

    ``sets_nothing`` tells whether a call of a module leaves all attributes as they are. Raises Untraceable. Nothing is
    changed.
    """
    original = class_of(module)
    forward = original.forward
    if isinstance(inspect.getattr_static(original, "forward"), functools.partialmethod):
        raise Untraceable("is made anew each time that it is read")
    required, optional = parameters(forward)
    if not required:
        raise Untraceable("takes no argument that must be given")
    tracer = _Tracer(training, sets_nothing)
    tracer.guards.require_is(f"{tracer.guards.name(original)}.forward", forward, "it is patched")
    values = [tracer._argument(name, kind) for name, kind in zip([*required, *optional], kinds, strict=False)]
    try:
        result = tracer.run(forward, (Reference(tracer, module, "self", "self", target=""), *values), {})
        tracer.own(result)
        tracer.create_node("output", "output", (tracer.create_arg(result),), {})
    except Untraceable:
        raise
    except Exception as error:  # of any kind: the forward may do anything with what is no tensor
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise Untraceable(f"does what torch.fx cannot trace: {lines[0]}") from error
    return Trace(tracer.graph, tracer.guards, tracer.asked)


class _Tracer(GraphAppendingTracer):
    """Answers a forward's questions, and writes down the calls that it makes."""

    def __init__(self, training: bool, sets_nothing: Callable[[torch.nn.Module], bool]) -> None:
        super().__init__(Graph())
        self.training, self.asked, self.guards = training, False, Guards()
        self.sets_nothing = sets_nothing
        self.values: dict[Any, Value] = {}
        self.called: list[Reference] = []
        self.given: dict[int, Any] = {}
        # Copies of containers that the forward has read, by identity: it may not change them.
        self.lent: dict[int, tuple[Any, str]] = {}
        self.answers = {
            source.ATTRIBUTE: self.attribute,
            source.ATTRIBUTES: lambda owner: NotSet(owner.shown if isinstance(owner, Reference) else "a value"),
            source.ITEM: lambda owner, index: self.named(owner[index]),
            source.ITEMS: self.items,
            source.CALL: self.call,
            source.NAME: self.named,
            source.IS: self.is_same,
            source.IN_PLACE: self.in_place,
            source.TEXT: self.text,
            source.REMAINDER: self.remainder,
            source.SLICE: slice,
            source.UNPACK: self.unpack,
            source.REFUSE: self.refuse,
        }

    # What is written down

    def proxy(self, node: Node) -> Proxy:
        return Value(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is Value:
            return a.node
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (super().create_arg(list(a.items())),), {})
        if isinstance(a, Reference):
            raise Untraceable(f"hands on {a.shown}, a {type(a.value).__name__}")
        is_made_of_such = type(a) in (list, dict, tuple, torch.Size, slice, range)
        if is_made_of_such or isinstance(a, Proxy) or is_constant(a) or a is ...:
            return super().create_arg(a)
        raise Untraceable(f"hands on a {type(a).__name__}")

    def own(self, result: Any) -> None:
        """Raise Untraceable if a container in ``result`` is not the forward's own."""
        if id(result) in self.lent:
            raise Untraceable(f"returns {self.lent[id(result)][1]}")
        if isinstance(result, list | tuple | dict):
            for part in result.values() if isinstance(result, dict) else result:
                self.own(part)

    def run(self, function: FunctionType, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of a function of the user's."""
        try:
            code = source.rewritten(function)
        except source.SourceUnknown as why:
            raise Untraceable(str(why)) from None
        name = self.guards.name(function)
        self.guards.require_is(f"{name}.__code__", function.__code__, f"{function.__qualname__} is patched")
        twin = FunctionType(code, Names(self, function), function.__name__)
        twin.__defaults__ = tuple(
            self.seen(value, f"{name}.__defaults__[{i}]", "a default")
            for i, value in enumerate(function.__defaults__ or ())
        )
        twin.__kwdefaults__ = {
            key: self.seen(value, f"{name}.__kwdefaults__[{key!r}]", "a default")
            for key, value in (function.__kwdefaults__ or {}).items()
        }
        return twin(*args, **kwargs)

    # What is read

    def seen(self, value: Any, path: str, shown: str, owner: Reference | None = None) -> Any:
        """``value``, read at ``path``, or its stand-in."""
        if is_constant(value):
            self._must_be_settled(owner, shown)
            if owner is not None and shown.endswith(".training") and isinstance(owner.value, torch.nn.Module):
                value = self.training
            self.guards.require_still(path, value, shown)
            return value
        if is_constant_throughout(value):
            self._must_be_settled(owner, shown, type(value) in allowed.OWN)
            self.guards.require_still(path, value, shown)
            return self._lend(value, shown)
        return Reference(self, value, path, shown)

    def _must_be_settled(self, owner: Reference | None, shown: str, may_change: bool = False) -> None:
        """Raise Untraceable if a module that has been called may have set what is read, since guards come before that.

        A module's own attributes are set only by it and by what holds it; containers and others may be set by any.
        """
        if owner is None:
            return
        for module in self.called:
            is_own = owner.target is not None and not may_change
            if is_own and not f"{owner.target}.".startswith(f"{module.target}."):
                continue
            if not self.sets_nothing(module.value):
                raise Untraceable(f"reads {shown} behind a call of {module.shown}, which may set it")
            self._require_class(module)

    def _require_class(self, module: Reference) -> None:
        kind = self.guards.name(class_of(module.value))
        self.guards.require(f"isinstance({module.path}, {kind})", f"{module.shown} is another module")

    def _lend(self, value: Any, shown: str) -> Any:
        """A copy of a container of constants, which the forward may not change."""
        if type(value) is dict:
            lent: Any = {key: self._lend(item, shown) for key, item in value.items()}
        elif type(value) in CONTAINERS:
            lent = type(value)(self._lend(item, shown) for item in value)
        else:
            return value
        if type(value) in (set, frozenset) and list(lent) != list(value):
            raise Untraceable(f"reads {shown}, a set, of which a copy has another order")
        if type(value) in (list, dict, set):
            self.lent[id(lent)] = lent, shown
        return lent

    def named(self, value: Any) -> Any:
        """``value``, read by a name."""
        if id(value) in self.given:
            raise Untraceable(f"reads a {type(value).__name__} that a module was called with, which may change it")
        return value

    def attribute(self, owner: Any, name: str) -> Any:
        if name.startswith("__"):
            raise Untraceable(f"reads {name}")
        if isinstance(owner, Proxy):
            kind = owner.kind if type(owner) is Value else None
            if not hasattr(kind or Tensor, name):
                if kind is None:
                    raise Untraceable(f"reads {name} of {owner.node.name}")
                raise AttributeError(name)
            return Part(owner, name)
        if isinstance(owner, Parent):
            return self._of_parent(owner, name)
        if isinstance(owner, Reference):
            return self._of_reference(owner, name)
        if type(owner) in (*CONTAINERS, OrderedDict, slice, range) or is_constant(owner):
            return getattr(owner, name)
        raise Untraceable(f"reads {name} of a {type(owner).__name__}")

    def _of_reference(self, owner: Reference, name: str) -> Any:
        value, path, shown = owner.value, f"{owner.path}.{name}", f"{owner.shown}.{name}"
        if isinstance(value, ModuleType):
            if name in vars(value):
                return self.seen(vars(value)[name], path, shown)
            raise Untraceable(f"reads {shown}, which is not there")
        if isinstance(value, type):
            raw = allowed.in_classes(value.__mro__, name, shown)
            return self._of_class(raw.__func__ if isinstance(raw, staticmethod) else raw, path, shown)
        kind = class_of(value) if isinstance(value, torch.nn.Module) else type(value)
        if kind.__getattribute__ not in (object.__getattribute__, SimpleNamespace.__getattribute__):
            raise Untraceable(f"reads {shown}, which its class finds in a way of its own")
        raw = allowed.in_classes(kind.__mro__, name, shown, allowed.MISSING)
        if isinstance(raw, property) and isinstance(raw.fget, FunctionType):
            self.guards.require_is(f"{self.guards.name(kind)}.{name}", raw, f"{shown} is patched")
            return self.run(raw.fget, (owner,), {})
        if isinstance(raw, MemberDescriptorType):
            return self.seen(raw.__get__(value), path, shown)
        if hasattr(type(raw), "__set__"):
            raise Untraceable(f"reads {shown}, a {type(raw).__name__}")
        own = getattr(value, "__dict__", {})
        if name in own:
            return self._of_instance(owner, own[name], path, shown, f"{owner.path}.__dict__[{name!r}]")
        if isinstance(raw, FunctionType):
            return Reference(self, raw, path, shown, receiver=owner)
        if raw is not allowed.MISSING:
            return self._of_class(raw.__func__ if isinstance(raw, staticmethod) else raw, path, shown, owner)
        if isinstance(value, torch.nn.Module) and kind.__getattr__ is torch.nn.Module.__getattr__:
            if name in value._modules:
                return owner.child(name)
            for kept in ("_parameters", "_buffers"):
                if name in getattr(value, kept):
                    stored = f"{owner.path}.{kept}[{name!r}]"
                    return self._of_instance(owner, getattr(value, kept)[name], stored, shown, stored)
        elif hasattr(kind, "__getattr__"):
            raise Untraceable(f"reads {shown}, which its class finds in a way of its own")
        raise Untraceable(f"reads {shown}, which is not there")

    def _of_instance(self, owner: Reference, value: Any, path: str, shown: str, stored: str) -> Any:
        if not isinstance(value, Tensor):
            return self.seen(value, path, shown, owner)
        if owner.target is None:
            return Reference(self, value, path, shown)
        self.guards.require(f"isinstance({stored}, {self.guards.name(Tensor)})", f"{shown} is no tensor any more")
        target = ".".join(filter(None, (owner.target, shown.rpartition(".")[2])))
        return Value(self.create_node("get_attr", target, (), {}), self, Tensor)

    def _of_class(self, raw: Any, path: str, shown: str, owner: Reference | None = None) -> Any:
        if hasattr(type(raw), "__get__") and not isinstance(raw, FunctionType | type):
            raise Untraceable(f"reads {shown}, a {type(raw).__name__}")
        return self.seen(raw, path, shown, owner)

    def parent(self, function: FunctionType, *first: Any) -> Any:
        """``super()`` in ``function``, whose first argument is ``first``."""
        free = function.__code__.co_freevars
        if not first or not isinstance(first[0], Reference) or "__class__" not in free or function.__closure__ is None:
            raise Untraceable("calls super in a way that is not known")
        return Parent(function.__closure__[free.index("__class__")].cell_contents, first[0])

    def _of_parent(self, parent: Parent, name: str) -> Any:
        kind = next((kind for kind in parent.kinds if name in vars(kind)), None)
        if kind is None or not isinstance(vars(kind)[name], FunctionType):
            raise Untraceable(f"reads {name} of super()")
        found = vars(kind)[name]
        self.guards.require_is(f"{self.guards.name(kind)}.{name}", found, f"{name} is patched")
        return Reference(self, found, "", f"super().{name}", receiver=parent.receiver)

    # What is called

    def call(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, FunctionType | Proxy):
            # A function that the forward made, or a tensor's method.
            return function(*args, **kwargs)
        if isinstance(function, BuiltinFunctionType) and type(function.__self__) in (*CONTAINERS, OrderedDict, str):
            return self._call_method(function, args, kwargs)
        if not isinstance(function, Reference):
            raise Untraceable(f"calls a {type(function).__name__}")
        value = function.value
        if isinstance(value, torch.nn.Module):
            return self._call_module(function, args, kwargs)
        if function.receiver is not None:
            return self._call_bound(function, args, kwargs)
        if type(value) is functools.partial:
            return self._call_partial(function, args, kwargs)
        if function.path != self.guards.name(value):
            self.guards.require_is(function.path, value, f"{function.shown} is patched")
        if id(value) in allowed.PURE:
            return value(*args, **kwargs)
        if id(value) in allowed.WRITING:
            return value(*map(self.text, args), **{name: self.text(arg) for name, arg in kwargs.items()})
        if value is torch.is_tensor:
            return self.is_instance(args[0], Reference(self, Tensor, self.guards.name(Tensor), "Tensor"))
        for known, answer in ((isinstance, self.is_instance), (getattr, self.get_attribute), (hasattr, self.has)):
            if value is known:
                return answer(*args)
        if value is super and len(args) == 2 and all(isinstance(arg, Reference) for arg in args):
            return Parent(args[0].value, args[1])
        if any(value is state for state in allowed.STATES):
            answer, said = value(), f"{function.shown}() is not {value()} any more"
            self.guards.require(f"{self.guards.name(value)}() is {answer}", said)
            return answer
        if allowed.is_of(operator, value) or allowed.is_of(math, value):
            if any(type(arg) in allowed.OWN for arg in args):
                raise Untraceable(f"calls {function.shown} with a {type(args[0]).__name__}")
            if any(map(allowed.holds_value, (args, kwargs))):
                return self.create_proxy("call_function", value, args, kwargs)
            if all(map(is_constant, args)) and not kwargs:
                return value(*args)
        elif any(allowed.is_of(module, value) for module in allowed.TORCH):
            if any(map(allowed.holds_value, (args, kwargs))):
                self.asked |= any(value is joins for joins in allowed.JOIN) and allowed.is_argument(*args[:1])
                return self.create_proxy("call_function", value, args, kwargs)
        elif isinstance(value, FunctionType) and not allowed.is_torchs(value):
            return self.run(value, args, kwargs)
        elif isinstance(value, type):
            raise Untraceable(f"makes a {value.__name__}")
        raise Untraceable(f"calls {function.shown}")

    def _call_partial(self, partial: Reference, args: Any, kwargs: Any) -> Any:
        value, path, shown = partial.value, partial.path, partial.shown
        self.guards.require_is(f"type({path})", type(value), f"{shown} is something else now")
        first = [self.seen(arg, f"{path}.args[{i}]", shown) for i, arg in enumerate(value.args)]
        named = {name: self.seen(arg, f"{path}.keywords[{name!r}]", shown) for name, arg in value.keywords.items()}
        return self.call(self.seen(value.func, f"{path}.func", shown), *first, *args, **{**named, **kwargs})

    def _call_method(self, method: Any, args: Any, kwargs: Any) -> Any:
        """Call a method of a container or a string."""
        owner = method.__self__
        if isinstance(owner, str):
            args, kwargs = tuple(map(self.text, args)), {name: self.text(arg) for name, arg in kwargs.items()}
        elif id(owner) in self.lent and method.__name__ not in allowed.READING:
            raise Untraceable(f"changes {self.lent[id(owner)][1]}")
        return method(*args, **kwargs)

    def _call_module(self, module: Reference, args: Any, kwargs: Any) -> Any:
        if not module.target:
            raise Untraceable("calls itself" if module.target == "" else f"calls {module.shown}, which is not its own")
        node = self.create_proxy("call_module", module.target, args, kwargs).node
        for given in (*args, *kwargs.values()):
            self._hand_over(given)
        self.called.append(module)
        return Value(node, self, made_by=None if kwargs else (module, args))

    def _hand_over(self, given: Any) -> None:
        """Forbid reading a container that a module was called with, since that may change it."""
        if id(given) in self.lent:
            raise Untraceable(f"hands on {self.lent[id(given)][1]}")
        if not isinstance(given, list | tuple | dict):
            return
        for part in list(given.values() if isinstance(given, dict) else given):
            self._hand_over(part)
        if isinstance(given, list):
            given[:] = [Gone()] * len(given)
        elif isinstance(given, dict):
            given.update(dict.fromkeys(given, Gone()))
        self.given[id(given)] = given

    def _call_bound(self, method: Reference, args: Any, kwargs: Any) -> Any:
        value, receiver = method.value, method.receiver
        if method.path and value.__name__ == "forward" and isinstance(receiver.value, torch.nn.Module):
            read = f"{self.guards.name(allowed.forward_of)}({receiver.path})"
            self.guards.require_is(read, value, f"{method.shown} is patched")
        elif method.path:
            self.guards.require_is(f"{method.path}.__func__", value, f"{method.shown} is patched")
        if isinstance(receiver.value, torch.nn.Module) and not (args or kwargs):
            name = value.__name__
            if value is getattr(torch.nn.Module, name, None) and name in ("children", "named_children"):
                children = self._once_each(receiver)
                return list(children.items() if name == "named_children" else children.values())
            if value is getattr(torch.nn.ModuleDict, name, None) and name in ("items", "keys", "values"):
                return list(getattr(receiver.children(), name)())
        if allowed.is_torchs(value) and value.__globals__["__name__"] != allowed.CONTAINERS_CODE:
            raise Untraceable(f"calls {method.shown}")
        return self.run(value, (receiver, *args), kwargs)

    def _once_each(self, module: Reference) -> dict[str, Any]:
        """The children of ``module``, none of which is there twice or None."""
        if not allowed.are_distinct(module.value):
            raise Untraceable(f"goes through {module.shown}'s children, of which two are one or one is None")
        test = f"{self.guards.name(allowed.are_distinct)}({module.path})"
        self.guards.require(test, f"two children of {module.shown} are one now, or one is None")
        return module.children()

    # What is asked

    def _kind_of(self, value: Proxy) -> type:
        if type(value) is not Value:
            raise Untraceable(f"asks what {value.node.name} is")
        kind = value.kind
        if kind is None and value.made_by is not None:
            kind = self._kind_given_by(*value.made_by)
        elif kind is None and value.node.target in allowed.ARITHMETIC and value.node.args[0] in self.values:
            kind = Tensor if self._kind_of(self.values[value.node.args[0]]) is Tensor else None
        if kind is None:
            raise Untraceable(f"asks what {value.node.name} is")
        value.kind = kind
        return kind

    def _kind_given_by(self, module: Reference, args: tuple[Any, ...]) -> type | None:
        """The type of what ``module`` gives for arguments like ``args``, as long as the guards hold that this adds."""
        self._require_class(module)
        # Only forward hooks can replace the result.
        hooks = torch.nn.modules.module._global_forward_hooks
        self.guards.require(f"not {self.guards.name(hooks)}", "a hook on every module")
        unhooked = f"not {module.path}._forward_hooks and 'forward' not in {module.path}.__dict__"
        self.guards.require(unhooked, f"a hook or a forward of its own on {module.shown}")
        if isinstance(module.value, allowed.GIVE_TENSORS):
            return Tensor
        forward = allowed.forward_of(module.value)
        if not isinstance(forward, FunctionType):
            return None
        graph, self.graph = self.graph, Graph()
        try:
            values = [
                arg if is_constant(arg) else self._argument(f"x{i}", allowed.kind_of(arg)) for i, arg in enumerate(args)
            ]
            result = self._call_bound(
                Reference(self, forward, "", f"{module.shown}.forward", receiver=module), values, {}
            )
            return self._kind_of(result) if isinstance(result, Proxy) else type(result)
        except Untraceable:
            return None
        finally:
            self.graph = graph

    def _argument(self, name: str, kind: type | None) -> Value:
        return Value(self.create_node("placeholder", name, (), {}), self, kind)

    def is_instance(self, value: Any, kinds: Any) -> bool:
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        # A metaclass may answer as it likes.
        if not all(isinstance(kind, Reference) and type(kind.value) in allowed.ANSWER_TRULY for kind in kinds):
            raise Untraceable("calls isinstance in a way that is not known")
        for kind in kinds:
            self.guards.require_is(kind.path, kind.value, f"{kind.shown} is another class now")
        classes = tuple(kind.value for kind in kinds)
        if isinstance(value, Proxy):
            kind = self._kind_of(value)
            self.asked |= allowed.is_argument(value)
            if not set(classes) <= {Tensor, list, tuple, dict, OrderedDict, set, str, int, float, bool}:
                raise Untraceable(f"asks whether {value.node.name} is a {classes[0].__name__}")
            return issubclass(kind, classes)
        if isinstance(value, Reference):
            answer = isinstance(value.value, classes)
            names = ", ".join(self.guards.name(kind) for kind in classes)
            said = f"{value.shown} is {'no ' if answer else 'a '}{classes[0].__name__} now"
            self.guards.require(f"isinstance({value.path}, ({names},)) is {answer}", said)
            return answer
        return isinstance(value, classes)

    def get_attribute(self, owner: Any, name: str, *default: Any) -> Any:
        return self.attribute(owner, name) if not default or self.has(owner, name) else default[0]

    def has(self, owner: Any, name: str) -> bool:
        if not isinstance(owner, Reference) or not isinstance(name, str):
            raise Untraceable("asks for an attribute in a way that is not known")
        answer = True
        try:
            self.attribute(owner, name)
        except Untraceable:
            if hasattr(type(owner.value), name) or name in getattr(owner.value, "__dict__", {}):
                raise
            kind = type(owner.value)
            if getattr(kind, "__getattr__", torch.nn.Module.__getattr__) is not torch.nn.Module.__getattr__:
                raise
            answer = False
        said = f"{owner.shown}.{name} is there now" if not answer else f"{owner.shown}.{name} is gone"
        self.guards.require(f"hasattr({owner.path}, {name!r}) is {answer}", said)
        return answer

    def is_same(self, a: Any, b: Any) -> bool:
        if type(a) is type(b) and type(a) in (int, float, str):
            raise Untraceable("compares numbers or strings by identity")
        if a is b or (allowed.is_single(a) and allowed.is_single(b)):
            return a is b
        if isinstance(a, Reference) and isinstance(b, Reference):
            same = a.value is b.value
            self.guards.require(f"({a.path} is {b.path}) is {same}", f"{a.shown} is {b.shown} no more, or now")
            return same
        for value, other in ((a, b), (b, a)):
            if not allowed.is_single(other):
                continue
            if isinstance(value, Reference):
                return value.is_one(other)
            if isinstance(value, Proxy):
                self._kind_of(value)
            return False
        raise Untraceable("asks whether two things are one")

    def text(self, value: Any) -> Any:
        if not is_constant(value) and not is_constant_throughout(value):
            raise Untraceable("writes down what a value is")
        return value

    def remainder(self, a: Any, b: Any) -> Any:
        return a % (self.text(b) if isinstance(a, str) else b)

    def unpack(self, value: Any, count: int) -> Any:
        if not isinstance(value, Proxy):
            return value
        parts: Any = self.create_proxy("call_function", unpacked, (value, count), {})
        return [parts[i] for i in range(count)]

    def refuse(self, why: str) -> Any:
        raise Untraceable(why)

    # What is changed

    def items(self, owner: Any) -> Any:
        """``owner``, whose item is set."""
        if id(owner) in self.lent:
            raise Untraceable(f"changes {self.lent[id(owner)][1]}")
        if type(owner) in allowed.OWN:
            return owner
        return NotSet(owner.shown if isinstance(owner, Reference) else "an item of a value")

    def in_place(self, name: str, a: Any, b: Any) -> Any:
        function = getattr(operator, name)
        if isinstance(a, str):
            self.text(b)
        if isinstance(a, Proxy):
            return self.create_proxy("call_function", function, (a, b), {})
        if id(a) in self.lent:
            raise Untraceable(f"changes {self.lent[id(a)][1]}")
        return function(a, b)
