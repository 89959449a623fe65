"""Convolutions for PyTorch as hand-written Triton kernels, forward and backward.

``fastconv.convert(model)`` swaps a model's convolutions in place; ``fastconv.nn`` and ``fastconv.functional`` hold the
same layers and functions under torch's names. Nothing is imported before it is asked for: ``import fastconv`` loads
neither torch nor Triton and touches no GPU.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastconv import functional, nn
    from fastconv.convert import convert, revert
    from fastconv.explain import explain
    from fastconv.report import report
    from fastconv.settings import settings
    from fastconv.warmup import warmup

__version__ = "0.1.0"
__all__ = ["convert", "explain", "functional", "nn", "report", "revert", "settings", "warmup"]

_FUNCTIONS = {
    "convert": "fastconv.convert",
    "explain": "fastconv.explain",
    "report": "fastconv.report",
    "revert": "fastconv.convert",
    "settings": "fastconv.settings",
    "warmup": "fastconv.warmup",
}
_MODULES = ("functional", "nn")


class _Package(ModuleType):
    """Keeps ``fastconv.convert`` a function: importing a submodule would bind the module to that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FUNCTIONS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastconv.{name}")
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module(_FUNCTIONS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastconv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
