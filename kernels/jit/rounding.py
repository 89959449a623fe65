"""Factors of TF32 products, of which tensor cores ignore the low 13 bits: as they are, every product is drawn towards
zero. A bulk copy rounds what it brings (`Descriptor.factor`); these round what passes registers."""

from __future__ import annotations

import triton
import triton.language as tl

from fastconv.kernels.launch.interpreter import interpreting

# The interpreter's products take all bits.
_TENSOR_CORES = tl.constexpr(not interpreting())


@triton.jit
def to_tf32(x, ROUND: tl.constexpr):
    """fp32 of which the tensor cores take the nearest TF32, ties away from zero, if ROUND; for products alone.

    Half a unit of TF32, with the sign and the exponent of x, is added in one operation. Infinities and NaNs stay.
    """
    if ROUND and _TENSOR_CORES:
        power = (x.to(tl.int32, bitcast=True) & -0x800000).to(tl.float32, bitcast=True)
        x = tl.fma(power, 2.0**-11, x)
    return x


@triton.jit
def nearest_tf32(x, ROUND: tl.constexpr):
    """fp32 rounded to the nearest TF32, ties away from zero, if ROUND: to be kept."""
    if ROUND and _TENSOR_CORES:
        x = (to_tf32(x, ROUND).to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    return x
