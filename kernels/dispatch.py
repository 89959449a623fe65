"""Which kernel family serves a call, and the launches it takes: one ordered list for each direction.

The first family without a reason against it serves the call. If every family has one, PyTorch's own op does and
``explain`` shows the reasons.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch

from fastconv.autotune import Choice, Gpu, gpu_named
from fastconv.autotune import gpus as gpu_table
from fastconv.autotune.cost_model import predict_pass
from fastconv.kernels.families import (
    batch_norm,  # noqa: F401 (declares its spaces)
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
from fastconv.kernels.launch.device import here
from fastconv.kernels.launch.launch import Launch, decided
from fastconv.kernels.problem.conv import DIRECTIONS, ConvProblem
from fastconv.kernels.problem.layout import pixel_strides
from fastconv.kernels.problem.pool import PoolProblem
from fastconv.kernels.tiles.autotuned import ADAPTER, predicted, version_of
from fastconv.kernels.tiles.shapes import declared_spaces

# `declared_spaces` and `version_of` know the spaces of imported families; this module imports all of them.
__all__ = [
    "ADAPTER", "FAMILIES", "Plan", "declared_spaces", "is_forced", "only_family", "plan", "target", "use_target",
    "version_of",
]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How one call is served; ``family`` is "pytorch" if no kernel serves it, and ``reasons`` says why of each family
    that was asked before."""

    direction: str
    problem: ConvProblem | PoolProblem
    family: str
    choice: Choice | None
    launches: tuple[Launch, ...]
    reasons: tuple[tuple[str, str], ...]
    slower: bool = False  # a kernel serves it, but PyTorch's own op was measured faster
    layout: Layout = DENSE  # what the launches expect; operands that differ from it are copied first


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
    # No rows: hardly any program asks for an image's gradient.
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
        conv_gemm.FAMILY_WGRAD,
        conv_pixels_wgrad.FAMILY,
        conv_gather_wgrad.FAMILY,
    ),
    "forward": (pool_window.FAMILY,),
    "backward": (pool_gradient.FAMILY,),
}


def plan(direction: str, problem: ConvProblem | PoolProblem, gpu: Gpu, layout: Layout = DENSE) -> Plan:
    """How ``gpu`` serves one direction of ``problem``: family, tile, launches. Needs neither tensors nor a GPU."""
    reasons: list[tuple[str, str]] = []
    named, reason = named_family(), why_not_gpu(gpu)
    if reason is not None:
        return decided(Plan(direction, problem, "pytorch", None, (), (("every family", reason),)))
    for family in FAMILIES[direction]:
        if named not in (None, family.name):
            continue
        laid, reason = _layout_for(family, direction, problem, gpu, layout)
        if reason is None:
            choice, launches = family.plan(direction, problem, gpu, laid)
            # What was measured had no epilogue. PyTorch's backward of a max pool cannot read the taps that ours keeps.
            if choice.pytorch_faster and direction in DIRECTIONS and layout.epilogue == PLAIN:
                reasons.append((family.name, "PyTorch's own op was measured faster"))
                return decided(Plan(direction, problem, "pytorch", None, (), tuple(reasons), slower=True))
            return decided(Plan(direction, problem, family.name, choice, launches, tuple(reasons), layout=laid))
        reasons.append((family.name, reason))
    return decided(Plan(direction, problem, "pytorch", None, (), tuple(reasons)))


def _layout_for(family: Family, direction: str, problem: Any, gpu: Gpu, layout: Layout) -> tuple[Layout, str | None]:
    """(the layout that the launches of ``family`` expect, the reason against the family or None)."""
    copies: list[int] = []
    if family.by_bulk_copy:
        layout, copies = _padded_layout(family, direction, problem, layout)
    reason = family.why_not(direction, problem, gpu, layout)
    # A family that is asked for by name is measured, whatever is predicted.
    if reason is None and copies and named_family() is None:
        reason = _why_not_copies(family, direction, problem, gpu, layout, copies)
    return layout, reason


def _padded_layout(family: Family, direction: str, problem: ConvProblem, layout: Layout) -> tuple[Layout, list[int]]:
    """(layout, bytes that each copy moves): an operand that bulk copies cannot step through gets each pixel padded to
    16 bytes, by a copy."""
    dtype, shapes = problem.dtype, (problem.as_rank3.input_shape, problem.as_rank3.output_shape)
    if direction == "dgrad":
        shapes = shapes[::-1]

    def odd(shape: tuple[int, ...]) -> bool:
        return shape[1] * dtype.itemsize % ALIGNMENT > 0

    strides, elements = {"source": layout.source_strides, "other": layout.other_strides}, {}
    for name, shape in zip(strides, shapes, strict=True):
        if name in family.by_bulk_copy and odd(shape) and not bulk(dtype, shape, strides[name]):
            strides[name], elements[name] = pixel_strides(shape, pitched(shape, dtype)), prod(shape)
    if direction != "wgrad" and odd(problem.weight_shape):
        elements["weight"] = prod(problem.weight_shape)
    if "other" in elements and layout.epilogue.residual:
        elements["residual"] = elements["other"]
    copies = [2 * dtype.itemsize * count for name, count in elements.items() if name not in layout.precopied]
    return replace(layout, source_strides=strides["source"], other_strides=strides["other"]), copies


def _why_not_copies(
    family: Family, direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout, copies: list[int]
) -> str | None:
    """Why padding ``copies`` (bytes of each) do not pay, or None: with them the family is predicted slower than the
    gather."""
    gather = conv_gather_wgrad.FAMILY if direction == "wgrad" else conv_gather.FAMILY
    seconds, gather_seconds = (predicted(it.candidates(direction, problem, gpu, layout)) for it in (family, gather))
    copying = sum(predict_pass(moved_bytes, gpu) for moved_bytes in copies)
    ratio = (seconds + copying) / gather_seconds
    if ratio <= 1:
        return None
    return f"with {copying * 1e6:.0f} us of copies predicted to take {ratio:.2f} times as long as a gather"


_forced: list[Gpu] = []


def is_forced() -> bool:
    """Whether `use_target` names the GPU that plans are made for."""
    return bool(_forced)


def target(device: torch.device) -> Gpu:
    """What plans are made for on ``device``: the GPU of `use_target`, else Triton's interpreter, else its GPU."""
    if _forced:
        return _forced[-1]
    if interpreter.interpreting():
        return gpu_table.INTERPRETER
    return _device_gpu(device.index if device.index is not None else here.current_device())


@cache
def _device_gpu(index: int | None) -> Gpu:
    properties = here.get_device_properties(index)
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
    """Let no other family serve a call inside the block, on any thread."""
    known = sorted({family.name for families in FAMILIES.values() for family in families})
    if name not in known:
        raise ValueError(f"no family {name!r} among {', '.join(known)}")
    with only(name):
        yield


@contextlib.contextmanager
def use_target(gpu: Gpu) -> Iterator[None]:
    """Plan for ``gpu`` inside the block, whatever the device; so every family runs in the interpreter."""
    _forced.append(gpu)
    try:
        yield
    finally:
        _forced.pop()
