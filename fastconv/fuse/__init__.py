"""Finds convolution -> batch norm (-> activation, residual) in a model, and makes each a fused layer: one call.

There is no list of models. If a module's own forward calls a convolution and a batch norm, that forward is traced
(``trace``), with every child a leaf, and searched (``search``). A fused layer's calls become one of ``run_fused`` with
the same children, and the instance's ``__class__`` a subclass of its class with that forward (``rewrite``). Parameters,
names and children stay. What the forward decided by is compared at each call (``guards``); if it is not what it was,
and for arguments of other kinds, the class's own forward runs.

A fused layer whose result is its module's may continue in the module that calls that one: a block adds its input to
what a Sequential gives. That call becomes one of ``run_continued``, which hands the steps on to the child's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fastconv.fuse.fused import FusedLayer
from fastconv.fuse.rewrite import fuse_module, fused_names, why_not_fused
from fastconv.fuse.search import Studies, reach
from fastconv.fuse.stand_ins import class_of, is_librarys
from fastconv.nn.fused import ConvBNAct
from fastconv.nn.fused_call import steps_fusible, why_not_bypassed


@dataclass(frozen=True)
class Norm:
    """A batch norm of a model: the fused layer that computes it, or why it is computed on its own."""

    name: str
    kind: str
    fused: str | None = None  # "layer1.0.conv1 + bn1 + relu"
    conv: str | None = None  # the name of the convolution layer in it
    reason: str | None = None  # if fused: why the layer does not take the next call, an activation or a sum
    untraceable: bool = False  # the reason is what the forward that calls it does


def fuse(model: torch.nn.Module, wanted: Callable[[torch.nn.Module, torch.nn.Module], bool]) -> None:
    """Fuse, in place, those layers of ``model`` whose convolution and batch norm are ``wanted``."""
    studies = Studies()
    heads = {module: set(fused_names(module)) for module in model.modules()}
    for module, study in studies.of(model).items():
        for layer in study.layers:
            links = _links(module, layer, studies)
            conv, norm = _conv_and_norm(links)
            if layer.steps and conv is not None and norm is not None and wanted(conv, norm):
                for part, link in links:
                    heads[part].add(link.head)
    for module, names in heads.items():
        if names and not isinstance(module, ConvBNAct):
            fuse_module(module, studies[module], names)


def unfuse(model: torch.nn.Module) -> None:
    """Give every module of ``model`` its own class again."""
    for module in model.modules():
        module.__class__ = class_of(module)


def norms(model: torch.nn.Module) -> Iterator[Norm]:
    """Every batch norm of ``model`` once, as it is computed now."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[torch.nn.Module, Norm] = {}
    studies = Studies(as_fused=True)
    for norm, fused, conv, reason in _findings(studies, model, names):
        if norm not in found or (fused and not found[norm].fused):
            of_conv = None if conv is None else names.get(conv)
            found[norm] = Norm(names[norm], type(norm).__name__, fused, of_conv, reason)
    for norm, reason in _untraceable(studies, model):
        found.setdefault(norm, Norm(names[norm], type(norm).__name__, reason=reason, untraceable=True))
    for module, name in names.items():
        if isinstance(module, _BatchNorm):
            yield found.get(module) or Norm(
                name, type(module).__name__, reason="not called by the module that holds it"
            )


_Link = tuple[torch.nn.Module, FusedLayer]
_Finding = tuple[torch.nn.Module, "str | None", "torch.nn.Module | None", "str | None"]


def _child(module: torch.nn.Module, target: str) -> torch.nn.Module | None:
    """What is at ``target`` under ``module`` now."""
    for name in target.split("."):
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


def _links(module: torch.nn.Module, layer: FusedLayer, studies: Studies) -> list[_Link]:
    """The fused layers that ``layer`` of ``module`` continues and itself, the one with the convolution first, each with
    the module that calls it; none if a module that it continues is another now."""
    if layer.of_conv:
        return [(module, layer)]
    child = _child(module, layer.head)
    end = None if child is None else studies[child].end
    links = [] if child is None or end is None else _links(child, end, studies)
    return [*links, (module, layer)] if links else []


def _steps(links: list[_Link]) -> list[tuple[str, Any]]:
    """What ``links`` do to the convolution's result, with the modules that do it."""
    return [
        (step.kind, _child(module, step.operand) if isinstance(step.operand, str) else step.operand)
        for module, layer in links
        for step in layer.steps
    ]


def _conv_and_norm(links: list[_Link]) -> tuple[torch.nn.Module | None, torch.nn.Module | None]:
    if not links:
        return None, None
    module, layer = links[0]
    return _child(module, layer.head), next((norm for kind, norm in _steps(links) if kind == "norm"), None)


def _findings(studies: Studies, model: torch.nn.Module, names: dict[torch.nn.Module, str]) -> Iterator[_Finding]:
    """Batch norms, maybe several times, with fused layer, convolution and reason, if any; the best known first."""
    # By a module that ends in a fused layer: what continues that.
    continued_by: dict[torch.nn.Module, _Link] = {}
    others: list[_Finding] = []
    found = studies.of(model) | {module: studies[module] for module in names if fused_names(module)}
    changed = {module: why for module in found if (why := why_not_fused(module)) is not None}

    def is_fused(module: torch.nn.Module, layer: FusedLayer) -> bool:
        return module not in changed and (isinstance(module, ConvBNAct) or layer.head in fused_names(module))

    for module, study in found.items():
        for layer in study.layers:
            if not is_fused(module, layer):
                conv, norm = _conv_and_norm(_links(module, layer, studies))
                if isinstance(norm, _BatchNorm) and module in changed:
                    yield norm, None, conv, changed[module]
                elif isinstance(norm, _BatchNorm):
                    others.append((norm, None, conv, _why_not_chosen(conv)))
            elif not layer.of_conv and (child := _child(module, layer.head)) is not None:
                continued_by.setdefault(child, (module, layer))
    for module, study in found.items():
        for layer in study.layers:
            if layer.of_conv and is_fused(module, layer):
                links, hooked = [(module, layer)], None
                while links[-1][1] is studies[links[-1][0]].end and links[-1][0] in continued_by and hooked is None:
                    hooked = why_not_bypassed(links[-1][0])
                    links += [] if hooked else [continued_by[links[-1][0]]]
                yield from _finding(links, hooked, names)
        for target, reason in study.unfused.items():
            if (norm := _child(module, target)) is not None:
                yield norm, None, None, reason
    yield from others


def _untraceable(studies: Studies, model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """Batch norms, each with what the innermost module that might call it does."""
    found = studies.of(model)
    for module in reversed(found):
        for child in reach(module):
            if isinstance(child, _BatchNorm) and (reason := found[module].untraceable) is not None:
                yield child, reason


def _finding(links: list[_Link], hooked: str | None, names: dict[torch.nn.Module, str]) -> Iterator[_Finding]:
    """The batch norm of a fused layer, as its modules are now."""
    conv, norm = _conv_and_norm(links)
    if isinstance(norm, _BatchNorm):
        steps = _steps(links)
        end, reason = steps_fusible(conv, tuple(steps))
        labels = [step.label for _, layer in links for step in layer.steps][:end]
        if all(kind == "skip" for kind, _ in steps[end:]):
            reason = hooked or links[-1][1].ends
        fused = " + ".join([names[conv], *(label for label in labels if label)]) if end and conv is not None else None
        yield norm, fused, conv, reason


def _why_not_chosen(conv: torch.nn.Module | None) -> str:
    if conv is None:
        return "its convolution is gone"
    return "not converted" if is_librarys(type(conv)) else f"its convolution, a {type(conv).__name__}, is not converted"
