"""What ``fastconv check`` compares. An operator joins it as one entry of ``CHECKS``."""

from __future__ import annotations

from fastconv.benchmarks.checks import conv, conv_bn_act, pool
from fastconv.benchmarks.checks.check import Check as Check

CHECKS: tuple[Check, ...] = (
    conv.CONVOLUTION,
    conv.DEPTHWISE,
    conv.GROUPED,
    conv.FIRST_LAYER,
    conv.TRANSPOSED,
    conv_bn_act.INFERENCE,
    conv_bn_act.TRAINING,
    conv_bn_act.FROZEN,
    pool.MAX_POOL,
    pool.AVERAGE_POOL,
    pool.LP_POOL,
)
