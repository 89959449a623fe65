"""From tensors to launches: a call is prepared once, kept under all that its preparation depends on, and run.

A call met before costs one dictionary hit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

import torch

from fastconv.autotune import Choice, Config, Gpu, Space, Work
from fastconv.autotune.choose import by_cost_model
from fastconv.autotune.known import join, on_change
from fastconv.kernels import dispatch
from fastconv.kernels.dispatch import Plan
from fastconv.kernels.families.family import Layout, fp32_precision, named_family, why_not_gpu
from fastconv.kernels.launch.descriptor import ALIGNMENT, start_of
from fastconv.kernels.launch.launch import Launch, Uncovered, deciding, run
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.pool import PoolProblem
from fastconv.kernels.tiles.autotuned import ADAPTER, considering, policy

Sizes = tuple[int, ...]
Operands = tuple[torch.Tensor | None, ...]
Prepare = Callable[..., "Prepared"]  # of (GPU, operands, *arguments)
Result = TypeVar("Result")
log = logging.getLogger("fastconv")


class Slower(Uncovered):
    """A kernel would serve the call, but PyTorch's own op was measured faster."""


class NoRoom(torch.OutOfMemoryError):
    """No memory is left for partial sums."""


@dataclass(frozen=True)
class Prepared:
    """A call that lacks only its tensors."""

    copies: tuple[Sizes | None, ...]  # each operand's strides after a copy; None: it is not copied
    launches: tuple[Launch, ...]  # none: the result is empty or all zeros
    shape: Sizes  # the result's
    strides: Sizes  # the result's, as the kernel writes it

    @cached_property
    def copied(self) -> bool:
        return any(self.copies)

    def laid_out(self, operands: Operands) -> Operands:
        """The operands as the launches read them, copied if need be."""
        if not self.copied:
            return operands
        return tuple(
            t if t is None or strides is None else t.new_empty_strided(t.shape, strides).copy_(t)
            for t, strides in zip(operands, self.copies, strict=True)
        )


@dataclass(frozen=True)
class PreparedConv(Prepared):
    """What `execute` runs."""

    returned: Sizes | None = None  # strides of the copy that is returned; None: the result itself is
    workspace: int = 0  # fp32 elements between a first and a second launch
    partials: Sizes | None = None  # [tiles, K]: shape of the fp32 means and squares beside the result
    row_weight: int = 0  # elements of the weight as the first launch lays it out for the second


# Key -> prepared call, or (exception type, message) if PyTorch's own op serves it.
_calls: dict[tuple[Any, ...], Any] = {}
# A program that never meets the same sizes twice must not keep them all.
MAX_CALLS = 8192

# No call outlives the tables that its tiles came from.
on_change(_calls.clear)


def prepared(prepare: Prepare, operands: Operands, arguments: tuple[Any, ...]) -> Any:
    """What ``prepare(gpu, operands, *arguments)`` returns; raises the Uncovered that it raises. Either is kept."""
    first = operands[0]
    assert first is not None
    gpu = dispatch.target(first.device)
    if deciding():
        return prepare(gpu, operands, *arguments)
    precision = fp32_precision(first.dtype)
    start = start_of(first)
    kinds = tuple(
        [None if t is None else (t.shape, t.stride(), t.dtype, t.device, start(t) % ALIGNMENT == 0) for t in operands]
    )
    key = (prepare, gpu.name, named_family(), policy(), precision, kinds, arguments)
    call = _calls.get(key)
    if call is None:
        join(ADAPTER)
        if len(_calls) >= MAX_CALLS:
            _calls.clear()
        try:
            reason = why_not_gpu(gpu)
            if reason is not None:
                raise Uncovered(reason)
            call = prepare(gpu, operands, *arguments)
        except Uncovered as refusal:
            # The exception's traceback would keep the operands alive.
            call = type(refusal), str(refusal)
        _calls[key] = call
    if isinstance(call, tuple) and isinstance(call[0], type):
        refusal_type, reason = call
        raise refusal_type(reason)
    return call


def prepare_and_run(
    prepare: Prepare, operands: Operands, arguments: tuple[Any, ...], run_call: Callable[[Any, Operands], Result]
) -> Result:
    """``run_call(call, operands)`` of the `prepared` call.

    If no memory is left for partial sums, a slower call without them takes its place from then on; not under stable
    numerics, because it adds in another order.
    """
    call = prepared(prepare, operands, arguments)
    try:
        return run_call(call, operands)
    except NoRoom:
        if policy().stable:
            raise
    _say_no_room()
    return run_call(_unsplit(call, prepare, operands, arguments), operands)


def workspace(like: torch.Tensor, shape: int | Sizes, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory for partial sums; tiles are chosen so that it is at most MAX_WORKSPACE bytes. Raises NoRoom."""
    try:
        return like.new_empty(shape, dtype=dtype)
    except torch.OutOfMemoryError as error:
        raise NoRoom(str(error)) from None


@cache
def _say_no_room() -> None:
    log.warning("no memory is left for partial sums: what finds none is called without from then on, which is slower")


def _unsplit(call: Any, prepare: Prepare, operands: Operands, arguments: tuple[Any, ...]) -> Any:
    """The same call prepared with tiles that split no reduction, kept in the place of ``call``."""
    thread = threading.get_ident()

    def whole(space: Space, features: Any, work: Callable[[Config], Work], gpu: Gpu, choice: Choice) -> Choice:
        if threading.get_ident() != thread or choice.config.get("SPLITS", 1) == 1:
            return choice
        return by_cost_model(space.narrowed(only={"SPLITS": (1,)}), work, gpu)

    assert operands[0] is not None
    with considering(whole):
        found = prepare(dispatch.target(operands[0].device), operands, *arguments)
    for key in [key for key, kept in list(_calls.items()) if kept is call]:
        _calls[key] = found
    return found


def planned(direction: str, problem: ConvProblem | PoolProblem, gpu: Gpu, layout: Layout) -> tuple[Plan, Config]:
    """(plan, config) of a call that a kernel serves. Raises Slower or Uncovered with each family's reason."""
    plan = dispatch.plan(direction, problem, gpu, layout)
    if plan.choice is None:
        refusal = Slower if plan.slower else Uncovered
        raise refusal("; ".join(f"{family}: {reason}" for family, reason in plan.reasons))
    return plan, plan.choice.config


def execute(call: PreparedConv, operands: Operands) -> tuple[torch.Tensor, ...]:
    """Allocate, copy, launch: the result, and counts, means and squares if the call has ``partials``."""
    first = operands[0]
    assert first is not None
    out = first.new_empty_strided(call.shape, call.strides)
    if not call.launches:
        return (out.zero_(),)
    operands = call.laid_out(operands)
    launch = call.launches[-1]
    partials: tuple[torch.Tensor, ...] = ()
    if call.row_weight:
        row_weight = first.new_empty(call.row_weight)
        run(call.launches[0], operands[1], row_weight)
        operands = (operands[0], row_weight, *operands[2:])
    if call.workspace:
        partial = workspace(first, call.workspace)
        before = call.launches[0]
        # The second launch takes an epilogue's operands.
        taken = sum(pointer is not None for pointer in before.pointers) - 1
        given = iter((*operands[:taken], partial))
        run(before, *(None if pointer is None else next(given) for pointer in before.pointers))
        operands = (partial, *operands[taken:])
    if len(launch.pointers) == len(operands) + 1:
        run(launch, *operands, out)
    elif call.partials is None:
        run(launch, *operands, out, None, None, None)
    else:
        shapes = call.partials[:1], call.partials, call.partials
        partials = tuple(first.new_empty(shape, dtype=torch.float32) for shape in shapes)
        run(launch, *operands, out, *partials)
    if call.returned is not None:
        out = out.new_empty_strided(call.shape, call.returned).copy_(out)
    return out, *partials
