"""Fused calls, noted and made of PyTorch's own operators: a test compares which are made, when, with what."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fastconv import functional
from fastconv import nn as ours
from fastconv.functional import conv as functional_conv
from fastconv.functional import conv_bn_act

Note = Callable[[tuple[Any, ...]], Any]


def activation(args: tuple[Any, ...]) -> str | None:
    """That of a fused call: the name of its class."""
    return args[8] and type(args[8]).__name__


@contextmanager
def fused_calls(note: Note = activation) -> Iterator[list[Any]]:
    """``note`` of the arguments of each fused call of nn's."""
    made: list[Any] = []
    fused = ours.fused_call.conv_norm_act

    def noted(*args: Any) -> Tensor:
        made.append(note(args))
        return fused(*args)

    with mock.patch.object(ours.fused_call, "conv_norm_act", noted):
        yield made


@contextmanager
def fused_by_torch(note: Note = activation, float64: bool = False) -> Iterator[list[Any]]:
    """`fused_calls`, composed of PyTorch's operators, beside torch.nn.functional's convolutions; ``float64``: as if
    kernels served it."""
    fused, served = ours.fused_call.conv_norm_act, ours.fused_call.why_not_served
    within: list[bool] = []

    def composed(*args: Any) -> Tensor:
        within.append(True)  # torch.compile follows this
        try:
            return fused(*args)
        finally:
            within.pop()

    def serves(x: Tensor, dtype: torch.dtype | None = None) -> str | None:
        if within:
            return "PyTorch's operators are compared"
        return served(x, torch.float32 if float64 and x.dtype is torch.float64 else dtype)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ours.fused_call, "conv_norm_act", composed))
        for module in (ours.fused_call, functional_conv, conv_bn_act):
            stack.enter_context(mock.patch.object(module, "why_not_served", serves))
        for layer, function in list(ours.fused_call._FUNCTIONS.items()):
            theirs = getattr(F, function.__name__)
            stack.enter_context(mock.patch.object(functional, function.__name__, theirs))
            stack.enter_context(mock.patch.dict(ours.fused_call._FUNCTIONS, {layer: theirs}))
        yield stack.enter_context(fused_calls(note))
