"""An operator of ``fastconv check``: its problems, its operands, and the two functions that must agree on them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

import fastconv
from fastconv.benchmarks.models import channels_last
from fastconv.kernels.launch import launch
from fastconv.kernels.launch.device import here
from fastconv.measuring.accuracy import TF32_EPS, fp32_convolutions, max_error, tolerance

FORWARD = "forward"
Tensors = dict[str, torch.Tensor]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class CheckCase:
    """One way in which an index, a mask or a tail can be wrong. Operators add the fields that theirs need."""

    name: str
    quick: bool = False  # ``--quick`` takes it too
    precisions: tuple[str, ...] = ()  # none named: all


@dataclass(frozen=True, kw_only=True)
class Check:
    """One operator in one way of use.

    ``operands(case, dtype, device)`` draws operands by name, in their layouts, always the same values. ``ours``, and
    ``theirs`` with operands in fp64 on the CPU, return results by name. The first result has the operands' dtype and is
    differentiated by all operands that are not ``constants``. ``depths(case, output)``: how many products or terms an
    element of a result sums, 1 by default.
    """

    name: str
    cases: tuple[Any, ...]
    operands: Callable[[Any, torch.dtype, torch.device], Tensors]
    ours: Callable[[Any, Tensors], Tensors]
    theirs: Callable[[Any, Tensors], Tensors]
    depths: Callable[[Any, torch.Tensor], dict[str, int]] = lambda case, output: {}
    # "apart": one at a time, as if the other operands were frozen, so that its own kernels compute it.
    gradients: Literal["apart", "together", "none"] = "apart"
    constants: tuple[str, ...] = ()
    stored: int = 1  # values rounded to the operands' dtype on the longest way to a result, the result included


def precisions(device: torch.device) -> dict[str, tuple[torch.dtype, float]]:
    """What is checked on ``device``: name, dtype and rounding unit. The interpreter does not model TF32."""
    names = {
        "float32": (torch.float32, torch.finfo(torch.float32).eps),
        "tf32": (torch.float32, TF32_EPS),
        "float16": (torch.float16, torch.finfo(torch.float16).eps),
        "bfloat16": (torch.bfloat16, torch.finfo(torch.bfloat16).eps),
    }
    return names if here.holds(device) else {name: value for name, value in names.items() if name != "tf32"}


def compare(check: Check, case: CheckCase, precision: str, device: torch.device) -> Iterator[Row]:
    """Every result and gradient of ``case`` against PyTorch in fp64 on the same values, with the kernels that computed
    it. Memory that is allocated for kernels holds NaNs."""
    dtype, eps = precisions(device)[precision]
    operands = check.operands(case, dtype, device)
    leaves = [] if check.gradients == "none" else [name for name in operands if name not in check.constants]
    exact, seed = _exact(check, case, operands, leaves)
    seed = seed.to(device, dtype)
    groups = [leaves] if check.gradients == "together" else [[], *([leaf] for leaf in leaves)]
    results: dict[str, tuple[torch.Tensor, list[str]]] = {}
    with (
        fastconv.settings(strict=True, prefer="triton"),
        fp32_convolutions("tf32" if precision == "tf32" else "ieee"),
        poisoned_memory(),
    ):
        for group in groups:
            given = {name: value.detach().requires_grad_(name in group) for name, value in operands.items()}
            with launch.record() as records:
                computed = check.ours(case, given)
            names = [record.name for record in records]
            # The first group's results: with no gradient wanted, the call saves nothing for one.
            results = results or {name: (value.detach(), names) for name, value in computed.items()}
            if not group:
                continue
            output = next(iter(computed.values()))
            with launch.record() as records:
                found = torch.autograd.grad(output, [given[name] for name in group], seed)
            names = [record.name for record in records]
            results |= {gradient_of(name): (value, names) for name, value in zip(group, found, strict=True)}
    first = next(iter(exact))
    depths = check.depths(case, exact[first])
    for name, reference in exact.items():
        value, names = results[name]
        # A result wider than the operands is not rounded to their type, indices are not rounded at all.
        floating = value.dtype.is_floating_point
        unit = eps if value.dtype == dtype else torch.finfo(value.dtype).eps if floating else 0.0
        error, bound = max_error(value.cpu(), reference), tolerance(check.stored * unit, depths.get(name, 1))
        yield {
            "operator": check.name,
            "case": case.name,
            "result": name,
            "precision": precision,
            "error": error,
            "tolerance": bound,
            "launches": names,
            # A NaN compares false. Without a launch PyTorch computed the result.
            "right": error <= bound
            and bool(names)
            and value.shape == reference.shape
            and (value.dtype == dtype or name != first),
        }


def gradient_of(operand: str) -> str:
    return f"{operand} gradient"


def _exact(
    check: Check, case: CheckCase, operands: Tensors, leaves: list[str]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """PyTorch's results and gradients in fp64, and the output's gradient that they follow from."""
    wide = {name: value.detach().cpu().double().requires_grad_(name in leaves) for name, value in operands.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same'")  # about a copy that PyTorch makes
        exact = check.theirs(case, wide)
    output = next(iter(exact.values()))
    # bfloat16 values are exact in every type that is checked.
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16().double()
    gradients = torch.autograd.grad(output, [wide[name] for name in leaves], seed) if leaves else ()
    exact = {name: value.detach() for name, value in exact.items()}
    return exact | {gradient_of(name): value for name, value in zip(leaves, gradients, strict=True)}, seed


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaNs, integers their largest value, so an element that no program writes is found."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled


def laid_out(tensor: torch.Tensor, layout: str = "channels_last") -> torch.Tensor:
    """The same values, dense in "channels_last" or "contiguous", or "strided": every second value of a wider tensor,
    whose others are NaN."""
    if layout == "strided":
        return torch.stack((tensor, torch.full_like(tensor, float("nan"))), -1).flatten(-2)[..., ::2]
    return tensor.contiguous() if layout == "contiguous" else channels_last(tensor)
