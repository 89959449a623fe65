"""Swaps a model's convolution layers and pools for fastconv's, fuses batch norms, and back, and says what was left.

A layer is swapped by a change of its ``__class__``: it stays the same object, with its parameters, hooks, names and
everything that refers to it. So is a module that calls a chain of layers (``fastconv.fuse``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from fastconv import nn
from fastconv.fuse import Norm, norms, unfuse
from fastconv.fuse import fuse as fuse_chains
from fastconv.kernels.dispatch import Plan
from fastconv.kernels.layout import packed_taps
from fastconv.nn.patches import patched

if TYPE_CHECKING:
    from fastconv.explain import Run

Model = TypeVar("Model", bound=torch.nn.Module)
Rule = str | type[torch.nn.Module]

_OURS: dict[type, type] = {getattr(torch.nn, name): getattr(nn, name) for name in nn.__all__ if hasattr(torch.nn, name)}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_POOLS = tuple(theirs for theirs in _OURS if theirs.__module__ == "torch.nn.modules.pooling")
_SCRIPTED = {theirs.__name__ for theirs in _OURS if theirs not in _POOLS}
_SCRIPTED_POOLS = {theirs.__name__ for theirs in _POOLS}
# Each with the axes of the weights it is for; None: any.
_FORMATS = {torch.contiguous_format: None, torch.channels_last: 4, torch.channels_last_3d: 5}


_BACKEND = (
    "where a forward does or reads what cannot be compared at each call, its layers are left apart; "
    'torch.compile(backend="fastconv"), which is to come, will capture it with guards'
)


@dataclass(frozen=True)
class Layer:
    """A convolution layer of a model, or a pool.

    ``reason`` says why PyTorch's own op computes it; None: fastconv's kernels do. ``runs``, which ``explain`` fills
    in, hold what runs for each way in which the layer, or the chain that it begins, is called.
    """

    name: str  # "" where the model itself is the layer
    kind: str
    reason: str | None
    runs: tuple[Run, ...] = ()

    @property
    def plans(self) -> tuple[Plan, ...]:
        """What serves each problem that it is called with: forward, then the gradients that are needed."""
        return tuple(plan for run in self.runs for plan in run.plans)


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
        """The chains that are one call each, as in "layer1.0.conv1 + bn1 + relu"."""
        return [norm.chain for norm in self.norms if norm.chain is not None]

    @property
    def unfused(self) -> list[tuple[str, str]]:
        """The name of each batch norm that is in none of them, and why."""
        return [(norm.name, norm.reason or "") for norm in self.norms if norm.chain is None]

    def __str__(self) -> str:
        if not self.layers and not self.pools:
            return "nothing to convert: the model has no convolution layers and no pools"
        rows = [["layer", "kind", "served by", ""]]
        chains = self.chains
        for layer in self.layers:
            chain = chains.get(layer.name)
            reason = layer.reason or (chain.reason if chain else None)
            name = chain.chain if chain else layer.name
            rows.append([name or "(the model)", layer.kind, "PyTorch" if layer.reason else "fastconv", reason or ""])
        for pool in self.pools:
            by = "PyTorch" if pool.reason else "fastconv"
            rows.append([pool.name or "(the model)", pool.kind, by, pool.reason or ""])
        rows += [[norm.name, norm.kind, "PyTorch", norm.reason or ""] for norm in self.norms if norm.chain is None]
        return "\n".join((table(rows), *self.notes, self.summary))

    @property
    def notes(self) -> tuple[str, ...]:
        """What else there is to do."""
        return (_BACKEND,) if any(norm.untraceable for norm in self.norms) else ()

    @property
    def chains(self) -> dict[str, Norm]:
        """The batch norm that is fused into a convolution layer, by the layer's name."""
        return {norm.conv: norm for norm in self.norms if norm.chain and norm.conv is not None}

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


def convert(
    model: Model,
    *,
    fuse: bool = True,
    memory_format: torch.memory_format | None = None,
    include: Rule | Iterable[Rule] | None = None,
    exclude: Rule | Iterable[Rule] | None = None,
) -> Model:
    """Make ``model``'s convolution layers and pools fastconv's, in place, and return it; ``report`` tells which are
    left and why.

    fuse: a convolution whose result only a batch norm reads becomes one call with it, and with the activation and the
    addition behind it, wherever the forward of the module that calls them can be traced. What hooks into one of them,
    replaces or parametrises it later, or patches torch.nn's classes and functions, is seen at each call. False: leave
    chains as they are.

    include, exclude: names as in ``named_modules()``, with wildcards (``"layer4"``, ``"*.conv1"``), and types of
    modules; one or an iterable. Each speaks for the modules below as well; ``exclude`` wins. A shared layer is
    converted once and stays shared; one that has several names is taken by any.

    memory_format: torch.channels_last converts the weights of the replaced 2-d layers, torch.channels_last_3d those of
    3-d ones, torch.contiguous_format all; weights that a lazy layer does not have yet stay out. Of a depthwise layer's,
    which have one input channel, either puts the taps outermost: dense strides that its kernels read as they are.

    Only instances of exactly torch.nn's classes are taken: subclassed, parametrised, scripted and quantised layers,
    those prepared for quantisation, and those with a forward of their own, are left as they are. Raises TypeError and
    ValueError on arguments like none of these, among them a name that no module has.
    """
    if memory_format is not None and memory_format not in _FORMATS:
        known = ", ".join(map(str, _FORMATS))
        raise (ValueError if isinstance(memory_format, torch.memory_format) else TypeError)(
            f"convert: memory_format must be one of {known}, but got {memory_format!r}"
        )
    layers = [layer for _, layer in (*convolutions(model), *pools(model)) if reason_against(layer) is None]
    chosen = _chosen(model, include, exclude)
    for layer in layers:
        if layer not in chosen:
            continue
        layer.__class__ = _OURS.get(type(layer), type(layer))
        weight = layer._parameters.get("weight")
        if memory_format is None or weight is None or is_lazy(weight):
            continue
        if _FORMATS[memory_format] not in (None, weight.dim()):
            continue
        if memory_format is not torch.contiguous_format and weight.shape[1] == 1 != layer.groups:
            weight.data = weight.data.new_empty_strided(weight.shape, packed_taps(weight.shape)).copy_(weight.data)
        else:
            weight.data = weight.data.contiguous(memory_format=memory_format)
    if fuse:
        # A batch norm need not be included, but may be excluded.
        fusible = _chosen(model, None, exclude)
        fuse_chains(model, lambda conv, norm: type(conv) in _THEIRS and conv in chosen and norm in fusible)
    return model


def revert(model: Model) -> Model:
    """Make fastconv's layers torch.nn's again and take chains apart, in place, and return ``model``.

    Weights keep their memory format. Layers subclassed or parametrised since stay as they are.
    """
    for _, layer in (*convolutions(model), *pools(model)):
        layer.__class__ = _THEIRS.get(type(layer), type(layer))
    unfuse(model)
    return model


def report(model: torch.nn.Module) -> Report:
    """Which convolution layers and pools of ``model`` are fastconv's and which batch norms are fused; which are not,
    and why.

    Each once, by its first name.
    """
    return Report(_layers(convolutions(model)), tuple(norms(model)), pools=_layers(pools(model)))


def _layers(found: Iterable[tuple[str, torch.nn.Module]]) -> tuple[Layer, ...]:
    return tuple(
        Layer(
            name,
            kind(layer),
            reason_against(layer) or ("not converted" if type(layer) in _OURS else patched(type(layer))),
        )
        for name, layer in found
    )


def convolutions(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The layers of ``model`` that are convolutions, whoever computes them."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected a torch.nn.Module, but got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd) or _quantised(module) or kind(module) in _SCRIPTED:
            yield name, module


def pools(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The layers of ``model`` that are pools of torch.nn's that fastconv has too, whoever computes them."""
    for name, module in model.named_modules():
        if isinstance(module, _POOLS) or kind(module) in _SCRIPTED_POOLS:
            yield name, module


def is_converted(layer: torch.nn.Module) -> bool:
    """Whether it is one of fastconv's layers."""
    return isinstance(layer, tuple(_THEIRS))


def kind(layer: torch.nn.Module) -> str:
    """The name of a layer's class; of a scripted or traced one, of the class it was made from."""
    return getattr(layer, "original_name", None) or type(layer).__name__


def reason_against(layer: torch.nn.Module) -> str | None:
    """Why ``convert`` leaves a convolution layer or a pool alone; None for what is fastconv's or can become so."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "scripted"
    if _quantised(layer):
        return "quantised"
    if is_converted(layer):
        return None
    if is_parametrized(layer):
        return f"parametrised: {', '.join(layer.get_submodule('parametrizations')._modules)}"
    if type(layer) not in _OURS:
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
    """Rows of as many cells each, as aligned text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _quantised(module: torch.nn.Module) -> bool:
    """Whether it is one of ``torch.ao.nn``'s convolutions, told by name, so that the package is not imported."""
    return any(
        base.__module__.startswith("torch.ao.nn.") and "conv" in base.__module__ for base in type(module).__mro__
    )


def _chosen(
    model: torch.nn.Module, include: Rule | Iterable[Rule] | None, exclude: Rule | Iterable[Rule] | None
) -> set[torch.nn.Module]:
    """The modules that ``include`` and ``exclude`` leave to be converted."""
    everything = set(model.modules())
    chosen = everything if include is None else _named("include", include, model)
    return chosen if exclude is None else chosen - _named("exclude", exclude, model)


def _named(argument: str, rules: Rule | Iterable[Rule], model: torch.nn.Module) -> set[torch.nn.Module]:
    """The modules that one of ``rules`` names, and those below."""
    if isinstance(rules, str | type) or not isinstance(rules, Iterable):
        rules = (rules,)
    named: set[torch.nn.Module] = set()
    for rule in rules:
        if isinstance(rule, str):
            found = [m for name, m in model.named_modules(remove_duplicate=False) if fnmatchcase(name, rule)]
            if not found:
                raise ValueError(f"convert: {argument}={rule!r} names no module of the model")
        elif isinstance(rule, type) and issubclass(rule, torch.nn.Module):
            found = [m for m in model.modules() if isinstance(m, rule)]
        else:
            raise TypeError(f"convert: {argument} takes names and types of modules, but got {rule!r}")
        for module in found:
            named.update(module.modules())
    return named
