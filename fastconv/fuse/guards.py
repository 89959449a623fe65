"""Guards of a fused forward: expressions over its module that must be true at each call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

_SCALARS = (type(None), bool, int, float, str)
_OF_TORCH = (torch.dtype, torch.memory_format, torch.layout, torch.device)
CONTAINERS = (tuple, list, dict, set, frozenset, torch.Size)
_GONE = (AttributeError, LookupError, TypeError, ValueError)


def is_constant(value: Any) -> bool:
    """Whether ``value`` means the same for as long as it compares equal to what it was."""
    if type(value) is float and math.isnan(value):
        return False
    return type(value) in _SCALARS or isinstance(value, _OF_TORCH)


def is_constant_throughout(value: Any) -> bool:
    """Whether ``value`` is one of Python's own containers, of constants and of containers of constants."""
    if type(value) not in CONTAINERS:
        return False
    parts = (*value.keys(), *value.values()) if type(value) is dict else value
    return all(is_constant(part) or is_constant_throughout(part) for part in parts)


def frozen(value: Any) -> Any:
    """What compares equal to another value's only if types and order are the same too."""
    if type(value) is dict:
        return dict, tuple((frozen(key), frozen(item)) for key, item in value.items())
    if type(value) in CONTAINERS:
        return type(value), tuple(map(frozen, value))
    # 0.0 and -0.0 compare equal.
    return type(value), repr(value) if type(value) is float else value


class Guards:
    """Python expressions over ``self``, true of a module, each with what to say if it is not.

    Objects in them that are no literals have a name. ``key`` is equal for guards that mean the same.
    """

    def __init__(self) -> None:
        self.tests: dict[str, str] = {}
        self._objects: dict[str, Any] = {"frozen": frozen}
        self._values: dict[str, Any] = {}
        self._names: dict[int, str] = {}

    def name(self, thing: Any) -> str:
        """The name of an object in tests."""
        if id(thing) not in self._names:
            self._names[id(thing)] = name = f"c{len(self._names)}"
            self._objects[name] = thing
        return self._names[id(thing)]

    def _name_of_value(self, value: Any) -> str:
        for name, known in self._values.items():
            if known == value:
                return name
        self._values[name := f"f{len(self._values)}"] = value
        return name

    def require(self, test: str, otherwise: str) -> None:
        self.tests.setdefault(f"({test})", otherwise)

    def require_is(self, path: str, thing: Any, otherwise: str) -> None:
        """Require that the expression ``path`` is the object ``thing``."""
        self.require(f"{path} is {self.name(thing)}", otherwise)

    def require_still(self, path: str, value: Any, shown: str) -> None:
        """Require that the expression ``path`` is ``value``, a constant or a container of constants."""
        if value is None or isinstance(value, bool):
            test = f"{path} is {value}"
        elif type(value) is float and value and math.isfinite(value):
            test = f"type(v := {path}) is float and v == {value!r}"
        elif type(value) in (int, str):
            test = f"type(v := {path}) is {type(value).__name__} and v == {value!r}"
        else:
            test = f"frozen({path}) == {self._name_of_value(frozen(value))}"
        self.require(test, f"{shown} is not {value!r} any more")

    @property
    def key(self) -> tuple[Any, ...]:
        objects = tuple((name, id(thing)) for name, thing in self._objects.items())
        return tuple(self.tests), objects, tuple(self._values.items())

    @property
    def _space(self) -> dict[str, Any]:
        return {**self._objects, **self._values}

    def compile(self) -> Callable[[Any], bool]:
        """The function that tells whether all hold for a module."""
        space = self._space
        exec(f"def holds(self):\n    return {' and '.join(self.tests) or True}", space)
        holds = space["holds"]

        def hold(module: Any) -> bool:
            if torch.compiler.is_compiling():
                return holds(module)
            try:
                return holds(module)
            except _GONE:
                return False

        return hold

    def why_not(self, module: Any) -> str | None:
        """What to say of the first that does not hold; None: all hold."""
        space = self._space
        for test, otherwise in self.tests.items():
            try:
                holds = eval(test, space, {"self": module})
            except _GONE:
                holds = False
            if not holds:
                return otherwise
        return None
