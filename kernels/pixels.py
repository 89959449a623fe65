"""Where a pixel lies: jit helpers that every kernel which walks pixels shares."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_elements(n, d, h, w, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Strides in units of VEC elements, which tells the compiler their alignment, as elements; 64 bits if WIDE."""
    n, d, h, w = n * VEC, d * VEC, h * VEC, w * VEC
    if WIDE:
        n, d, h, w = n.to(tl.int64), d.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    return n, d, h, w


@triton.jit
def unravel(index, O, P, Q, RANK: tl.constexpr):
    """Pixel numbers -> (n, o, p, q); o is 0 in rank 2."""
    q = index % Q
    index = index // Q
    p = index % P
    n = index // P
    o = 0
    if RANK == 3:
        o = n % O
        n = n // O
    return n, o, p, q


@triton.jit
def advance(n, o, p, q, n_step, o_step, p_step, q_step, O, P, Q, RANK: tl.constexpr):
    """Add an unravelled number of pixels to unravelled pixels: carries instead of divisions."""
    q += q_step
    carry = q >= Q
    q = tl.where(carry, q - Q, q)
    p += p_step + carry.to(tl.int32)
    carry = p >= P
    p = tl.where(carry, p - P, p)
    if RANK == 3:
        o += o_step + carry.to(tl.int32)
        carry = o >= O
        o = tl.where(carry, o - O, o)
    n += n_step + carry.to(tl.int32)
    return n, o, p, q
