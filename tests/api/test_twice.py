"""Each function twice, forward and every gradient: launches that compile and load, and ones made again."""

from collections.abc import Iterator
from typing import Any

import pytest

import fastconv.functional as F
from tests.fuzz.operators import Case, check
from tests.marks import runs_kernels

pytestmark = runs_kernels
SIZE, WINDOW, STRIDE, PADDING = (6, 7, 5), (3, 2, 3), (1, 2, 1), (1, 0, 1)


def convolutions(rank: int) -> Iterator[Case]:
    size, window, stride, padding = (sizes[:rank] for sizes in (SIZE, WINDOW, STRIDE, PADDING))
    n, c, k = 3, 8, 24
    reach = [(h + 2 * p - r, s) for h, p, r, s in zip(size, padding, window, stride, strict=True)]
    pixels = tuple(over // s + 1 for over, s in reach)
    left = tuple(over % s for over, s in reach)
    arguments: dict[str, Any] = {"stride": stride, "padding": padding}
    operands = {"x": ((n, c, *size), "channels_last"), "weight": ((k, c, *window), "dense"), "dy": (None, "dense")}
    for transposed in (False, True):
        name, outputs = f"conv{rank}d", k
        if transposed:
            name, outputs = f"conv_transpose{rank}d", c
            operands = operands | {"x": ((n, k, *pixels), "channels_last")}
            arguments = arguments | {"output_padding": left}
        biased = operands | {"bias": ((outputs,), "dense")}
        yield Case(name, biased, arguments, "bfloat16")
        of_channels = ("bn_weight", "bn_bias", "running_mean", "running_var")
        residual = (n, outputs, *(size if transposed else pixels))
        fused = operands | dict.fromkeys(of_channels, ((outputs,), "dense")) | {"residual": (residual, "dense")}
        yield Case(f"{name}_bn_act", fused, arguments | {"residual_after": False}, act="relu")
        yield Case(f"{name}_bn_act", fused, arguments, "bfloat16", False, act="silu", training=True)


def pools(rank: int) -> Iterator[Case]:
    operands = {"x": ((2, 8, *SIZE[:rank]), "channels_last"), "dy": (None, "dense")}
    sizes: dict[str, Any] = {"kernel_size": WINDOW[:rank], "stride": STRIDE[:rank]}
    adaptive: dict[str, Any] = {"output_size": (4, 3, 2)[:rank]}
    lp = (sizes if rank > 1 else {name: value[0] for name, value in sizes.items()}) | {"norm_type": 2.0}
    yield Case(f"max_pool{rank}d", operands, sizes | {"return_indices": True}, "bfloat16")
    yield Case(f"avg_pool{rank}d", operands, sizes, "bfloat16", False)
    yield Case(f"lp_pool{rank}d", operands, lp, "float32", False)
    yield Case(f"adaptive_max_pool{rank}d", operands, adaptive, "bfloat16")
    yield Case(f"adaptive_avg_pool{rank}d", operands, adaptive, "bfloat16", False)


CASES = [case for rank in (1, 2, 3) for made in (convolutions(rank), pools(rank)) for case in made]


def test_all_are_here() -> None:
    assert {case.function for case in CASES} == {*F.__all__} - {"why_not_served"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.function}{' training' if case.training else ''}")
def test_each_function(case: Case) -> None:
    check(case)
    check(case)
