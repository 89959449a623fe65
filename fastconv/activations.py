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

    name: str  # in fastconv.kernels.epilogue.ACTIVATIONS
    a: float = 0.0
    b: float = 0.0
    slope: Tensor | None = None  # PReLU's weight


class Activation(NamedTuple):
    """One activation as users have it."""

    module: Callable[[], nn.Module]
    form: Callable[[Any], FusedForm]  # of one of these modules
    functions: tuple[Any, ...] = ()  # torch's with the module's arguments, and names of tensors' methods
    timm: str | None = None  # timm's class, which takes ``inplace``


NAMED: dict[str, Activation] = {
    "elu": Activation(nn.ELU, lambda m: FusedForm("elu", float(m.alpha)), (F.elu, F.elu_)),
    "gelu": Activation(nn.GELU, lambda m: _gelu(m), (F.gelu,), "GELU"),
    "gelu_tanh": Activation(partial(nn.GELU, approximate="tanh"), lambda m: _gelu(m), (), "GELUTanh"),
    "hardsigmoid": Activation(nn.Hardsigmoid, lambda m: FusedForm("hardsigmoid"), (F.hardsigmoid,)),
    "hardswish": Activation(nn.Hardswish, lambda m: FusedForm("hardswish"), (F.hardswish,)),
    "hardtanh": Activation(nn.Hardtanh, lambda m: _hardtanh(m), (F.hardtanh, F.hardtanh_)),
    "identity": Activation(nn.Identity, lambda m: FusedForm("identity")),
    "leaky_relu": Activation(
        nn.LeakyReLU, lambda m: FusedForm("leaky_relu", float(m.negative_slope)), (F.leaky_relu, F.leaky_relu_)
    ),
    "mish": Activation(nn.Mish, lambda m: FusedForm("mish"), (F.mish,)),
    "relu": Activation(
        nn.ReLU, lambda m: FusedForm("relu"), (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
    ),
    "relu6": Activation(nn.ReLU6, lambda m: _hardtanh(m), (F.relu6,)),
    "sigmoid": Activation(
        nn.Sigmoid,
        lambda m: FusedForm("sigmoid"),
        (F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"),
        "Sigmoid",
    ),
    "silu": Activation(nn.SiLU, lambda m: FusedForm("silu"), (F.silu,)),
    "softplus": Activation(
        nn.Softplus, lambda m: FusedForm("softplus", float(m.beta), float(m.threshold)), (F.softplus,)
    ),
    "tanh": Activation(
        nn.Tanh, lambda m: FusedForm("tanh"), (F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"), "Tanh"
    ),
}


def _gelu(module: nn.GELU) -> FusedForm:
    return FusedForm("gelu" if module.approximate == "none" else "gelu_tanh")


def _hardtanh(module: nn.Hardtanh) -> FusedForm:
    return FusedForm("hardtanh", float(module.min_val), float(module.max_val))


# Each function with the module that does the same.
MODULES = {function: row.module for row in NAMED.values() for function in row.functions}
_NAMED_FORMS = {name: row.form(row.module()) for name, row in NAMED.items()}
_FORMS = {type(row.module()): row.form for row in NAMED.values()}
_FORMS[nn.PReLU] = lambda m: FusedForm("prelu", slope=m.weight)
_TIMM = {row.timm: name for name, row in NAMED.items() if row.timm}


def has_fused_form(act: Act) -> bool:
    """Whether a kernel's epilogue can apply ``act``."""
    return act is None or (act in NAMED if isinstance(act, str) else is_activation(type(act)))


def is_activation(kind: type[nn.Module]) -> bool:
    """Whether modules of this class are activations with a fused form."""
    return kind in _FORMS


def register_activation(kind: type[nn.Module]) -> None:
    """Let a class of timm's be the activation that it is called after, if that has a fused form."""
    if kind.__name__ in _TIMM:
        form = _NAMED_FORMS[_TIMM[kind.__name__]]
        _FORMS[kind] = lambda m: form


def activation_of(act: Act) -> FusedForm:
    """How the kernels have ``act``; None is the identity. Raises ValueError on one without a fused form."""
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
