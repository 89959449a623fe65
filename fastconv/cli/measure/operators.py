"""Convolutions and pools of real networks one by one, each direction apart, against PyTorch, beside their bytes.

A call is read off a network as the network makes it. A direction is what autograd runs for it: forward without
gradients, forward keeping what backward reads, the gradient of one operand alone.
"""

from __future__ import annotations

import copy
import inspect
import math
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import fastconv
from fastconv.cli import BadUsage
from fastconv.cli.measure.accuracy import against_yardstick, fp32_convolutions
from fastconv.cli.measure.clock import Call, Clock, interleave, reason, spread, within
from fastconv.cli.measure.results import Part
from fastconv.cli.measure.screen import Progress
from fastconv.cli.models import Subject, load
from fastconv.kernels import launch
from fastconv.kernels.problem import ConvProblem
from fastconv.traffic import Traffic

OURS, EAGER, CONTIGUOUS, COMPILED = "fastconv", "eager channels_last", "eager contiguous", "torch.compile channels_last"
EITHER_LAYOUT, ANY = (EAGER, CONTIGUOUS), (EAGER, CONTIGUOUS, COMPILED)
# The operand that a direction differentiates by; None: it is a forward pass.
DIFFERENTIATED = {"fprop": None, "forward": None, "forward, training": None, "dgrad": 0, "wgrad": 1, "backward": 0}
LARGE = 2**28  # bytes of an input that no cache holds a part of: of such tensors a share of the bandwidth is owed
MOST_BATCHES = 8  # that a network's batch is enlarged to for that
ROUND_SECONDS = 0.3  # for the rounds of one row, where that is enough for the least of them
ROW_SECONDS = 0.5  # that a row needs without torch.compile, until some have been measured
COMPILE_SECONDS = 3.0  # that Inductor needs for one operator: not begun where less is left
FIRST_LAYER_CHANNELS = 4
Operands = list[torch.Tensor | None]
Providers = dict[str, tuple[Callable[..., Any], Callable[[torch.Tensor], torch.Tensor]]]  # and how its operands lie


@dataclass(frozen=True)
class Operator:
    """A call of a function that torch.nn.functional and fastconv.functional both have."""

    function: str  # "conv2d"
    shapes: tuple[tuple[int, ...] | None, ...]  # of its tensors: the input, of a convolution also weight and bias
    arguments: tuple[tuple[str, Any], ...]  # all the others
    needs_dx: bool  # not of a first layer's image

    @property
    def input(self) -> tuple[int, ...]:
        assert self.shapes[0] is not None
        return self.shapes[0]

    @property
    def pool(self) -> bool:
        return "pool" in self.function

    @property
    def groups(self) -> int:
        return dict(self.arguments).get("groups", 0)

    @property
    def first(self) -> bool:
        """Whether it is a network's first layer: few channels, of an image."""
        return self.groups == 1 and self.input[1] <= FIRST_LAYER_CHANNELS and not self.needs_dx

    @property
    def directions(self) -> tuple[str, ...]:
        if not self.pool:
            return ("fprop", *["dgrad"] * self.needs_dx, "wgrad")
        # Only a maximum keeps something for backward.
        return ("forward", *["forward, training"] * ("max" in self.function), *["backward"] * self.needs_dx)

    @property
    def streams(self) -> bool:
        """Whether a copy's bandwidth is what it can be held to: a pool, or a convolution of stride 1."""
        stride = dict(self.arguments).get("stride")
        return self.pool or stride == 1 or (isinstance(stride, tuple) and set(stride) == {1})

    def enlarged(self, itemsize: int) -> Operator | None:
        """With a batch so large that its input is `LARGE`; None where it is so already, or never will be."""
        bytes_of_one = math.prod(self.input) * itemsize
        batches = next((2**i for i in range(8) if bytes_of_one << i >= LARGE), MOST_BATCHES + 1)
        if not 1 < batches <= MOST_BATCHES:
            return None
        return replace(self, shapes=((self.input[0] * batches, *self.input[1:]), *self.shapes[1:]))


@dataclass(frozen=True)
class Kind:
    """Operators that are alike: the networks they are read off, and what is owed for them."""

    name: str
    networks: tuple[str, ...]
    takes: Callable[[Operator], bool]
    speed: float  # relative to the fastest of ``rivals``
    rivals: tuple[str, ...]
    share: float | None = None  # of the bandwidth of a copy, where tensors are `LARGE`


KINDS = (
    Kind(
        "pool",
        ("resnet50", "vgg16", "googlenet"),
        lambda call: call.pool,
        speed=1.0,
        rivals=ANY,
        share=0.85,
    ),
    Kind(
        "depthwise",
        ("mobilenet_v2", "efficientnet_b0", "convnext_tiny"),
        lambda call: 1 < call.groups == call.input[1],
        speed=2.0,
        rivals=(EAGER,),
        share=0.85,
    ),
    Kind(
        "grouped",
        ("resnext50_32x4d",),
        lambda call: 1 < call.groups < call.input[1],
        speed=1.5,
        rivals=EITHER_LAYOUT,
    ),
    Kind(
        "first-layer",
        ("resnet50", "efficientnet_b0", "vgg16"),
        lambda call: call.first,
        speed=1.0,
        rivals=EITHER_LAYOUT,
    ),
    Kind(
        "dense",
        ("resnet50",),
        lambda call: call.groups == 1 and not call.first,
        speed=0.5,
        rivals=(EAGER,),
    ),
)


@dataclass
class Task:
    """An operator to be measured, and how often each network calls it (never with an enlarged batch)."""

    kind: Kind
    operator: Operator
    networks: dict[str, int]
    rows: list[dict[str, Any]] = field(default_factory=list)  # one for each direction


class _Calls(TorchFunctionMode):
    """Counts the calls of functions that fastconv has too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Operator] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in fastconv.functional.__all__ and hasattr(F, name):
            bound = inspect.signature(getattr(fastconv.functional, name)).bind(*args, **kwargs)
            bound.apply_defaults()
            tensors = {key: value for key, value in bound.arguments.items() if key in ("input", "weight", "bias")}
            self.found[
                Operator(
                    name,
                    tuple(None if tensor is None else tuple(tensor.shape) for tensor in tensors.values()),
                    tuple((key, _frozen(value)) for key, value in bound.arguments.items() if key not in tensors),
                    tensors["input"].requires_grad,
                )
            ] += 1
        return func(*args, **kwargs)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read_off(subject: Subject) -> Counter[Operator]:
    """The distinct calls of the network, with how often it makes each. Runs it on the meta device: no arithmetic.

    Left out: pools that are asked for indices.
    """
    model = copy.deepcopy(subject.model).to("meta").eval()  # a small image may have maps of one pixel
    calls = _Calls()
    try:
        with calls:
            model(torch.empty(subject.input_shape, device="meta"))
    except Exception as error:  # the network's own code: anything
        raise BadUsage(f"the layers of {subject.name} cannot be listed without data: {reason(error)}") from error
    return calls.found


def tasks_of(
    kinds: Iterable[Kind], subjects: Callable[[str], Subject], dtype: torch.dtype, most: int | None = None
) -> list[Task]:
    """The operators of each kind, those with the most bytes in a network first, those with an enlarged batch before
    them, the kinds taking turns; at most ``most`` of each."""
    calls: dict[str, Counter[Operator]] = {}
    columns = []
    for kind in kinds:
        found: dict[Operator, dict[str, int]] = {}
        for network in kind.networks:
            if network not in calls:
                calls[network] = read_off(subjects(network))
            for call, count in calls[network].items():
                if kind.takes(call):
                    found.setdefault(call, {})[network] = count
        ordered = sorted(found, key=lambda call: -sum(found[call].values()) * math.prod(call.input))
        large = [call.enlarged(dtype.itemsize) for call in ordered if call.streams] if kind.share else []
        tasks = [Task(kind, call, {}) for call in dict.fromkeys(large) if call is not None]
        columns.append((tasks + [Task(kind, call, found[call]) for call in ordered])[:most])
    return [task for turn in zip_longest(*columns) for task in turn if task is not None]


def networks_on_meta(batch: int, size: int | None) -> Callable[[str], Subject]:
    """Networks of torchvision's by name, without the time that their weights take."""

    def subject(name: str) -> Subject:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GoogLeNet's, about how its weights are drawn
            return load(name, batch, size)

    return subject


def plan_each(tasks: Sequence[Task], dtype: torch.dtype, device: torch.device) -> None:
    """Give each task its rows, with what will run, found without data: all that is launched, for compiling ahead."""
    for task in tasks:
        task.rows = task.rows or [_planned(task, direction, dtype, device) for direction in task.operator.directions]


def _planned(task: Task, direction: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    operator = task.operator
    row: dict[str, Any] = {
        "operator": f"{operator.function} {'x'.join(map(str, operator.input))}",
        "direction": direction,
        "networks": task.networks,
        "bytes": None,
        "flops": 0,
        # Of a share of the bandwidth only that is owed which no cache helps.
        "large": operator.streams and math.prod(operator.input) * dtype.itemsize >= LARGE,
    }
    try:
        with FakeTensorMode(), fastconv.settings(strict=True):
            call = _step(
                getattr(fastconv.functional, operator.function), operator, direction, _fakes(task, dtype, device)
            )
            with Traffic() as traffic:
                call()
        plans = [found.plan for found in traffic.passes if found.plan is not None]
        first = plans[0]
    except Exception as error:
        return row | {"status": "failed", "reason": reason(error), "providers": []}
    return row | {
        "operator": first.problem.describe(),
        "bytes": sum(plan.problem.bytes for plan in plans),
        "flops": sum(plan.problem.flops for plan in plans if isinstance(plan.problem, ConvProblem)),
        "family": first.family,
        "tile": None if first.choice is None else dict(first.choice.config),
        "status": "ok",
        "reason": None,
        "providers": [],
    }


def _fakes(task: Task, dtype: torch.dtype, device: torch.device) -> Operands:
    return [
        None if shape is None else _laid_out(torch.empty(shape, dtype=dtype, device=device))
        for shape in task.operator.shapes
    ]


def _drawn(operator: Operator, dtype: torch.dtype, device: torch.device) -> Operands:
    """Random (zeros run faster), channels_last where there is such a layout, the weight such that outputs are of size
    one."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...] | None) -> torch.Tensor | None:
        if shape is None:
            return None
        # A weight's; an input's first axis is the batch, which scales nothing.
        scale = math.prod(shape[1:]) ** -0.5 if shape is not operator.input else 1.0
        return _laid_out((torch.randn(shape, generator=generator, device=device) * scale).to(dtype))

    return [draw(shape) for shape in operator.shapes]


def _laid_out(tensor: torch.Tensor) -> torch.Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=formats.get(tensor.dim(), torch.contiguous_format))


def _step(
    function: Callable[..., Any], operator: Operator, direction: str, operands: Operands
) -> Callable[[], torch.Tensor]:
    """One direction of ``function``, which returns its result."""
    index, keywords = DIFFERENTIATED[direction], dict(operator.arguments)
    operands = [None if tensor is None else tensor.detach() for tensor in operands]
    leaf = operands[index or 0]
    assert leaf is not None
    leaf.requires_grad_(index is not None or direction == "forward, training")
    if index is None:

        def forward() -> torch.Tensor:
            with torch.set_grad_enabled(direction == "forward, training"):
                return function(*operands, **keywords)

        return forward
    y = function(*operands, **keywords)
    generator = torch.Generator(y.device).manual_seed(1)
    # As y lies, whichever side's it is, and exact in every type.
    dy = torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator, device=y.device).bfloat16())
    return lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]


def measure(
    tasks: Sequence[Task],
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    deadline: float,
    progress: Progress,
    save: Callable[[Part], None],
) -> list[Part]:
    """Every direction of every task, compared, then timed with a cold L2 cache: a part for each kind, what PyTorch is
    faster at first.

    ``save`` gets a task's part after it. Rows that ``deadline`` leaves no time for say so; so do providers that fail.
    torch.compile gets what time the tasks to come do not need, for kinds that are owed to be faster than it first.
    """
    name = str(dtype).removeprefix("torch.")
    plan_each(tasks, dtype, device)
    bandwidth = copy_bandwidth(device, clock)
    parts: dict[str, Part] = {}
    for kind in dict.fromkeys(task.kind for task in tasks):
        parts[kind.name] = {
            "id": f"operators-{kind.name}",
            "kind": "operators",
            "title": f"{kind.name.capitalize()} operators of {', '.join(kind.networks)}, batch {batch}, {name}",
            "dtype": name,
            "copy_bandwidth": bandwidth,
            "speed_target": kind.speed,
            "rivals": list(kind.rivals),
            "share_target": kind.share,
            "rows": [],
        }
    progress.begin("operators", len(tasks))
    needed: list[float] = []  # seconds of a row, torch.compile left out
    with torch.autograd.set_multithreading_enabled(False):
        for done, task in enumerate(tasks):
            part, started = parts[task.kind.name], time.monotonic()
            if started > deadline:
                for row in task.rows:
                    row |= {"status": "skipped", "reason": "no time left"}
            else:
                each = statistics.median(needed[-10:]) if len(needed) > 5 else ROW_SECONDS
                coming = sum(_seconds(other, each, COMPILED in task.kind.rivals) for other in tasks[done:])
                _measure_task(task, dtype, device, clock, deadline, deadline - coming)
                compiling = sum(p.get("seconds", 0.0) for row in task.rows for p in row["providers"])
                needed.append((time.monotonic() - started - compiling) / len(task.rows))
            for row in task.rows:
                _finish(row, task.kind, bandwidth)
            part["rows"] = sorted((*part["rows"], *task.rows), key=_losses_first)
            part |= _verdict(part["rows"])
            save(part)
            progress.tick(task.rows[0]["operator"])
    return list(parts.values())


def _seconds(task: Task, each: float, owed: bool) -> float:
    """What a task to come will need; where torch.compile is not ``owed`` to the one at hand, theirs that are."""
    return len(task.rows) * each + (COMPILE_SECONDS if COMPILED in task.kind.rivals and not owed else 0.0)


def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """Bytes a second, read and written, of a copy too large for any cache."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    samples = [clock(lambda: target.copy_(source), cold=True).device for _ in range(12)]
    return 2 * source.numel() / statistics.median(samples[2:]) * 1e3


def _measure_task(
    task: Task, dtype: torch.dtype, device: torch.device, clock: Clock, deadline: float, compile_deadline: float
) -> None:
    torch._dynamo.reset()  # one operator's guards would count against another's limit of recompilations
    providers = _providers(task.operator, device)
    for row in task.rows:
        if row["status"] != "ok":
            continue
        try:
            operands = _drawn(task.operator, dtype, device)
            if _is_right(row, task.operator, operands):
                _time(row, task.operator, operands, providers, clock, deadline, compile_deadline)
        except Exception as error:
            row |= {"status": "failed", "reason": reason(error)}


def _providers(operator: Operator, device: torch.device) -> Providers:
    """What is timed: a function, and how its operands lie."""
    theirs = getattr(F, operator.function)

    # Of its own, so that torch.compile keeps what it makes of it with nothing else.
    def compilable(*operands: Any, **keywords: Any) -> Any:
        return theirs(*operands, **keywords)

    # Where there is no GPU this is a dry run, and Inductor would spend it on compiling C++.
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    return {
        EAGER: (theirs, _laid_out),
        OURS: (getattr(fastconv.functional, operator.function), _laid_out),
        CONTIGUOUS: (theirs, torch.Tensor.contiguous),
        COMPILED: (torch.compile(compilable, backend=backend, dynamic=False), _laid_out),
    }


def _is_right(row: dict[str, Any], operator: Operator, operands: Operands) -> bool:
    """Complete ``row`` with the error of our result, beside PyTorch's, against wider arithmetic."""
    direction, theirs = row["direction"], getattr(F, operator.function)
    assert operands[0] is not None
    dtype = operands[0].dtype
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    with fp32_convolutions("ieee"):
        wider = [None if tensor is None else tensor.to(wide).contiguous() for tensor in operands]
        exact = _step(theirs, operator, direction, wider)()
    with fastconv.settings(strict=True):
        ours = _step(getattr(fastconv.functional, operator.function), operator, direction, operands)
        with launch.record() as records:
            value = ours()
    eager = _step(theirs, operator, direction, operands)()
    (found,) = against_yardstick({direction: value}, {direction: eager}, {direction: exact}, dtype)
    row |= {"error": found["ours"], "eager_error": found["eager"], "allowed": found["allowed"]}
    row["launches"] = [record.name for record in records]
    if not records or not found["right"]:
        row |= {"status": "wrong", "reason": "too far from the reference" if records else "no kernel ran"}
    return row["status"] == "ok"


def _time(
    row: dict[str, Any],
    operator: Operator,
    operands: Operands,
    providers: Providers,
    clock: Clock,
    deadline: float,
    compile_deadline: float,
) -> None:
    calls: dict[str, Call] = {}
    for name, (function, layout) in providers.items():
        provider: dict[str, Any] = {"provider": name, "status": "ok", "reason": None}
        row["providers"].append(provider)
        started = time.monotonic()
        left = compile_deadline - started if name == COMPILED else math.inf
        if left < COMPILE_SECONDS:
            provider |= {"status": "skipped", "reason": "no time left"}
            continue
        try:
            # A gradient is asked for again and again.
            with within(left), torch._functorch.config.patch(donated_buffer=False):
                laid_out = [None if tensor is None else layout(tensor) for tensor in operands]
                calls[name] = _step(function, operator, row["direction"], laid_out)
                for _ in range(2):  # cuDNN searches its algorithm at a problem's first call
                    clock(calls[name])
        except Exception as error:
            calls.pop(name, None)
            provider |= {"status": "failed", "reason": reason(error)}
        if name == COMPILED:
            provider["seconds"] = time.monotonic() - started
    if EAGER in calls:
        calls["A/A"] = calls[EAGER]  # the same call twice is the noise of the measurement
    until = min(deadline, time.monotonic() + ROUND_SECONDS)
    rounds = interleave(calls, lambda call: clock(call, cold=True), deadline=until, least=5)
    times = {name: spread([sample.device for sample in samples]) for name, samples in rounds.samples.items() if samples}
    for provider in row["providers"]:
        name = provider["provider"]
        if name in rounds.failures:
            provider |= {"status": "failed", "reason": rounds.failures[name]}
        elif name in times:
            provider["ms"] = times[name]
    if EAGER in times and "A/A" in times:
        row["noise"] = abs(times["A/A"]["median"] / times[EAGER]["median"] - 1)
    ours = next(provider for provider in row["providers"] if provider["provider"] == OURS)
    if ours["status"] != "ok":
        row |= {"status": ours["status"], "reason": ours["reason"]}


def _finish(row: dict[str, Any], kind: Kind, bandwidth: float) -> None:
    """What the times mean: speed over the fastest of PyTorch's and over the rivals, bandwidth, and what is owed."""
    times = {provider["provider"]: provider["ms"]["median"] for provider in row["providers"] if "ms" in provider}
    if OURS not in times or row["status"] != "ok":
        return
    ours = times.pop(OURS)
    rivals = [times[name] for name in kind.rivals if name in times]
    row["speed"] = min(times.values()) / ours if times else None
    row["speed_over_rivals"] = min(rivals) / ours if rivals else None
    row["gb_per_s"] = row["bytes"] / ours / 1e6
    row["share"] = row["bytes"] / ours * 1e3 / bandwidth
    row["tflops"] = row["flops"] / ours / 1e9 if row["flops"] else None
    missed = [row["speed_over_rivals"] is not None and row["speed_over_rivals"] < kind.speed]
    missed.append(kind.share is not None and row["large"] and row["share"] < kind.share)
    row["missed"] = [what for what, is_missed in zip(("speed", "bandwidth"), missed, strict=True) if is_missed]


def _losses_first(row: dict[str, Any]) -> float:
    if row["status"] in ("wrong", "failed"):
        return -1.0
    speed = row.get("speed")
    return math.inf if speed is None else speed


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    bad = [f"{row['direction']} of {row['operator']}" for row in rows if row["status"] in ("wrong", "failed")]
    if bad:
        return {"verdict": "wrong", "reason": f"{len(bad)} wrong or failed, the first {bad[0]}"}
    measured = any(row["status"] == "ok" for row in rows)
    return {"verdict": "right", "reason": None} if measured else {"verdict": "skipped", "reason": "no time left"}
