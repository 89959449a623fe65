"""Memory layout, decided once: the format PyTorch would return, and what kernels need to know of strides."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch

# An operand's strides of batch, depth, height and width, in elements; channels are contiguous.
Strides = tuple[int, int, int, int]
INT32_MAX = 2**31 - 1
TAPS_OUTERMOST = 2  # a `weight_format`
POINTER_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
INDEX_TYPES = {torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32"}


def pointer_type(dtype: torch.dtype) -> str:
    """Triton's name for a pointer to ``dtype``."""
    return POINTER_TYPES[dtype]


def is_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether PyTorch takes a tensor [N, C, spatial] for channels_last; rank 1 counts as [N, C, 1, L].

    The rule is that of ``c10/core/MemoryFormat.h``; ambiguous cases (C=1, a single pixel) are not channels_last.
    """
    if len(shape) == 4:
        # The rule below without its loop, because every call asks it of every operand.
        (n, c, h, w), (step_n, step_c, step_h, step_w) = shape, strides
        if not (n and c and h and w) or step_c <= 0 or h * step_h == step_c:
            return False
        return step_n >= h * step_h and step_h >= w * step_w and step_w >= c * step_c
    if len(shape) == 3:
        shape, strides = (*shape[:2], 1, shape[2]), (*strides[:2], shape[2] * strides[2], strides[2])
    if strides[1] == 0:
        return False
    least = 0
    for axis in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * max(shape[axis], 1)
    return True


def strides_like(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """The strides of a dense tensor [N, C, spatial], channels_last or contiguous."""
    order = (1, *range(len(shape) - 1, 1, -1), 0) if channels_last else range(len(shape) - 1, -1, -1)
    strides = [0] * len(shape)
    step = 1
    for axis in order:
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


def dense_strides(shape: Sequence[int]) -> Strides:
    """Pixel strides of a dense channels_last operand of shape [N, C, D, H, W]."""
    n, _, d, h, w = strides_like(shape, True)
    return n, d, h, w


def pixel_strides(shape: Sequence[int], strides: Sequence[int]) -> Strides:
    """Pixel strides of [N, C, spatial] of rank 1 to 3; an axis of size one has stride 0."""
    n, _, *spatial = (0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))
    d, h, w = (0,) * (3 - len(spatial)) + tuple(spatial)
    return n, d, h, w


def contiguous_channels(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """None if neighbouring channels are neighbours in memory, else the strides of a channels_last copy."""
    return None if shape[1] == 1 or strides[1] == 1 else strides_like(shape, True)


def dense_copy(shape: Sequence[int], strides: Sequence[int], channels_last: bool = False) -> tuple[int, ...] | None:
    """None if a tensor lies in this format without gaps, else the strides of a copy that does."""
    dense = strides_like(shape, channels_last)
    return None if laid_out(shape, strides, dense) else dense


def laid_out(shape: Sequence[int], strides: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether ``strides`` place a tensor's elements as ``wanted`` would."""
    return all(size == 1 or have == want for size, have, want in zip(shape, strides, wanted, strict=True))


def taps_outermost(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a depthwise weight [K, 1, filter] with taps outermost, so that 16 bytes hold one tap of eight
    channels. A parameter may have them: to PyTorch they are dense."""
    strides = [1]
    for size in (shape[0], *reversed(shape[2:])):
        strides.append(strides[-1] * size)
    return 1, *reversed(strides[1:])


def weight_format(shape: Sequence[int], strides: Sequence[int]) -> int:
    """A weight's format: TAPS_OUTERMOST (depthwise only), 1 if PyTorch takes it for channels_last, else 0."""
    if is_channels_last(shape, strides):
        return 1
    many = shape[1] == 1 and shape[0] > 1 and max(shape[2:]) > 1
    return TAPS_OUTERMOST if many and laid_out(shape, strides, taps_outermost(shape)) else 0


def weight_strides(shape: Sequence[int], format: int) -> tuple[int, ...]:
    """The strides of a dense weight, or gradient, of this `weight_format`."""
    return taps_outermost(shape) if format == TAPS_OUTERMOST else strides_like(shape, bool(format))


def linear_stride(shape: Sequence[int], strides: Strides) -> int | None:
    """The distance of neighbouring pixels of [N, C, spatial] if it is one across rows and images, else None."""
    sizes = (shape[0], *(1,) * (5 - len(shape)), *shape[2:])
    step, count = 0, 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if count == 1:
            step = stride
        elif stride != step * count:
            return None
        count *= size
    return step


def even_pixels(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """None if channels are contiguous and pixels have a `linear_stride`, else the strides of a channels_last copy."""
    copy = contiguous_channels(shape, strides)
    if copy is None and linear_stride(shape, pixel_strides(shape, strides)) is None:
        copy = strides_like(shape, True)
    return copy


def load_width(dtype: torch.dtype, channels: int, *strides: int) -> int:
    """The elements of a 16-byte load if channels and strides are multiples of it, else 1: no more than two binaries."""
    width = 16 // dtype.itemsize
    return width if all(value % width == 0 for value in (channels, *strides)) else 1


def common_width(dtype: torch.dtype, *lengths: int) -> int:
    """The largest power of two, up to the elements of 16 bytes, that divides all lengths."""
    return gcd(16 // dtype.itemsize, *lengths)


def needs_int64(*operands: tuple[Sequence[int], Strides]) -> bool:
    """Whether an operand, (shape [N, C, D, H, W], pixel strides), reaches past 2^31 elements."""
    return any(
        sum((size - 1) * stride for size, stride in zip((shape[0], *shape[2:]), strides, strict=True)) + shape[1] - 1
        > INT32_MAX
        for shape, strides in operands
    )
