"""A network's distinct convolutions as problems."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fastconv.cli import BadUsage
from fastconv.cli.measure.clock import reason
from fastconv.cli.models import Subject
from fastconv.kernels.problem import DIRECTIONS, ConvProblem, conv_problem

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Layer:
    """A distinct convolution of a network: how often it occurs, and whether its input needs a gradient."""

    problem: ConvProblem
    bias: bool
    needs_dgrad: bool
    count: int

    @property
    def directions(self) -> tuple[str, ...]:
        return tuple(direction for direction in DIRECTIONS if direction != "dgrad" or self.needs_dgrad)


def distinct_layers(subject: Subject, dtype: torch.dtype) -> list[Layer]:
    """The network's distinct convolutions, most arithmetic first. Runs it on the meta device: no arithmetic.

    Left out: transposed convolutions, subclasses, padding modes other than zeros and sides padded unequally, which
    aten's own operator does not take.
    """
    found: Counter[tuple[ConvProblem, bool, bool]] = Counter()

    def note(conv: _ConvNd, inputs: tuple[torch.Tensor, ...]) -> None:
        # What _ConvNd resolves 'same' to: innermost axis first, both sides of each.
        before, after = (
            conv._reversed_padding_repeated_twice[::2][::-1],
            conv._reversed_padding_repeated_twice[1::2][::-1],
        )
        if type(conv) not in CONVS or conv.padding_mode != "zeros" or before != after:
            return
        (x,) = inputs
        padding = (*before, *after)
        problem = conv_problem(
            x.shape, conv.weight.shape, None, conv.stride, padding, conv.dilation, conv.groups, dtype
        )
        found[problem, conv.bias is not None, x.requires_grad] += 1

    model = copy.deepcopy(subject.model).to("meta")
    for module in model.modules():
        if isinstance(module, _ConvNd):
            module.register_forward_pre_hook(note)
    try:
        model(torch.empty(subject.input_shape, device="meta"))
    except Exception as error:  # the network's own code: anything
        raise BadUsage(f"the layers of {subject.name} cannot be listed without data: {reason(error)}") from error
    layers = [Layer(*key, count) for key, count in found.items()]
    return sorted(layers, key=lambda layer: -layer.count * layer.problem.flops)
