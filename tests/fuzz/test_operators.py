"""Random calls of every operator, as PyTorch would answer them: any layout, stride, offset, view, dtype and argument.

FASTCONV_FUZZ=N: that many calls of each test, other ones each time; without it, the same few. A failure ends with lines
to paste.
"""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastconv.kernels.launch import interpreter
from guards import guarded_memory, poisoned_memory
from tests.fuzz.operators import EXACT, SMOOTH, Case, check
from views import KEEPING, VIEWS

__all__ = ["guarded_memory", "poisoned_memory"]
pytestmark = [pytest.mark.usefixtures("poisoned_memory", "guarded_memory"), pytest.mark.filterwarnings("ignore")]
pytestmark += [pytest.mark.slow, *[pytest.mark.gpu] * (not interpreter.interpreting())]

NUMBER = int(os.environ.get("FASTCONV_FUZZ", 0))
DTYPES = ("float32", "float32", "float16", "bfloat16")


def each(few: int) -> settings:
    return settings(
        max_examples=NUMBER or few,
        derandomize=not NUMBER,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def axes(draw: Any, rank: int, transposed: bool) -> dict[str, tuple[int, ...]]:
    """Sizes along each axis that fit together: of images, filter, output, and a convolution's arguments."""
    found: dict[str, list[int]] = {
        name: [] for name in ("size", "filter", "stride", "padding", "dilation", "output_padding", "output")
    }
    for _ in range(rank):
        r, s, d = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from((1, 1, 2)))
        reach, p = d * (r - 1) + 1, draw(st.integers(1, 4 if rank < 3 else 2))
        pad, extra = draw(st.integers(0, 2)), draw(st.integers(0, (max(s, d) if transposed else s) - 1))
        size = (p - 1) * s + reach + extra - 2 * pad
        if size < 1:
            pad, size = 0, (p - 1) * s + reach + extra
        for name, value in zip(found, (size, r, s, pad, d, extra, p), strict=True):
            found[name].append(value)
    return {name: tuple(values) for name, values in found.items()}


def views(draw: Any, repeating: bool = True) -> str:
    return draw(st.sampled_from(sorted(VIEWS if repeating else KEEPING)))


@st.composite
def convolutions(draw: Any, fused: bool) -> Case:
    rank, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    it = draw(axes(rank, transposed))
    dtype, bulk = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    if bulk and dtype != "float32" and draw(st.booleans()):
        # What bulk copies serve: the families of the tensor cores.
        groups, (c, k) = 1, (draw(st.sampled_from((8, 16, 24))) for _ in range(2))
        n = draw(st.sampled_from((1, 2, 16, 17)))
    else:
        groups = draw(st.sampled_from((1, 1, 1, 2, 3, 8)))
        c, k = (draw(st.sampled_from((1, 1, 2, 3, 4, 8, 16) if groups < 8 else (1, 1, 2))) for _ in range(2))
        n = draw(st.sampled_from((0, 1, 2, 2, 3, 16)))
    training = fused and draw(st.booleans())
    exact = not training and draw(st.booleans())
    arguments: dict[str, Any] = {name: it[name] for name in ("stride", "padding", "dilation")} | {"groups": groups}
    weight = (groups * k, c, *it["filter"])
    shape, outputs, pixels = (n, groups * c, *it["size"]), groups * k, it["output"]
    if transposed:
        # The convolution that maps the output to the input.
        shape, outputs, pixels = (n, groups * k, *it["output"]), groups * c, it["size"]
        arguments["output_padding"] = it["output_padding"]
    elif all(s == 1 for s in it["stride"]) and draw(st.integers(0, 3)) == 0:
        arguments["padding"], pixels = "same", it["size"]
    operands: dict[str, tuple[tuple[int, ...] | None, str]] = {
        "x": (shape, views(draw)),
        "weight": (weight, views(draw)),
        "dy": (None, views(draw)),
    }
    if draw(st.booleans()):
        operands["bias"] = ((outputs,), views(draw))
    act = None
    if fused:
        # Whatever is stored on the way must keep integers, too.
        dtype = "float32" if exact else dtype
        act = draw(st.sampled_from(sorted(EXACT) if exact else SMOOTH))
        if draw(st.booleans()):
            operands |= {name: ((outputs,), views(draw)) for name in ("bn_weight", "bn_bias")}
        if not training or draw(st.booleans()):
            # What is written to may not overlap.
            operands |= {name: ((outputs,), views(draw, not training)) for name in ("running_mean", "running_var")}
        if draw(st.booleans()):
            operands["residual"] = ((n, outputs, *pixels), views(draw))
            arguments["residual_after"] = draw(st.booleans())
        if training and n * _product(pixels) == 1:
            training, exact = False, exact
            operands |= {name: ((outputs,), views(draw)) for name in ("running_mean", "running_var")}
    name = f"conv{'_transpose' if transposed else ''}{rank}d{'_bn_act' if fused else ''}"
    precision = draw(st.sampled_from(("ieee", "tf32")))
    return Case(name, operands, arguments, dtype, exact, bulk, precision, act, training, draw(st.integers(0, 99)))


def _meets(size: int, window: int, stride: int, padding: int, dilation: int) -> bool:
    """Whether each window along an axis has a tap inside."""
    starts = range(-padding, size, stride)
    return all(any(0 <= start + tap * dilation < size for tap in range(window)) for start in starts)


def _product(sizes: tuple[int, ...]) -> int:
    found = 1
    for size in sizes:
        found *= size
    return found


@st.composite
def pools(draw: Any) -> Case:
    rank, kind = draw(st.integers(1, 3)), draw(st.sampled_from(("max", "avg", "lp", "adaptive_max", "adaptive_avg")))
    n, c = draw(st.sampled_from((0, 1, 2, 3))), draw(st.sampled_from((1, 2, 3, 8, 16)))
    arguments: dict[str, Any] = {}
    if kind.startswith("adaptive"):
        size = tuple(draw(st.lists(st.integers(1, 7), min_size=rank, max_size=rank)))
        wanted = tuple(draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank)))
        arguments["output_size"] = wanted if rank > 1 else wanted[0]
    else:
        it = draw(axes(rank, False))
        window = it["filter"]
        dilation = it["dilation"] if kind == "max" else (1,) * rank
        padding = tuple(min(p, r // 2) for p, r in zip(it["padding"], window, strict=True)) if kind != "lp" else ()
        pads = padding or (0,) * rank
        size = tuple(
            max(h, d * (r - 1) + 1, r if rank == 3 else 1) if kind != "max" else max(h, d * (r - 1) + 1 - 2 * p, 1)
            for h, d, r, p in zip(it["size"], dilation, window, pads, strict=True)
        )
        spans = zip(size, window, it["stride"], pads, dilation, strict=True)
        if not all(_meets(*span) for span in spans):
            # PyTorch gives the gradient of a window that lies in padding to some other pixel.
            dilation = (1,) * rank
        arguments |= {"kernel_size": window, "stride": it["stride"], "ceil_mode": draw(st.booleans())}
        if kind != "lp":
            arguments["padding"] = padding
        if kind == "max":
            arguments["dilation"] = dilation
        if kind == "avg":
            arguments["count_include_pad"] = draw(st.booleans())
            if rank > 1 and draw(st.booleans()):
                arguments["divisor_override"] = draw(st.integers(1, 5))
        if kind == "lp":
            arguments["norm_type"] = draw(st.sampled_from((1.0, 2.0, 3.0)))
            if rank == 1:
                arguments |= {name: arguments[name][0] for name in ("kernel_size", "stride")}
    if kind.endswith("max"):
        arguments["return_indices"] = draw(st.booleans())
    operands: dict[str, tuple[tuple[int, ...] | None, str]] = {
        "x": ((n, c, *size), views(draw)),
        "dy": (None, views(draw)),
    }
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    exact = kind != "avg" and kind != "adaptive_avg" and draw(st.booleans())
    return Case(f"{kind}_pool{rank}d", operands, arguments, dtype, exact, seed=seed)


def _checked(case: Case) -> None:
    try:
        check(case)
    except Exception as error:
        lines = f"from tests.fuzz.operators import Case, check\n\ncheck({case!r})"
        raise AssertionError(f"{type(error).__name__}: {error}\n\n{lines}\n") from error


@each(25)
@given(convolutions(fused=False))
def test_convolutions(case: Case) -> None:
    _checked(case)


@each(25)
@given(convolutions(fused=True))
def test_fused_convolutions(case: Case) -> None:
    _checked(case)


@each(50)
@given(pools())
def test_pools(case: Case) -> None:
    _checked(case)
