"""The networks whose layer lists are kept: torchvision's, and plain definitions of those it lacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fastconv.benchmarks.models import torchvision

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOL = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}


@dataclass(frozen=True)
class Network:
    image: tuple[int, ...]  # its shape
    make: Callable[[], nn.Module]


def lenet5(padding: int = 0, features: int = 400) -> nn.Module:
    """LeCun et al., "Gradient-based learning applied to document recognition", 1998, figure 2.

    ``padding`` of the first convolution, ``features`` behind the last pool.
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=padding), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(features, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)),
    )


class UNet(nn.Module):
    """Ronneberger et al., "U-Net", 2015, padded, with batch norm; in rank 3 Çiçek et al., "3D U-Net", 2016.

    ``widths`` are the levels' from the finest; each pixel gets ``classes`` scores.
    """

    def __init__(self, rank: int, channels: int, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        up = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[rank]
        self.pool = POOL[rank](2)
        self.down = nn.ModuleList(_twice(rank, c, k) for c, k in pairwise((channels, *widths)))
        self.up = nn.ModuleList(up(c, k, 2, stride=2) for c, k in pairwise(widths[::-1]))
        self.join = nn.ModuleList(_twice(rank, 2 * k, k) for k in widths[-2::-1])
        self.head = CONV[rank](widths[0], classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        levels = [self.down[0](x)]
        for block in list(self.down)[1:]:
            levels.append(block(self.pool(levels[-1])))
        x = levels.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat((levels.pop(), up(x)), 1))
        return self.head(x)


def _twice(rank: int, c: int, k: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inside in (c, k):
        layers += [CONV[rank](inside, k, 3, padding=1, bias=False), NORM[rank](k), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def m11() -> nn.Module:
    """Dai et al., "Very deep convolutional neural networks for raw waveforms", 2016: M11, for seconds of 8 kHz."""
    layers: list[nn.Module] = [nn.Conv1d(1, 64, 80, stride=4), nn.BatchNorm1d(64), nn.ReLU(), nn.MaxPool1d(4)]
    c = 64
    for number, (k, times) in enumerate(((64, 2), (128, 2), (256, 3), (512, 2))):
        layers += [nn.MaxPool1d(4)] * (number > 0)
        for _ in range(times):
            layers += [nn.Conv1d(c, k, 3, padding=1), nn.BatchNorm1d(k), nn.ReLU()]
            c = k
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(c, 10))


def _theirs(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision().models.get_model(name, weights=None, **options)


IMAGE = (3, 224, 224)
NETWORKS = {
    "lenet5": Network((1, 32, 32), lenet5),
    **{name: Network(IMAGE, _theirs(name)) for name in ("alexnet", "vgg16")},
    "googlenet": Network(IMAGE, _theirs("googlenet", init_weights=False)),
    "inception_v3": Network((3, 299, 299), _theirs("inception_v3", init_weights=False)),
    **{name: Network(IMAGE, _theirs(name)) for name in ("resnet18", "resnet50", "resnext50_32x4d", "densenet121")},
    **{name: Network(IMAGE, _theirs(name)) for name in ("efficientnet_b0", "mobilenet_v2", "mobilenet_v3_large")},
    "convnext_tiny": Network(IMAGE, _theirs("convnext_tiny")),
    "unet": Network((3, 256, 256), lambda: UNet(2, 3, (64, 128, 256, 512, 1024), 2)),
    "deeplabv3_resnet50": Network((3, 513, 513), _theirs("deeplabv3_resnet50", weights_backbone=None)),
    "unet3d": Network((1, 64, 128, 128), lambda: UNet(3, 1, (32, 64, 128, 256), 3)),
    "r3d_18": Network((3, 16, 112, 112), _theirs("r3d_18")),
    "m11": Network((1, 8000), m11),
}
