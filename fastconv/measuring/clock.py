"""Timing: samples of a call on the device and on the host, candidates visited in turn, medians with their spread."""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from fastconv.kernels.launch.device import here
from fastconv.measuring import reason

Thunk = Callable[[], object]
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one call: on the device, and on the host until the call returned."""

    device: float
    host: float


class Clock(Protocol):
    """``cold`` empties the L2 cache first, as a single operator finds it, and hides the host's latency. With ``alone``
    that is in the device's time, as for a caller whose queue is empty."""

    def __call__(self, call: Thunk, repeats: int = 1, *, cold: bool = False, alone: bool = False) -> Sample: ...


class CudaClock:
    """CUDA events on the current stream."""

    # Long enough for the host to enqueue an operator behind it, at any clock rate of a GPU.
    SLEEP_CYCLES = 1_000_000

    def __init__(self) -> None:
        cache = here.get_device_properties(here.current_device()).L2_cache_size
        self._flush = torch.empty(4 * cache, dtype=torch.int8, device=here.at())

    def __call__(self, call: Thunk, repeats: int = 1, *, cold: bool = False, alone: bool = False) -> Sample:
        begin, end = (here.Event(enable_timing=True) for _ in range(2))
        here.synchronize()
        if cold:
            if not alone:
                here.sleep(self.SLEEP_CYCLES)
            self._flush.zero_()
            if alone:
                here.synchronize()
        begin.record()
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        enqueued = time.perf_counter()
        end.record()
        end.synchronize()
        return Sample(begin.elapsed_time(end) / repeats, (enqueued - started) * 1e3 / repeats)


class HostClock:
    """The host's clock for both numbers, for dry runs. Its times say nothing about a GPU."""

    def __call__(self, call: Thunk, repeats: int = 1, *, cold: bool = False, alone: bool = False) -> Sample:
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        elapsed = (time.perf_counter() - started) * 1e3 / repeats
        return Sample(elapsed, elapsed)


@dataclass
class Rounds:
    """What ``interleave`` collected: samples by candidate, and why a candidate left."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def interleave(
    candidates: Mapping[str, T],
    sample: Callable[[T], Sample],
    *,
    deadline: float,
    least: int = 3,
    most: int = 30,
    now: Callable[[], float] = time.monotonic,
) -> Rounds:
    """Sample every candidate once a round. Each round begins one candidate later, so that drift of the clocks or the
    temperature falls on all alike. Stops after ``most`` rounds, or at ``deadline`` (seconds of ``now``) once ``least``
    are done. A candidate that raises leaves with its reason; the others go on."""
    rounds = Rounds(samples={name: [] for name in candidates})
    for done in range(most):
        if done >= least and now() >= deadline:
            break
        alive = [name for name in candidates if name not in rounds.failures]
        if not alive:
            break
        first = done % len(alive)
        for name in alive[first:] + alive[:first]:
            try:
                rounds.samples[name].append(sample(candidates[name]))
            except Exception as error:  # a benchmark's row, not its end
                rounds.failures[name] = reason(error)
    return rounds


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once ``seconds`` have passed: for compilers, which know no time limit.

    A signal raises it, so only in the main thread and between two bytecodes. It comes again every few seconds, because
    compilers catch exceptions of their parts.
    """
    if math.isinf(seconds) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(number: int, frame: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def spread(values: list[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile, and the number of values."""
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3], "samples": len(values)}


def synchronize(device: torch.device) -> None:
    """Wait for the device; the CPU is never behind."""
    if here.holds(device):
        here.synchronize(device)


def release(device: torch.device) -> None:
    """Free what nothing refers to, and give the allocator's memory back."""
    gc.collect()
    if here.holds(device):
        here.empty_cache()
