"""Operands as bulk tensor copies see them, and the host's cache of their descriptors.

Descriptors are built directly: ``TensorDescriptor.from_tensor`` and views take twice the time of a small launch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastconv.kernels.launch import interpreter
from fastconv.kernels.problem.layout import Strides, pointer_type, strides_like

# Bytes that a bulk copy's start and steps are multiples of.
ALIGNMENT = 16
# Bytes of a line of shared memory as bulk copies write it, and so the reduced channels that a step covers.
LINE = 128
MAX_BOX = 256


@dataclass(frozen=True)
class Descriptor:
    """A view of an operand, in elements, and the box of it that one copy moves.

    A view has at most five axes, the last of stride 1; the other strides and its start are multiples of `ALIGNMENT`.
    A box's sides are powers of two up to `MAX_BOX`; its part outside the view is read as 0 and is not written.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    start: int = 0  # of the view in its operand
    factor: bool = False  # of a product: a copy rounds fp32 to the nearest TF32, if Triton can

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.strides) == len(self.box) <= 5, self
        assert self.strides[-1] == 1 and min(self.shape) > 0, self
        assert all(step * self.dtype.itemsize % ALIGNMENT == 0 for step in (*self.strides[:-1], self.start)), self
        assert all(side & (side - 1) == 0 and 0 < side <= MAX_BOX for side in self.box), self

    def __str__(self) -> str:
        """Triton's name for its type, which is all that a binary knows of it."""
        return f"tensordesc<{pointer_type(self.dtype)[1:]}[{','.join(map(str, self.box))}]>"

    @cached_property
    def _number(self) -> int:
        """A unique number: hashing it is cheaper than hashing the whole dataclass."""
        return next(_numbers)

    @cached_property
    def _latest(self) -> tuple[int | None, Any]:
        """The last address and its TensorDescriptor: a weight's is always the same."""
        return None, None

    def of(self, t: torch.Tensor) -> TensorDescriptor:
        """What a launch takes for ``t``; kept by address, without keeping ``t`` alive."""
        address = t.data_ptr()
        latest, descriptor = self._latest
        if latest == address:
            return descriptor
        key = (address, self._number)
        # Sound without a lock: no step relies on what other threads leave between two.
        descriptor = _descriptors.pop(key, None)
        if descriptor is None:
            if interpreter.interpreting():
                reach = sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True)) + 1
                view = t.as_strided((reach,), (1,), t.storage_offset() + self.start)
                return TensorDescriptor(view, list(self.shape), list(self.strides), list(self.box))
            if len(_descriptors) >= MAX_DESCRIPTORS:
                _descriptors.popitem(last=False)
            base = _Address(address + self.start * t.itemsize, self.dtype)
            rounds = _ROUNDS if self.factor and self.dtype is torch.float32 else {}
            descriptor = TensorDescriptor(base, list(self.shape), list(self.strides), list(self.box), **rounds)
        _descriptors[key] = descriptor
        self.__dict__["_latest"] = address, descriptor
        return descriptor


class _Address:
    """The part of a tensor that Triton asks a descriptor's base for."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


_numbers = count()
# From Triton 3.7 on.
MAPS_ROUND = "round_f32_to_tf32" in TensorDescriptor.__dataclass_fields__
_ROUNDS: dict[str, Any] = {"round_f32_to_tf32": True} if MAPS_ROUND else {}
# Outputs are allocated anew in each call, most of them at an earlier one's address.
MAX_DESCRIPTORS = 2048
# The latest used stands last, so that a weight's stays.
_descriptors: OrderedDict[tuple[int, int], TensorDescriptor] = OrderedDict()


def aligned(t: torch.Tensor) -> bool:
    """Whether a bulk copy may start at ``t``'s address, or at that of torch's allocator for a tensor without data."""
    return start_of(t)(t) % ALIGNMENT == 0


def start_of(t: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    """A function that tells the start in bytes of tensors like ``t``: with data, or without."""
    return _offset if isinstance(t, FakeTensor) else torch.Tensor.data_ptr


def _offset(t: torch.Tensor) -> Any:
    return t.storage_offset() * t.itemsize


def pitch(channels: int, dtype: torch.dtype) -> int:
    """The least distance of pixels, or of a weight's taps, of ``channels`` that bulk copies can step by."""
    return -(-channels * dtype.itemsize // ALIGNMENT) * ALIGNMENT // dtype.itemsize


def pitched(shape: Sequence[int], dtype: torch.dtype) -> tuple[int, ...]:
    """The strides of a channels_last tensor whose pixels are padded to their `pitch`."""
    return strides_like((shape[0], pitch(shape[1], dtype), *shape[2:]), True)


def bulk(dtype: torch.dtype, shape: Sequence[int], strides: Strides | None) -> bool:
    """Whether bulk copies may step by the pixel strides of an operand [N, C, D, H, W]; None: dense channels_last."""
    size = dtype.itemsize
    if strides is None:
        return shape[1] * size % ALIGNMENT == 0
    steps = zip((shape[0], *shape[2:]), strides, strict=True)
    return all(count == 1 or (step > 0 and step * size % ALIGNMENT == 0) for count, step in steps)
