"""Repairs of Triton's interpreter: bfloat16 casts and products, and launches from several threads.

With ``TRITON_INTERPRET=1`` a bfloat16 tile is an array of raw ``uint16`` bits. ``tl.dot`` multiplies the bits as
integers, and a cast from fp32 drops the low bits, which a GPU rounds to nearest even. `apply` replaces the three
methods concerned, on Triton 3.6 to 3.9. Arithmetic, comparisons and reductions on bfloat16 tiles stay wrong: kernels
go to fp32 right after ``tl.load`` and back at ``tl.store``, which costs nothing on a GPU. Also unrepaired:
``tl.maximum`` without ``propagate_nan`` (NaN or not by version), TF32 (an fp32 product is exact fp32).

The interpreter swaps functions of ``triton.language`` during a launch, so two launches at a time undo each other: hold
`LOCK` around each one.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

if TYPE_CHECKING:
    import numpy as np

# Held around every interpreted launch; reentrant, because code that holds it may launch.
LOCK = threading.RLock()


def interpreting() -> bool:
    """Whether ``TRITON_INTERPRET`` was on when Triton was imported; setting it later changes nothing."""
    return not isinstance(tl.cdiv, triton.JITFunction)


def fp32_to_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 array to the bits of bfloat16 (uint16): nearest, ties to even; a NaN becomes a quiet one."""
    import numpy as np

    bits = x.view(np.uint32)
    # Adds half a unit less one, and one more if the last kept bit is odd, so that a tie lands on the even neighbour. A
    # carry out of the mantissa rightly gives the next exponent, and infinity above the largest number.
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 (uint16 array) to fp32, exactly."""
    import numpy as np

    return (bits.astype(np.uint32) << 16).view(np.float32)


def apply() -> None:
    """Mend the interpreter of this process; a second call changes nothing."""
    # Imported here because it needs NumPy, which nothing else here does.
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast_impl, create_fp_to_fp, create_dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    if create_dot.__module__ == __name__:
        return

    def decoded(tile: Any) -> Any:
        return handle(bf16_to_fp32(tile.data), tl.float32) if tile.dtype.scalar == tl.bfloat16 else tile

    def mended_cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        # Other types become bfloat16 by way of fp32, as in PyTorch.
        if dst_type.scalar == tl.bfloat16:
            return handle(fp32_to_bf16(cast_impl(self, decoded(src), tl.float32).data), tl.bfloat16)
        return cast_impl(self, decoded(src), dst_type)

    def mended_create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        types = (src.dtype.scalar, dst_type.scalar)
        to_nearest = rounding_mode != interpreter._ir.ROUNDING_MODE.RTZ
        if tl.bfloat16 in types and to_nearest and not any(ty.is_fp8() for ty in types):
            return self.cast_impl(src, dst_type)
        return create_fp_to_fp(self, src, dst_type, rounding_mode)

    def mended_create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, decoded(a), decoded(b), *rest)

    builder.cast_impl = mended_cast_impl
    builder.create_fp_to_fp = mended_create_fp_to_fp
    builder.create_dot = mended_create_dot
    patch_lang = interpreter._patch_lang

    def mended_patch_lang(fn: Any) -> Any:
        # Once a launch has patched triton.language, every device function would patch it again: a quarter of a test.
        seen = (value for value in fn.__globals__.values() if value is tl or value is tl.core)
        return patch_lang(fn) if any(tl.core.is_builtin(it.load) for it in seen) else interpreter._LangPatchScope()

    interpreter._patch_lang = mended_patch_lang
    # The interpreter repeats integer sums and products in int64 for a comparison that it drops, having no debug mode:
    # half the time of a step with a small tile (2.4 ms to 1.3 ms at 128 rows).
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
