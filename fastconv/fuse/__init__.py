"""Finds chains of convolution -> batch norm (-> activation, residual) in a model, and makes each one call.

No list of models: where a module's own forward calls a convolution and a batch norm, that forward alone is traced by
torch.fx, with every child a leaf, so that what it decides by its attributes is decided for this instance. The chain's
calls become one of ``run_chain`` with the same children, and the instance's ``__class__`` a subclass of its class with
that forward. Parameters, names and children stay; whatever the trace did not see (other arguments, proxies, attributes
set since) runs the class's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from fastconv.fuse.chains import may_hold_chains, study
from fastconv.fuse.rewrite import fuse_module, fused_names
from fastconv.fuse.trace import class_of
from fastconv.nn.fused import ConvBNAct, Steps, fusible


@dataclass(frozen=True)
class Norm:
    """A batch norm of a model: the chain that computes it, or why it is computed on its own."""

    name: str
    kind: str
    chain: str | None = None  # "layer1.0.conv1 + bn1 + relu"
    conv: str | None = None  # the name of the convolution layer in it
    reason: str | None = None  # with a chain: why it does not take the next call, if that is an activation or a sum


def fuse(model: torch.nn.Module, wanted: Callable[[torch.nn.Module, torch.nn.Module], bool]) -> None:
    """Fuse, in place, the chains of ``model`` whose convolution and batch norm are ``wanted``."""
    for module in list(model.modules()):
        if may_hold_chains(module):
            found = study(module)
            child = module.get_submodule
            names = {chain.conv for chain in found.chains if wanted(child(chain.conv), child(chain.norm))}
            fuse_module(module, found, names.union(fused_names(module)))


def unfuse(model: torch.nn.Module) -> None:
    """Give every module of ``model`` its own class again."""
    for module in model.modules():
        module.__class__ = class_of(module)


def norms(model: torch.nn.Module) -> Iterator[Norm]:
    """Every batch norm of ``model``, once, with what is true of it now."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[torch.nn.Module, Norm] = {}
    for module, name in names.items():
        prefix = f"{name}." if name else ""
        for norm, chain, conv, reason in _findings(module):
            if norm not in found or (chain and not found[norm].chain):
                label = prefix + chain if chain else None
                found[norm] = Norm(names[norm], type(norm).__name__, label, names.get(conv), reason)
    for module, name in names.items():
        if isinstance(module, _BatchNorm):
            yield found.get(module) or Norm(name, type(module).__name__, reason="not called beside a convolution")


_Finding = tuple[torch.nn.Module, "str | None", "torch.nn.Module | None", "str | None"]


def _findings(module: torch.nn.Module) -> Iterator[_Finding]:
    """Batch norms that ``module`` calls beside convolutions, with chain and convolution, if any, and the reason."""
    if isinstance(module, ConvBNAct):
        steps: Steps = ("norm",) if module.act is None else ("norm", "act")
        end, reason = fusible(module.conv, module.bn, module.act, (), steps)
        yield module.bn, " + ".join(("conv", "bn", "act")[: end + 1]) if end else None, module.conv, reason
        return
    if not may_hold_chains(module):
        return
    child = module.get_submodule
    found = study(module)
    for target, reason in found.apart.items():
        yield child(target), None, None, reason
    for chain in found.chains:
        conv, norm = child(chain.conv), child(chain.norm)
        if chain.conv not in fused_names(module):
            yield norm, None, conv, "not converted"
            continue
        act = child(chain.act) if isinstance(chain.act, str) else chain.act
        end, reason = fusible(conv, norm, act, tuple(map(child, chain.others)), chain.steps)
        parts = [part for part in chain.parts[:end] if part]
        yield norm, " + ".join([chain.conv, *parts]) if end else None, conv, reason or chain.ends
