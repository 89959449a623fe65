"""Candidates in turn, medians, and what happens when time runs out or a candidate fails; all with a clock made up."""

import math
import signal
import threading
import time

import pytest

from fastconv.measuring import reason
from fastconv.measuring.clock import HostClock, Sample, interleave, spread, within


class Now:
    """A clock that every sample moves on by a second."""

    def __init__(self) -> None:
        self.time = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.time

    def sample(self, call) -> Sample:  # type: ignore[no-untyped-def]
        self.time += 1.0
        self.order.append(call())
        return Sample(device=self.time, host=0.0)


def test_every_round_visits_all_and_begins_one_later() -> None:
    now = Now()
    calls = {name: (lambda name=name: name) for name in "abc"}
    rounds = interleave(calls, now.sample, deadline=math.inf, most=4, now=now)
    assert "".join(now.order) == "abcbcacababc"
    assert {name: len(samples) for name, samples in rounds.samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_the_deadline_ends_it_but_not_before_the_least_rounds() -> None:
    calls = {name: (lambda name=name: name) for name in "ab"}
    for deadline, expected in ((0.0, 3), (9.0, 5), (1e9, 30)):
        now = Now()
        rounds = interleave(calls, now.sample, deadline=deadline, now=now)
        assert len(rounds.samples["a"]) == len(rounds.samples["b"]) == expected


def test_a_candidate_that_raises_leaves_with_its_reason_and_the_others_go_on() -> None:
    now = Now()

    def fails() -> str:
        if now.time > 3:
            raise MemoryError("out of memory\nand a long story")
        return "b"

    rounds = interleave({"a": lambda: "a", "b": fails}, now.sample, deadline=math.inf, most=6, now=now)
    assert len(rounds.samples["a"]) == 6
    assert rounds.failures == {"b": "MemoryError: out of memory"}


def test_it_ends_when_all_have_failed() -> None:
    def fails() -> None:
        raise ValueError

    rounds = interleave({"a": fails}, lambda call: call(), deadline=math.inf)
    assert rounds.failures == {"a": "ValueError: no message"}


def test_spread() -> None:
    assert spread([5.0]) == {"median": 5.0, "p20": 5.0, "p80": 5.0, "samples": 1}
    assert spread([float(i) for i in range(11)]) == pytest.approx({"median": 5, "p20": 2, "p80": 8, "samples": 11})


def test_a_reason_is_one_short_line() -> None:
    assert reason(RuntimeError("first\nsecond")) == "RuntimeError: first"
    assert len(reason(RuntimeError("x" * 10_000))) == 300


def test_the_host_clock_repeats_the_call() -> None:
    calls: list[int] = []
    sample = HostClock()(lambda: calls.append(1), 7)
    assert len(calls) == 7
    assert sample.device == sample.host > 0


def test_a_block_that_takes_too_long_is_stopped() -> None:
    handler = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match="not done after 0 s"), within(0.05):
        while True:
            time.sleep(0.01)
    with within(60.0):
        pass
    with within(math.inf):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0
    assert signal.getsignal(signal.SIGALRM) is handler


def test_only_the_main_thread_has_a_time_limit() -> None:
    done: list[str] = []

    def work() -> None:
        with within(1e-3):
            done.append("no limit")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["no limit"]
