"""One direction of an operator as a call, as autograd runs it: forward, the gradient of one operand, or both together
as in a training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from fastconv.benchmarks.calls import KEEPING, TENSORS, TOGETHER, Operator
from fastconv.measuring.accuracy import Tensors, fp32_convolutions

# The operands that a direction differentiates by; "together" takes all that a layer has a gradient of.
DIFFERENTIATED = {"dgrad": ("input",), "wgrad": ("weight",), "backward": ("input",)}
Operands = list[torch.Tensor | None]
DirectionCall = Callable[[], Tensors]


def fakes(operator: Operator, dtype: torch.dtype, device: torch.device) -> Operands:
    """Operands whose values nobody reads."""
    return [None if shape is None else torch.empty(shape, dtype=dtype, device=device) for shape in operator.shapes]


def drawn(operator: Operator, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Operands:
    """Random operands, because zeros run faster. The weight's scale makes outputs of size one."""
    generator = torch.Generator(device).manual_seed(seed)
    operands: Operands = []
    for name, shape in zip(TENSORS, operator.shapes, strict=False):
        if shape is None:
            operands.append(None)
            continue
        # A weight sums over all its axes but the first.
        scale = 1.0 if name == "input" else math.prod(shape[1:]) ** -0.5
        operands.append((torch.randn(shape, generator=generator, device=device) * scale).to(dtype))
    return operands


def direction_call(
    function: Callable[..., torch.Tensor], operator: Operator, direction: str, operands: Operands
) -> DirectionCall:
    """A call of one direction of ``function``. It returns "output", and gradients by operand."""
    named: Any = {name: None if t is None else t.detach() for name, t in zip(TENSORS, operands, strict=False)}
    wanted = DIFFERENTIATED.get(direction, ())
    if direction == TOGETHER:
        wanted = tuple(name for name, t in named.items() if t is not None and (name != "input" or operator.needs_dx))
    leaves = [named[name].requires_grad_() for name in wanted]
    if direction == KEEPING:
        named["input"].requires_grad_()
    keywords = dict(operator.arguments)

    def forward(gradient: bool = True) -> torch.Tensor:
        with torch.set_grad_enabled(gradient):
            return function(*named.values(), **keywords)

    def differentiated(y: torch.Tensor, dy: torch.Tensor, again: bool) -> Tensors:
        return dict(zip(wanted, torch.autograd.grad(y, leaves, dy, retain_graph=again), strict=True))

    def together(dy: torch.Tensor) -> Tensors:
        y = forward()
        return {"output": y.detach(), **differentiated(y, dy, again=False)}

    if not wanted:
        return lambda: {"output": forward(direction == KEEPING).detach()}
    if direction == TOGETHER:
        return partial(together, _like(forward(False)))
    y = forward()
    return partial(differentiated, y, _like(y), again=True)


def _like(y: torch.Tensor) -> torch.Tensor:
    """A random gradient in the layout of ``y``, exact in every type."""
    generator = torch.Generator(y.device).manual_seed(1)
    return torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator, device=y.device).bfloat16())


def exact(operator: Operator, direction: str, operands: Operands) -> Tensors:
    """PyTorch's results in wider arithmetic: fp32 without TF32 for half precision, fp64 for fp32."""
    assert operands[0] is not None
    wide = torch.float64 if operands[0].dtype == torch.float32 else torch.float32
    with fp32_convolutions("ieee"):
        wider: Any = [None if tensor is None else tensor.to(wide).contiguous() for tensor in operands]
        return direction_call(getattr(F, operator.function), operator, direction, wider)()
