"""What fastconv's operators share: their definition in PyTorch's library, the short way past it, and the fallback.

torch.compile, torch.export, dispatch modes and the profiler see the operators ``torch.ops.fastconv.*``, which choose
kernel and tile inside, so that sizes never become guards. If nobody looks, a call on plain tensors goes straight to the
operator's implementation: PyTorch's dispatcher takes several times as long as choosing a launch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastconv.kernels.launch.launch import Failed, Uncovered
from fastconv.kernels.ops.call import Slower
from fastconv.kernels.tiles import autotuned
from fastconv.settings import Values, settings
from fastconv.traffic import implementations

log = logging.getLogger("fastconv")
_library = torch.library.Library("fastconv", "DEF")
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_VALUES = frozenset({type(None), int, bool, float, str, tuple, torch.Size})
# Looked up once, since every call asks them.
_is_compiling, _is_profiled = torch.compiler.is_compiling, torch.autograd._profiler_enabled
_modes, _transforms, _tracing = (
    torch._C._len_torch_dispatch_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
)
_is_wrapped, _is_negated = torch._C._functorch.is_functorch_wrapped_tensor, Tensor.is_neg


def operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define ``fastconv::<schema>`` for every device, and return the function that calls it."""
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
    """torch.autograd.Function, applied without a search for transforms of torch.func if there are none."""

    _apply: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        cls._apply = super(torch.autograd.Function, cls).apply  # type: ignore[misc]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        return super().apply(*args) if _transforms() or not _plain(args) else cls._apply(*args)


def tracked(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _in_force() -> Values:
    """The settings of the calling thread, which in backward is autograd's."""
    return settings.values_in_backward if torch._C._current_graph_task_id() != -1 else settings.values


def _user_policy() -> tuple[str, str, str]:
    return _in_force()[1:]


autotuned.set_user_policy(_user_policy)


@lru_cache(maxsize=1024)
def _say_once(name: str, reason: str) -> None:
    log.info("%s runs PyTorch's own op: %s", name, reason)


@lru_cache(maxsize=1024)
def _warn_once(why: str) -> None:
    log.warning("PyTorch's own ops run where kernels cannot be launched: %s", why)


def fall_back(name: str, reason: Exception) -> None:
    """Make a call that no kernel serves visible: an error under ``settings(strict=True)``, else one line of the log, a
    warning if a kernel should have served it.

    If PyTorch's op was measured faster, ``settings(prefer="fastest")`` asks for it, and the line is all.
    """
    if _in_force().strict and not isinstance(reason, Slower):
        raise RuntimeError(f"fastconv.{name} has no kernel for this call ({reason}) and settings.strict is on")
    if isinstance(reason, Failed):
        _warn_once(reason.why)
    _say_once(name, str(reason))


def call_kernel(kernels: ModuleType, reference: ModuleType, name: str, *args: Any) -> Any:
    """What the function of this name gives in ``kernels``, or in ``reference`` if no kernel serves the call."""
    try:
        return getattr(kernels, name)(*args)
    except Uncovered as reason:
        fall_back(name, reason)
    return getattr(reference, name)(*args)


def _unseen(args: tuple[Any, ...]) -> bool:
    """Whether nobody has to see a call on ``args``: no compiler, mode, transform, tracer or profiler, no tensor of a
    class that does more."""
    if _is_compiling() or _modes() or _transforms() or _tracing() is not None or _is_profiled():
        return False
    return _plain(args)


def _plain(args: tuple[Any, ...]) -> bool:
    """Whether every tensor is of PyTorch's own class, none is left over from a transform of torch.func, and none is
    stored negated, as the imaginary part of a conjugate is."""
    for each in args:
        kind = type(each)
        # A parameter that a transform wraps is none any more.
        if kind is Parameter:
            if _is_negated(each):
                return False
        elif kind is Tensor:
            if _is_wrapped(each) or _is_negated(each):
                return False
        elif kind not in _VALUES and isinstance(each, Tensor):
            return False
    return True
