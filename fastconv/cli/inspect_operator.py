"""What the passes of one operator are on a GPU that need not be here: tiles, launches, binaries, predictions.

The operator is called on tensors without data, so they are what a call launches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastconv import functional
from fastconv.autotune import Choice, Config, Gpu, Space, Work, predict
from fastconv.autotune.choose import predictions
from fastconv.cli.errors import BadUsage
from fastconv.functional.conv_bn_act import conv_norm_act
from fastconv.kernels import dispatch
from fastconv.kernels.compile.sass import Compiled, compile_all, mix
from fastconv.kernels.launch.launch import LaunchRecord
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import strides_like, taps_outermost
from fastconv.kernels.tiles.autotuned import considering
from fastconv.kernels.tiles.shapes import matrix_share
from fastconv.measuring import reason
from fastconv.measuring.accuracy import fp32_convolutions
from fastconv.settings import settings
from fastconv.traffic import OperatorPass, Traffic

CONVOLUTIONS = tuple(f"conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3))
POOLS = tuple(
    f"{kind}_pool{rank}d" for kind in ("max", "avg", "lp", "adaptive_max", "adaptive_avg") for rank in (1, 2, 3)
)
OPERATORS = (*CONVOLUTIONS, *POOLS)
# Parameters that count something. Others are sides of tensors, whose lengths are powers of two in Triton, or rows of a
# filter, of which spaces list odd numbers.
COUNTS = ("SPLITS", "TAPS", "COLUMNS", "OUTPUTS", "LINES", "PAIRS", "num_stages")
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Fused:
    """What a call has behind the convolution: batch norm, an activation, a residual."""

    statistics: bool  # the batch's, as in training; else running ones
    act: str | None
    residual: bool


@dataclass(frozen=True)
class OperatorCall:
    """A call of one of `OPERATORS` of `fastconv.functional`, forward and, with ``gradients``, backward."""

    operator: str
    input: tuple[int, ...]
    weight: tuple[int, ...] | None  # a convolution's
    arguments: dict[str, Any]  # by name: stride, padding...
    dtype: torch.dtype
    bias: bool = False
    fused: Fused | None = None
    channels_last: bool = True
    gradients: bool = True
    precision: str = "tf32"  # or "ieee": the products of an fp32 convolution

    def __call__(self) -> None:
        x = self._tensor(self.input)
        wanted = [x]
        function = getattr(functional, self.operator)
        if self.weight is None:
            y = function(x, **self.arguments)
            y = y[0] if self.arguments.get("return_indices") else y
        else:
            w, b = self._tensor(self.weight), None
            channels = self.weight[0]
            if "transpose" in self.operator:
                channels = self.weight[1] * self.arguments["groups"]
            wanted.append(w)
            if self.bias:
                b = torch.empty(channels, dtype=self.dtype, requires_grad=self.gradients)
                wanted.append(b)
            if self.fused is None:
                y = function(x, w, b, **self.arguments)
            else:
                y = self._fused(function, x, w, b, channels)
        if y.requires_grad:
            torch.autograd.grad(y, wanted, torch.empty_like(y))

    def _fused(self, function: Any, x: Tensor, w: Tensor, b: Tensor | None, channels: int) -> Tensor:
        assert self.fused is not None and self.weight is not None
        mean, var, gamma, beta = (torch.empty(channels) for _ in range(4))
        residual = None
        if self.fused.residual:
            meta = [torch.empty(shape, device="meta") for shape in (self.input, self.weight)]
            residual = self._tensor(tuple(getattr(torch.nn.functional, self.operator)(*meta, **self.arguments).shape))
        if self.gradients:
            gamma, beta = gamma.requires_grad_(), beta.requires_grad_()
        return conv_norm_act(
            *(function, x, w, b, (mean, var, gamma, beta)),
            training=self.fused.statistics,
            momentum=0.1,
            eps=1e-5,
            act=torch.nn.PReLU() if self.fused.act == "prelu" else self.fused.act,
            residual=residual,
            residual_after=False,
            **self.arguments,
        )

    def _tensor(self, shape: tuple[int, ...]) -> Tensor:
        strides = strides_like(shape, self.channels_last)
        if shape is self.weight and self.channels_last and shape[1] == 1 and shape[0] > 1:
            strides = taps_outermost(shape)  # as convert lays out depthwise weights
        t = torch.empty_strided(shape, strides, dtype=self.dtype)
        return t.requires_grad_(self.gradients)


@dataclass(frozen=True)
class Considered:
    """A tile that was chosen, its space, and what each config of that makes of the problem."""

    space: Space
    work: Callable[[Config], Work]
    choice: Choice

    def each_config(self, gpu: Gpu) -> Iterator[tuple[Config, float | None, str | None]]:
        """Every combination of the space's values, with its predicted seconds or why it is not tried."""
        for config in self.space.combinations():
            why, seconds = self.space.valid(config), None
            if why is None:
                prediction = predict(self.work(config), gpu)
                if prediction is None:
                    why = f"{self.work(config).shared_memory >> 10} KB of shared memory, or its threads, do not fit"
                else:
                    seconds = prediction.seconds
            yield config, seconds, why


@dataclass(frozen=True)
class Inspected:
    """One pass: its decisions, and the binary of each of its launches."""

    found: OperatorPass
    considered: Considered | None  # None: the pass has one form only
    binaries: tuple[Compiled, ...]
    gpu: Gpu
    precision: str  # the products' of an fp32 convolution

    @property
    def launches(self) -> tuple[LaunchRecord, ...]:
        return self.found.launches

    @property
    def problem(self) -> str:
        return self.found.plan.problem.describe() if self.found.plan else ""

    @property
    def config(self) -> Config:
        return self.considered.choice.config if self.considered else {}

    @property
    def why_not_tried(self) -> str | None:
        """Why the space would not try the config, or None."""
        if self.considered is None:
            return None
        space = self.considered.space
        foreign = [name for name, value in self.config.items() if value not in space.ranges[name]]
        return f"{', '.join(foreign)} outside its values" if foreign else space.valid(self.config)

    @property
    def flops(self) -> int:
        problem = self.found.plan.problem if self.found.plan else None
        return problem.flops if isinstance(problem, ConvProblem) else 0

    @property
    def roofline(self) -> tuple[float, str]:
        """Seconds at the GPU's peak rates, each operand moved once, and which peak bounds them."""
        problem = self.found.plan.problem if self.found.plan else None
        rate = self.gpu.vector_rate
        if isinstance(problem, ConvProblem) and any(binary.tensor_cores for binary in self.binaries):
            rate = self.gpu.matrix_rate * matrix_share(problem.dtype, self.precision)
        # What one launch leaves to the next need not move.
        moved = problem.bytes if problem and len(self.launches) > 1 else self.found.bytes
        return max((self.flops / rate, "arithmetic"), (moved / self.gpu.bandwidth, "DRAM"))

    def predicted(self, compiled: bool) -> tuple[float, str, int] | None:
        """The cost model's seconds, what bounds them, and programs a multiprocessor; with ``compiled`` by the binary's
        registers and shared memory instead of estimates."""
        if self.considered is None:
            return None
        work = self.considered.work(self.config)
        if compiled:
            main = max(self.binaries, key=lambda binary: (binary.tensor_cores is not None, binary.shared_memory))
            work = replace(work, registers=main.registers, shared_memory=main.shared_memory)
        prediction = predict(work, self.gpu)
        return None if prediction is None else (prediction.seconds, prediction.bound, prediction.occupancy)

    def json(self) -> dict[str, Any]:
        plan, considered = self.found.plan, self.considered
        seconds, bound = self.roofline
        predictions = {
            name: prediction and dict(zip(("seconds", "bound", "occupancy"), prediction, strict=True))
            for name, prediction in (
                ("predicted", self.predicted(False)),
                ("predicted_from_binary", self.predicted(True)),
            )
        }
        return {
            "pass": self.found.name,
            "operator": self.found.operator,
            "problem": self.problem,
            "target": self.gpu.name,
            "family": plan.family if plan else None,
            "config": dict(self.config),
            "config_source": considered.choice.source if considered else None,
            "outside_space": self.why_not_tried,
            "flops": self.flops,
            "bytes": self.found.bytes,
            "roofline": {"seconds": seconds, "bound": bound},
            **predictions,
            "launches": [
                _launch(record, binary, self.gpu) for record, binary in zip(self.launches, self.binaries, strict=True)
            ],
        }


def _launch(record: LaunchRecord, binary: Compiled, gpu: Gpu) -> dict[str, Any]:
    programs, limit = binary.occupancy(gpu)
    it = record.launch
    return {
        "kernel": it.name,
        "grid": list(it.grid),
        "warps": it.num_warps,
        "stages": it.num_stages,
        "bytes": sum(record.bytes),
        "registers": binary.registers,
        "spills": binary.spills,
        "stack": binary.stack,
        "shared_memory": binary.shared_memory,
        "tensor_columns": binary.tensor_columns,
        "occupancy": programs,
        "occupancy_limit": limit,
        "waves": math.prod(it.grid) / (programs * gpu.multiprocessors) if programs else None,
        "tensor_cores": binary.tensor_cores,
        "first_operands": dict(binary.operands),
        "wgmma_waits": list(binary.waits),
        "wgmma_serialised": binary.serialised,
        "copies_in_flight": binary.copies,
        "bytes_in_flight": binary.copy_bytes,
        "step_instructions": binary.step,
        "step_mix": mix(binary.step_opcodes),
        "mix": mix(binary.opcodes),
        "load_bytes": binary.global_accesses("LDG"),
        "async_load_bytes": binary.global_accesses("LDGSTS"),
        "store_bytes": binary.global_accesses("STG"),
        **binary.listings,
    }


def inspect(
    call: OperatorCall,
    gpu: Gpu,
    family: str | None = None,
    direction: str | None = None,
    configs: Sequence[Config | None] = (None,),
    listings: Sequence[str] = (),
    progress: Tick | None = None,
) -> list[list[Inspected]]:
    """For each of ``configs`` the passes of ``call`` on ``gpu``, or the one called ``direction``.

    A config names some parameters of one pass; the others become the best predicted ones. Raises BadUsage.
    """
    found = [_passes(call, gpu, family, direction, config) for config in configs]
    launches = [record.launch for passes in found for it, _ in passes for record in it.launches]
    try:
        compiled = compile_all([(launch, gpu) for launch in launches], None, progress, listings)
    except RuntimeError as error:
        raise BadUsage(str(error)) from error
    return [
        [
            Inspected(
                *(it, considered),
                tuple(compiled[record.launch.compile_key, gpu.arch] for record in it.launches),
                *(gpu, call.precision),
            )
            for it, considered in passes
        ]
        for passes in found
    ]


def _passes(
    call: OperatorCall, gpu: Gpu, family: str | None, direction: str | None, config: Config | None
) -> list[tuple[OperatorPass, Considered | None]]:
    passes, considered = _called(call, gpu, family, {})
    wanted = [index for index, it in enumerate(passes) if direction in (None, it.name, it.name.partition(",")[0])]
    if not wanted:
        raise BadUsage(f"--direction {direction!r} is not one of {', '.join(it.name for it in passes)}")
    if config is not None:
        chosen = [n for n in wanted if passes[n].choice is not None and passes[n].name != "indices"]
        if not chosen:
            raise BadUsage(f"{direction} has no tile of its own")
        if len(chosen) != 1:
            names = ", ".join(passes[index].name for index in chosen)
            raise BadUsage(f"a config is one pass's: add --direction, one of {names}")
        of = next(n for n, it in enumerate(considered) if it.choice is passes[chosen[0]].choice)
        passes, considered = _called(call, gpu, family, {of: config})
    by_choice = {id(it.choice): it for it in considered}
    served = [index for index in wanted if passes[index].plan is None or passes[index].choice is not None]
    # If a family is named, the passes that it does not serve are left out.
    if (family is None and len(served) < len(wanted)) or not served:
        it = passes[next(index for index in wanted if index not in served)]
        assert it.plan is not None
        why = "; ".join(f"{name}: {reason}" for name, reason in it.plan.reasons)
        raise BadUsage(f"no kernel serves {it.name}: {why or f'{family} is no family of it'}")
    # Indices take the forward pass's tile, whose prediction is not theirs.
    return [(it, None if it.name == "indices" else by_choice.get(id(it.choice))) for it in (passes[n] for n in served)]


def _called(
    call: OperatorCall, gpu: Gpu, family: str | None, configs: dict[int, Config]
) -> tuple[list[OperatorPass], list[Considered]]:
    """The passes of one call, and its tiles in the order of their choice; ``configs``: what is given of the n-th."""
    considered: list[Considered] = []

    def consider(space: Space, features: Hashable, work: Callable[[Config], Work], gpu: Gpu, choice: Choice) -> Choice:
        given = configs.get(len(considered))
        # A copy, whose identity says which pass it is of.
        choice = replace(choice) if given is None else _best(space, work, gpu, given)
        considered.append(Considered(space, work, choice))
        return choice

    try:
        only = dispatch.only_family(family) if family else contextlib.nullcontext()
        planned = dispatch.use_target(gpu), considering(consider), settings(strict=False), FakeTensorMode()
        grad = torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(call.gradients)
        with contextlib.ExitStack() as stack:
            for context in (only, *planned, fp32_convolutions(call.precision), *grad):
                stack.enter_context(context)
            with Traffic() as traffic:
                call()
    except (RuntimeError, ValueError, TypeError, ZeroDivisionError) as error:
        raise BadUsage(reason(error)) from error
    except AssertionError as error:
        if not configs:
            raise
        tried = [considered[n].choice.config if n < len(considered) else given for n, given in configs.items()]
        raise BadUsage(f"{'; '.join(map(_text, tried))}: the kernel takes no such tile for this problem") from error
    return traffic.passes, considered


def _best(space: Space, work: Callable[[Config], Work], gpu: Gpu, given: Config) -> Choice:
    """The best predicted config with the given values: of those that the space tries, if there are any, else of all
    that fit."""
    unknown = [name for name in given if name not in space.ranges]
    if unknown:
        known = "; ".join(f"{name} of {', '.join(map(str, values))}" for name, values in space.ranges.items())
        raise BadUsage(f"no parameter {', '.join(unknown)} in {space.name}, which has {known}")
    for name, value in given.items():
        why = _why_not_taken(space, name, value)
        if why is not None:
            raise BadUsage(f"{name}={value}: {why}")
    narrowed = space.narrowed(only={name: (value,) for name, value in given.items()})
    fitting = predictions(list(narrowed) or narrowed.combinations(), work, gpu)
    if not fitting:
        raise BadUsage(f"{_text(given)} does not fit a multiprocessor of the {gpu.name}")
    config, prediction = min(fitting, key=lambda pair: pair[1].seconds)
    return Choice(config, "the command line", prediction.seconds, prediction.bound)


def _why_not_taken(space: Space, name: str, value: int) -> str | None:
    """Why no kernel of ``space`` can take this value of a parameter, or None."""
    if value == 0:
        return None if 0 in space.ranges[name] else "not at least 1"
    counted = name in COUNTS or any(known & (known - 1) for known in space.ranges[name])
    return None if counted or value & (value - 1) == 0 else "a tensor's side, which has to be a power of two"


def _text(config: Config) -> str:
    return ",".join(f"{name}={value}" for name, value in config.items())
