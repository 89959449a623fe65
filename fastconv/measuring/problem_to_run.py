"""A problem as something to run: its operands, our kernel's call, PyTorch's own op, what both are held against.

Calls on tensors without data show what is asked and launched; the same calls with data are measured.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fastconv.autotune import Choice, Config, Gpu, ProblemKey, Space, Work
from fastconv.autotune.choose import Question, ask, fixed
from fastconv.kernels import dispatch
from fastconv.kernels.dispatch import ADAPTER
from fastconv.kernels.families.batch_norm import Activated
from fastconv.kernels.launch.launch import Launch, Uncovered, decisions, record
from fastconv.kernels.ops import conv, pool
from fastconv.kernels.ops.batch_norm import batch_norm_act_sums
from fastconv.kernels.ops.call import execute
from fastconv.kernels.problem.conv import DIRECTIONS, ConvProblem
from fastconv.kernels.problem.layout import TAPS_OUTERMOST, strides_like, taps_outermost
from fastconv.kernels.problem.pool import POOL_DIRECTIONS, PoolProblem
from fastconv.kernels.problem.windows import output_size
from fastconv.kernels.tiles.autotuned import considering
from fastconv.measuring.accuracy import fp32_convolutions
from fastconv.reference.conv import both_sides, pad_argument
from fastconv.reference.pool import is_ceiled, max_pool_indices

Computation = Callable[[], Tensor]
Operands = tuple[Tensor, ...]


class Unmeasurable(ValueError):
    """No call of this version of fastconv asks about the problem. The message says why, in one line."""


@dataclass(frozen=True)
class Operand:
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    scale: float = 1.0

    def empty(self, device: torch.device | None = None) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class ProblemToRun:
    """``ours`` and ``pytorch`` make a computation of operands. PyTorch's in wider types is the reference."""

    key: ProblemKey
    operands: tuple[Operand, ...]
    ours: Callable[[Operands, Gpu], Computation]
    pytorch: Callable[[Operands], Computation]
    depth: int  # products or elements that one result sums
    family: str | None  # of kernels, that asks about the problem
    native: bool = True  # PyTorch has an op of its own for it, so that its time means something
    recalled: Callable[[Operands], Tensor] | None = None  # our result again, from what a call keeps for backward

    @property
    def precision(self) -> str:
        return str(dict(self.key.kind).get("precision", "ieee"))

    @contextlib.contextmanager
    def serving(self, config: Config | None, gpu: Gpu) -> Iterator[list[Question]]:
        """Inside the block calls are planned for ``gpu`` with ``config``, None: as chosen; collects what they ask.

        A call that asks raises ValueError if the config is not of its space or does not fit.
        """
        found: list[Question] = []

        def consider(space: Space, features: Any, work: Callable[[Config], Work], on: Gpu, choice: Choice) -> Choice:
            if ADAPTER.problem(space.name, features) != self.key:
                return choice
            found.append(ask(space, features, work, on, ADAPTER))
            taken = choice if config is None else fixed(space, config, work, on)
            # Our kernel serves even if PyTorch's is faster.
            return replace(taken, pytorch_faster=False)

        with contextlib.ExitStack() as stack:
            if self.family is not None:
                stack.enter_context(dispatch.only_family(self.family))
            precision = fp32_convolutions(self.precision, timed=True)
            for context in (dispatch.use_target(gpu), precision, considering(consider), decisions()):
                stack.enter_context(context)
            yield found

    def planned(self, gpu: Gpu, config: Config | None = None) -> tuple[Question | None, list[Launch]]:
        """(what a call asks about this problem, if it does; what it launches), found without data."""
        with FakeTensorMode(), self.serving(config, gpu) as found:
            # A pool's forward, which makes what its backward is given, is not part of the call.
            call = self.ours(tuple(each.empty() for each in self.operands), gpu)
            with record() as records:
                call()
        launches = {it.launch.compile_key: it.launch for it in records}
        return (found[0] if found else None), list(launches.values())


def to_run(problem: ProblemKey, gpu: Gpu) -> tuple[ProblemToRun, Question]:
    """How ``problem`` is run on ``gpu``, by the kernel family that asks about it. Raises Unmeasurable."""
    try:
        described, families = _described(problem)
    except (KeyError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise Unmeasurable(f"{problem.describe()}: not a problem of this version's kernels ({why})") from error
    for family in families:
        candidate = replace(described, family=family)
        try:
            question, _ = candidate.planned(gpu)
        except (Uncovered, ValueError):
            continue
        if question is not None:
            return candidate, question
    raise Unmeasurable(f"{problem.describe()}: no kernel of this version asks about it on the {gpu.name}")


def _described(problem: ProblemKey) -> tuple[ProblemToRun, Sequence[str | None]]:
    """The problem to run, without a family, and the families that may serve it."""
    kind = dict(problem.kind)
    if problem.space.startswith("pass"):
        return _sums(problem), (None,)
    # A space of one direction is named after it; the problems of other spaces name theirs.
    direction = str(kind.get("direction", "wgrad" if "wgrad" in problem.space else "fprop"))
    if direction not in (*DIRECTIONS, *POOL_DIRECTIONS):
        raise ValueError(f"no direction {direction!r}")
    families = [family.name for family in dispatch.FAMILIES[direction]]
    if direction in POOL_DIRECTIONS:
        return _pool(problem, PoolProblem.from_key(problem), direction, bool(kind["channels_last"])), families
    return _convolution(problem, ConvProblem.from_key(problem), direction), families


# Convolutions.


def _convolution(problem: ProblemKey, it: ConvProblem, direction: str) -> ProblemToRun:
    depthwise = it.groups > 1 and it.in_channels == it.groups
    x = Operand(it.input_shape, strides_like(it.input_shape, True), it.dtype)
    y = Operand(it.output_shape, strides_like(it.output_shape, True), it.dtype)
    strides = taps_outermost(it.weight_shape) if depthwise else strides_like(it.weight_shape, True)
    per_output = math.prod(it.weight_shape[1:])
    w = Operand(it.weight_shape, strides, it.dtype, per_output**-0.5)
    operands = {"fprop": (x, w), "dgrad": (y, w), "wgrad": (x, y)}[direction]

    def ours(tensors: Operands, gpu: Gpu) -> Computation:
        if direction == "wgrad":
            format = TAPS_OUTERMOST if depthwise else 1
            arguments = it.filter_size, it.stride, it.padding, it.dilation, it.groups, format
            call = conv.prepare_wgrad(gpu, tensors, *arguments)
            return lambda: execute(call, tensors)[0]
        all_operands = (*tensors, None, *conv.NO_EPILOGUE)
        call = conv.prepare_fprop_or_dgrad(direction, it, gpu, all_operands, True)
        return lambda: execute(call, all_operands)[0]

    depth = {"fprop": per_output, "dgrad": it.out_channels // it.groups * it.taps, "wgrad": it.output_pixels}[direction]
    return ProblemToRun(problem, operands, ours, partial(_pytorch_convolution, it, direction), depth, None, _even(it))


def _even(it: ConvProblem) -> bool:
    """Whether PyTorch has it as one convolution, padded alike on both sides."""
    twice = [2 * pad for pad in it.padding]
    sizes = map(output_size, it.input_size, it.filter_size, it.stride, twice, it.dilation)
    return min(it.padding) >= 0 and it.output_size == tuple(sizes)


def _pytorch_convolution(it: ConvProblem, direction: str, tensors: Operands) -> Computation:
    padding, sides = it.padding, [0] * 2 * it.rank
    if not _even(it):
        sizes = it.input_size, it.output_size, it.filter_size
        sides = pad_argument(both_sides(sizes, it.stride, it.padding, it.dilation))
        padding = (0,) * it.rank
    arguments = it.stride, padding, it.dilation, False, (0,) * it.rank, it.groups

    def padded(x: Tensor) -> Tensor:
        return F.pad(x, sides) if any(sides) else x

    if direction == "fprop":
        x, w = tensors
        return lambda: torch.ops.aten.convolution(padded(x), w, None, *arguments)

    def gradient(dy: Tensor, x: Tensor, w: Tensor, which: int) -> Tensor:
        mask = [index == which for index in range(3)]
        return torch.ops.aten.convolution_backward(dy, padded(x), w, None, *arguments, mask)[which]

    if direction == "dgrad":
        dy, w = tensors
        x = dy.new_empty_strided(it.input_shape, strides_like(it.input_shape, True))

        def input_gradient() -> Tensor:
            dx = gradient(dy, x, w, 0)
            return F.pad(dx, [-side for side in sides]) if any(sides) else dx

        return input_gradient
    x, dy = tensors
    w = x.new_empty_strided(it.weight_shape, strides_like(it.weight_shape, True))
    return lambda: gradient(dy, x, w, 1)


# Pools.


def _pool(problem: ProblemKey, it: PoolProblem, direction: str, channels_last: bool) -> ProblemToRun:
    geometry = pool.ADAPTIVE if it.adaptive else (it.window, it.stride, it.padding, it.dilation)
    x = Operand(it.input_shape, strides_like(it.input_shape, channels_last), it.dtype)
    dy = Operand(it.output_shape, strides_like(it.output_shape, channels_last), it.dtype)

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        if it.kind == "max":
            return pool.max_pool(x, it.output_size, geometry, it.index)
        if it.kind == "average":
            return (pool.average_pool(x, it.output_size, geometry, it.include_padding, it.divisor),)
        return (pool.lp_pool(x, it.output_size, geometry, it.norm),)

    def ours(tensors: Operands, gpu: Gpu) -> Computation:
        x = tensors[0]
        if direction == "forward":
            return lambda: forward(x)[0]
        dy = tensors[1]
        kept = forward(x)[-1]
        if it.kind == "max":
            return lambda: pool.max_pool_backward(dy, kept, it.input_size, geometry, channels_last)
        if it.kind == "average":
            sums = it.include_padding, it.divisor
            return lambda: pool.average_pool_backward(dy, it.input_size, geometry, channels_last, *sums)
        return lambda: pool.lp_pool_backward(dy, kept, x, geometry, channels_last, it.norm)

    def at_taps(tensors: Operands) -> Tensor:
        x = tensors[0].flatten(2)
        indices = max_pool_indices(forward(*tensors)[1], it.input_size, geometry, channels_last)
        inside = (indices >= 0) & (indices < x.shape[2])
        found = x.gather(2, indices.where(inside, 0).flatten(2)).view(indices.shape)
        return found.where(inside, math.nan)

    operands = (x,) if direction == "forward" else (x, dy)
    recalled = at_taps if direction == "forward" and it.index is not None else None
    return ProblemToRun(
        problem, operands, ours, partial(_pytorch_pool, it, direction), it.taps, None, recalled=recalled
    )


def _pytorch_pool(it: PoolProblem, direction: str, tensors: Operands) -> Computation:
    x = tensors[0]
    names = {"max": "max", "average": "avg", "lp": "lp"}
    function = getattr(F, f"{'adaptive_' if it.adaptive else ''}{names[it.kind]}_pool{it.rank}d")
    arguments: dict[str, Any] = {"output_size": it.output_size}
    if not it.adaptive:
        ceiled = is_ceiled(it.input_size, it.output_size, (it.window, it.stride, it.padding, it.dilation))
        arguments = {"kernel_size": it.window, "stride": it.stride, "ceil_mode": ceiled}
        if it.kind != "lp":
            arguments["padding"] = it.padding
        if it.kind == "max":
            arguments["dilation"] = it.dilation
        if it.kind == "average":
            arguments["count_include_pad"] = it.include_padding
            # One-dimensional averages take no divisor.
            arguments |= {"divisor_override": it.divisor} if it.divisor else {}
    if it.kind == "lp":
        function = partial(function, norm_type=it.norm)
    if direction == "forward":
        return lambda: function(x, **arguments)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = function(leaf, **arguments)
    dy = tensors[1]
    return lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]


# Sums over pixels: a bias's gradient, or those of batch norm.


def _sums(problem: ProblemKey) -> ProblemToRun:
    kind, channels = dict(problem.kind), dict(problem.channels)["C"]
    moved, element = int(kind["moved"]), int(kind["element"])
    if not problem.space.startswith("pass_split"):
        raise ValueError("a pass with one config")
    dtype = {2: torch.bfloat16, 4: torch.float32}[element]
    shape = (1, channels, dict(problem.sizes)["pixels"])
    large = Operand(shape, strides_like(shape, True), dtype)
    vector = Operand((channels,), (1,), torch.float32)
    if moved == 1:

        def bias(tensors: Operands) -> Computation:
            return lambda: tensors[0].sum((0, 2))

        return ProblemToRun(
            problem, (large,), lambda tensors, gpu: partial(conv.channel_sum, *tensors), bias, shape[2], None
        )
    # A third tensor that moves is z, from which the gradient behind the activation comes; a fourth is a residual.
    how = Activated(1e-5, "identity" if moved == 2 else "relu")

    def ours(tensors: Operands, gpu: Gpu) -> Computation:
        dz, y, mean, *further = tensors
        z, residual = (*further, None, None)[:2]
        norm = mean, torch.ones_like(mean), None, None
        return lambda: batch_norm_act_sums(dz, y, z, norm, None, residual, how)

    def pytorch(tensors: Operands) -> Computation:
        dz, y, mean, *further = tensors

        def sums() -> Tensor:
            g = dz * (further[0] > 0) if further else dz
            xhat = (y - mean[:, None]) * (1 + how.eps) ** -0.5
            return torch.stack([g.sum((0, 2)), (g * xhat).sum((0, 2)), torch.zeros_like(mean)])

        return sums

    operands = (large, large, vector, *(large,) * (moved - 2))
    return ProblemToRun(problem, operands, ours, pytorch, shape[2], None, native=False)
