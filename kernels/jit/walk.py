"""Helpers of all kernels that walk pixels: pixel numbers, offsets, and the taps that each pixel meets.

A loop over a reduction is guarded by ``if steps > 0``: ptxas waits for every wgmma in a loop that may not run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def in_elements(n, d, h, w, VEC: tl.constexpr, WIDE: tl.constexpr):
    """Strides in elements from strides in units of VEC, which tell the compiler their alignment; 64 bits if WIDE."""
    n, d, h, w = n * VEC, d * VEC, h * VEC, w * VEC
    if WIDE:
        n, d, h, w = n.to(tl.int64), d.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    return n, d, h, w


@triton.jit
def unravel(index, O, P, Q, RANK: tl.constexpr):
    """Pixel numbers as (n, o, p, q); o is 0 in rank 2."""
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
    """Unravelled pixels plus an unravelled step, by carries instead of divisions."""
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


@triton.jit
def phase_walk(index, OUT, TAPS, STRIDE, PADDING, DILATION, GCD, INVERSE, DGRAD: tl.constexpr):
    """The walk of phase ``index`` along one axis, over its outputs i and its taps j:
    output = first + i * step; source = base + i * move + j * hop; tap of the filter = tap + j * skip.

    Returns (first, step, count of i, base, move, hop, tap, skip, count of j).
    """
    if DGRAD:
        phase = (index + PADDING) % STRIDE
        skip = STRIDE // GCD
        tap = (phase // GCD * INVERSE) % skip
        taps = tl.where(phase % GCD == 0, (TAPS - tap + skip - 1) // skip, 0)
        taps = tl.maximum(taps, 0)
        # The quotient is exact if the phase has a tap, so that rounding of negative ones does not matter.
        base = (index + PADDING - tap * DILATION) // STRIDE
        return index, STRIDE, (OUT - index + STRIDE - 1) // STRIDE, base, 1, -(DILATION // GCD), tap, skip, taps
    else:
        return 0, 1, OUT, -PADDING, STRIDE, DILATION, 0, 1, TAPS


@triton.jit
def taps_in_image(
    index, SIZE, OUT, TAPS, STRIDE, PADDING, DILATION, GCD, INVERSE, DGRAD: tl.constexpr, PIXELS: tl.constexpr
):
    """The taps of output ``index`` along one axis that fall inside the source of SIZE pixels, j from 0 to count:
    source = base + j * hop; tap of the filter = tap + j * skip.

    PIXELS neighbours of one phase share the taps that are inside for any of them; base is then the first one's.
    Returns (base, hop, tap, skip, count).
    """
    _, _, _, base, move, hop, tap, skip, taps = phase_walk(
        index if DGRAD else 0, OUT, TAPS, STRIDE, PADDING, DILATION, GCD, INVERSE, DGRAD
    )
    if DGRAD:
        low, high, distance = base - SIZE + 1, base + PIXELS - 1, -hop
    else:
        base += index * move
        low, high, distance = (1 - PIXELS) * STRIDE - base, SIZE - 1 - base, hop
    # Negative quotients would be rounded towards 0, so numerators are kept from being negative.
    begin = (tl.maximum(low, 0) + distance - 1) // distance
    end = tl.where(high < 0, 0, tl.minimum(tl.maximum(high, 0) // distance + 1, taps))
    return base + begin * hop, hop, tap + begin * skip, skip, tl.maximum(end - begin, 0)
