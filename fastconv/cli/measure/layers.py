"""A network's convolutions one by one, each direction apart, against cuDNN on channels_last; and a call's host time."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

import fastconv.functional
from fastconv.cli import BadUsage
from fastconv.cli.measure.accuracy import against_yardstick, fp32_convolutions
from fastconv.cli.measure.clock import Call, Clock, Sample, interleave, reason, spread, synchronize
from fastconv.cli.measure.results import Part
from fastconv.cli.measure.screen import Progress
from fastconv.cli.models import Subject
from fastconv.kernels import dispatch, launch
from fastconv.kernels.problem import DIRECTIONS, ConvProblem, conv_problem

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
HOST_CALLS = 200  # few enough for the driver's queue, so that the host never waits for the GPU
HOST_TARGET_US = 30.0
SPEED_TARGET = 0.5  # of cuDNN's speed, in each direction of a dense layer


@dataclass(frozen=True)
class Layer:
    """A distinct convolution of a network: how often it occurs, and whether its input needs a gradient."""

    problem: ConvProblem
    bias: bool
    needs_dgrad: bool
    count: int

    @property
    def directions(self) -> tuple[str, ...]:
        return tuple(direction for direction in DIRECTIONS if direction != "dgrad" or self.needs_dgrad)


def distinct_layers(subject: Subject, dtype: torch.dtype) -> list[Layer]:
    """The network's distinct convolutions, most arithmetic first. Runs it on the meta device: no arithmetic.

    Left out: transposed convolutions, subclasses, padding modes other than zeros and sides padded unequally, which
    aten's own operator does not take.
    """
    found: Counter[tuple[ConvProblem, bool, bool]] = Counter()

    def note(conv: _ConvNd, inputs: tuple[torch.Tensor, ...]) -> None:
        # What _ConvNd resolves 'same' to: innermost axis first, both sides of each.
        before, after = (
            conv._reversed_padding_repeated_twice[::2][::-1],
            conv._reversed_padding_repeated_twice[1::2][::-1],
        )
        if type(conv) not in CONVS or conv.padding_mode != "zeros" or before != after:
            return
        (x,) = inputs
        padding = (*before, *after)
        problem = conv_problem(
            x.shape, conv.weight.shape, None, conv.stride, padding, conv.dilation, conv.groups, dtype
        )
        found[problem, conv.bias is not None, x.requires_grad] += 1

    model = copy.deepcopy(subject.model).to("meta")
    for module in model.modules():
        if isinstance(module, _ConvNd):
            module.register_forward_pre_hook(note)
    try:
        model(torch.empty(subject.input_shape, device="meta"))
    except Exception as error:  # the network's own code: anything
        raise BadUsage(f"the layers of {subject.name} cannot be listed without data: {reason(error)}") from error
    layers = [Layer(*key, count) for key, count in found.items()]
    return sorted(layers, key=lambda layer: -layer.count * layer.problem.flops)


def dense_layers(subject: Subject, dtype: torch.dtype) -> list[Layer]:
    return [layer for layer in distinct_layers(subject, dtype) if layer.problem.groups == 1]


def call_each(subject: Subject, dtype: torch.dtype, device: torch.device) -> None:
    """Call what `measure` times of ours once: for compiling ahead."""
    for layer in dense_layers(subject, dtype):
        for direction in layer.directions:
            _ours(layer.problem, direction, *_operands(layer.problem, direction, device))()


def measure(
    subject: Subject,
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    deadline: float,
    progress: Progress,
    save: Callable[[Part], None],
) -> Part:
    """Every direction of every dense layer, compared, then timed with a cold L2 cache; slowest against cuDNN first.

    ``save`` gets the part after each layer. Layers that ``deadline`` leaves no time for are rows that say so.
    """
    name = str(dtype).removeprefix("torch.")
    part: Part = {
        "id": "layers",
        "kind": "layers",
        "title": f"Dense convolutions of {subject.name}, batch {subject.input_shape[0]}, {name}, channels_last",
        "model": subject.name,
        "dtype": name,
        "target": SPEED_TARGET,
        "rows": [],
    }
    rows = part["rows"]
    layers = dense_layers(subject, dtype)
    progress.begin(part["title"], len(layers))
    for layer in layers:
        for direction in layer.directions:
            row = {"layer": layer.problem.describe(), "count": layer.count, "direction": direction}
            row |= {"flops": layer.problem.flops, "bytes": layer.problem.bytes, "reason": None}
            if time.monotonic() > deadline:
                row |= {"status": "skipped", "reason": "no time left"}
            else:
                try:
                    row |= _row(layer.problem, direction, device, clock, deadline)
                except Exception as error:
                    row |= {"status": "failed", "reason": reason(error)}
            rows.append(row)
        rows.sort(key=lambda row: row.get("speed", float("inf")))
        save(part | _verdict(rows))
        progress.tick(layer.problem.describe())
    return part | _verdict(rows)


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    bad = [f"{row['direction']} of {row['layer']}" for row in rows if row["status"] in ("wrong", "failed")]
    if bad:
        return {"verdict": "wrong", "reason": f"{len(bad)} wrong or failed, the first {bad[0]}"}
    measured = any(row["status"] == "ok" for row in rows)
    return {"verdict": "right", "reason": None} if measured else {"verdict": "skipped", "reason": "no time left"}


def _row(problem: ConvProblem, direction: str, device: torch.device, clock: Clock, deadline: float) -> dict[str, Any]:
    operands = _operands(problem, direction, device)
    ours, theirs = _ours(problem, direction, *operands), _theirs(problem, direction, *operands)
    with torch.no_grad():
        with launch.record() as records:
            value = ours()
        plan = dispatch.plan(direction, problem, dispatch.target(device))
        row: dict[str, Any] = {
            "family": plan.family,
            "tile": None if plan.choice is None else dict(plan.choice.config),
            "launches": [record.name for record in records],
        }
        wide = torch.float64 if problem.dtype == torch.float32 else torch.float32
        with fp32_convolutions("ieee"):
            exact = _theirs(problem, direction, *(operand.to(wide) for operand in operands))()
        (compared,) = against_yardstick({direction: value}, {direction: theirs()}, {direction: exact}, problem.dtype)
        row |= {"error": compared["ours"], "eager_error": compared["eager"], "allowed": compared["allowed"]}
        if not records or not compared["right"]:
            return row | {"status": "wrong", "reason": "no kernel ran" if not records else "too far from the reference"}
        # The same call twice is the noise of the measurement.
        calls = {"fastconv": ours, "cudnn": theirs, "A/A": theirs}
        for call in calls.values():  # cuDNN searches its algorithm at a problem's first call
            clock(call)
        rounds = interleave(calls, lambda call: clock(call, cold=True), deadline=deadline, least=5)
    if rounds.failures:
        name, why = next(iter(rounds.failures.items()))
        return row | {"status": "failed", "reason": f"{name}: {why}"}
    times = {name: spread([sample.device for sample in samples]) for name, samples in rounds.samples.items()}
    ours_ms, cudnn_ms = times["fastconv"]["median"], times["cudnn"]["median"]
    return row | {
        "status": "ok",
        "fastconv_ms": times["fastconv"],
        "cudnn_ms": times["cudnn"],
        "speed": cudnn_ms / ours_ms,
        "noise": abs(times["A/A"]["median"] / cudnn_ms - 1),
        "tflops": problem.flops / ours_ms / 1e9,
    }


def _operands(
    problem: ConvProblem, direction: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, w, dy in the dense channels-last layout, random (zeros run faster), w scaled so that y is of size one."""
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    memory_format = formats.get(problem.rank, torch.contiguous_format)
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device) * scale
        return values.to(problem.dtype).contiguous(memory_format=memory_format)

    fan_in = problem.in_channels // problem.groups * problem.taps
    return draw(problem.input_shape), draw(problem.weight_shape, fan_in**-0.5), draw(problem.output_shape)


def _ours(
    problem: ConvProblem, direction: str, x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Our operator for one direction; its results in the layout of its operands."""
    ops = torch.ops.fastconv
    rest = (list(problem.dilation), problem.groups)
    stride, padding = list(problem.stride), list(problem.padding)
    channels_last = problem.rank > 1
    if direction == "fprop":
        return lambda: ops.conv_fprop(x, w, None, stride, padding * 2, *rest)
    if direction == "dgrad":
        return lambda: ops.conv_dgrad(dy, w, None, list(problem.input_size), stride, padding, *rest, channels_last)
    return lambda: ops.conv_wgrad(x, dy, list(problem.filter_size), stride, padding, *rest, channels_last)


def _theirs(
    problem: ConvProblem, direction: str, x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """PyTorch's own operator for one direction; on a GPU, cuDNN."""
    axes = (list(problem.stride), list(problem.padding), list(problem.dilation))
    rest = (False, [0] * problem.rank, problem.groups)
    if direction == "fprop":
        return lambda: torch.ops.aten.convolution(x, w, None, *axes, *rest)
    mask = [direction == "dgrad", direction == "wgrad", False]
    index = mask.index(True)
    return lambda: torch.ops.aten.convolution_backward(dy, x, w, None, *axes, *rest, mask)[index]


def host_time(device: torch.device, deadline: float) -> Part:
    """Microseconds of the host for one small ``conv2d``, without and with a graph for backward: ours and PyTorch's."""
    x = torch.randn(1, 16, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    w = torch.randn(16, 16, 3, 3, device=device).contiguous(memory_format=torch.channels_last).requires_grad_()
    functions: dict[str, Callable[..., torch.Tensor]] = {"fastconv": fastconv.functional.conv2d, "PyTorch": F.conv2d}
    rows = []
    for gradient in (False, True):
        calls = {name: _called(conv, x, w, gradient) for name, conv in functions.items()}
        for call in calls.values():
            call()
        rounds = interleave(calls, lambda call: _host_sample(call, device), deadline=deadline, most=20)
        for name, samples in rounds.samples.items():
            times = {"host_us": spread([sample.host * 1e3 for sample in samples])} if samples else {}
            rows.append({"function": name, "gradient": gradient, "reason": rounds.failures.get(name), **times})
    failed = [row["reason"] for row in rows if row["reason"]]
    return {
        "id": "host",
        "kind": "host",
        "title": "Host time of one conv2d call, 1x16x8x8, 3x3",
        "verdict": "failed" if failed else "right",
        "reason": failed[0] if failed else None,
        "target_us": HOST_TARGET_US,
        "rows": rows,
    }


def _called(conv: Callable[..., torch.Tensor], x: torch.Tensor, w: torch.Tensor, gradient: bool) -> Call:
    def call() -> None:
        with torch.set_grad_enabled(gradient):
            conv(x, w, padding=1)

    return call


def _host_sample(call: Call, device: torch.device) -> Sample:
    calls = HOST_CALLS if device.type == "cuda" else 1  # interpreted, a call takes ten thousand times as long
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    host = (time.perf_counter() - started) * 1e3 / calls
    synchronize(device)
    return Sample(float("nan"), host)
