"""One direction of one operator, a row of a result file: every provider's result compared, then its time taken."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

import fastconv
from fastconv.benchmarks.calls import Operator
from fastconv.benchmarks.measure.directions import DirectionCall, Operands, direction_call, drawn, exact
from fastconv.benchmarks.models import channels_last
from fastconv.benchmarks.registry import COMPILED, EAGER, Provider
from fastconv.benchmarks.report.targets import DOUBTED
from fastconv.kernels.launch import launch
from fastconv.kernels.launch.device import here
from fastconv.measuring import reason
from fastconv.measuring.accuracy import Tensors, against_yardstick
from fastconv.measuring.capture import Captured, captured
from fastconv.measuring.clock import Clock, Sample, Thunk, interleave, spread, synchronize, within

ROUND_SECONDS = 0.3  # for the rounds of one row, unless the least number of rounds takes longer
COMPILE_SECONDS = 3.0  # Inductor's for one operator: it does not begin with less left
WARM_UP = 2  # calls after the first, in which cuDNN searches its algorithm
AGAIN_BYTES = 2**30  # of operands that the second measurement goes through: far more than a cache holds
AGAIN_COPIES, AGAIN_ROUNDS = 32, 5  # of the operands, at most
ALONE = ", alone"  # ends a candidate's name: called from Python, the GPU waiting for it
REPEATED = "A/A"


@dataclass(frozen=True)
class Setup:
    """What the rows of a run share."""

    dtype: torch.dtype
    device: torch.device
    clock: Clock


@contextlib.contextmanager
def conditions(device: torch.device) -> Iterator[None]:
    """Rows are measured without falling back, with gradients that can be asked for repeatedly, and on one stream: no
    graph can be captured on the default one, and gradients run on their forward pass's."""
    with (
        fastconv.settings(strict=True, prefer="triton"),
        torch._functorch.config.patch(donated_buffer=False),
        torch.autograd.set_multithreading_enabled(False),
    ):
        if not here.holds(device):
            yield
            return
        stream = here.Stream()
        stream.wait_stream(here.current_stream())
        with here.stream(stream):
            yield
        here.current_stream().wait_stream(stream)


def measure_row(
    row: dict[str, Any],
    operator: Operator,
    providers: Sequence[Provider],
    setup: Setup,
    deadline: float,
    compile_deadline: float,
) -> None:
    """Complete ``row``: errors, a time for each provider whose results are right, the noise. A provider that raises,
    runs out of memory or finds no time is an entry that says so. No time is taken if ours is wrong."""
    eager, ours = providers[0], next(provider for provider in providers if provider.name == row["ours"])
    operands = drawn(operator, setup.dtype, setup.device)
    yardstick = compared(row, operator, ours, operands)
    if row["status"] != "ok":
        return
    ready: dict[str, DirectionCall] = {}
    unserved = {entry["provider"] for entry in row["providers"]}
    for provider in providers:
        if provider.name in unserved:
            continue
        entry: dict[str, Any] = {"provider": provider.name, "status": "ok", "reason": None}
        row["providers"].append(entry)
        started = time.monotonic()
        left = compile_deadline - started if provider.name == COMPILED else math.inf
        if left < COMPILE_SECONDS:
            entry |= {"status": "skipped", "reason": "no time left"}
            continue
        try:
            with within(left):
                call = prepared(provider, operator, row["direction"], operands)
                wrong = yardstick(call())
                for _ in range(WARM_UP):
                    setup.clock(call)
        except Exception as error:  # a row's entry, not the run's end
            entry |= failed(error)
        else:
            entry |= {"status": "wrong", "reason": "too far from the reference"} if wrong else {}
            ready |= {} if wrong else {provider.name: call}
        if provider.name == COMPILED:
            entry["seconds"] = time.monotonic() - started
    del yardstick
    _time(row, ready, setup, deadline)
    entries = {entry["provider"]: entry for entry in row["providers"]}
    row |= {key: entries[ours.name][key] for key in ("status", "reason") if entries[ours.name]["status"] != "ok"}
    times = [entries[side.name]["ms"]["median"] for side in (eager, ours) if "ms" in entries[side.name]]
    if len(times) == 2 and times[0] > DOUBTED * times[1]:
        row["again"] = _measure_again(row, operator, ours, eager, setup)


def compared(
    row: dict[str, Any], operator: Operator, provider: Provider, operands: Operands
) -> Callable[[Tensors], bool]:
    """Complete ``row`` with the worst error of our results against wider arithmetic, beside PyTorch's. Returns a
    function that says whether another side's results are wrong; if PyTorch's call raises, by a fixed tolerance."""
    direction, dtype = row["direction"], operands[0].dtype  # type: ignore[union-attr]
    reference = exact(operator, direction, operands)
    call = prepared(provider, operator, direction, operands)
    with launch.record() as records:
        ours = call()
    dense = [None if t is None else channels_last(t) for t in operands]
    eager: Tensors | None = None
    with contextlib.suppress(Exception):  # its entry as a provider holds it
        eager = direction_call(getattr(F, operator.function), operator, direction, dense)()
    found = against_yardstick(ours, eager, reference, dtype)
    worst = found[0]
    row |= {"error": worst["ours"], "eager_error": worst["eager"], "allowed": worst["allowed"]}
    row["launches"] = [record.name for record in records]
    if not records or not all(tensor["right"] for tensor in found):
        why = f"{worst['tensor']} too far from the reference" if records else "no kernel ran"
        row |= {"status": "wrong", "reason": why}

    def wrong(results: Tensors) -> bool:
        return not all(tensor["right"] for tensor in against_yardstick(results, eager, reference, dtype))

    return wrong


def prepared(provider: Provider, operator: Operator, direction: str, operands: Operands) -> DirectionCall:
    """The provider's call of one direction, with the operands in its layout."""
    laid_out = [None if tensor is None else provider.layout(tensor) for tensor in operands]
    with provider.serving():
        call = direction_call(provider.function(operator), operator, direction, laid_out)
    if provider.family is None:
        return call

    def serving() -> Tensors:
        with provider.serving():
            return call()

    return serving


def failed(error: Exception) -> dict[str, Any]:
    """What an entry or a row says of an exception. Memory that it leaves is given back."""
    if isinstance(error, torch.OutOfMemoryError):
        here.empty_cache()
    return {"status": "failed", "reason": reason(error)}


def _time(row: dict[str, Any], ready: dict[str, DirectionCall], setup: Setup, deadline: float) -> None:
    """Each provider's milliseconds, in turn with the others': replayed from a CUDA graph, and called from Python."""
    entries = {entry["provider"]: entry for entry in row["providers"]}
    samples: dict[str, Callable[[], Sample]] = {}
    if here.holds(setup.device):
        here.empty_cache()  # a graph takes memory of its own, and none is given back during its capture
    for name, call in ready.items():
        replay = captured(Captured, call, entries[name], setup.device)
        samples[name] = partial(setup.clock, replay, cold=True)
        samples[name + ALONE] = partial(setup.clock, call, cold=True, alone=True)
    if EAGER in samples:
        samples[REPEATED] = samples[EAGER]  # the same call twice is the noise of the measurement
    until = min(deadline, time.monotonic() + ROUND_SECONDS)
    rounds = interleave(samples, lambda sample: sample(), deadline=until, least=5)
    times = {name: spread([sample.device for sample in found]) for name, found in rounds.samples.items() if found}
    for name in ready:
        why = rounds.failures.get(name) or rounds.failures.get(name + ALONE)
        if why is None:
            entries[name] |= {"ms": times[name], "alone_ms": times[name + ALONE]}
        else:
            entries[name] |= {"status": "failed", "reason": why}
    if "ms" in entries.get(EAGER, {}) and REPEATED not in rounds.failures:
        row["noise"] = abs(times[REPEATED]["median"] / times[EAGER]["median"] - 1)


def _measure_again(
    row: dict[str, Any], operator: Operator, ours: Provider, eager: Provider, setup: Setup
) -> dict[str, Any]:
    """Ours and eager's milliseconds in another way: other numbers, the host's clock, and a cold cache because copies of
    the operands that exceed it take turns in one graph."""
    moved = operator.elements * setup.dtype.itemsize
    many = here.real and here.holds(setup.device)
    copies = max(2, min(AGAIN_COPIES, AGAIN_BYTES // moved)) if many else 2
    try:
        calls = {}
        for provider in (ours, eager):
            each = [
                prepared(provider, operator, row["direction"], drawn(operator, setup.dtype, setup.device, seed))
                for seed in range(1, copies + 1)
            ]
            calls[provider.name] = _all_of(each, setup.device)
        rounds = interleave(calls, partial(_host_sample, setup.device), deadline=math.inf, most=AGAIN_ROUNDS)
        if rounds.failures:
            raise RuntimeError("; ".join(rounds.failures.values()))
    except Exception as error:
        return failed(error) | {"copies": copies}
    mine, theirs = (
        statistics.median(sample.host / copies for sample in rounds.samples[side.name]) for side in (ours, eager)
    )
    return {"status": "ok", "copies": copies, "ms": mine, "eager_ms": theirs, "speed_over_eager": theirs / mine}


def _all_of(each: Sequence[DirectionCall], device: torch.device) -> Thunk:
    """All the calls as one."""

    def one_after_the_other() -> None:
        for call in each:
            call()

    one_after_the_other()
    return captured(Captured, one_after_the_other, {}, device)


def _host_sample(device: torch.device, call: Thunk) -> Sample:
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    elapsed = (time.perf_counter() - started) * 1e3
    return Sample(elapsed, elapsed)
