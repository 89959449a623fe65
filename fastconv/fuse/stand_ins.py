"""What a traced forward gets in the place of tensors and of what it reaches by a path.

Each answers what the tracer allows, through Python's own operators, and raises Untraceable on all else.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch.fx import Node, Proxy
from torch.fx.proxy import Attribute

from fastconv.fuse import source

MODULE_CONTAINERS = (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)


class Untraceable(Exception):
    """What the forward does that no graph holds: "sets seen"."""


def class_of(module: torch.nn.Module) -> Any:
    """The class of ``module`` as if nothing were fused."""
    return type(module).__dict__.get("_fastconv_original", type(module))


def is_librarys(kind: type) -> bool:
    """Whether ``kind`` is a class of torch.nn's or of fastconv.nn's."""
    return kind.__module__.startswith(("torch.nn.modules.", "fastconv.nn."))


def is_sequential(module: torch.nn.Module) -> bool:
    """Whether the forward of ``module`` is torch.nn.Sequential's."""
    return getattr(class_of(module), "forward", None) is torch.nn.Sequential.forward


def path_of(target: str) -> str:
    """The expression for the child ``target`` of ``self``."""
    return "".join(("self", *(f"._modules[{name!r}]" for name in target.split("."))))


class Value(Proxy):
    """Stands for a value of type ``kind``, a tensor or a list; None: the type may not be asked.

    ``made_by``: the module whose result it is, and the arguments of that call.
    """

    kind: type | None
    made_by: tuple[Reference, tuple[Any, ...]] | None

    def __init__(
        self,
        node: Node,
        tracer: Any,
        kind: type | None = None,
        made_by: tuple[Reference, tuple[Any, ...]] | None = None,
    ) -> None:
        super().__init__(node, tracer)
        self.kind, self.made_by = kind, made_by
        tracer.values[node] = self

    def __iter__(self) -> Iterator[Any]:
        raise Untraceable(f"iterates over {self.node.name}")


def unpacked(values: Any, count: int) -> tuple[Any, ...]:
    """``values`` for an assignment to ``count`` names."""
    parts = tuple(values)
    if len(parts) != count:
        raise ValueError(f"cannot unpack {len(parts)} values into {count} names")
    return parts


class Part(Attribute):
    """An attribute of what a `Value` stands for."""

    def __iter__(self) -> Iterator[Any]:
        raise Untraceable(f"iterates over {self.attr}")


class Gone:
    """Takes the place of the items of a list or dict that the forward has handed to a module."""


class Reference:
    """Stands for what the forward reaches by a path and is no constant: a module, an object, a function, a class.

    ``path`` is an expression in guards, ``shown`` the same for a reader; ``target``: a module's name under the traced
    one; ``receiver``: the object that a method is bound to.
    """

    __slots__ = ("path", "receiver", "shown", "target", "tracer", "value")
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, tracer: Any, value: Any, path: str, shown: str, target: str | None = None, receiver: Any = None
    ) -> None:
        self.tracer, self.value, self.path, self.shown = tracer, value, path, shown
        self.target, self.receiver = target, receiver

    def __bool__(self) -> bool:
        kind = type(self.value)
        if self._is_container("__len__"):
            return bool(self._container("__len__"))
        if hasattr(kind, "__bool__") or hasattr(kind, "__len__"):
            raise Untraceable(f"asks whether {self.shown}, a {kind.__name__}, is true")
        self.tracer.guards.require(self.path, f"{self.shown} is not true any more")
        return True

    def is_one(self, constant: Any) -> bool:
        """False, and required at each call: it is not ``constant``, that is None, True, False or the like."""
        guards = self.tracer.guards
        guards.require(f"{self.path} is not {guards.name(constant)}", f"{self.shown} is {constant!r} now")
        return False

    def __eq__(self, other: object) -> bool:
        if other is None and type(self.value).__eq__ is object.__eq__:
            return self.is_one(None)
        if isinstance(other, Reference) and type(self.value).__eq__ is type(other.value).__eq__ is object.__eq__:
            return self.tracer.is_same(self, other)
        raise Untraceable(f"compares {self.shown}, a {type(self.value).__name__}")

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _compare(self, other: object) -> bool:
        raise Untraceable(f"compares {self.shown}, a {type(self.value).__name__}")

    __lt__ = __le__ = __gt__ = __ge__ = _compare

    def __len__(self) -> int:
        return len(self._container("__len__"))

    def __iter__(self) -> Iterator[Any]:
        children = self._container("__iter__")
        return iter(children if isinstance(self.value, torch.nn.ModuleDict) else children.values())

    def __contains__(self, name: object) -> bool:
        if isinstance(self.value, torch.nn.ModuleDict):
            return name in self._container("__contains__")
        raise Untraceable(f"searches {self.shown}, a {type(self.value).__name__}")

    def __getitem__(self, index: Any) -> Any:
        children = self._container("__getitem__")
        if isinstance(self.value, torch.nn.ModuleDict):
            return children[index]
        return list(children.values())[index]

    def _is_container(self, method: str) -> bool:
        kind = next((kind for kind in MODULE_CONTAINERS if isinstance(self.value, kind)), None)
        return kind is not None and getattr(class_of(self.value), method, None) is getattr(kind, method, None)

    def _container(self, method: str) -> dict[str, Any]:
        if not self._is_container(method):
            raise Untraceable(f"reads {self.shown}, a {type(self.value).__name__}, in a way that is not known")
        own = getattr(class_of(self.value), method)
        self.tracer.guards.require_is(f"type({self.path}).{method}", own, f"{self.shown} is another container now")
        return self.children()

    def children(self) -> dict[str, Any]:
        """The children by name; requires the same names in the same order at each call."""
        modules = self.value._modules
        test = f"tuple({self.path}._modules) == {tuple(modules)!r}"
        self.tracer.guards.require(test, f"{self.shown} has other children now")
        return {name: self.child(name) for name in modules}

    def child(self, name: str) -> Any:
        child = self.value._modules[name]
        path, shown = f"{self.path}._modules[{name!r}]", f"{self.shown}.{name}"
        if child is None:
            self.tracer.guards.require_still(path, None, shown)
            return None
        target = None if self.target is None else ".".join(filter(None, (self.target, name)))
        return Reference(self.tracer, child, path, shown, target)


class Names(dict[str, Any]):
    """The globals of rewritten code: the answers to its questions, and ``function``'s own names, looked up late."""

    def __init__(self, tracer: Any, function: FunctionType) -> None:
        super().__init__(tracer.answers, **{source.SUPER: lambda *first: tracer.parent(function, *first)})
        self.tracer, self.function = tracer, function

    def __missing__(self, name: str) -> Any:
        guards, function = self.tracer.guards, self.function
        if name in function.__code__.co_freevars:
            assert function.__closure__ is not None
            cell = function.__closure__[function.__code__.co_freevars.index(name)]
            return self.tracer.seen(cell.cell_contents, f"{guards.name(cell)}.cell_contents", name)
        space = function.__globals__
        if name in space:
            module = sys.modules.get(space.get("__name__", ""))
            of_module = module is not None and vars(module) is space
            path = f"{guards.name(module)}.{name}" if of_module else f"{guards.name(space)}[{name!r}]"
            return self.tracer.seen(space[name], path, name)
        if not hasattr(builtins, name):
            raise Untraceable(f"reads {name}, which is not defined")
        guards.require(f"{name!r} not in {guards.name(space)}", f"{name} is no builtin any more")
        return Reference(self.tracer, getattr(builtins, name), f"{guards.name(builtins)}.{name}", name)


class Parent:
    """``super()``: the classes behind ``kind`` in the order of ``receiver``'s."""

    def __init__(self, kind: type, receiver: Reference) -> None:
        order = class_of(receiver.value).__mro__
        self.kinds, self.receiver = order[order.index(kind) + 1 :], receiver


class NotSet:
    """Takes the place of an object whose attribute or item the forward sets."""

    def __init__(self, of: str) -> None:
        self.of = of

    def __setitem__(self, name: Any, _: Any) -> None:
        raise Untraceable(f"sets {self.of}.{name}")

    def __delitem__(self, name: Any) -> None:
        raise Untraceable(f"deletes {self.of}.{name}")
