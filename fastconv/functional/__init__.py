"""torch.nn.functional's convolutions and pools on fastconv's kernels: the same names, signatures, formats and errors.

Only device, dtype and rank decide here whether fastconv or PyTorch serves a call, so that sizes never become guards of
a compiled model. The kernel is chosen inside the operator.
"""

from __future__ import annotations

from fastconv.arguments import why_not_served
from fastconv.functional.conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from fastconv.functional.conv_bn_act import (
    conv1d_bn_act,
    conv2d_bn_act,
    conv3d_bn_act,
    conv_transpose1d_bn_act,
    conv_transpose2d_bn_act,
    conv_transpose3d_bn_act,
)
from fastconv.functional.pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    lp_pool1d,
    lp_pool2d,
    lp_pool3d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
)

__all__ = [
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "conv1d",
    "conv1d_bn_act", "conv2d", "conv2d_bn_act", "conv3d", "conv3d_bn_act", "conv_transpose1d",
    "conv_transpose1d_bn_act", "conv_transpose2d", "conv_transpose2d_bn_act", "conv_transpose3d",
    "conv_transpose3d_bn_act", "lp_pool1d", "lp_pool2d", "lp_pool3d", "max_pool1d", "max_pool2d",
    "max_pool3d", "why_not_served",
]  # fmt: skip
