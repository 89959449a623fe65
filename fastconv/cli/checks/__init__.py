"""What ``fastconv check`` compares. An operator joins it as one entry of ``OPERATORS``."""

from __future__ import annotations

from fastconv.cli.checks import conv, conv_bn_act
from fastconv.cli.checks.operator import Operator as Operator

OPERATORS: tuple[Operator, ...] = (
    conv.CONVOLUTION,
    conv.TRANSPOSED,
    conv_bn_act.INFERENCE,
    conv_bn_act.TRAINING,
    conv_bn_act.FROZEN,
)
