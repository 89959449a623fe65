"""Finds chains of convolution -> batch norm (-> activation, residual) in a model, and makes each one call.

No list of models: where a module's own forward calls a convolution and a batch norm, that forward alone is traced
(``trace``), with every child a leaf. The chain's calls become one of ``run_chain`` with the same children, and the
instance's ``__class__`` a subclass of its class with that forward. Parameters, names and children stay. What the
forward decided by is compared at each call (``guards``); where it is not what it was, and for arguments of other
kinds, the class's own forward runs.

A chain whose result is its module's may go on in the module that calls it, as where a block adds its input to what a
Sequential gives: that call becomes one of ``run_open``, which hands the steps on to the child's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fastconv.fuse.chains import Chain, Studies, reach
from fastconv.fuse.rewrite import broken, fuse_module, fused_names
from fastconv.fuse.stand_ins import class_of
from fastconv.nn.fused import ConvBNAct, fusible, interference


@dataclass(frozen=True)
class Norm:
    """A batch norm of a model: the chain that computes it, or why it is computed on its own."""

    name: str
    kind: str
    chain: str | None = None  # "layer1.0.conv1 + bn1 + relu"
    conv: str | None = None  # the name of the convolution layer in it
    reason: str | None = None  # with a chain: why it does not take the next call, if that is an activation or a sum
    untraceable: bool = False  # whether the reason is what the forward that calls it does


def fuse(model: torch.nn.Module, wanted: Callable[[torch.nn.Module, torch.nn.Module], bool]) -> None:
    """Fuse, in place, the chains of ``model`` whose convolution and batch norm are ``wanted``."""
    studies = Studies()
    heads = {module: set(fused_names(module)) for module in model.modules()}
    for module, study in studies.of(model).items():
        for chain in study.chains:
            links = _links(module, chain, studies)
            conv, norm = _conv_and_norm(links)
            if chain.steps and conv is not None and norm is not None and wanted(conv, norm):
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
    """Every batch norm of ``model``, once, with what is true of it now."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[torch.nn.Module, Norm] = {}
    studies = Studies(as_fused=True)
    for norm, chain, conv, reason in _findings(studies, model, names):
        if norm not in found or (chain and not found[norm].chain):
            of_conv = None if conv is None else names.get(conv)
            found[norm] = Norm(names[norm], type(norm).__name__, chain, of_conv, reason)
    for norm, reason in _untraceable(studies, model):
        found.setdefault(norm, Norm(names[norm], type(norm).__name__, reason=reason, untraceable=True))
    for module, name in names.items():
        if isinstance(module, _BatchNorm):
            yield found.get(module) or Norm(
                name, type(module).__name__, reason="not called by the module that holds it"
            )


_Link = tuple[torch.nn.Module, Chain]
_Finding = tuple[torch.nn.Module, "str | None", "torch.nn.Module | None", "str | None"]


def _child(module: torch.nn.Module, target: str) -> torch.nn.Module | None:
    """What is at ``target`` under ``module`` now."""
    for name in target.split("."):
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


def _links(module: torch.nn.Module, chain: Chain, studies: Studies) -> list[_Link]:
    """The chains that make up ``chain`` of ``module``, from a convolution's on, each with the module that calls it;
    none where the module that it goes on from is another now."""
    if chain.of_conv:
        return [(module, chain)]
    child = _child(module, chain.head)
    end = None if child is None else studies[child].end
    links = [] if child is None or end is None else _links(child, end, studies)
    return [*links, (module, chain)] if links else []


def _steps(links: list[_Link]) -> list[tuple[str, Any]]:
    """What they do to the convolution's result, with the modules that do it."""
    return [
        (step.kind, _child(module, step.operand) if isinstance(step.operand, str) else step.operand)
        for module, chain in links
        for step in chain.steps
    ]


def _conv_and_norm(links: list[_Link]) -> tuple[torch.nn.Module | None, torch.nn.Module | None]:
    if not links:
        return None, None
    module, chain = links[0]
    return _child(module, chain.head), next((norm for kind, norm in _steps(links) if kind == "norm"), None)


def _findings(studies: Studies, model: torch.nn.Module, names: dict[torch.nn.Module, str]) -> Iterator[_Finding]:
    """Batch norms, more than once perhaps, with chain and convolution, if any, and the reason; the best known first."""
    # What goes on with the chain at the end of a module.
    goes_on: dict[torch.nn.Module, _Link] = {}
    unfused: list[_Finding] = []
    found = studies.of(model) | {module: studies[module] for module in names if fused_names(module)}
    changed = {module: why for module in found if (why := broken(module)) is not None}

    def is_fused(module: torch.nn.Module, chain: Chain) -> bool:
        return module not in changed and (isinstance(module, ConvBNAct) or chain.head in fused_names(module))

    for module, study in found.items():
        for chain in study.chains:
            if not is_fused(module, chain):
                conv, norm = _conv_and_norm(_links(module, chain, studies))
                if isinstance(norm, _BatchNorm) and module in changed:
                    yield norm, None, conv, changed[module]
                elif isinstance(norm, _BatchNorm):
                    unfused.append((norm, None, conv, _against(conv)))
            elif not chain.of_conv and (child := _child(module, chain.head)) is not None:
                goes_on.setdefault(child, (module, chain))
    for module, study in found.items():
        for chain in study.chains:
            if chain.of_conv and is_fused(module, chain):
                links, hooked = [(module, chain)], None
                while links[-1][1] is studies[links[-1][0]].end and links[-1][0] in goes_on and hooked is None:
                    hooked = interference(links[-1][0])
                    links += [] if hooked else [goes_on[links[-1][0]]]
                yield from _finding(links, hooked, names)
        for target, reason in study.apart.items():
            if (norm := _child(module, target)) is not None:
                yield norm, None, None, reason
    yield from unfused


def _untraceable(studies: Studies, model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """Batch norms, each with what the innermost module does that might have called it."""
    found = studies.of(model)
    for module in reversed(found):
        for child in reach(module):
            if isinstance(child, _BatchNorm) and (reason := found[module].untraceable) is not None:
                yield child, reason


def _finding(links: list[_Link], hooked: str | None, names: dict[torch.nn.Module, str]) -> Iterator[_Finding]:
    """The batch norm of a chain that is fused, as its modules are now."""
    conv, norm = _conv_and_norm(links)
    if isinstance(norm, _BatchNorm):
        steps = _steps(links)
        end, reason = fusible(conv, tuple(steps))
        labels = [step.label for _, chain in links for step in chain.steps][:end]
        if all(kind == "skip" for kind, _ in steps[end:]):
            reason = hooked or links[-1][1].ends
        chain = " + ".join([names[conv], *(label for label in labels if label)]) if end and conv is not None else None
        yield norm, chain, conv, reason


def _against(conv: torch.nn.Module | None) -> str:
    if conv is None:
        return "its convolution is gone"
    theirs = type(conv).__module__.startswith(("torch.nn.modules.", "fastconv.nn."))
    return "not converted" if theirs else f"its convolution, a {type(conv).__name__}, is not converted"
