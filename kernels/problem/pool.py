"""The frozen description of one pool: its forward direction, whichever is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fastconv.autotune import ProblemKey
from fastconv.kernels.problem.windows import (
    DTYPES,
    KeyParts,
    Windows,
    dtype_name,
    joined_by_x,
    largest_divisor,
    non_defaults,
    window_fields,
)

POOL_DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class PoolProblem(Windows):
    """One pool: input ``[N, C, *input_size]``, output ``[N, C, *output_size]``.

    Adaptive windows are nearly equal shares of the input, one for each output. ``window`` is then the size of the
    largest, and stride, padding and dilation mean nothing.
    """

    kind: str  # "max", "average" or "lp"
    batch: int
    channels: int
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    dtype: torch.dtype
    adaptive: bool = False
    index: torch.dtype | None = None  # max: dtype of the taps kept for backward; None: not kept
    divisor: int = 0  # average: every window's; 0: each window's count of pixels
    include_padding: bool = True  # average: that count includes padding
    norm: float = 0.0  # lp: its p, finite and not 0

    @property
    def taps(self) -> int:
        return math.prod(self.window)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.input_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.output_size)

    @property
    def bytes(self) -> int:
        """Bytes that must move when input, output and index are read or written once; the same in each direction,
        except that an lp norm's backward moves twice as many."""
        index = 0 if self.index is None else self.index.itemsize
        return self.channels * (
            self.input_pixels * self.dtype.itemsize + self.output_pixels * (self.dtype.itemsize + index)
        )

    @cached_property
    def as_rank3(self) -> PoolProblem:
        """The same pool in rank 3, with leading axes of size one."""
        return replace(self, **self.rank3_fields("window"))

    @property
    def planes(self) -> PoolProblem:
        """The same pool with each channel as an image, as a contiguous tensor lies in memory."""
        return replace(self, batch=self.batch * self.channels, channels=1)

    @property
    def bounded(self) -> bool:
        """Whether a tap can fall outside the input, or outside an adaptive window that is smaller than others."""
        if self.adaptive:
            return any(h % p for h, p in zip(self.input_size, self.output_size, strict=True))
        return self.leaves_input(self.window)

    @property
    def uniform_divisor(self) -> int:
        """The one divisor of all sums; 0 if windows differ."""
        if self.kind == "max":
            return 1
        if self.divisor:
            return self.divisor
        if self.adaptive:
            return 0 if self.bounded else self.taps
        padding = self.padding if self.include_padding else (0,) * self.rank
        whole = all(
            (p - 1) * stride + r <= size + 2 * pad
            for p, stride, r, size, pad in zip(
                self.output_size, self.stride, self.window, self.input_size, padding, strict=True
            )
        )
        return self.taps if whole and (self.include_padding or not self.bounded) else 0

    @property
    def scale(self) -> float:
        """The factor of a window's sum, or of its average if windows differ; an lp norm's includes taps."""
        return (self.taps if self.kind == "lp" else 1.0) / (self.uniform_divisor or 1)

    @property
    def windows(self) -> tuple[int, ...]:
        """The most windows along each axis that hold one pixel of the input; under dilation one for each tap."""
        if self.adaptive:
            return tuple(map(largest_share, self.output_size, self.input_size))
        if any(d > 1 for d in self.dilation):
            return self.window
        return tuple(-(-r // stride) for r, stride in zip(self.window, self.stride, strict=True))

    @property
    def key_parts(self) -> KeyParts:
        """The problem as the autotuner's tables spell it."""
        kind, _, sizes = self.window_parts(self.window)
        kind |= {"pool": self.kind, "C_divides": largest_divisor(self.channels), "adaptive": int(self.adaptive)}
        kind |= {"index": "none" if self.index is None else dtype_name(self.index), "divisor": self.divisor}
        kind |= {"include_padding": int(self.include_padding), "norm": f"p{self.norm!r}"}
        return KeyParts(kind, {"C": self.channels}, sizes)

    @classmethod
    def from_key(cls, key: ProblemKey) -> PoolProblem:
        """The pool of a table's key. Raises KeyError, ValueError if the key is another operator's."""
        kind = dict(key.kind)
        return cls(
            kind=str(kind["pool"]),
            channels=dict(key.channels)["C"],
            adaptive=bool(kind["adaptive"]),
            index=None if kind["index"] == "none" else DTYPES[str(kind["index"])],
            divisor=int(kind["divisor"]),
            include_padding=bool(kind["include_padding"]),
            norm=float(str(kind["norm"])[1:]),
            **window_fields(key),
        )

    def describe(self) -> str:
        """One line for a person: ``max N32 C64 112x112 -> 56x56 3x3 stride 2 padding 1 bfloat16``."""
        sizes = [f"N{self.batch} C{self.channels}", joined_by_x(self.input_size), "->", joined_by_x(self.output_size)]
        kind = f"lp {self.norm:g}" if self.kind == "lp" else self.kind
        words = [f"adaptive {kind}" if self.adaptive else kind, *sizes]
        if not self.adaptive:
            words.append(joined_by_x(self.window))
            words += non_defaults(self.stride, self.padding, self.dilation)
        words.append(dtype_name(self.dtype))
        return " ".join(words)


def largest_share(size: int, parts: int) -> int:
    """The largest of the shares [floor(i * size / parts), ceil((i + 1) * size / parts)) of ``size`` pixels."""
    return (size + 2 * parts - 1 - math.gcd(size, parts)) // parts


def index_type(taps: int) -> torch.dtype:
    """The smallest type that numbers ``taps``."""
    return torch.uint8 if taps <= 255 else torch.int16 if taps <= 2**15 else torch.int32
