"""What a kernel family is, and the reasons against a call that several families share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastconv.autotune import Choice, Config, Gpu
from fastconv.kernels.jit.epilogue import PLAIN, Epilogue
from fastconv.kernels.launch.launch import Launches
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import INT32_MAX, POINTER_TYPES, Strides, dense_strides
from fastconv.kernels.tiles.autotuned import Candidates, choose

Operand = tuple[tuple[int, ...], Strides]  # shape [N, C, D, H, W], pixel strides


@dataclass(frozen=True)
class Layout:
    """What the tensors of a call add to its problem. Pixel strides in elements; None: dense channels_last."""

    source_strides: Strides | None = None  # of x (fprop, wgrad) or dy (dgrad)
    other_strides: Strides | None = None  # of y (fprop), dx (dgrad) or dy (wgrad)
    bias: bool = False
    epilogue: Epilogue = PLAIN
    # Whether a convolution's dw is, and a pool's tensors are; a pool's source_strides are else those of its planes.
    channels_last: bool = True
    taps_outermost: bool = False  # a depthwise convolution's dw is [taps, K]
    starts_aligned: bool = True  # every operand starts where a bulk copy may
    precopied: tuple[str, ...] = ()  # "source", "other": copied before the launches of every family

    def operands(self, direction: str, problem: ConvProblem) -> tuple[Operand, Operand]:
        """The source and the other operand of a convolution, in rank 3."""
        shapes = problem.as_rank3.input_shape, problem.as_rank3.output_shape
        x, y = shapes[::-1] if direction == "dgrad" else shapes
        return (x, self.source_strides or dense_strides(x)), (y, self.other_strides or dense_strides(y))


DENSE = Layout()


@dataclass(frozen=True)
class Family:
    """One way to serve some directions. Its functions take (direction, problem, [config,] GPU, layout), no tensor."""

    name: str
    why_not: Callable[[str, Any, Gpu, Layout], str | None]  # the reason against a call, or None
    candidates: Callable[[str, Any, Gpu, Layout], Candidates]  # what the tile is chosen from
    launches: Callable[[str, Any, Config, Gpu, Layout], Launches]
    by_bulk_copy: tuple[str, ...] = ()  # "source", "other": the operands that bulk copies move

    def plan(self, direction: str, problem: Any, gpu: Gpu, layout: Layout) -> tuple[Choice, Launches]:
        """The tile of a call, and its launches."""
        choice = choose(self.candidates(direction, problem, gpu, layout))
        return choice, self.launches(direction, problem, choice.config, gpu, layout)


_named: list[str] = []


@contextlib.contextmanager
def only(name: str) -> Iterator[None]:
    """Let only the family ``name`` serve calls inside the block, on any thread."""
    _named.append(name)
    try:
        yield
    finally:
        _named.pop()


def named_family() -> str | None:
    """The family that calls ask for by name; None: any may serve."""
    return _named[-1] if _named else None


def fp32_precision(dtype: torch.dtype) -> str:
    """The precision of products of ``dtype``: "tf32" or "ieee". float32 follows PyTorch's setting for convolutions."""
    if dtype is not torch.float32:
        return "ieee"
    setting = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if setting == "tf32" else "ieee"


def rounds_in_registers(dtype: torch.dtype, gpu: Gpu) -> bool:
    """Whether a kernel that loads by pointers rounds the factors of TF32 products: where tensor cores read registers.

    Those of Hopper and Blackwell read shared memory. To round there, a step would take its factors to registers and
    back and wait for that: 443 instructions for 366 in dgrad's loop, none of them beside the products. What they ignore
    makes a sum of one sign smaller by 2^-10.5 on average, which scales a gradient as a learning rate would.
    """
    return fp32_precision(dtype) == "tf32" and not gpu.bulk


def why_not_gpu(gpu: Gpu) -> str | None:
    """Why no kernel runs on ``gpu``, or None."""
    if gpu.interpreted or gpu.arch >= 80:
        return None
    return f"the {gpu.name}'s compute capability {gpu.arch / 10:.1f} is below 8.0"


def why_not_dtype(dtype: torch.dtype) -> str | None:
    return None if dtype in POINTER_TYPES else f"{dtype} is not one of float32, float16, bfloat16"


def why_not_sizes(problem: ConvProblem) -> str | None:
    """Why no convolution kernel can number the problem's pixels and weights, or None."""
    # Pixels are numbered in 32 bits, with room for the last tile.
    if max(problem.input_pixels, problem.output_pixels) > INT32_MAX - 2**16:
        return "more than 2^31 pixels"
    if problem.out_channels * (problem.in_channels // problem.groups) * problem.taps > INT32_MAX:
        return "a weight of more than 2^31 elements"
    return why_not_dtype(problem.dtype)


def why_not_groups(problem: ConvProblem) -> str | None:
    """`why_not_sizes` for kernels whose grid has groups as its second axis."""
    if problem.groups > 65535:
        return f"{problem.groups} groups are more than a grid's second axis holds"
    return why_not_sizes(problem)


def why_not_bulk_copies(problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    """Why bulk copies cannot bring the problem's operands to the tensor cores, or None."""
    if not gpu.bulk:
        return "no tensor cores that read what bulk copies bring"
    if not layout.starts_aligned:
        return "an operand that does not begin at a multiple of 16 bytes"
    if problem.dtype is torch.float32 and fp32_precision(problem.dtype) == "ieee":
        return "fp32 products outside the tensor cores"
    return why_not_sizes(problem)
