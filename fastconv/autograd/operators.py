"""What PyTorch is told of fastconv: its library operators, their gradients' Functions, and the short way past both.

The operators ``torch.ops.fastconv.*`` are what torch.compile, torch.export, dispatch modes and the profiler see; they
choose kernel and tile inside, so that sizes never become guards. Where nobody looks, a call on plain tensors goes
straight to what the operator runs: PyTorch's dispatcher takes several times what choosing a launch does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_library = torch.library.Library("fastconv", "DEF")
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_VALUES = frozenset({type(None), int, bool, float, str, tuple, torch.Size})
# Looked up once: these are asked of every call.
_is_compiling, _is_profiled = torch.compiler.is_compiling, torch.autograd._profiler_enabled
_modes, _transforms, _tracing = (
    torch._C._len_torch_dispatch_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
)
_is_wrapped, _is_negated = torch._C._functorch.is_functorch_wrapped_tensor, Tensor.is_neg

# What each operator runs, for who calls it on tensors without data: the dispatcher would call the fake one.
implementations: dict[Any, Callable[..., Any]] = {}


def operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``fastconv::<schema>``, for every device alike, and return what calls it."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=_TAGS)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastconv::{name}", fake, lib=_library)
    overload = getattr(torch.ops.fastconv, name).default
    implementations[overload] = implementation

    tensors = [i for i, it in enumerate(overload._schema.arguments) if "Tensor" in str(it.type)]
    last = tensors[-1] + 1  # behind it are numbers

    def call(*args: Any) -> Any:
        return implementation(*args) if _unseen(args[:last]) else overload(*args)

    return call


class Function(torch.autograd.Function):
    """torch.autograd.Function, applied without a search for transforms of torch.func where there are none."""

    _apply: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        cls._apply = super(torch.autograd.Function, cls).apply  # type: ignore[misc]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        return super().apply(*args) if _transforms() or not _plain(args) else cls._apply(*args)


def _unseen(args: tuple[Any, ...]) -> bool:
    """Whether nobody has to be told of a call on ``args``: no compiler, mode, transform, tracer or profiler, nor a
    tensor that is more than one."""
    if _is_compiling() or _modes() or _transforms() or _tracing() is not None or _is_profiled():
        return False
    return _plain(args)


def _plain(args: tuple[Any, ...]) -> bool:
    """Whether every tensor is PyTorch's own, none was left over by a transform of torch.func, and none is stored
    negated, as the imaginary part of a conjugate is."""
    for each in args:
        kind = type(each)
        # (What a transform wraps is no longer a parameter.)
        if kind is Parameter:
            if _is_negated(each):
                return False
        elif kind is Tensor:
            if _is_wrapped(each) or _is_negated(each):
                return False
        elif kind not in _VALUES and isinstance(each, Tensor):
            return False
    return True
