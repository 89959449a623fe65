"""The activations that kernels apply, as users have them: names, torch.nn's modules, torch's functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Act = str | nn.Module | None


class FusedForm(NamedTuple):
    """An activation as the kernels have it."""

    name: str  # in fastconv.kernels.jit.activations.ACTIVATIONS
    a: float = 0.0
    b: float = 0.0
    slope: Tensor | None = None  # PReLU's weight


class NamedActivation(NamedTuple):
    """An activation as users have it."""

    module: Callable[[], nn.Module]
    functions: tuple[Any, ...] = ()  # torch's functions, called with the module's arguments, and tensor methods' names
    form: Callable[[Any], FusedForm] | None = None  # the module's form; None: that of this name, without numbers
    timm: str | None = None  # the name of timm's class, which takes ``inplace``


def _gelu(module: nn.GELU) -> FusedForm:
    return FusedForm("gelu" if module.approximate == "none" else "gelu_tanh")


def _hardtanh(module: nn.Hardtanh) -> FusedForm:
    return FusedForm("hardtanh", float(module.min_val), float(module.max_val))


NAMED = {
    "elu": NamedActivation(nn.ELU, (F.elu, F.elu_), lambda m: FusedForm("elu", float(m.alpha))),
    "gelu": NamedActivation(nn.GELU, (F.gelu,), _gelu, "GELU"),
    "gelu_tanh": NamedActivation(partial(nn.GELU, approximate="tanh"), (), _gelu, "GELUTanh"),
    "hardsigmoid": NamedActivation(nn.Hardsigmoid, (F.hardsigmoid,)),
    "hardswish": NamedActivation(nn.Hardswish, (F.hardswish,)),
    "hardtanh": NamedActivation(nn.Hardtanh, (F.hardtanh, F.hardtanh_), _hardtanh),
    "identity": NamedActivation(nn.Identity),
    "leaky_relu": NamedActivation(
        nn.LeakyReLU, (F.leaky_relu, F.leaky_relu_), lambda m: FusedForm("leaky_relu", float(m.negative_slope))
    ),
    "mish": NamedActivation(nn.Mish, (F.mish,)),
    "relu": NamedActivation(nn.ReLU, (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")),
    "relu6": NamedActivation(nn.ReLU6, (F.relu6,), _hardtanh),
    "sigmoid": NamedActivation(
        nn.Sigmoid, (F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), timm="Sigmoid"
    ),
    "silu": NamedActivation(nn.SiLU, (F.silu,)),
    "softplus": NamedActivation(
        nn.Softplus, (F.softplus,), lambda m: FusedForm("softplus", float(m.beta), float(m.threshold))
    ),
    "tanh": NamedActivation(nn.Tanh, (F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), timm="Tanh"),
}


def _form_of(name: str) -> Callable[[Any], FusedForm]:
    return NAMED[name].form or (lambda _: FusedForm(name))


# Each function with the module that does the same.
MODULES = {function: row.module for row in NAMED.values() for function in row.functions}
_NAMED_FORMS = {name: _form_of(name)(row.module()) for name, row in NAMED.items()}
_FORMS = {type(row.module()): _form_of(name) for name, row in NAMED.items()}
_FORMS[nn.PReLU] = lambda m: FusedForm("prelu", slope=m.weight)
_TIMM = {row.timm: name for name, row in NAMED.items() if row.timm}


def has_fused_form(act: Act) -> bool:
    """Whether a kernel's epilogue can apply ``act``."""
    return act is None or (act in NAMED if isinstance(act, str) else is_activation(type(act)))


def is_activation(kind: type[nn.Module]) -> bool:
    """Whether modules of this class are activations with a fused form."""
    return kind in _FORMS


def register_activation(kind: type[nn.Module]) -> None:
    """Let a class of timm's be the activation of its name, if that has a fused form."""
    if kind.__name__ in _TIMM:
        form = _NAMED_FORMS[_TIMM[kind.__name__]]
        _FORMS[kind] = lambda m: form


def activation_of(act: Act) -> FusedForm:
    """The fused form of ``act``; None is the identity. Raises ValueError if it has none."""
    if act is None:
        return FusedForm("identity")
    if isinstance(act, str):
        if act in NAMED:
            return _NAMED_FORMS[act]
    elif type(act) in _FORMS:
        return _FORMS[type(act)](act)
    raise ValueError(
        f"activation {act!r} has no fused form; these have: {', '.join(NAMED)}, and torch.nn's "
        f"{', '.join(sorted(module.__name__ for module in _FORMS))}"
    )
