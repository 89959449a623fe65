"""The frozen description of one convolution, from which every kernel, plan, cache key and report is derived.

It describes the forward direction, whichever is asked for: input ``[N, C, *input_size]``, weight
``[K, C/groups, *filter_size]``, output ``[N, K, *output_size]``. A transposed convolution is the dgrad of the
convolution that maps its output to its input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fastconv.autotune import ProblemKey
from fastconv.kernels.problem.windows import (
    KeyParts,
    Windows,
    dtype_name,
    joined_by_x,
    largest_divisor,
    least_input_size,
    non_defaults,
    output_size,
    window_fields,
)

DIRECTIONS = ("fprop", "dgrad", "wgrad")


@dataclass(frozen=True)
class ConvProblem(Windows):
    """One convolution. Sizes have ``rank`` entries, outermost axis first; ``padding`` holds the leading sides."""

    batch: int
    in_channels: int
    out_channels: int
    groups: int
    input_size: tuple[int, ...]
    filter_size: tuple[int, ...]
    output_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    dtype: torch.dtype

    @property
    def taps(self) -> int:
        return math.prod(self.filter_size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.batch, self.in_channels, *self.input_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.filter_size)

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.batch, self.out_channels, *self.output_size)

    @property
    def flops(self) -> int:
        """Multiplications and additions, padding included as in PyTorch's counter; the same in each direction."""
        return 2 * self.output_pixels * self.out_channels * (self.in_channels // self.groups) * self.taps

    @property
    def bytes(self) -> int:
        """Bytes that must move when each operand is read or written once; the same in each direction."""
        elements = math.prod(self.input_shape) + math.prod(self.weight_shape) + math.prod(self.output_shape)
        return elements * self.dtype.itemsize

    @cached_property
    def as_rank3(self) -> ConvProblem:
        """The same convolution in rank 3, with leading axes of size one: kernels are launched with it."""
        return replace(self, **self.rank3_fields("filter_size"))

    @cached_property
    def phases(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(gcd of dilation and stride, inverse of dilation / gcd modulo stride / gcd) by axis, for `phase_walk`."""
        gcds = tuple(map(math.gcd, self.dilation, self.stride))
        axes = zip(self.dilation, self.stride, gcds, strict=True)
        return gcds, tuple(pow(d // g, -1, s // g) if s > g else 0 for d, s, g in axes)

    def padded(self, direction: str) -> bool:
        """Whether a tap of a pixel can fall outside the operand that ``direction`` gathers from."""
        if direction == "dgrad":
            # output_padding may exceed the stride under dilation, so even a single tap can miss.
            return (
                self.taps > 1
                or any(self.padding)
                or any(map(lambda h, s, p: (h - 1) // s >= p, self.input_size, self.stride, self.output_size))
            )
        return self.leaves_input(self.filter_size)

    @property
    def key_parts(self) -> KeyParts:
        """The problem as the autotuner's tables spell it."""
        kind, _, sizes = self.window_parts(self.filter_size)
        # Channels of another divisor have loads of another width, and so another kernel.
        divisors = {"C_divides": largest_divisor(self.in_channels), "K_divides": largest_divisor(self.out_channels)}
        channels = {"C": self.in_channels, "K": self.out_channels}
        return KeyParts({**kind, "groups": self.groups, **divisors}, channels, sizes)

    @classmethod
    def from_key(cls, key: ProblemKey) -> ConvProblem:
        """The convolution of a table's key. Raises KeyError, ValueError if the key is another operator's."""
        kind, channels, fields = dict(key.kind), dict(key.channels), window_fields(key)
        return cls(
            in_channels=channels["C"],
            out_channels=channels["K"],
            groups=int(kind["groups"]),
            filter_size=fields.pop("window"),
            **fields,
        )

    def describe(self) -> str:
        """One line for a person: ``N32 C64 56x56 -> K128 3x3 stride 2 padding 1 bfloat16``."""
        words = [f"N{self.batch} C{self.in_channels} {joined_by_x(self.input_size)} -> K{self.out_channels}"]
        words += [joined_by_x(self.filter_size), *non_defaults(self.stride, self.padding, self.dilation)]
        if self.groups > 1:
            words.append(f"groups {self.groups}")
        words.append(dtype_name(self.dtype))
        return " ".join(words)


def conv_problem(
    input_shape: Sequence[int], weight_shape: Sequence[int], bias_shape: Sequence[int] | None, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, dtype: torch.dtype,
) -> ConvProblem:  # fmt: skip
    """The problem of ``conv(input, weight, bias)``. ``padding`` holds the leading sides, then the trailing ones.

    Raises RuntimeError, as torch.nn.functional does, naming the shapes, if the arguments do not fit together.
    """
    rank = len(weight_shape) - 2
    check_arguments(weight_shape, bias_shape, 0, stride, padding, dilation, groups)
    _check_rank(f"conv{rank}d", rank, input_shape)
    if input_shape[1] != weight_shape[1] * groups:
        raise RuntimeError(
            f"Given groups={groups}, weight of size {list(weight_shape)}, expected input{list(input_shape)} to have "
            f"{weight_shape[1] * groups} channels, but got {input_shape[1]} channels instead"
        )
    if any(size <= 0 for size in input_shape[2:]):
        raise RuntimeError(f"Only a zero batch is supported, but got input of size: {list(input_shape)}")
    before, after = padding[:rank], padding[rank:]
    sizes = tuple(
        output_size(*axis)
        for axis in zip(
            input_shape[2:], weight_shape[2:], stride, map(sum, zip(before, after, strict=True)), dilation, strict=True
        )
    )
    if any(size <= 0 for size in sizes):
        padded = " x ".join(str(h + b + a) for h, b, a in zip(input_shape[2:], before, after, strict=True))
        extent = " x ".join(str(d * (r - 1) + 1) for r, d in zip(weight_shape[2:], dilation, strict=True))
        raise RuntimeError(
            f"Calculated padded input size per channel: ({padded}). Kernel size: ({extent}). Kernel size can't be "
            f"greater than actual input size (input {list(input_shape)}, weight {list(weight_shape)})"
        )
    return ConvProblem(
        batch=input_shape[0],
        in_channels=input_shape[1],
        out_channels=weight_shape[0],
        groups=groups,
        input_size=tuple(input_shape[2:]),
        filter_size=tuple(weight_shape[2:]),
        output_size=sizes,
        stride=tuple(stride),
        padding=tuple(before),
        dilation=tuple(dilation),
        dtype=dtype,
    )


def conv_transpose_problem(
    input_shape: Sequence[int], weight_shape: Sequence[int], bias_shape: Sequence[int] | None, stride: Sequence[int],
    padding: Sequence[int], output_padding: Sequence[int], dilation: Sequence[int], groups: int, dtype: torch.dtype,
) -> ConvProblem:  # fmt: skip
    """The problem whose dgrad is ``conv_transpose(input, weight, bias)``: its output is the transposed one's input.

    Raises RuntimeError, as torch.nn.functional does, naming the shapes, if the arguments do not fit together.
    """
    rank = len(weight_shape) - 2
    check_arguments(weight_shape, bias_shape, 1, stride, padding, dilation, groups)
    _check_rank(f"conv_transpose{rank}d", rank, input_shape)
    if input_shape[1] != weight_shape[0]:
        raise RuntimeError(
            f"Given transposed=1, weight of size {list(weight_shape)}, expected input{list(input_shape)} to have "
            f"{weight_shape[0]} channels, but got {input_shape[1]} channels instead"
        )
    if any(extra < 0 for extra in output_padding):
        raise RuntimeError(f"negative output_padding is not supported, but got output_padding={list(output_padding)}")
    if any(extra >= max(s, d) for extra, s, d in zip(output_padding, stride, dilation, strict=True)):
        raise RuntimeError(
            f"output padding must be smaller than either stride or dilation, but got output_padding="
            f"{list(output_padding)}, stride={list(stride)}, dilation={list(dilation)} for input {list(input_shape)}, "
            f"weight {list(weight_shape)}"
        )
    sizes = tuple(
        least_input_size(p, r, s, 2 * pad, d) + extra
        for p, s, pad, d, r, extra in zip(
            input_shape[2:], stride, padding, dilation, weight_shape[2:], output_padding, strict=True
        )
    )
    if any(size <= 0 for size in sizes) or any(size <= 0 for size in input_shape[2:]):
        raise RuntimeError(
            f"Given input size per channel: {list(input_shape[2:])}. Calculated output size per channel: "
            f"{list(sizes)}. Output size is too small (input {list(input_shape)}, weight {list(weight_shape)})"
        )
    return ConvProblem(
        batch=input_shape[0],
        in_channels=weight_shape[1] * groups,
        out_channels=weight_shape[0],
        groups=groups,
        input_size=sizes,
        filter_size=tuple(weight_shape[2:]),
        output_size=tuple(input_shape[2:]),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        dtype=dtype,
    )


def _check_rank(name: str, rank: int, input_shape: Sequence[int]) -> None:
    if len(input_shape) != rank + 2:
        raise RuntimeError(
            f"Expected {rank + 1}D (unbatched) or {rank + 2}D (batched) input to {name}, "
            f"but got input of size: {list(input_shape)}"
        )


def check_arguments(
    weight_shape: Sequence[int], bias_shape: Sequence[int] | None, bias_axis: int, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> None:  # fmt: skip
    """Raise what torch raises before it looks at the input; ``bias_axis``: the weight's axis of output channels."""
    if groups <= 0:
        raise RuntimeError(f"non-positive groups is not supported, but got groups={groups}")
    if any(value <= 0 for value in stride):
        raise RuntimeError(f"non-positive stride is not supported, but got stride={list(stride)}")
    # Trailing sides may be negative, to make a transposed convolution's backward fit.
    if any(value < 0 for value in padding[: len(stride)]):
        raise RuntimeError(f"negative padding is not supported, but got padding={list(padding)}")
    if any(value <= 0 for value in dilation):
        raise RuntimeError(f"dilation should be greater than zero, but got dilation={list(dilation)}")
    if any(value <= 0 for value in weight_shape):
        raise RuntimeError(f"weight should have at least one element in each dimension, but got {list(weight_shape)}")
    if weight_shape[0] % groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
            f"but got weight of size {list(weight_shape)} instead"
        )
    channels = weight_shape[0] if bias_axis == 0 else weight_shape[1] * groups
    if bias_shape is not None and tuple(bias_shape) != (channels,):
        raise RuntimeError(
            f"Given weight of size {list(weight_shape)}, expected bias to be 1-dimensional with {channels} elements, "
            f"but got bias of size {list(bias_shape)} instead"
        )
