"""Swaps a model's convolution layers and pools for fastconv's, fuses batch norms, and back.

A layer is swapped by a change of its ``__class__``: it stays the same object, with its parameters, hooks, names and
everything that refers to it. So is a module that calls layers that are fused (``fastconv.fuse``).
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch.nn.parameter import is_lazy

from fastconv.fuse import fuse as fuse_layers
from fastconv.fuse import unfuse
from fastconv.kernels.problem.layout import taps_outermost
from fastconv.report import OURS, THEIRS, convolutions, pools, why_not_converted

Model = TypeVar("Model", bound=torch.nn.Module)
Rule = str | type[torch.nn.Module]

# With the axes of the weights that each is for; None: any.
_FORMATS = {torch.contiguous_format: None, torch.channels_last: 4, torch.channels_last_3d: 5}


def convert(
    model: Model,
    *,
    fuse: bool = True,
    memory_format: torch.memory_format | None = None,
    include: Rule | Iterable[Rule] | None = None,
    exclude: Rule | Iterable[Rule] | None = None,
) -> Model:
    """Make ``model``'s convolution layers and pools fastconv's, in place, and return it; ``report`` tells which are
    not, and why.

    fuse: a convolution whose result only a batch norm reads becomes one call with it, and with the activation and the
    addition behind it, if the forward of the module that calls them can be traced. What hooks into one of them,
    replaces or parametrises it later, or patches torch.nn's classes and functions, is seen at each call. False: fuse
    nothing.

    include, exclude: names as in ``named_modules()``, with wildcards (``"layer4"``, ``"*.conv1"``), and types of
    modules; one or an iterable. Each speaks for the modules below as well; ``exclude`` wins. A shared layer is
    converted once and stays shared; one that has several names is taken by any.

    memory_format: torch.channels_last converts the weights of the replaced 2-d layers, torch.channels_last_3d those of
    3-d ones, torch.contiguous_format all; weights that a lazy layer does not have yet stay out. A depthwise layer's
    weights, which have one input channel, get the taps outermost: dense strides that its kernels read as they are.

    Only instances of exactly torch.nn's classes are taken: subclassed, parametrised, scripted and quantised layers,
    those prepared for quantisation, and those with a forward of their own, are left as they are. Raises TypeError on
    an argument of another type, and ValueError on another memory format and on a name that no module has.
    """
    if memory_format is not None and memory_format not in _FORMATS:
        known = ", ".join(map(str, _FORMATS))
        raise (ValueError if isinstance(memory_format, torch.memory_format) else TypeError)(
            f"convert: memory_format must be one of {known}, but got {memory_format!r}"
        )
    layers = [layer for _, layer in (*convolutions(model), *pools(model)) if why_not_converted(layer) is None]
    chosen = _chosen(model, include, exclude)
    for layer in layers:
        if layer not in chosen:
            continue
        layer.__class__ = OURS.get(type(layer), type(layer))
        weight = layer._parameters.get("weight")
        if memory_format is None or weight is None or is_lazy(weight):
            continue
        if _FORMATS[memory_format] not in (None, weight.dim()):
            continue
        if memory_format is not torch.contiguous_format and weight.shape[1] == 1 != layer.groups:
            weight.data = weight.data.new_empty_strided(weight.shape, taps_outermost(weight.shape)).copy_(weight.data)
        else:
            weight.data = weight.data.contiguous(memory_format=memory_format)
    if fuse:
        # A batch norm need not be included, but may be excluded.
        may_fuse = _chosen(model, None, exclude)
        fuse_layers(model, lambda conv, norm: type(conv) in THEIRS and conv in chosen and norm in may_fuse)
    return model


def revert(model: Model) -> Model:
    """Make fastconv's layers torch.nn's again and unfuse them, in place, and return ``model``.

    Weights keep their memory format. Layers subclassed or parametrised since stay as they are.
    """
    for _, layer in (*convolutions(model), *pools(model)):
        layer.__class__ = THEIRS.get(type(layer), type(layer))
    unfuse(model)
    return model


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
