"""torch.nn's convolution layers on fastconv's kernels (same constructors, repr, state_dict, pickles) and fused ones."""

from fastconv.nn.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    LazyConv1d,
    LazyConv2d,
    LazyConv3d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
    LazyConvTranspose3d,
)
from fastconv.nn.fused import ConvBNAct1d, ConvBNAct2d, ConvBNAct3d

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvBNAct1d",
    "ConvBNAct2d",
    "ConvBNAct3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "LazyConv1d",
    "LazyConv2d",
    "LazyConv3d",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "LazyConvTranspose3d",
]
