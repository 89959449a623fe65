"""What of a model fastconv computes, what PyTorch does, and why: its convolutions, its pools and its batch norms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from fastconv import nn
from fastconv.fuse import Norm, norms
from fastconv.nn.patches import patched

OURS: dict[type, type] = {getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__ if hasattr(torch.nn, name)}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}
_POOLS = tuple(theirs for theirs in OURS if theirs.__module__ == "torch.nn.modules.pooling")
_SCRIPTED = {theirs.__name__ for theirs in OURS if theirs not in _POOLS}
_SCRIPTED_POOLS = {theirs.__name__ for theirs in _POOLS}
_BACKEND = (
    "where a forward does or reads what cannot be compared at each call, its layers are left apart; "
    'torch.compile(backend="fastconv"), which is to come, will capture it with guards'
)


@dataclass(frozen=True)
class Layer:
    """A convolution layer of a model, or a pool."""

    name: str  # "" if the model itself is the layer
    kind: str
    reason: str | None  # why PyTorch's own operator computes it; None: fastconv's kernels do


@dataclass(frozen=True)
class Report:
    """What ``report`` and ``explain`` find; ``str()`` is a table whose last line sums it up."""

    layers: tuple[Layer, ...]
    norms: tuple[Norm, ...] = ()  # the model's batch norms
    pools: tuple[Layer, ...] = field(default=(), kw_only=True)

    @property
    def replaced(self) -> list[str]:
        """The names of the convolution layers that fastconv's kernels compute."""
        return [layer.name for layer in self.layers if layer.reason is None]

    @property
    def left(self) -> list[tuple[str, str]]:
        """The name of each convolution layer that PyTorch's own op computes, and why."""
        return [(layer.name, layer.reason) for layer in self.layers if layer.reason is not None]

    @property
    def fused(self) -> list[str]:
        """The fused layers, as in "layer1.0.conv1 + bn1 + relu"."""
        return [norm.fused for norm in self.norms if norm.fused is not None]

    @property
    def unfused(self) -> list[tuple[str, str]]:
        """The name of each batch norm that is in none, and why."""
        return [(norm.name, norm.reason or "") for norm in self.norms if norm.fused is None]

    def __str__(self) -> str:
        if not self.layers and not self.pools:
            return "nothing to convert: the model has no convolution layers and no pools"
        rows = [["layer", "kind", "served by", ""]]
        fused = self.fused_by_conv
        for layer in self.layers:
            norm = fused.get(layer.name)
            reason = layer.reason or (norm.reason if norm else None)
            name = norm.fused if norm else layer.name
            rows.append([name or "(the model)", layer.kind, "PyTorch" if layer.reason else "fastconv", reason or ""])
        for pool in self.pools:
            by = "PyTorch" if pool.reason else "fastconv"
            rows.append([pool.name or "(the model)", pool.kind, by, pool.reason or ""])
        rows += [[norm.name, norm.kind, "PyTorch", norm.reason or ""] for norm in self.norms if norm.fused is None]
        return "\n".join((table(rows), *self.notes, self.summary))

    @property
    def notes(self) -> tuple[str, ...]:
        """What else there is to do."""
        return (_BACKEND,) if any(norm.untraceable for norm in self.norms) else ()

    @property
    def fused_by_conv(self) -> dict[str, Norm]:
        """The batch norm that is fused into a convolution layer, by the layer's name."""
        return {norm.conv: norm for norm in self.norms if norm.fused and norm.conv is not None}

    @property
    def summary(self) -> str:
        counted = []
        if self.layers or not self.pools:
            counted.append(f"{len(self.replaced)} of {len(self.layers)} convolution layers")
        if self.pools:
            counted.append(f"{sum(pool.reason is None for pool in self.pools)} of {len(self.pools)} pools")
        summary = f"{' and '.join(counted)} on fastconv's kernels"
        if self.norms and self.layers:
            summary += f", {len(self.fused)} of {len(self.norms)} batch norms fused into them"
        return summary


def report(model: torch.nn.Module) -> Report:
    """Which convolution layers and pools of ``model`` are fastconv's, which batch norms are fused, and why not.

    Each is listed once, by its first name. Raises TypeError if ``model`` is no torch.nn.Module.
    """
    return Report(_layers(convolutions(model)), tuple(norms(model)), pools=_layers(pools(model)))


def _layers(found: Iterable[tuple[str, torch.nn.Module]]) -> tuple[Layer, ...]:
    return tuple(
        Layer(
            name,
            kind(layer),
            why_not_converted(layer) or ("not converted" if type(layer) in OURS else patched(type(layer))),
        )
        for name, layer in found
    )


def convolutions(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The convolution layers of ``model``, whoever computes them."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, but got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) or _quantised(module) or kind(module) in _SCRIPTED:
            yield name, module


def pools(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The pools of ``model`` that fastconv has too, whoever computes them."""
    for name, module in model.named_modules():
        if isinstance(module, _POOLS) or kind(module) in _SCRIPTED_POOLS:
            yield name, module


def is_converted(layer: torch.nn.Module) -> bool:
    """Whether ``layer`` is fastconv's."""
    return isinstance(layer, tuple(THEIRS))


def kind(layer: torch.nn.Module) -> str:
    """The name of a layer's class; a scripted or traced layer has that of the class it was made from."""
    return getattr(layer, "original_name", None) or type(layer).__name__


def why_not_converted(layer: torch.nn.Module) -> str | None:
    """Why ``convert`` leaves a convolution layer or a pool as it is; None: it is fastconv's, or can become so."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "scripted"
    if _quantised(layer):
        return "quantised"
    if is_converted(layer):
        return None
    if is_parametrized(layer):
        return f"parametrised: {', '.join(layer.get_submodule('parametrizations')._modules)}"
    if type(layer) not in OURS:
        return f"a class of its own: {type(layer).__module__}.{type(layer).__qualname__}"
    if {"forward", "_conv_forward"} & set(vars(layer)):
        return "a forward of its own"
    if vars(layer).get("qconfig") is not None:
        return "prepared for quantisation"
    # What the older weight_norm, spectral_norm and prune leave behind: hooks that set a plain attribute.
    weights = ("weight", "bias") if isinstance(layer, _ConvNd) else ()
    computed = [name for name in weights if name not in layer._parameters]
    if computed:
        hooks = ", ".join(type(hook).__name__ for hook in layer._forward_pre_hooks.values())
        return f"parametrised: {', '.join(computed)}, set before each forward by {hooks}"
    return None


def table(rows: list[list[str]]) -> str:
    """Rows of equally many cells as aligned text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _quantised(module: torch.nn.Module) -> bool:
    """Whether ``module`` is a convolution of ``torch.ao.nn``, told by name so that the package is not imported."""
    return any(
        base.__module__.startswith("torch.ao.nn.") and "conv" in base.__module__ for base in type(module).__mro__
    )
