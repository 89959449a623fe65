"""Models by name, with random weights: torchvision's, timm's, or ``module:factory`` of the user's own."""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fastconv.measuring import reason

_kept: list[torch.library.Library] = []  # a library's definitions live as long as the object


def channels_last_format(dimensions: int) -> torch.memory_format:
    """The dense channels-last format; one-dimensional images have none and stay contiguous."""
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(dimensions, torch.contiguous_format)


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=channels_last_format(tensor.dim()))


@dataclass(frozen=True)
class LoadedModel:
    """A model in fp32 on the CPU, in training mode, and the shape of one input batch."""

    name: str
    model: nn.Module
    input_shape: tuple[int, ...]

    @property
    def memory_format(self) -> torch.memory_format:
        return channels_last_format(len(self.input_shape))

    def refusal(self, error: Exception) -> str:
        """What the user is told if the model raised ``error`` on its batch."""
        return f"{self.name} does not run on a batch of {'x'.join(map(str, self.input_shape))}: {reason(error)}"


def load(name: str, batch: int, size: int | None = None, *, seed: int = 0) -> LoadedModel:
    """The model ``name`` with the weights that ``seed`` gives, for square inputs of ``size``, by default the model's
    own or 224. Raises ValueError with the nearest names for an unknown one."""
    torch.manual_seed(seed)
    model = find(name)()
    convs = [module for module in model.modules() if isinstance(module, _ConvNd)]
    channels = convs[0].in_channels if convs else 3
    rank = len(convs[0].kernel_size) if convs else 2
    if size is None:
        size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))[-1]
    # torchvision's video models were trained with sixteen frames.
    spatial = (16, size, size) if rank == 3 else (size,) * rank
    return LoadedModel(name, model.train(), (batch, channels, *spatial))


def torchvision() -> ModuleType:
    """torchvision, even if its compiled part does not load, as a CUDA wheel's beside a CPU build of torch.

    Its import registers Python code for ``nms`` and fails if the compiled part has not defined it. Detection's box
    operators stay unusable then; every model still builds and runs.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'fastconv[models]'") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for half_imported in [module for module in sys.modules if module.split(".")[0] == "torchvision"]:
        del sys.modules[half_imported]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
    return importlib.import_module("torchvision")


def find(name: str) -> Callable[[], nn.Module]:
    """A function that builds the model ``name``, or raises ValueError. Raises ValueError with the nearest names for an
    unknown one."""
    return _users(name) if ":" in name else _library(name)


def _library(name: str) -> Callable[[], nn.Module]:
    vision = torchvision().models
    known = list(vision.list_models())
    if name in known:
        return partial(vision.get_model, name, weights=None)
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError:
        source = "torchvision's (timm is not installed)"
    else:
        source = "torchvision's and timm's"
        known += timm.list_models()
        if timm.is_model(name):
            return partial(timm.create_model, name)
    close = _close(name, known) or "none is close"
    raise ValueError(f"no model {name!r} among {source}; close names: {close}; your own: module:factory")


def _users(name: str) -> Callable[[], nn.Module]:
    module_name, _, factory_name = name.partition(":")
    # A console script has its own folder on the path, not the user's.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    known: Iterable[str] = [module.name for module in pkgutil.iter_modules([os.getcwd()])]
    sought = module_name
    try:
        module = importlib.import_module(module_name)
        known, sought = vars(module), factory_name
        factory = getattr(module, factory_name)
    except Exception as error:  # the user's code: anything
        missing = isinstance(error, ModuleNotFoundError | AttributeError) and _close(sought, known)
        close = f"; close names: {missing}" if missing else ""
        raise ValueError(f"--model {name}: {reason(error)}{close}") from error

    def build() -> nn.Module:
        try:
            model = factory()
        except Exception as error:
            raise ValueError(f"--model {name}: {reason(error)}") from error
        if not isinstance(model, nn.Module):
            raise ValueError(f"--model {name}: {factory_name} returned {type(model).__name__}, not a torch.nn.Module")
        return model

    return build


def _close(name: str, known: Iterable[str]) -> str:
    return ", ".join(difflib.get_close_matches(name, dict.fromkeys(known), n=5))
