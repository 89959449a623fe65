"""Makes tools that know only torch.nn's own classes raise on fastconv's layers, which they would silently pass over."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


def _refuse(tool: str) -> NoReturn:
    raise RuntimeError(f"{tool} knows torch.nn's layers, not fastconv's: call fastconv.revert(model) first")


class _Config:
    """The attribute that torch.ao.quantization sets on each layer before it looks for the classes that it replaces.

    None, for a layer that stays as it is, may be set. What was set before the layer was converted may be read.
    """

    def __get__(self, layer: Any, owner: type) -> Any:
        if layer is None or "qconfig" not in vars(layer):
            raise AttributeError("qconfig")
        return vars(layer)["qconfig"]

    def __set__(self, layer: Any, value: Any) -> None:
        if value is not None:
            _refuse("torch.ao.quantization")
        vars(layer)["qconfig"] = value

    def __delete__(self, layer: Any) -> None:
        del vars(layer)["qconfig"]


def _prepare_scriptable(layer: Any) -> NoReturn:
    _refuse("torch.jit.script")


def _register_buffer(layer: Any, name: str, *args: Any, **kwargs: Any) -> None:
    # thop sets it before it looks up the layer's class in its table.
    if name == "total_ops":
        _refuse("thop")
    torch.nn.Module.register_buffer(layer, name, *args, **kwargs)


def refuse_tracer(x: Any) -> None:
    """Raise RuntimeError if a layer is called with what torch.ao.quantization traces a model with."""
    if any(kind.__module__.startswith("torch.ao.quantization.") for kind in type(getattr(x, "tracer", None)).__mro__):
        _refuse("torch.ao.quantization")


def exact(*layers: Any) -> None:
    """Let torch.jit.script, before it compiles any part of a model, and thop raise on the classes ``layers``."""
    for layer in layers:
        layer.__prepare_scriptable__ = _prepare_scriptable
        layer.register_buffer = _register_buffer


def unquantised(*layers: Any) -> None:
    """Let torch.ao.quantization raise on the classes ``layers``."""
    for layer in layers:
        layer.qconfig = _Config()
