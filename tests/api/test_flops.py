"""PyTorch's FLOP counter sees in our operators what it sees in its own convolutions."""

from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from torch.utils.flop_counter import FlopCounterMode

import fastconv.functional as ours
from tests.marks import DEVICE, runs_kernels

pytestmark = runs_kernels


def flops(function: Any, x: torch.Tensor, weight: torch.Tensor, **arguments: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function(x, weight, **arguments).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "weight", "arguments"),
    [("conv2d", (8, 6, 3, 3), {"stride": 2, "padding": 1}), ("conv_transpose2d", (6, 4, 3, 3), {"stride": 2})],
)
def test_as_many_as_pytorchs(name: str, weight: tuple[int, ...], arguments: dict[str, Any]) -> None:
    operands = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((2, 6, 7, 7), weight)]
    expected = flops(getattr(theirs, name), *operands, **arguments)
    assert flops(getattr(ours, name), *operands, **arguments) == expected > 0


def test_groups_multiply_their_own_channels_in_each_direction() -> None:
    """PyTorch's counter takes a grouped weight's gradient for one over all channels."""
    x = torch.randn(2, 6, 7, 7, device=DEVICE, requires_grad=True)
    weight = torch.randn(8, 3, 3, 3, device=DEVICE, requires_grad=True)
    forward = 2 * (2 * 8 * 7 * 7) * (3 * 3 * 3)
    assert flops(ours.conv2d, x, weight, groups=2, padding=1) == 3 * forward


@pytest.mark.parametrize("training", [True, False])
def test_a_fused_layer_counts_its_convolution(training: bool) -> None:
    x, weight = torch.randn(2, 6, 7, 7, device=DEVICE), torch.randn(8, 6, 3, 3, device=DEVICE)
    norm = [torch.ones(8, device=DEVICE) for _ in range(4)]
    with FlopCounterMode(display=False) as counter:
        ours.conv2d_bn_act(x, weight, None, *norm, training=training, momentum=0.1, eps=1e-5)
    assert counter.get_total_flops() == 2 * (2 * 8 * 5 * 5) * (6 * 3 * 3)
    with FlopCounterMode(display=False) as counter:
        ours.conv_transpose2d_bn_act(
            x, weight.permute(1, 0, 2, 3), None, *norm, training=training, momentum=0.1, eps=1e-5
        )
    assert counter.get_total_flops() == 2 * (2 * 6 * 7 * 7) * (8 * 3 * 3)
