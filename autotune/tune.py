"""How configs are measured and a winner is found: one problem (`tune`), and a session over many (`session`).

Knows neither kernels nor GPUs: a `Runner` compiles and runs one problem's configs, the clock is given. Each measurement
is in the store before the next begins, so a session may end at any moment and go on later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import exp, log, sqrt
from statistics import median
from typing import Any, Protocol

from fastconv.autotune.choose import Question, predictions
from fastconv.autotune.cost_model import predict
from fastconv.autotune.records import OUT_OF_MEMORY, RETRIED, Identity, Measured, Record, Tuned, now
from fastconv.autotune.search import Candidate, Key, Search, key_of
from fastconv.autotune.space import Config

# `Version.policy`: a change to this procedure, or to what a `Runner` times, raises it.
PROCEDURE = 1
FIRST = 5  # configs of the first round
ROUND = 3  # of a later one, which knows better where to look
FINALISTS = 2  # the best configs, measured again before they meet the default in the last paired run
PAIRED = 7  # rounds of that run


@dataclass(frozen=True)
class Footprint:
    """What a compiler made of a config."""

    registers: int  # a thread
    spills: int  # instructions
    shared_memory: int  # bytes a program


@dataclass(frozen=True)
class Failed:
    """Why there is no time."""

    status: str  # one of records.FAILURES
    message: str = ""


class Runner(Protocol):
    """One problem on one GPU."""

    def compile(self, configs: Sequence[Config]) -> Sequence[Footprint | Failed]:
        """Compile them, in parallel and without the GPU; an entry for each."""

    def run(self, config: Config | None) -> float | Failed:
        """Seconds of one measurement, cold L2 and result checked. No config: PyTorch's own op."""


@dataclass(frozen=True)
class TuningState:
    """A problem's state after a round."""

    question: Question
    measured: int  # configs with a time, earlier sessions' included
    failed: int
    best: Config | None
    best_seconds: float | None
    default_seconds: float | None
    left: float  # seconds of the problem's allowance
    done: bool = False


@dataclass(frozen=True)
class TuningTask:
    """A problem to tune, and how often the model runs it in a step."""

    question: Question
    count: int = 1


def tune(
    question: Question,
    runner: Runner,
    keep: Callable[[Record], object],
    *,
    known: Iterable[Measured] = (),
    seeds: Iterable[Config] = (),
    trials: int = 16,
    top_k: int = 16,
    deadline: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
    tell: Callable[[TuningState], object] = lambda state: None,
    fastconv: str = "unknown",
) -> Tuned | None:
    """Find the fastest config of one problem in at most ``trials`` measurements and a last paired run.

    The cost model chooses the default. The ``top_k`` configs that it ranks first are compiled at once, others when they
    are proposed. ``keep`` gets each record at once (``Store.append``). ``known``: this problem's earlier measurements
    of this version; they count among the ``trials``, and failed configs are not tried again. None if nothing was
    measured by ``deadline``, or nothing runs.
    """
    return _Tuning(question, runner, keep, known, seeds, deadline, clock, tell).run(trials, top_k, fastconv)


class _Tuning:
    def __init__(
        self,
        question: Question,
        runner: Runner,
        keep: Callable[[Record], object],
        known: Iterable[Measured],
        seeds: Iterable[Config],
        deadline: float,
        clock: Callable[[], float],
        tell: Callable[[TuningState], object],
    ) -> None:
        self.question, self.runner, self.keep = question, runner, keep
        self.deadline, self.clock, self.report = deadline, clock, tell
        self.default = question.choice.config
        candidates = [Candidate(*each) for each in predictions(question.space, question.work, question.gpu)]
        self.predictions = {key_of(each.config): each.prediction for each in candidates}
        self.search = Search(candidates, self.default, seeds)
        self.compiled: set[Key] = set()
        self.failed: set[Key] = set()
        for each in known:
            if each.config is None or key_of(each.config) not in self.predictions:
                continue
            if each.seconds is None:
                self._drop(each.config)
            else:
                self.search.tell(each.config, each.seconds)
                self.compiled.add(key_of(each.config))
        self.trials = self.search.measured

    def run(self, trials: int, top_k: int, fastconv: str) -> Tuned | None:
        self.look(trials, top_k)
        return self._last_run(fastconv)

    def look(self, trials: int, top_k: int) -> None:
        """The rounds of the search; ``search`` holds what they find."""
        ranked = sorted(self.predictions, key=lambda key: self.predictions[key].seconds)
        self._compile([dict(key) for key in ranked[:top_k]])
        count = FIRST
        while self.trials < trials - FINALISTS and self.clock() < self.deadline:
            proposed = self._proposed(min(count, trials - FINALISTS - self.trials))
            if not proposed:
                break
            self._round(proposed)
            count = ROUND
        if self.clock() < self.deadline:
            self._round([config for config, _ in self.search.best(min(FINALISTS, trials - self.trials))])

    def _proposed(self, count: int) -> list[Config]:
        """The next configs to measure. They are compiled, so none of them spills or is too large."""
        while True:
            proposed = self.search.propose(count)
            new = [config for config in proposed if key_of(config) not in self.compiled]
            if not new or not self._compile(new):
                return proposed

    def _compile(self, configs: Sequence[Config]) -> bool:
        """Whether a config fails. The compiler's figures make the predictions of the others anew."""
        configs = [config for config in configs if not {key_of(config)} & (self.compiled | self.failed)]
        out = False
        for config, found in zip(configs, self.runner.compile(configs) if configs else (), strict=True):
            self.compiled.add(key_of(config))
            if isinstance(found, Footprint):
                taken = {"registers": found.registers, "shared_memory": found.shared_memory}
                prediction = predict(replace(self.question.work(config), **taken), self.question.gpu)
                if found.spills:
                    found = Failed("spills")
                elif prediction is None:
                    found = Failed("too_large")
                else:
                    self.predictions[key_of(config)] = prediction
                    self.search.refine(config, prediction)
            # Users get the default, so it is measured even if it spills.
            if isinstance(found, Failed) and not (found.status == "spills" and config == self.default):
                self._fail(config, found)
                out = True
        return out

    def _round(self, configs: Sequence[Config]) -> None:
        for config in configs:
            seconds = self._measure(config)
            if seconds is not None:
                self.search.tell(config, seconds)
        self._report()

    def _measure(self, config: Config | None) -> float | None:
        self.trials += config is not None
        found = self.runner.run(config)
        if isinstance(found, Failed):
            self._fail(config, found)
            return None
        self._keep(config, "ok", found)
        return found

    def _fail(self, config: Config | None, failure: Failed) -> None:
        self._keep(config, failure.status, None)
        if config is not None:
            self._drop(config)

    def _drop(self, config: Config) -> None:
        self.failed.add(key_of(config))
        self.search.drop(config)

    def _keep(self, config: Config | None, status: str, seconds: float | None) -> None:
        found = (None, None) if config is None else (dict(config), self.predictions[key_of(config)].seconds)
        self.keep(Measured(*self.question.identity, found[0], status, seconds, found[1], now()))

    def _last_run(self, fastconv: str) -> Tuned | None:
        """The best against the default and PyTorch, in turn. The default runs twice: the difference is the noise."""
        times = None
        while times is None:
            best = self.search.best(8)
            if not best:
                return None
            # A default that cannot run leaves nothing to beat.
            default = best[0][0] if key_of(self.default) in self.failed else self.default
            finalists = [config for config, _ in best[:FINALISTS] if config != default]
            times = self._paired(default, finalists)
        twice = times["default"], times["again"]
        base = [sqrt(a * b) for a, b in zip(*twice, strict=True)]
        noise = noise_of(*twice)
        winner, ours = default, base
        for index, config in enumerate(finalists):
            theirs = times.get(f"finalist {index}", [])
            if theirs and _gain(base, theirs) > max(1 + noise, _gain(base, ours)):
                winner, ours = config, theirs
        pytorch = times.get("pytorch")
        entry = Tuned(
            *self.question.identity,
            config=dict(winner),
            seconds=median(ours),
            default=dict(default),
            default_seconds=median(base),
            also=tuple((dict(config), seconds) for config, seconds in best if config != winner),
            pytorch=median(pytorch) if pytorch else None,
            noise=noise,
            measurements=self.search.measured,
            date=now(),
            fastconv=fastconv,
        )
        self.keep(entry)
        self._report(entry)
        return entry

    def _paired(self, default: Config, finalists: Sequence[Config]) -> dict[str, list[float]] | None:
        """Times of each contestant that did not fail; None if the default failed."""
        contestants: dict[str, Config | None] = {"default": default, "again": default, "pytorch": None}
        contestants |= {f"finalist {index}": config for index, config in enumerate(finalists)}
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for index in range(PAIRED):
            names = list(contestants)
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                seconds = self._measure(contestants[name])
                if seconds is not None:
                    times[name].append(seconds)
                elif contestants[name] == default:
                    return None
                else:
                    del contestants[name], times[name]
        return times

    def _report(self, entry: Tuned | None = None) -> None:
        best = self.search.best(1)
        config, seconds = best[0] if best else (None, None)
        default = self.search.time(self.default)
        if entry is not None:
            config, seconds, default = entry.config, entry.seconds, entry.default_seconds
        left = self.deadline - self.clock()
        measured, failed = self.search.measured, len(self.failed)
        self.report(TuningState(self.question, measured, failed, config, seconds, default, left, entry is not None))


def _gain(base: Sequence[float], theirs: Sequence[float]) -> float:
    return median(a / b for a, b in zip(base, theirs, strict=True))


def noise_of(a: Sequence[float], b: Sequence[float]) -> float:
    """How much two series of times differ, taken of one thing in turn: relative, outliers aside."""
    differences = [log(x / y) for x, y in zip(a, b, strict=True)]
    middle = median(differences)
    return exp(abs(middle) + 1.4826 * median(abs(each - middle) for each in differences)) - 1


def session(
    tasks: Sequence[TuningTask],
    runner_of: Callable[[Question], Runner],
    keep: Callable[[Record], object],
    *,
    budget: float,
    known: Sequence[Record] = (),
    seeds: Callable[[Question], Iterable[Config]] = lambda question: (),
    again: bool = False,
    clock: Callable[[], float] = time.monotonic,
    **options: Any,
) -> list[Tuned]:
    """Tune problems in ``budget`` seconds, first and longest those that take most of the model's time.

    ``known``: the store's records (``Store.read``). What is tuned or measured is not measured again, nor what failed,
    except out of memory; with ``again`` also what is tuned or measured, crashed or hung. ``options``: those of `tune`.
    Raises ValueError if the budget is not positive.
    """
    if budget <= 0:
        raise ValueError(f"the budget must be over 0 seconds, but is {budget:g}")
    ended = {each.identity for each in known if isinstance(each, Tuned)}
    open_tasks = [task for task in tasks if again or task.question.identity not in ended]
    open_tasks.sort(key=lambda task: -share_of(task))
    earlier: dict[Identity, list[Measured]] = {}
    anew = (OUT_OF_MEMORY, *(("ok", *RETRIED) if again else ()))
    for each in known:
        if isinstance(each, Measured) and each.status not in anew:
            earlier.setdefault(each.identity, []).append(each)
    end = clock() + budget

    kept: list[Record] = []

    def noted(record: Record) -> object:
        kept.append(record)
        return keep(record)

    def attempt(task: TuningTask, deadline: float) -> Tuned | None:
        question = task.question
        options.update(known=earlier.get(question.identity, ()), seeds=seeds(question), deadline=deadline)
        return tune(question, runner_of(question), noted, clock=clock, **options)

    found: list[Tuned | None] = []
    late: list[TuningTask] = []
    left = sum(map(share_of, open_tasks))
    for task in open_tasks:
        share, left = share_of(task) / left if left else 1.0, left - share_of(task)
        if clock() >= end:
            break
        before = len(kept)
        found.append(attempt(task, min(end, clock() + (end - clock()) * share)))
        if found[-1] is None and len(kept) == before:
            late.append(task)
    # Their configs are compiled now, which took all their time.
    for task in late:
        if clock() >= end:
            break
        found.append(attempt(task, end))
    return [entry for entry in found if entry is not None]


def share_of(task: TuningTask) -> float:
    """The problem's predicted seconds in a step of the model."""
    return task.count * task.question.choice.seconds


def expected_gain(question: Question) -> float:
    """Predicted seconds that the best config saves over the default."""
    return question.choice.seconds - question.fitting()[0][1]
