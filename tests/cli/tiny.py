"""Networks small enough to interpret, as a user's ``--model tests/...:factory`` would name them."""

import torch
from torch import nn


def network() -> nn.Module:
    """Two convolutions, batch norm, a shortcut and a head."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 1), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
    )


def every_kind() -> nn.Module:
    """A call of each kind that operators are measured by, and no other."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        *(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1), nn.MaxPool2d(2)),
    )


def large() -> nn.Module:
    """For images of five pixels and more."""
    return nn.Sequential(nn.Conv2d(3, 4, 5))


def perceptron() -> nn.Module:
    """Nothing that a convolution library could convert."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))


def volume() -> nn.Module:
    """A video model."""
    return nn.Sequential(nn.Conv3d(2, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())


def not_a_module() -> torch.Tensor:
    return torch.zeros(1)
