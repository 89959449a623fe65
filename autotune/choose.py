"""The one place that answers: which tile for this problem on this GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from fastconv.autotune import known
from fastconv.autotune.adapter import CACHED, MEASURING, Adapter, Policy
from fastconv.autotune.cost_model import MAX_REGISTERS, Prediction, Work, predict
from fastconv.autotune.gpus import Gpu
from fastconv.autotune.records import Identity, ProblemKey, Tuned, Untuned, Version, now
from fastconv.autotune.space import Config, Space
from fastconv.autotune.table import Table, Tables

# The cost model cannot tell closer times apart: the space's earlier config wins, so that problems share binaries.
RESOLUTION = 0.35
# Another problem's config serves if its prediction is at most this times the best.
TRUST = 2.0

NEAREST, COST_MODEL, FIXED = "nearest problem", "cost model", "fixed"


@dataclass(frozen=True)
class Choice:
    config: Config
    source: str  # one of table.SOURCES, NEAREST, COST_MODEL or FIXED
    seconds: float  # predicted
    bound: str  # what limits it, by the prediction
    measured: float | None = None  # seconds, if a table has them for a problem of this bucket
    pytorch_faster: bool = False  # by more than the noise of the measurement
    of: str | None = None  # the problem that was measured, if it is another one


@dataclass(frozen=True)
class Question:
    """Which config of ``space`` serves a problem on ``gpu``? Holds what a tuning run needs to know."""

    space: Space
    features: Hashable
    work: Callable[[Config], Work]
    gpu: Gpu
    problem: ProblemKey
    version: Version
    choice: Choice  # the cost model's: the default

    @property
    def identity(self) -> Identity:
        """The first fields of the question's records."""
        return self.problem, self.gpu.name, self.gpu.multiprocessors, self.version

    def predict(self, config: Config) -> Prediction | None:
        """None for a config that does not fit the GPU."""
        return predict(self.work(config), self.gpu)

    def fitting(self) -> list[tuple[Config, float]]:
        """The configs that fit the GPU, fastest predicted first, with the predicted seconds."""
        predicted = predictions(self.space, self.work, self.gpu)
        return sorted(((config, it.seconds) for config, it in predicted), key=lambda pair: pair[1])


_choices: dict[tuple[str, Hashable, Gpu, Policy], Choice] = {}
known.on_change(lambda: _choices.clear())
_measurer: Callable[[Question], Tuned | None] | None = None
_measuring = threading.local()
_one_measures = threading.Lock()


def choose(
    space: Space, features: Hashable, work: Callable[[Config], Work], gpu: Gpu, adapter: Adapter | None = None
) -> Choice:
    """The config of ``space`` for the problem that ``features`` identifies; a known problem is one dictionary hit.

    ``work(config)`` says what a config makes of the problem. The first source that knows a config decides: the lock
    file, this user's measurements, the shipped table, the nearest problem measured, the cost model. A table is asked
    for the problem itself, then for one of nearly its batch and image. Without an ``adapter`` the cost model decides.
    Measures only if the policy is "first" or "force", a measurer is installed and the adapter is ``live``. Raises
    ValueError if nothing fits.
    """
    if adapter is None or gpu.interpreted:
        adapter, policy = None, CACHED
    else:
        policy = adapter.policy()
        if policy.tune in MEASURING and not adapter.live(gpu):
            # The choice of a call that cannot measure is not kept for the one that will.
            policy = policy._replace(tune="cached")
    key = (space.name, features, gpu, policy)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = _decide(space, features, work, gpu, adapter, policy)
    return choice


def predictions(configs: Iterable[Config], work: Callable[[Config], Work], gpu: Gpu) -> list[tuple[Config, Prediction]]:
    """The configs that fit the GPU, in their own order."""
    predicted = ((config, predict(work(config), gpu)) for config in configs)
    return [(config, it) for config, it in predicted if it is not None]


def by_cost_model(space: Space, work: Callable[[Config], Work], gpu: Gpu) -> Choice:
    """The choice without measurements: the default that tuning has to beat. Raises ValueError if nothing fits."""
    fitting = predictions(space, work, gpu)
    if not fitting:
        raise ValueError(f"no config of the space {space.name!r} fits the {gpu.name}")
    limit = (1 + RESOLUTION) * min(prediction.seconds for _, prediction in fitting)
    config, prediction = next((c, p) for c, p in fitting if p.seconds <= limit)
    if space.free:
        binary = {name: value for name, value in config.items() if name not in space.free}
        alike = [(c, p) for c, p in fitting if binary.items() <= c.items()]
        config, prediction = min(alike, key=lambda each: each[1].seconds)
    return Choice(config, COST_MODEL, prediction.seconds, prediction.bound)


def ask(space: Space, features: Hashable, work: Callable[[Config], Work], gpu: Gpu, adapter: Adapter) -> Question:
    """The question, with the choice by the cost model. Raises ValueError if nothing fits."""
    model = by_cost_model(space, work, gpu)
    return Question(
        space, features, work, gpu, adapter.problem(space.name, features), adapter.version(space.name), model
    )


def fixed(space: Space, config: Config, work: Callable[[Config], Work], gpu: Gpu) -> Choice:
    """The choice of a given config. Raises ValueError unless it is the space's and fits."""
    if config not in space:
        raise ValueError(f"the space {space.name!r} has no config {dict(config)}")
    prediction = predict(work(config), gpu)
    if prediction is None:
        raise ValueError(f"the config {dict(config)} of the space {space.name!r} does not fit the {gpu.name}")
    return Choice(config, FIXED, prediction.seconds, prediction.bound)


def install_measurer(measurer: Callable[[Question], Tuned | None] | None) -> None:
    """Let ``measurer`` measure problems if the policy is "first" or "force"."""
    global _measurer
    _measurer = measurer


def _decide(
    space: Space, features: Hashable, work: Callable[[Config], Work], gpu: Gpu, adapter: Adapter | None, policy: Policy
) -> Choice:
    if adapter is None or policy.tune == "off":
        return by_cost_model(space, work, gpu)
    question = ask(space, features, work, gpu, adapter)
    tables = known.tables(gpu, adapter)
    if policy.tune in MEASURING:
        _measure(question, tables, policy.tune == "force")
    choice = _look_up(question, tables, policy)
    if choice.source in (NEAREST, COST_MODEL) and adapter.live(gpu):
        known.note(Untuned(*question.identity, now()))
    return choice


def _look_up(question: Question, tables: Tables, policy: Policy) -> Choice:
    space, problem, version, model = question.space, question.problem, question.version, question.choice

    def usable(config: Config) -> Prediction | None:
        if config not in space or (policy.stable and not space.same_order(config, model.config)):
            return None
        return question.predict(config)

    for source, table in tables.layers:
        exact = table.exact(problem, version)
        for entry in [exact] if exact is not None else table.bucket(problem, version):
            config, measured = entry.config, entry.seconds
            if policy.stable:
                config, measured = _of_order(entry, space, model.config)
            prediction = usable(config)
            if prediction is not None:
                # PyTorch sums in another order.
                faster = policy.fastest and not policy.stable and entry.pytorch_faster
                of = None if entry is exact else entry.problem.describe()
                return Choice(config, source, prediction.seconds, prediction.bound, measured, faster, of)
    near = [entry for table in (tables.user, tables.shipped) for entry in table.nearest(problem, version)]
    best = question.fitting()[0][1] if near else 0.0
    for entry in sorted(near, key=lambda entry: problem.distance(entry.problem)):
        config = _of_order(entry, space, model.config)[0] if policy.stable else entry.config
        prediction = usable(config)
        if prediction is None or prediction.seconds > TRUST * best or question.work(config).registers > MAX_REGISTERS:
            continue
        return Choice(config, NEAREST, prediction.seconds, prediction.bound, of=entry.problem.describe())
    return model


def _of_order(entry: Tuned, space: Space, default: Config) -> tuple[Config, float]:
    """The fastest config of an entry that sums in the order of ``default``; else ``default``."""
    candidates = ((entry.config, entry.seconds), *entry.also)
    fitting = [(c, s) for c, s in candidates if c in space and space.same_order(c, default)]
    return fitting[0] if fitting else (default, entry.default_seconds)


def _measure(question: Question, tables: Tables, again: bool) -> None:
    """Measure what no table has, or with ``again`` what no lock file has; once a process, one thread at a time."""
    if getattr(_measuring, "now", False):
        return
    with _one_measures:
        layers = [tables.lock] if again else [table for _, table in tables.layers]
        if question.identity in known.attempted or any(
            table.exact(question.problem, question.version) for table in layers
        ):
            return
        if _measurer is None:
            known.warn_once(
                "tune='first' and 'force' need something that measures; none is installed, so tables decide"
            )
            return
        known.attempted.add(question.identity)
        _measuring.now = True
        try:
            entry = _measurer(question)
        except Exception as error:
            known.warn_once(f"{question.problem.describe()}: not measured: {type(error).__name__}: {error}")
            return
        finally:
            _measuring.now = False
        if entry is not None:
            known.store().append(entry)
            tables.user = Table([*tables.user.entries, entry])
