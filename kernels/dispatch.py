"""Which kernel family serves a call, and the launches it takes: one ordered list for each direction.

The first family without a reason against it is taken; where every family has one, PyTorch's own op runs and the
reason is what ``explain`` shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch

from fastconv.autotune import Choice, Gpu, gpu_named
from fastconv.autotune import gpus as gpu_table
from fastconv.autotune.cost_model import predict_pass
from fastconv.kernels.families import (
    batch_norm,  # noqa: F401 (which declares its spaces)
    conv_depthwise,
    conv_depthwise_wgrad,
    conv_gather,
    conv_gather_wgrad,
    conv_gemm,
    conv_pixels,
    conv_pixels_wgrad,
    conv_row_boxes,
    conv_rows,
    conv_rows_wgrad,
    conv_spatial,
    pool_gradient,
    pool_window,
)
from fastconv.kernels.families.family import DENSE, Family, Layout, named_family, only, why_not_gpu
from fastconv.kernels.jit.epilogue import PLAIN
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.descriptor import ALIGNMENT, bulk, pitched
from fastconv.kernels.launch.launch import Launch, decided
from fastconv.kernels.problem.conv import DIRECTIONS, ConvProblem
from fastconv.kernels.problem.layout import pixel_strides
from fastconv.kernels.problem.pool import PoolProblem
from fastconv.kernels.tiles.autotuned import ADAPTER, predicted, version_of
from fastconv.kernels.tiles.shapes import declared_spaces

# Spaces are known once their families are imported, which this module does.
__all__ = [
    "ADAPTER", "FAMILIES", "Plan", "declared_spaces", "is_forced", "only_family", "plan", "target", "use_target",
    "version_of",
]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How one call is served; ``family`` is "pytorch" where no kernel is, and ``reasons`` says why each one is not."""

    direction: str
    problem: ConvProblem | PoolProblem
    family: str
    choice: Choice | None
    launches: tuple[Launch, ...]
    reasons: tuple[tuple[str, str], ...]
    slower: bool = False  # a kernel serves it, but PyTorch's own op was measured faster
    layout: Layout = DENSE  # as the launches take it: another one's operands are copied to it first


FAMILIES: dict[str, tuple[Family, ...]] = {
    "fprop": (
        conv_depthwise.FAMILY,
        conv_gather.GROUPED,
        conv_row_boxes.FAMILY,
        conv_rows.FAMILY,
        conv_gemm.FAMILY,
        conv_pixels.FAMILY,
        conv_spatial.FAMILY,
        conv_gather.FAMILY,
    ),
    # An image's gradient is hardly ever asked for: it has no rows.
    "dgrad": (
        conv_depthwise.FAMILY,
        conv_gather.GROUPED,
        conv_gemm.FAMILY,
        conv_pixels.FAMILY,
        conv_spatial.FAMILY,
        conv_gather.FAMILY,
    ),
    "wgrad": (
        conv_depthwise_wgrad.FAMILY,
        conv_gather_wgrad.GROUPED,
        conv_rows_wgrad.FAMILY,
        conv_gemm.WGRAD,
        conv_pixels_wgrad.FAMILY,
        conv_gather_wgrad.FAMILY,
    ),
    "forward": (pool_window.FAMILY,),
    "backward": (pool_gradient.FAMILY,),
}


def plan(direction: str, problem: ConvProblem | PoolProblem, gpu: Gpu, layout: Layout = DENSE) -> Plan:
    """How ``gpu`` serves one direction of ``problem``: family, tile, launches. Needs neither tensors nor a GPU."""
    reasons: list[tuple[str, str]] = []
    only = named_family()
    old = why_not_gpu(gpu)
    if old is not None:
        return decided(Plan(direction, problem, "pytorch", None, (), (("every family", old),)))
    for family in FAMILIES[direction]:
        if only not in (None, family.name):
            continue
        laid, reason = _fitted(family, direction, problem, gpu, layout)
        if reason is None:
            choice, launches = family.plan(direction, problem, gpu, laid)
            # (What was measured had no epilogue; and what a pool keeps for backward PyTorch's own cannot read.)
            if choice.pytorch_faster and direction in DIRECTIONS and layout.epilogue == PLAIN:
                reasons.append((family.name, "PyTorch's own op was measured faster"))
                return decided(Plan(direction, problem, "pytorch", None, (), tuple(reasons), slower=True))
            return decided(Plan(direction, problem, family.name, choice, launches, tuple(reasons), layout=laid))
        reasons.append((family.name, reason))
    return decided(Plan(direction, problem, "pytorch", None, (), tuple(reasons)))


def _fitted(family: Family, direction: str, problem: Any, gpu: Gpu, layout: Layout) -> tuple[Layout, str | None]:
    """The layout as ``family`` would take it, and the reason against it, or None."""
    copied: list[int] = []
    if family.by_bulk_copy:
        layout, copied = _with_room(family, direction, problem, layout)
    reason = family.why_not(direction, problem, gpu, layout)
    # Asked for by name it is to be measured, whatever is predicted.
    if reason is None and copied and named_family() is None:
        reason = _copies_slower(family, direction, problem, gpu, layout, copied)
    return layout, reason


def _with_room(family: Family, direction: str, problem: ConvProblem, layout: Layout) -> tuple[Layout, list[int]]:
    """How operands lie that bulk copies can step through: where channels are no multiple of 16 bytes and pixels lie as
    close as these, with room behind each. And the bytes that each copy moves which that takes."""
    dtype, shapes = problem.dtype, (problem.as_rank3.input_shape, problem.as_rank3.output_shape)
    if direction == "dgrad":
        shapes = shapes[::-1]

    def odd(shape: tuple[int, ...]) -> bool:
        return shape[1] * dtype.itemsize % ALIGNMENT > 0

    strides, moved = {"source": layout.source_strides, "other": layout.other_strides}, {}
    for name, shape in zip(strides, shapes, strict=True):
        if name in family.by_bulk_copy and odd(shape) and not bulk(dtype, shape, strides[name]):
            strides[name], moved[name] = pixel_strides(shape, pitched(shape, dtype)), prod(shape)
    if direction != "wgrad" and odd(problem.weight_shape):
        moved["weight"] = prod(problem.weight_shape)
    if "other" in moved and layout.epilogue.residual:
        moved["residual"] = moved["other"]
    copied = [2 * dtype.itemsize * count for name, count in moved.items() if name not in layout.precopied]
    return replace(layout, source_strides=strides["source"], other_strides=strides["other"]), copied


def _copies_slower(
    family: Family, direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout, copied: Sequence[int]
) -> str | None:
    """The cost model's reason to gather if a family of bulk copies is to have operands copied first, each of which
    moves so many bytes, or its result afterwards: all together is predicted to take longer."""
    gather = conv_gather_wgrad.FAMILY if direction == "wgrad" else conv_gather.FAMILY
    copying = sum(predict_pass(moved, gpu) for moved in copied)
    family_seconds, gather_seconds = (
        predicted(it.candidates(direction, problem, gpu, layout)) for it in (family, gather)
    )
    ratio = (family_seconds + copying) / gather_seconds
    if ratio <= 1:
        return None
    return f"with {copying * 1e6:.0f} us of copies predicted to take {ratio:.2f} times as long as a gather"


_forced: list[Gpu] = []


def is_forced() -> bool:
    """Whether plans are made for a GPU that was named, whatever the device."""
    return bool(_forced)


def target(device: torch.device) -> Gpu:
    """What plans are made for on ``device``: its GPU, or Triton's interpreter."""
    if _forced:
        return _forced[-1]
    if interpreter.interpreting():
        return gpu_table.INTERPRETER
    return _device_gpu(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _device_gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    known = gpu_named(properties.name, properties.multi_processor_count)
    if known is not None:
        return known
    return gpu_table.describe(
        properties.name,
        properties.major * 10 + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        properties.L2_cache_size,
        None,
    )


@contextlib.contextmanager
def only_family(name: str) -> Iterator[None]:
    """Let no other family serve a call inside the block, on any thread: to measure or to test one by itself."""
    known = sorted({family.name for families in FAMILIES.values() for family in families})
    if name not in known:
        raise ValueError(f"no family {name!r} among {', '.join(known)}")
    with only(name):
        yield


@contextlib.contextmanager
def use_target(gpu: Gpu) -> Iterator[None]:
    """Plan for ``gpu`` inside the block, whatever the device: how every family runs in the interpreter."""
    _forced.append(gpu)
    try:
        yield
    finally:
        _forced.pop()
