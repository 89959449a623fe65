"""Which kernel family serves a call, and the launches it takes: one ordered list for each direction.

The first family without a reason against it is taken; where every family has one, PyTorch's own op runs and the
reason is what ``explain`` shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any

import torch

from fastconv.autotune import Choice, Gpu, gpu_named
from fastconv.autotune import gpus as gpu_table
from fastconv.autotune.cost_model import MAX_WORKSPACE
from fastconv.kernels import mend
from fastconv.kernels.conv_depthwise import MAX_ROW, MAX_STRIDE, conv_depthwise, conv_depthwise_wgrad
from fastconv.kernels.conv_gather import conv_gather, packed_groups
from fastconv.kernels.conv_gemm import conv_gemm, conv_gemm_wgrad, gemm_unfit
from fastconv.kernels.conv_pixels import conv_pixels
from fastconv.kernels.conv_pixels_wgrad import conv_pixels_wgrad
from fastconv.kernels.conv_row_boxes import box_form, conv_row_boxes
from fastconv.kernels.conv_rows import Rows, conv_rows, conv_rows_wgrad, row_form
from fastconv.kernels.conv_spatial import conv_spatial, spatial_unfit
from fastconv.kernels.conv_wgrad import conv_wgrad
from fastconv.kernels.descriptor import ALIGNMENT, bulk, pitched
from fastconv.kernels.epilogue import PLAIN, Epilogue
from fastconv.kernels.launch import Launch, decided
from fastconv.kernels.layout import INT32_MAX, POINTER_TYPES, Strides, dense_strides, pixel_strides
from fastconv.kernels.pool_gradient import pool_backward
from fastconv.kernels.pool_window import pool_forward
from fastconv.kernels.problem import DIRECTIONS, POOL_DIRECTIONS, ConvProblem, PoolProblem
from fastconv.kernels.tiles import (
    copies_slower,
    depthwise_tile,
    depthwise_wgrad_tile,
    few_images,
    gather_tile,
    gemm_tile,
    gemm_wgrad_tile,
    pixels_slower,
    pixels_tile,
    pixels_wgrad_tile,
    pool_tile,
    predicted_faster,
    row_boxes_slower,
    row_boxes_tile,
    rows_tile,
    rows_wgrad_tile,
    spatial_tile,
    wgrad_tile,
)


@dataclass(frozen=True)
class Layout:
    """What the tensors of a call add to its problem. Pixel strides in elements, None: dense channels_last."""

    source: Strides | None = None  # of x (fprop, wgrad) or dy (dgrad)
    other: Strides | None = None  # of y (fprop), dx (dgrad) or dy (wgrad)
    bias: bool = False
    epilogue: Epilogue = PLAIN
    channels_last: bool = True  # of dw; of a pool's tensors, else source holds the strides of planes
    packed: bool = False  # dw is [taps, K]
    aligned: bool = True  # every operand starts where a bulk copy may
    copied: tuple[str, ...] = ()  # "source", "other": what is copied whichever family serves


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
    layout: Layout = Layout()  # as the launches take it: another one's operands are copied to it first


@dataclass(frozen=True)
class Family:
    name: str
    unsupported: Callable[[str, Any, Gpu, Layout], str | None]  # of a problem a reason, or None
    plan: Callable[[str, Any, Gpu, Layout], tuple[Choice, tuple[Launch, ...]]]
    moved: tuple[str, ...] = ()  # a layout's fields whose operands bulk copies move


def too_old(gpu: Gpu) -> str | None:
    """Why no kernel runs on a GPU, or None."""
    if gpu.interpreted or gpu.arch >= 80:
        return None
    return f"the {gpu.name}'s compute capability {gpu.arch / 10:.1f} is below 8.0"


def _unserved(dtype: torch.dtype) -> str | None:
    return None if dtype in POINTER_TYPES else f"{dtype} is not one of float32, float16, bfloat16"


def _convolution_unserved(problem: ConvProblem, gpu: Gpu) -> str | None:
    # Pixels are numbered in 32 bits, with room for the last tile.
    if max(problem.input_pixels, problem.output_pixels) > INT32_MAX - 2**16:
        return "more than 2^31 pixels"
    if problem.out_channels * (problem.in_channels // problem.groups) * problem.taps > INT32_MAX:
        return "a weight of more than 2^31 elements"
    return _unserved(problem.dtype)


def _gather_unsupported(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    if problem.groups > 65535:
        return f"{problem.groups} groups are more than a grid's second axis holds"
    return _convolution_unserved(problem, gpu)


def _grouped_unsupported(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    if problem.groups == 1:
        return "one group"
    if problem.in_channels == problem.groups:
        return "one channel a group"
    if packed_groups(direction, problem) == 1:
        widths = problem.in_channels // problem.groups, problem.out_channels // problem.groups
        return f"{problem.groups} groups of {widths[0]} to {widths[1]} channels: no two share a tile"
    return _gather_unsupported(direction, problem, gpu, layout)


def _plan_gather(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> tuple[Choice, tuple[Launch, ...]]:
    return _plan_packed(direction, problem, gpu, layout, 1)


def _plan_grouped(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> tuple[Choice, tuple[Launch, ...]]:
    return _plan_packed(direction, problem, gpu, layout, packed_groups(direction, problem))


def _plan_packed(
    direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout, pack: int
) -> tuple[Choice, tuple[Launch, ...]]:
    precision = fp32_precision(problem.dtype)
    source, other = layout.source, layout.other
    if direction == "wgrad":
        choice = wgrad_tile(problem, precision, gpu, pack)
        return choice, conv_wgrad(problem, choice.config, precision, source, other, layout.channels_last, pack)
    choice = gather_tile(direction, problem, precision, gpu, pack)
    config = choice.config
    bias, epilogue = layout.bias, layout.epilogue
    return choice, conv_gather(direction, problem, config, precision, source, other, bias, epilogue, pack)


def _pixels_wgrad_unsupported(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    if not gpu.bulk:
        return "no tensor cores that read what bulk copies bring"
    if problem.dtype is torch.float32:
        return "tensor cores do not transpose float32 in shared memory"
    c, k = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    if problem.groups > 1 and (c % 8 or k % 8):
        return f"groups of {c} to {k} channels do not begin at multiples of 16 bytes"
    if problem.groups > 1 and min(c, k) < 32:
        return f"groups of {c} to {k} channels leave most of a tile empty"
    if problem.batch < 16 and not few_images(problem):
        return f"{problem.batch} images leave most of a step empty"
    views = (problem.lifted.input_shape, layout.source), (problem.lifted.output_shape, layout.other)
    if not layout.aligned or not all(bulk(problem.dtype, *view) for view in views):
        return "operands whose pixels do not lie at multiples of 16 bytes"
    unfit = _gather_unsupported(direction, problem, gpu, layout)
    # Asked for by name it is to be measured, whatever is predicted.
    if unfit is not None or problem.batch >= 16 or single_family() == "pixels":
        return unfit
    return pixels_slower(direction, problem, fp32_precision(problem.dtype), gpu)


def _pixels_unsupported(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    reason = _unfit_for_bulk_copies(problem, gpu, layout)
    if reason is not None:
        return reason
    if direction == "dgrad" and problem.dtype is torch.float32:
        return "tensor cores do not transpose float32 in shared memory"
    c, k = problem.in_channels // problem.groups, problem.out_channels // problem.groups
    if problem.groups > 1 and (c % 64 or k % 64):
        return f"groups of {c} to {k} channels fill no tile"
    if problem.batch < 16:
        return f"{problem.batch} images leave most of a box empty"
    shapes = problem.lifted.input_shape, problem.lifted.output_shape
    views = zip(shapes[:: -1 if direction == "dgrad" else 1], (layout.source, layout.other), strict=True)
    if not all(bulk(problem.dtype, *view) for view in views):
        return "operands whose pixels do not lie at multiples of 16 bytes"
    precision = fp32_precision(problem.dtype)
    unfit = _gather_unsupported(direction, problem, gpu, layout)
    # Asked for by name it is to be measured, whatever is predicted.
    return unfit or (None if single_family() == "pixels" else pixels_slower(direction, problem, precision, gpu))


def _plan_pixels(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> tuple[Choice, tuple[Launch, ...]]:
    precision = fp32_precision(problem.dtype)
    choice = pixels_tile(direction, problem, precision, gpu)
    source, other, bias, epilogue = layout.source, layout.other, layout.bias, layout.epilogue
    return choice, (conv_pixels(direction, problem, choice.config, precision, source, other, bias, epilogue),)


def _plan_pixels_wgrad(
    direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout
) -> tuple[Choice, tuple[Launch, ...]]:
    choice = pixels_wgrad_tile(problem, gpu)
    return choice, conv_pixels_wgrad(problem, choice.config, layout.source, layout.other, layout.channels_last)


def _unfit_for_bulk_copies(problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    if not gpu.bulk:
        return "no tensor cores that read what bulk copies bring"
    if not layout.aligned:
        return "an operand that does not begin at a multiple of 16 bytes"
    if problem.dtype is torch.float32 and fp32_precision(problem.dtype) == "ieee":
        return "fp32 products outside the tensor cores"
    return _convolution_unserved(problem, gpu)


def _gemm_unsupported(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    unfit = gemm_unfit(direction, problem, layout.source, layout.other)
    return unfit or _unfit_for_bulk_copies(problem, gpu, layout)


def _plan_gemm(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> tuple[Choice, tuple[Launch, ...]]:
    if direction == "wgrad":
        choice = gemm_wgrad_tile(problem, gpu)
        return choice, conv_gemm_wgrad(problem, choice.config, layout.source, layout.other)
    precision, bias, epilogue = fp32_precision(problem.dtype), layout.bias, layout.epilogue
    choice = gemm_tile(direction, problem, precision, gpu)
    return choice, conv_gemm(direction, problem, choice.config, precision, gpu, layout.source, bias, epilogue)


def _spatial_unsupported(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    unfit = spatial_unfit(direction, problem, layout.source) or _unfit_for_bulk_copies(problem, gpu, layout)
    if unfit is not None or single_family() == "spatial":
        return unfit
    if not predicted_faster(direction, problem, fp32_precision(problem.dtype), gpu):
        return "tiles of rows and rectangles that fit the image badly: predicted slower than the gather's"
    return unfit


def _plan_spatial(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> tuple[Choice, tuple[Launch, ...]]:
    precision = fp32_precision(problem.dtype)
    choice = spatial_tile(direction, problem, precision, gpu)
    return choice, conv_spatial(
        direction, problem, choice.config, precision, layout.source, layout.bias, layout.epilogue
    )


def _rows_unsupported(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    form = row_form(problem, layout.source)
    if isinstance(form, str):
        return form
    if problem.dtype is torch.float32 and fp32_precision(problem.dtype) == "ieee":
        return "fp32 products outside the tensor cores"
    if direction == "wgrad" and 4 * form.columns * prod(problem.weight_shape) > MAX_WORKSPACE:
        return "a weight whose gradient, of each column of outputs, is more than a workspace holds"
    return _gather_unsupported(direction, problem, gpu, layout)


def _plan_rows(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> tuple[Choice, tuple[Launch, ...]]:
    precision, source, other = fp32_precision(problem.dtype), layout.source, layout.other
    form = row_form(problem, source)
    assert isinstance(form, Rows)
    if direction == "wgrad":
        choice = rows_wgrad_tile(problem, form, precision, gpu)
        return choice, conv_rows_wgrad(problem, form, choice.config, precision, source, other, layout.channels_last)
    choice = rows_tile(problem, form, precision, gpu)
    return choice, conv_rows(problem, form, choice.config, precision, source, other, layout.bias, layout.epilogue)


def _row_boxes_unsupported(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    form = box_form(problem, layout.source)
    if isinstance(form, str):
        return form
    if problem.dtype is torch.float32:
        return "float32, in which it is untried"
    if problem.batch < 16:
        return f"{problem.batch} images leave most of a box empty"
    if not bulk(problem.dtype, problem.lifted.output_shape, layout.other):
        return "a result whose pixels do not lie at multiples of 16 bytes"
    unfit = _unfit_for_bulk_copies(problem, gpu, layout)
    # Asked for by name it is to be measured, whatever is predicted.
    if unfit is not None or single_family() == "row_boxes":
        return unfit
    return row_boxes_slower(problem, form, row_form(problem, layout.source), gpu)


def _plan_row_boxes(
    direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout
) -> tuple[Choice, tuple[Launch, ...]]:
    form = box_form(problem, layout.source)
    assert isinstance(form, Rows)
    choice = row_boxes_tile(problem, form, gpu)
    source, other, bias, epilogue = layout.source, layout.other, layout.bias, layout.epilogue
    return choice, conv_row_boxes(problem, form, choice.config, source, other, bias, epilogue)


def _pool_unsupported(direction: str, problem: PoolProblem, gpu: Gpu, layout: Layout) -> str | None:
    # Rows are numbered in 32 bits, with room for the last tile: pixels, or the lines of planes.
    lines = problem.batch * problem.channels * max(prod(problem.input_size[:-1]), prod(problem.output_size[:-1]))
    if max(problem.input_pixels, problem.output_pixels, lines) > INT32_MAX - 2**16:
        return "more than 2^31 pixels"
    # Where a share begins is worked out in 32 bits.
    if problem.adaptive and any(
        (h + 1) * (p + 1) > INT32_MAX for h, p in zip(problem.input_size, problem.output_size, strict=True)
    ):
        return "an adaptive axis whose sizes multiply to more than 2^31"
    return _unserved(problem.dtype)


def _plan_pool(direction: str, problem: PoolProblem, gpu: Gpu, layout: Layout) -> tuple[Choice, tuple[Launch, ...]]:
    choice = pool_tile(direction, problem, layout.channels_last, gpu)
    size = problem.input_size if direction == "forward" else problem.output_size
    strides = layout.source or dense_strides((problem.batch, problem.channels, *(1,) * (3 - problem.rank), *size))
    if direction == "forward":
        return choice, pool_forward(problem, choice.config, layout.channels_last, strides)
    return choice, (pool_backward(problem, choice.config, layout.channels_last, strides),)


def _depthwise_unsupported(direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout) -> str | None:
    if problem.groups == 1 or problem.in_channels != problem.groups:
        return f"{problem.in_channels // problem.groups} input channels a group"
    if problem.filter_size[-1] > MAX_ROW:
        return f"a filter of more than {MAX_ROW} columns"
    if direction == "dgrad" and problem.stride[-1] > MAX_STRIDE:
        return f"a stride of more than {MAX_STRIDE} columns"
    return _convolution_unserved(problem, gpu)


def _plan_depthwise(
    direction: str, problem: ConvProblem, gpu: Gpu, layout: Layout
) -> tuple[Choice, tuple[Launch, ...]]:
    if direction == "wgrad":
        choice = depthwise_wgrad_tile(problem, gpu)
        return choice, conv_depthwise_wgrad(problem, choice.config, layout.source, layout.other, layout.packed)
    choice = depthwise_tile(direction, problem, gpu)
    launch = conv_depthwise(
        direction, problem, choice.config, layout.source, layout.other, layout.bias, layout.epilogue
    )
    return choice, (launch,)


DEPTHWISE = Family("depthwise", _depthwise_unsupported, _plan_depthwise)
GROUPED = Family("grouped", _grouped_unsupported, _plan_grouped)
PIXELS = Family("pixels", _pixels_unsupported, _plan_pixels, ("source", "other"))
PIXELS_WGRAD = Family("pixels", _pixels_wgrad_unsupported, _plan_pixels_wgrad, ("source", "other"))
ROWS = Family("rows", _rows_unsupported, _plan_rows)
ROW_BOXES = Family("row_boxes", _row_boxes_unsupported, _plan_row_boxes)
GEMM = Family("gemm", _gemm_unsupported, _plan_gemm, ("source",))
GEMM_WGRAD = Family("gemm", _gemm_unsupported, _plan_gemm, ("source", "other"))
SPATIAL = Family("spatial", _spatial_unsupported, _plan_spatial, ("source",))
GATHER = Family("gather", _gather_unsupported, _plan_gather)
POOL = Family("pool", _pool_unsupported, _plan_pool)
FAMILIES: dict[str, tuple[Family, ...]] = {
    "fprop": (DEPTHWISE, GROUPED, ROW_BOXES, ROWS, GEMM, PIXELS, SPATIAL, GATHER),
    # An image's gradient is hardly ever asked for: it has no rows.
    "dgrad": (DEPTHWISE, GROUPED, GEMM, PIXELS, SPATIAL, GATHER),
    "wgrad": (DEPTHWISE, GROUPED, ROWS, GEMM_WGRAD, PIXELS_WGRAD, GATHER),
    **dict.fromkeys(POOL_DIRECTIONS, (POOL,)),
}


def plan(direction: str, problem: ConvProblem | PoolProblem, gpu: Gpu, layout: Layout = Layout()) -> Plan:
    """How ``gpu`` serves one direction of ``problem``: family, tile, launches. Needs neither tensors nor a GPU."""
    reasons: list[tuple[str, str]] = []
    only = single_family()
    old = too_old(gpu)
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
    if family.moved:
        layout, copied = _with_room(family, direction, problem, layout)
    reason = family.unsupported(direction, problem, gpu, layout)
    # Asked for by name it is to be measured, whatever is predicted.
    if reason is None and copied and single_family() is None:
        reason = copies_slower(family.name, direction, problem, fp32_precision(problem.dtype), gpu, copied)
    return layout, reason


def _with_room(family: Family, direction: str, problem: ConvProblem, layout: Layout) -> tuple[Layout, list[int]]:
    """How operands lie that bulk copies can step through: where channels are no multiple of 16 bytes and pixels lie as
    close as these, with room behind each. And the bytes that each copy moves which that takes."""
    dtype, shapes = problem.dtype, (problem.lifted.input_shape, problem.lifted.output_shape)
    if direction == "dgrad":
        shapes = shapes[::-1]

    def odd(shape: tuple[int, ...]) -> bool:
        return shape[1] * dtype.itemsize % ALIGNMENT > 0

    strides, moved = {"source": layout.source, "other": layout.other}, {}
    for name, shape in zip(strides, shapes, strict=True):
        if name in family.moved and odd(shape) and not bulk(dtype, shape, strides[name]):
            strides[name], moved[name] = pixel_strides(shape, pitched(shape, dtype)), prod(shape)
    if direction != "wgrad" and odd(problem.weight_shape):
        moved["weight"] = prod(problem.weight_shape)
    if "other" in moved and layout.epilogue.residual:
        moved["residual"] = moved["other"]
    copied = [2 * dtype.itemsize * count for name, count in moved.items() if name not in layout.copied]
    return replace(layout, source=strides["source"], other=strides["other"]), copied


def fp32_precision(dtype: torch.dtype) -> str:
    """How products of ``dtype`` are made: "tf32" only for float32, as PyTorch's convolutions are set."""
    if dtype is not torch.float32:
        return "ieee"
    setting = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if setting == "tf32" else "ieee"


_forced: list[Gpu] = []


def is_forced() -> bool:
    """Whether plans are made for a GPU that was named, whatever the device."""
    return bool(_forced)


def target(device: torch.device) -> Gpu:
    """What plans are made for on ``device``: its GPU, or Triton's interpreter."""
    if _forced:
        return _forced[-1]
    if mend.interpreting():
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


_single: list[str] = []


def single_family() -> str | None:
    """The one family that may serve a call; None: any."""
    return _single[-1] if _single else None


@contextlib.contextmanager
def only_family(name: str) -> Iterator[None]:
    """Let no other family serve a call inside the block, on any thread: to measure or to test one by itself."""
    known = sorted({family.name for families in FAMILIES.values() for family in families})
    if name not in known:
        raise ValueError(f"no family {name!r} among {', '.join(known)}")
    _single.append(name)
    try:
        yield
    finally:
        _single.pop()


@contextlib.contextmanager
def use_target(gpu: Gpu) -> Iterator[None]:
    """Plan for ``gpu`` inside the block, whatever the device: how every family runs in the interpreter."""
    _forced.append(gpu)
    try:
        yield
    finally:
        _forced.pop()
