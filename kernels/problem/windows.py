"""The part that the problems of convolutions and pools share, and how the autotuner's tables spell it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastconv.autotune import ProblemKey


def output_size(size: int, filter_size: int, stride: int, padding: int, dilation: int) -> int:
    """Outputs along one axis; ``padding`` is the sum of both sides."""
    return (size + padding - dilation * (filter_size - 1) - 1) // stride + 1


def least_input_size(size: int, filter_size: int, stride: int, padding: int, dilation: int) -> int:
    """The smallest input with ``size`` outputs along one axis: a transposed convolution's output without further
    padding."""
    return (size - 1) * stride + dilation * (filter_size - 1) + 1 - padding


DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int16, torch.int32, torch.int64)
}
# An axis's name in a table, outermost first.
INPUT_AXES = {1: "W", 2: "HW", 3: "DHW"}
OUTPUT_AXES = {1: "Q", 2: "PQ", 3: "OPQ"}


class KeyParts(NamedTuple):
    """Parts of a `ProblemKey`."""

    kind: dict[str, int | str]
    channels: dict[str, int]
    sizes: dict[str, int]


class Windows:
    """A convolution or a pool: windows of the input, one for each output."""

    batch: int
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    dtype: torch.dtype

    @property
    def rank(self) -> int:
        return len(self.input_size)

    @property
    def input_pixels(self) -> int:
        return self.batch * math.prod(self.input_size)

    @property
    def output_pixels(self) -> int:
        return self.batch * math.prod(self.output_size)

    def rank3_fields(self, window: str) -> dict[str, Any]:
        """The fields of the same problem in rank 3, whose leading axes have size one; ``window`` names a field."""
        names = ("input_size", window, "output_size", "stride", "padding", "dilation")
        return {name: (int(name != "padding"),) * (3 - self.rank) + getattr(self, name) for name in names}

    def leaves_input(self, window: tuple[int, ...]) -> bool:
        """Whether a tap of a ``window`` of this size can fall outside the input."""
        return any(self.padding) or any(
            (p - 1) * stride + (r - 1) * dilation >= size
            for p, stride, r, dilation, size in zip(
                self.output_size, self.stride, window, self.dilation, self.input_size, strict=True
            )
        )

    def window_parts(self, window: tuple[int, ...]) -> KeyParts:
        """Kind and sizes as tables spell them; no channels."""
        kind: dict[str, int | str] = {"dtype": dtype_name(self.dtype), "window": joined_by_x(window) or "none"}
        kind |= {name: joined_by_x(getattr(self, name)) or "none" for name in ("stride", "padding", "dilation")}
        sizes = {"N": self.batch, **dict(zip(INPUT_AXES[self.rank], self.input_size, strict=True))}
        return KeyParts(kind, {}, sizes | dict(zip(OUTPUT_AXES[self.rank], self.output_size, strict=True)))


def window_fields(key: ProblemKey) -> dict[str, Any]:
    """The fields that `Windows.window_parts` spelled, and "window". Raises KeyError, ValueError for any other key."""
    kind, sizes = dict(key.kind), dict(key.sizes)
    fields: dict[str, Any] = {
        name: () if kind[name] == "none" else tuple(map(int, str(kind[name]).split("x")))
        for name in ("window", "stride", "padding", "dilation")
    }
    rank = len(fields["window"])
    return fields | {
        "batch": sizes["N"],
        "input_size": tuple(sizes[name] for name in INPUT_AXES[rank]),
        "output_size": tuple(sizes[name] for name in OUTPUT_AXES[rank]),
        "dtype": DTYPES[str(kind["dtype"])],
    }


def joined_by_x(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def non_defaults(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> list[str]:
    """Each one that is not its default, by name; one number if all axes share it."""
    return [
        f"{name} {values[0] if len(set(values)) == 1 else joined_by_x(values)}"
        for name, values, default in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
        if any(value != default for value in values)
    ]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def largest_divisor(channels: int) -> int:
    """The largest power of two up to 16 that divides ``channels``."""
    return min(16, channels & -channels)
