"""How wrong a tensor may be: bounds from dtype and reduction depth, or PyTorch's own error as the yardstick."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastconv.kernels.families.family import fp32_precision

FP32_EPS = torch.finfo(torch.float32).eps
TF32_EPS = 2.0**-10  # products of operands rounded to 11 bits
# Our error may be this many times PyTorch's own: two right kernels with different summation orders stay well under it.
YARDSTICK = 2.0
PART = 2**26  # elements that are compared at once: the largest activations leave no room for whole copies in fp64
Tensors = dict[str, torch.Tensor]


def tolerance(eps: float, depth: int) -> float:
    """Largest error of a sum of ``depth`` products, over the largest element of the result.

    The result is rounded once to its type: ``eps`` is twice the bound of that. The sum's fp32 roundings add up like a
    random walk.
    """
    return eps + 2 * FP32_EPS * math.sqrt(depth)


def max_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute error over the largest element of the reference. NaN in, NaN out."""
    return 0.0 if reference.numel() == 0 else _error(value, reference, lambda t: t.abs().max())


def norm_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """``|value - reference| / |reference|``, norms over all elements. NaN in, NaN out."""
    return _error(value, reference, torch.linalg.vector_norm)


def _error(value: torch.Tensor, reference: torch.Tensor, norm: Callable[[torch.Tensor], torch.Tensor]) -> float:
    value, reference = torch.atleast_1d(value, reference)
    rows = max(1, PART * len(reference) // max(1, reference.numel()))
    norms = [
        (norm(exact.double()), norm(it.double() - exact.double()))
        for it, exact in zip(value.split(rows), reference.split(rows), strict=True)
    ]
    scale, error = (norm(torch.stack(found)).item() for found in zip(*norms, strict=True))
    return error / scale if scale > 0 else error


def against_yardstick(
    ours: Tensors, eager: Tensors | None, reference: Tensors, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One row a tensor, worst first: our relative error, PyTorch's in the same dtype, and whether ours is acceptable.

    A tensor may be as wrong as one convolution may be, or YARDSTICK times as wrong as PyTorch's, or as its typical
    tensor of this model: a single scalar can be right by luck.
    """
    errors = {
        name: (norm_error(ours[name], value), None if eager is None else norm_error(eager[name], value))
        for name, value in reference.items()
    }
    typical = statistics.median(error or 0.0 for _, error in errors.values())
    eps = torch.finfo(dtype).eps
    if eager is None and fp32_precision(dtype) == "tf32":
        eps = TF32_EPS
    rows = []
    for name, (our_error, eager_error) in errors.items():
        allowed = max(YARDSTICK * (eager_error or 0.0), YARDSTICK * typical, tolerance(eps, 4096))
        # A NaN compares false, so it is never acceptable.
        right = our_error <= allowed
        rows.append({"tensor": name, "ours": our_error, "eager": eager_error, "allowed": allowed, "right": right})
    return sorted(rows, key=lambda row: (row["right"], -row["ours"] / row["allowed"]))


@contextlib.contextmanager
def fp32_convolutions(precision: str, timed: bool = False) -> Iterator[None]:
    """fp32 convolutions in "ieee" arithmetic or in "tf32", PyTorch's default: operands rounded to 11 bits.

    Unless they are ``timed``, cuDNN does not search for their fastest algorithm, which takes longer than one call.
    """
    settings = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, searching = settings.fp32_precision, torch.backends.cudnn.benchmark
    settings.fp32_precision, torch.backends.cudnn.benchmark = precision, searching and timed
    try:
        yield
    finally:
        settings.fp32_precision, torch.backends.cudnn.benchmark = before, searching
