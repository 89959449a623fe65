"""How the rows of a filter meet runs of an image of few channels, and the weight laid out for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import triton
import triton.language as tl

from fastconv.kernels.families.family import Layout, fp32_precision
from fastconv.kernels.jit.rounding import nearest_tf32
from fastconv.kernels.launch.descriptor import ALIGNMENT
from fastconv.kernels.launch.launch import Launch
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import Strides, common_width, dense_strides, pointer_type
from fastconv.kernels.problem.windows import KeyParts

MOST_CHANNELS = 4
LONGEST_RUN = 64


@dataclass(frozen=True)
class RowForm:
    """How the rows of a filter are read. All fields except ``columns`` count elements."""

    columns: int  # neighbouring outputs that share a run
    vec: int  # of one load
    shift: int  # from the run's start to the first output's window
    used: int  # from the run's start to the end of the last output's window
    run: int  # ``used`` rounded up to a power of two

    @property
    def key_parts(self) -> KeyParts:
        """The form as the autotuner's tables spell it."""
        return KeyParts({f"rows_{name}": value for name, value in asdict(self).items()}, {}, {})


def why_not_runs(problem: ConvProblem, x_strides: Strides | None = None) -> str | None:
    """Why the rows of a filter meet no runs of the image of at most LONGEST_RUN elements, or None."""
    c, s = problem.in_channels, problem.filter_size[-1]
    if problem.groups > 1:
        return f"{problem.groups} groups"
    if c > MOST_CHANNELS:
        return f"{c} input channels"
    if problem.taps == 1:
        return "one tap"
    if s > 1 and problem.dilation[-1] > 1:
        return "a dilated row is no run"
    pixel = (x_strides or dense_strides(problem.as_rank3.input_shape))[-1]
    if problem.input_size[-1] > 1 and pixel != c:
        return f"pixels of {c} channels lie {pixel} elements apart"
    if s * c > LONGEST_RUN:
        return f"{s * c} elements a row of the filter, more than {LONGEST_RUN}"
    return None


def row_form(problem: ConvProblem, x_strides: Strides | None = None) -> RowForm | str:
    """The form with the shortest run and the widest loads, or the reason why there is none."""
    reason = why_not_runs(problem, x_strides)
    if reason is not None:
        return reason
    c, s = problem.in_channels, problem.filter_size[-1]
    *others, _ = x_strides or dense_strides(problem.as_rank3.input_shape)
    forms = []
    for columns in (1, 2):
        distance = problem.stride[-1] * c
        vec = common_width(problem.dtype, columns * distance, problem.input_size[-1] * c, *others)
        shift = -problem.padding[-1] * c % vec
        used = shift + s * c + (columns - 1) * distance
        form = RowForm(columns, vec, shift, used, max(8, triton.next_power_of_2(used)))
        if vec * problem.dtype.itemsize >= 4 and form.run <= LONGEST_RUN:
            forms.append(form)
    if not forms:
        row, size = problem.input_size[-1] * c, problem.dtype.itemsize
        return f"rows of {row} elements of {size} bytes: no copy of 4 bytes begins each run"
    return min(forms, key=lambda form: (form.run, -form.vec, form.columns))


def box_form(problem: ConvProblem, x_strides: Strides | None = None) -> RowForm | str:
    """The form whose run has the fewest elements for each of its outputs, or the reason why there is none."""
    reason = why_not_runs(problem, x_strides)
    if reason is not None:
        return reason
    n, c, *size = problem.as_rank3.input_shape
    strides = zip((n, *size), x_strides or dense_strides((n, c, *size)), strict=True)
    if any(count > 1 and (step <= 0 or step * problem.dtype.itemsize % ALIGNMENT) for count, step in list(strides)[:3]):
        return "rows that do not lie at multiples of 16 bytes"
    window, distance = problem.filter_size[-1] * c, problem.stride[-1] * c
    used = {columns: window + (columns - 1) * distance for columns in (1, 2)}
    # A product reduces 16 elements or more.
    forms = [RowForm(columns, 1, 0, last, max(16, triton.next_power_of_2(last))) for columns, last in used.items()]
    return min((form for form in forms if form.run <= LONGEST_RUN), key=lambda form: form.run / form.columns)


def form_of_call(problem: ConvProblem, layout: Layout, form_of: Callable[..., RowForm | str] = row_form) -> RowForm:
    """The form of a call that has one."""
    form = form_of(problem, layout.source_strides)
    assert isinstance(form, RowForm), form
    return form


def filter_rows(problem: ConvProblem) -> int:
    return problem.taps // problem.filter_size[-1]


def count_runs(problem: ConvProblem, form: RowForm) -> int:
    """The runs that all outputs meet under one row of the filter."""
    return problem.output_pixels // problem.output_size[-1] * triton.cdiv(problem.output_size[-1], form.columns)


@triton.jit(do_not_specialize=["K", "rows", "window", "shift", "distance", "padded", "elements"])
def conv_rows_weight_kernel(
    w_ptr,  # [K, rows, window]
    out_ptr,  # [columns, K, padded, RUN]
    K,
    rows,
    window,  # elements that a row of the filter meets
    shift,  # elements from the run's start to the first output's window
    distance,  # between two outputs' windows
    padded,  # rows in whole steps
    elements,  # of the result
    RUN: tl.constexpr,
    ROUND: tl.constexpr,  # fp32 to TF32
    BLOCK: tl.constexpr,
):
    """Put each column's weights at their place in the run, with zeros beside them."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = index // RUN % padded
    k = index // RUN // padded
    column = k // K
    e = index % RUN - shift - column * distance
    inside = (index < elements) & (row < rows) & (e >= 0) & (e < window)
    w = tl.load(w_ptr + (k % K * rows + row) * window + e, mask=inside, other=0.0)
    tl.store(out_ptr + index, nearest_tf32(w, ROUND), mask=index < elements)


def weight_as_runs(problem: ConvProblem, form: RowForm, padded: int) -> Launch:
    """The launch that lays out a weight as runs, ``padded`` rows a channel; its last scalar counts the elements."""
    c, k, element = problem.in_channels, problem.out_channels, pointer_type(problem.dtype)
    # One element a thread: a warp's are neighbours.
    elements, block = form.columns * k * padded * form.run, 128
    return Launch(
        kernel=conv_rows_weight_kernel,
        grid=(triton.cdiv(elements, block), 1, 1),
        pointers=(element, element),
        scalars=(
            *(k, filter_rows(problem), problem.filter_size[-1] * c, form.shift, problem.stride[-1] * c),
            *(padded, elements),
        ),
        constants={"RUN": form.run, "ROUND": fp32_precision(problem.dtype) == "tf32", "BLOCK": block},
        num_warps=4,
        num_stages=1,
    )


def row_scalars(problem: ConvProblem, form: RowForm, x_strides: Strides, vec_k: int) -> tuple[int, ...]:
    """The arguments N to ``begin`` of a rows kernel."""
    rank3, c = problem.as_rank3, problem.in_channels
    depth, height, width = rank3.input_size
    distance = rank3.stride[-1] * c
    return (
        *(problem.batch, depth, height, width * c // form.vec, *rank3.output_size, problem.out_channels // vec_k),
        *(*rank3.filter_size[:2], rank3.filter_size[-1] * c, form.shift, distance),
        *(stride // form.vec for stride in x_strides[:3]),
        *(form.columns * distance // form.vec, -(rank3.padding[-1] * c + form.shift) // form.vec),
    )


def row_taps(rank3: ConvProblem) -> tuple[int, ...]:
    """The arguments ``stride_d`` to ``dilation_h`` of a rows kernel."""
    return *rank3.stride[:2], *rank3.padding[:2], *rank3.dilation[:2]
