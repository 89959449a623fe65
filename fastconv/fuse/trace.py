"""The graph of one module's own forward: torch.fx with every child a leaf, and with what torch.fx would not notice.

torch.fx records calls on proxies. A forward that does more than calls (sets attributes, draws numbers, enters contexts,
asks for types, for the grad mode) would lose that in a graph; here it raises Untraceable, and leaves nothing behind.
"""

from __future__ import annotations

import inspect
import operator
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, Proxy
from torch.nn.modules.batchnorm import _BatchNorm

# torch.nn's modules whose result is a tensor whatever they are called with.
_GIVE_TENSORS = (
    *(torch.nn.modules.conv._ConvNd, _BatchNorm, torch.nn.Linear, torch.nn.GroupNorm, torch.nn.LayerNorm),
    *(torch.nn.ReLU, torch.nn.Hardtanh, torch.nn.SiLU, torch.nn.GELU, torch.nn.Sigmoid, torch.nn.Hardswish),
    *(torch.nn.AvgPool2d, torch.nn.AdaptiveAvgPool2d, torch.nn.Flatten, torch.nn.Dropout),
)


class Untraceable(Exception):
    """What the forward does that no graph holds: "sets seen"."""


def class_of(module: torch.nn.Module) -> Any:
    """The class of ``module`` as if nothing were fused."""
    return type(module).__dict__.get("_fastconv_original", type(module))


def is_sequential(module: torch.nn.Module) -> bool:
    """Whether its forward is torch.nn.Sequential's."""
    return class_of(module).forward is torch.nn.Sequential.forward


def subclass(original: Any, body: dict[str, Any]) -> Any:
    """A class that gives itself out for ``original``."""
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original)(original.__name__, (original,), {**names, **body})


Kinds = tuple[type, ...]


def parameters(forward: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """The names of a forward's positional parameters but for self: those without a default, and next those of None."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    positional = [p for p in list(inspect.signature(forward).parameters.values())[1:] if p.kind in kinds]
    required = [p.name for p in positional if p.default is inspect.Parameter.empty]
    return required, [p.name for p in takewhile(lambda p: p.default is None, positional[len(required) :])]


def trace(module: torch.nn.Module, training: bool, kinds: Kinds, reads: set[str]) -> tuple[Graph, bool]:
    """The graph of ``module``'s forward, and whether it asks what its arguments are.

    kinds: of the arguments, by position (Tensor or list); no others are given. The names of the attributes read are
    added to ``reads``. Raises Untraceable.
    """
    now, original = type(module), class_of(module)
    required, optional = parameters(original.forward)
    if not required:
        raise Untraceable("takes no argument that must be given")

    def read(self: torch.nn.Module, name: str) -> Any:
        if name[0] != "_":
            reads.add(name)
        return original.__getattribute__(self, name)

    tracer = _Tracer(dict(zip([*required, *optional], kinds, strict=False)))
    with _nothing_left_behind(module):
        module.__dict__["training"] = training
        try:
            module.__class__ = subclass(original, {"__getattribute__": read})
            graph = tracer.trace(module)
        except Untraceable:
            raise
        except Exception as error:  # of any kind: the forward may do anything with what is no tensor
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise Untraceable(f"does what torch.fx cannot trace: {lines[0]}") from error
        finally:
            module.__class__ = now
    return graph, tracer.asked


class _Value(Proxy):
    """Stands for a tensor or a list, as far as the forward can tell, or for what it may not ask."""

    tracer: _Tracer

    def __init__(self, node: Node, tracer: _Tracer, kind: type | None) -> None:
        super().__init__(node, tracer)
        object.__setattr__(self, "_kind", kind)

    # What isinstance asks where the true type does not do. torch's own code and ours are told the truth.
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        code = sys._getframe(1)
        package = code.f_globals.get("__name__", "").split(".")[0]
        if package in ("torch", "fastconv") and code.f_code.co_name != "is_tensor":
            return _Value
        if self._kind is None:
            raise Untraceable(f"asks what {self.node.name} is")
        self.tracer.asked = True
        return self._kind

    def __getattr__(self, name: str) -> Any:
        if not hasattr(self._kind or Tensor, name):
            if self._kind is None:
                raise Untraceable(f"reads {name} of {self.node.name}")
            raise AttributeError(name)
        return super().__getattr__(name)

    # Without these Python, and so torch.fx, makes ``a += b`` an ``a = a + b``, which other readers of ``a`` do not see.
    def __iadd__(self, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, arguments: dict[str, type]) -> None:
        super().__init__()
        self.arguments = arguments
        self.asked = False
        self.mode = _mode()

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        values = [self.create_proxy("placeholder", name, (), {}) for name in self.arguments]
        return root_fn, [self.root, *values]

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Value:
            return a.node
        if type(a) is OrderedDict:
            return self.create_node("call_function", OrderedDict, (super().create_arg(list(a.items())),), {})
        if isinstance(a, dict | list) and type(a) not in (dict, list):
            raise Untraceable(f"makes a {type(a).__name__}")  # torch.fx would make it a plain one
        return super().create_arg(a)

    def proxy(self, node: Node) -> Proxy:
        kind: type | None = None
        if node.op == "placeholder":
            kind = self.arguments[str(node.target)]
        elif node.op == "get_attr" or (node.op == "call_module" and self._gives_tensor(str(node.target))):
            kind = Tensor
        return _Value(node, self, kind)

    def _gives_tensor(self, target: str) -> bool:
        child = self.root.get_submodule(target)
        while is_sequential(child) and child._modules:
            child = list(child.children())[-1]
        return isinstance(child, _GIVE_TENSORS)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        # torch.fx records no contexts: what is called inside one would leave it.
        if _mode() != self.mode:
            raise Untraceable("calls a part of it in a context of its own (no_grad, autocast or the like)")
        return super().create_node(*args, **kwargs)


def _mode() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        *(torch.get_autocast_dtype(device) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
    )


@contextmanager
def _nothing_left_behind(module: torch.nn.Module) -> Iterator[None]:
    """Undo what the body does to ``module``'s attributes and the random numbers; raise Untraceable if it did any."""
    state = vars(module)
    before = {name: (value, _contents(value)) for name, value in state.items()}
    numbers = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        state["training"] = before["training"][0]
        drawn = not torch.equal(torch.get_rng_state(), numbers[0]) or random.getstate() != numbers[1]
        torch.set_rng_state(numbers[0])
        random.setstate(numbers[1])
        changed = [name for name in state if name not in before]
        for name in changed:
            del state[name]
        for name, (value, contents) in before.items():
            if state.get(name) is not value or _contents(value) != contents:
                changed.append(name)
                state[name] = value
                _refill(value, contents)
    if changed:
        made = any(name.startswith("_tensor_constant") for name in changed)
        raise Untraceable("makes tensors of its own" if made else f"sets {', '.join(sorted(changed))}")
    if drawn:
        raise Untraceable("draws random numbers")


class _Same:
    """Compares by identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _contents(value: Any) -> Any:
    if isinstance(value, dict):
        return [(key, _Same(item)) for key, item in value.items()]
    return [_Same(item) for item in value] if isinstance(value, list) else None


def _refill(value: Any, contents: Any) -> None:
    if isinstance(value, dict):
        value.clear()
        value.update((key, same.value) for key, same in contents)
    elif isinstance(value, list):
        value[:] = [same.value for same in contents]
