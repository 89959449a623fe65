"""Whether somebody replaced what PyTorch runs for a layer: on the layer's class, in torch.nn.functional or in torch.

The code of the class's own ``forward`` names the methods and functions that run. A function is torch's own if its code
comes from there, so that replacements made before fastconv was imported are seen too.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch

# What a call of a module runs before its forward; torch.fx and torch.export replace them by functions of torch's.
_CALL = ("__call__", "_call_impl")
# Modules with the code of torch's and torch.nn.functional's functions that are not built in.
_FUNCTIONS = ("torch", "torch.functional", "torch.nn.functional", "torch._jit_internal")
_PACKAGES = ("torch", "fastconv", "timm")
Point = tuple[Any, str]  # a class or a module, and the name of an attribute
Answer = tuple[Callable[[], bool], str | None]  # whether nothing has changed since, and what was found

_calls: dict[type, Answer] = {}
_beneath: dict[type, Answer] = {}
_NOTHING: Answer = (lambda: False, None)


def patched(kind: type[torch.nn.Module]) -> str | None:
    """What is replaced of all that a call of a ``kind`` runs, as in "torch.nn.ReLU.forward is patched"; None: nothing.

    A user's own forward is not looked at, only how the class is called.
    """
    unchanged, found = _calls.get(kind, _NOTHING)
    return found if unchanged() else _look(_calls, kind, [*_method(kind, *_CALL), *_points(kind)])


def patched_beneath(ours: type[torch.nn.Module]) -> str | None:
    """What is replaced of what torch.nn's layer runs and ``ours``, fastconv's, does not; None: nothing."""
    unchanged, found = _beneath.get(ours, _NOTHING)
    return found if unchanged() else _look(_beneath, ours, list(_overridden(ours)))


# A compiled model keeps what was true when it was compiled, as with torch.nn's own layers.
patched._dynamo_marked_constant = patched_beneath._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _look(memo: dict[type, Answer], kind: type, points: list[Point]) -> str | None:
    values = [getattr(*point) for point in points]
    replaced = (point for point, value in zip(points, values, strict=True) if not _is_own(*point, value))
    found = next((f"{_name(*point)} is patched" for point in replaced), None)
    # One expression, because a loop takes twice the time.
    terms = (f"owner{i}.{name} is value{i}" for i, (_, name) in enumerate(points))
    known = {f"owner{i}": owner for i, (owner, _) in enumerate(points)}
    known |= {f"value{i}": value for i, value in enumerate(values)}
    memo[kind] = eval(f"lambda: {' and '.join(terms)}", known), found
    return found


def _points(kind: Any) -> Iterator[Point]:
    """What ``kind``'s forward runs, and for a layer of fastconv's what torch.nn's would run instead."""
    # A forward that can be continued is fastconv's, on a user's class too, as is one that functools.wraps copied.
    if _defining(kind, "forward").__module__.partition(".")[0] in _PACKAGES or hasattr(kind.forward, "continued"):
        yield from _method(kind, "forward")
        yield from _overridden(kind)


def _overridden(kind: Any) -> Iterator[Point]:
    kind = getattr(kind, "cls_to_become", kind)
    if kind.__module__.startswith("fastconv.nn."):
        yield from _method(kind.__base__, *(name for name in ("_conv_forward", "forward") if name in vars(kind)))


def _method(kind: type, *names: str) -> Iterator[Point]:
    """The methods ``names`` of ``kind``, and what those that are its own refer to."""
    todo, seen = [(kind, name) for name in names], set()
    while todo:
        point = todo.pop()
        if point in seen:
            continue
        seen.add(point)
        yield point
        value = getattr(*point)
        if point[1] not in _CALL and isinstance(value, FunctionType) and _is_own(*point, value):
            for function in (value, *_chosen_by(value)):
                todo += _named(point[0], function)


def _chosen_by(function: FunctionType) -> Iterator[FunctionType]:
    """The functions between which ``function`` chooses by an argument, as max_pool2d by return_indices."""
    if _code_of(function) == "torch._jit_internal":
        held = (cell.cell_contents for cell in function.__closure__ or ())
        yield from (each for each in held if isinstance(each, FunctionType))


def _named(owner: Any, function: FunctionType) -> Iterator[Point]:
    """The methods of ``owner`` and the functions of torch that the code of ``function`` names."""
    before: Any = None  # what the instruction before loaded, if that is a global
    methods = owner if isinstance(owner, type) else None
    for code in dis.get_instructions(function):
        name, module = code.argval, before
        before = None
        if code.opname == "LOAD_GLOBAL":
            before, module = function.__globals__.get(name), owner  # torch's functions call each other by their names
        elif code.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            continue
        elif isinstance(getattr(methods, name, None), FunctionType) and not hasattr(torch.nn.Module, name):
            yield owner, name
        if (module is torch or module is torch.nn.functional) and name[0] != "_" and not hasattr(torch.overrides, name):
            value = vars(module).get(name)
            # fastconv's layers call pad as well.
            if callable(value) and not isinstance(value, type) and name != "pad":
                yield module, name


def _is_own(owner: Any, name: str, value: Any) -> bool:
    if isinstance(owner, ModuleType):
        return isinstance(value, BuiltinFunctionType) or _code_of(value) in _FUNCTIONS
    code = _code_of(value)
    if name in _CALL:
        return code.startswith("torch.")
    named = getattr(value, "__qualname__", "")
    return code.startswith("fastconv.") or any(
        code == kind.__module__ and named == f"{kind.__qualname__}.{name}" for kind in owner.__mro__
    )


def _code_of(value: Any) -> str:
    """The name of the module with a function's code, which functools.wraps does not change."""
    return value.__globals__["__name__"] if isinstance(value, FunctionType) else ""


def _defining(kind: type, name: str) -> type:
    return next(each for each in kind.__mro__ if name in vars(each))


def _name(owner: Any, name: str) -> str:
    if isinstance(owner, ModuleType):
        return f"{owner.__name__}.{name}"
    kind = _defining(owner, name)
    package = kind.__module__.partition(".")[0]
    short = f"{package}.nn" if package in ("torch", "fastconv") else kind.__module__
    return f"{short}.{kind.__qualname__}.{name}"
