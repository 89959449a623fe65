"""Which activation a user means: by name, by a module of torch.nn, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastconv.kernels.epilogue import ACTIVATIONS

Act = str | nn.Module | None
# A name of ACTIVATIONS, its two parameters, and PReLU's weight.
Resolved = tuple[str, float, float, Tensor | None]

_NAMES: dict[str, Resolved] = {
    **{name: (name, 0.0, 0.0, None) for name in ACTIVATIONS if name != "prelu"},
    "hardtanh": ("hardtanh", -1.0, 1.0, None),
    "relu6": ("hardtanh", 0.0, 6.0, None),
    "leaky_relu": ("leaky_relu", 0.01, 0.0, None),
    "elu": ("elu", 1.0, 0.0, None),
    "softplus": ("softplus", 1.0, 20.0, None),
}
_MODULES: dict[type[nn.Module], Callable[[Any], Resolved]] = {
    nn.Identity: lambda m: ("identity", 0.0, 0.0, None),
    nn.ReLU: lambda m: ("relu", 0.0, 0.0, None),
    nn.ReLU6: lambda m: ("hardtanh", 0.0, 6.0, None),
    nn.Hardtanh: lambda m: ("hardtanh", float(m.min_val), float(m.max_val), None),
    nn.LeakyReLU: lambda m: ("leaky_relu", float(m.negative_slope), 0.0, None),
    nn.PReLU: lambda m: ("prelu", 0.0, 0.0, m.weight),
    nn.ELU: lambda m: ("elu", float(m.alpha), 0.0, None),
    nn.SiLU: lambda m: ("silu", 0.0, 0.0, None),
    nn.Hardswish: lambda m: ("hardswish", 0.0, 0.0, None),
    nn.Hardsigmoid: lambda m: ("hardsigmoid", 0.0, 0.0, None),
    nn.Sigmoid: lambda m: ("sigmoid", 0.0, 0.0, None),
    nn.Tanh: lambda m: ("tanh", 0.0, 0.0, None),
    nn.GELU: lambda m: ("gelu" if m.approximate == "none" else "gelu_tanh", 0.0, 0.0, None),
    nn.Softplus: lambda m: ("softplus", float(m.beta), float(m.threshold), None),
    nn.Mish: lambda m: ("mish", 0.0, 0.0, None),
}


def has_fused_form(act: Act) -> bool:
    """Whether a kernel's epilogue can apply ``act``."""
    return act is None or (act in _NAMES if isinstance(act, str) else is_activation(type(act)))


def is_activation(kind: type[nn.Module]) -> bool:
    """Whether modules of this class are activations with a fused form."""
    return kind in _MODULES


def let_be(kind: type[nn.Module], name: str) -> None:
    """Make a class of somebody's the activation ``name``."""
    _MODULES[kind] = lambda m: _NAMES[name]


def activation_of(act: Act) -> Resolved:
    """What the kernels need to know of ``act``. Raises ValueError where it has no fused form."""
    if act is None:
        return _NAMES["identity"]
    if isinstance(act, str):
        if act in _NAMES:
            return _NAMES[act]
    elif type(act) in _MODULES:
        return _MODULES[type(act)](act)
    raise ValueError(
        f"activation {act!r} has no fused form; these have: {', '.join(sorted(_NAMES))}, and torch.nn's "
        f"{', '.join(sorted(module.__name__ for module in _MODULES))}"
    )
