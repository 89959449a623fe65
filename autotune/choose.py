"""The one place that answers: which tile for this problem on this GPU."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from fastconv.autotune.cost_model import MAX_REGISTERS, Prediction, Work, predict
from fastconv.autotune.gpus import Gpu
from fastconv.autotune.records import Met, Problem, Tuned, Version, from_line
from fastconv.autotune.schema import SchemaError
from fastconv.autotune.space import Config, Space
from fastconv.autotune.store import Store
from fastconv.autotune.table import Table, of_gpu, read_table, shipped

# What the cost model cannot tell apart: within it the space's earlier config wins, so that problems share binaries.
RESOLUTION = 0.35
# Another problem's config serves only where it is not predicted to take longer than this, beside the best predicted.
TRUST = 2.0

LOCK, MEASURED, TABLE, NEAREST, COST_MODEL = "lock file", "measured here", "table", "nearest problem", "cost model"
FIXED = "fixed"
TUNE = ("off", "cached", "first", "force")
MEASURING = TUNE[2:]

log = logging.getLogger("fastconv")


@dataclass(frozen=True)
class Choice:
    config: Config
    source: str  # LOCK, MEASURED, TABLE, NEAREST, COST_MODEL or FIXED
    seconds: float  # predicted
    bound: str  # what the prediction says limits it
    measured: float | None = None  # seconds, where a table has them for a problem of this bucket
    pytorch_faster: bool = False  # measured so, by more than the noise
    of: str | None = None  # the problem that was measured, where it is another one


class Regime(NamedTuple):
    """What the user set. ``stable``: one order of summation for each problem, whatever is tuned, so never PyTorch's."""

    tune: str = "cached"  # one of TUNE: "off" the cost model alone; "first", "force": the measurer may run
    stable: bool = False
    fastest: bool = True  # PyTorch's own op where it was measured faster


CACHED = Regime()


@dataclass(frozen=True)
class Caller:
    """What whoever chooses says of itself and its problems; asked on a problem's first call only, but for ``regime``.

    ``problem(space, features)``: as tables know it. ``version(space name)``: under which code it would be measured.
    ``live(gpu)``: whether ``gpu`` is here and the call is a user's program. ``agree(gpu, tables, reloads)``: told
    before a GPU's tables are first used, where processes must agree on them; ``reloads``: how often they were agreed on
    already, and dropped. ``joined()``: whether processes that must agree have appeared since it was asked last.
    """

    problem: Callable[[str, Hashable], Problem]
    version: Callable[[str], Version]
    regime: Callable[[], Regime] = lambda: CACHED
    live: Callable[[Gpu], bool] = lambda gpu: False
    agree: Callable[[Gpu, Tables, int], None] = lambda gpu, tables, reloads: None
    joined: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Asked:
    """One question as it was asked: what a tuning run needs to know of a problem."""

    space: Space
    features: Hashable
    work: Callable[[Config], Work]
    gpu: Gpu
    problem: Problem
    version: Version
    choice: Choice  # by the cost model: the default


class Tables:
    """What is known of one GPU, in the order it is asked: lock file, this user's measurements, the shipped table."""

    def __init__(self, lock: Iterable[Tuned], user: Iterable[Tuned], shipped: Iterable[Tuned]) -> None:
        self.lock, self.user, self.shipped = Table(lock), Table(user), Table(shipped)

    @property
    def layers(self) -> tuple[tuple[str, Table], ...]:
        return ((LOCK, self.lock), (MEASURED, self.user), (TABLE, self.shipped))

    def __len__(self) -> int:
        return sum(len(table) for _, table in self.layers)

    def dump(self) -> str:
        """All of it, as ``replace`` takes it."""
        return base64.b85encode(zlib.compress(self._lines())).decode()

    def digest(self) -> str:
        """Equal where ``dump`` is."""
        return hashlib.sha256(self._lines()).hexdigest()

    def _lines(self) -> bytes:
        lines = [line for _, table in self.layers for line in (*sorted(e.line for e in table.entries), "")]
        return "\n".join(lines).encode()

    def replace(self, dumped: bytes) -> None:
        """Take another process's tables. Raises SchemaError where they are damaged."""
        layers: list[list[Tuned]] = [[], [], []]
        try:
            parts = zlib.decompress(base64.b85decode(dumped)).split(b"\n")
        except (zlib.error, ValueError) as error:
            raise SchemaError(f"another process's tables: {error}") from None
        layer = 0
        for index, line in enumerate(parts[:-1]):
            if not line:
                layer += 1
                continue
            entry = from_line(line, f"another process's tables, line {index + 1}")
            if not isinstance(entry, Tuned) or layer > 2:
                raise SchemaError(f"another process's tables, line {index + 1}: not a tuned problem")
            layers[layer].append(entry)
        self.lock, self.user, self.shipped = map(Table, layers)
        forget()


_choices: dict[tuple[str, Hashable, Gpu, Regime], Choice] = {}
_tables: dict[tuple[str, int], Tables] = {}
_reloads: Counter[tuple[str, int]] = Counter()  # since others were joined
_locked: list[Tuned] | None = None
_met: set[Problem] = set()
_store: Store | None = None
_loading = threading.RLock()
_told: set[str] = set()
_dependents: list[Callable[[], None]] = []
_measurer: Callable[[Asked], Tuned | None] | None = None
_measuring = threading.local()
_one_measures = threading.Lock()
# Problems that this process has measured, or tried to.
_attempted: set[tuple[Problem, Version, Gpu]] = set()


def choose(
    space: Space, features: Hashable, work: Callable[[Config], Work], gpu: Gpu, caller: Caller | None = None
) -> Choice:
    """The config of ``space`` for the problem that ``features`` identifies; a known problem is one dictionary hit.

    ``work(config)`` says what a config makes of the problem. In order: the lock file, this user's measurements, the
    shipped table (each: the problem itself, then one whose batch and image are nearly its own), the nearest problem
    measured, the cost model; without a ``caller`` the cost model alone. Never measures, unless the regime is "first"
    or "force", a measurer is installed and the caller is ``live``. Raises ValueError where nothing fits.
    """
    if caller is None or gpu.interpreted:
        caller, regime = None, CACHED
    else:
        regime = caller.regime()
        if regime.tune in MEASURING and not caller.live(gpu):
            # What is found by only looking is not kept for the call that will measure.
            regime = regime._replace(tune="cached")
    key = (space.name, features, gpu, regime)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = _decide(space, features, work, gpu, caller, regime)
    return choice


def by_cost_model(space: Space, work: Callable[[Config], Work], gpu: Gpu) -> Choice:
    """What is chosen where nothing was measured: the default that tuning has to beat. Raises ValueError."""
    predictions = [(config, predict(work(config), gpu)) for config in space]
    fitting = [(config, prediction) for config, prediction in predictions if prediction is not None]
    if not fitting:
        raise ValueError(f"no config of the space {space.name!r} fits the {gpu.name}")
    limit = (1 + RESOLUTION) * min(prediction.seconds for _, prediction in fitting)
    config, prediction = next((c, p) for c, p in fitting if p.seconds <= limit)
    if space.free:
        binary = {name: value for name, value in config.items() if name not in space.free}
        alike = [(c, p) for c, p in fitting if binary.items() <= c.items()]
        config, prediction = min(alike, key=lambda each: each[1].seconds)
    return Choice(config, COST_MODEL, prediction.seconds, prediction.bound)


def _decide(
    space: Space,
    features: Hashable,
    work: Callable[[Config], Work],
    gpu: Gpu,
    caller: Caller | None,
    regime: Regime,
) -> Choice:
    model = by_cost_model(space, work, gpu)
    if caller is None or regime.tune == "off":
        return model
    known = tables(gpu, caller)
    problem, version = caller.problem(space.name, features), caller.version(space.name)
    if regime.tune in MEASURING:
        _measure(Asked(space, features, work, gpu, problem, version, model), known, regime.tune == "force")
    choice = _look_up(known, problem, version, space, work, gpu, model, regime)
    if choice.source in (NEAREST, COST_MODEL) and caller.live(gpu):
        _note(Met(problem, gpu.name, gpu.multiprocessors, version, now()))
    return choice


def _look_up(
    known: Tables,
    problem: Problem,
    version: Version,
    space: Space,
    work: Callable[[Config], Work],
    gpu: Gpu,
    model: Choice,
    regime: Regime,
) -> Choice:
    stable = regime.stable

    def usable(config: Config) -> Prediction | None:
        if config not in space or (stable and not space.same_order(config, model.config)):
            return None
        return predict(work(config), gpu)

    for source, table in known.layers:
        exact = table.exact(problem, version)
        for entry in [exact] if exact is not None else table.bucket(problem, version):
            config, measured = _of_order(entry, space, model.config) if stable else (entry.config, entry.seconds)
            prediction = usable(config)
            if prediction is not None:
                # (Its order of summation is another.)
                pytorch = entry.pytorch if regime.fastest and not stable else None
                faster = pytorch is not None and pytorch * (1 + entry.noise) < measured
                of = None if entry is exact else entry.problem.describe()
                return Choice(config, source, prediction.seconds, prediction.bound, measured, faster, of)
    near = [entry for table in (known.user, known.shipped) for entry in table.nearest(problem, version)]
    best = min(p.seconds for p in (predict(work(config), gpu) for config in space) if p is not None) if near else 0.0
    for entry in sorted(near, key=lambda entry: problem.distance(entry.problem)):
        config = _of_order(entry, space, model.config)[0] if stable else entry.config
        prediction = usable(config)
        if prediction is None or prediction.seconds > TRUST * best or work(config).registers > MAX_REGISTERS:
            continue
        return Choice(config, NEAREST, prediction.seconds, prediction.bound, of=entry.problem.describe())
    return model


def _of_order(entry: Tuned, space: Space, default: Config) -> tuple[Config, float]:
    """The fastest config of an entry that sums in the order of ``default``, which stands for what was not measured."""
    candidates = ((entry.config, entry.seconds), *entry.also)
    fitting = [(c, s) for c, s in candidates if c in space and space.same_order(c, default)]
    return fitting[0] if fitting else (default, entry.default_seconds)


def ask(space: Space, features: Hashable, work: Callable[[Config], Work], gpu: Gpu, caller: Caller) -> Asked:
    """The question, with what is chosen without measurements: what a tuning run begins with."""
    problem, version = caller.problem(space.name, features), caller.version(space.name)
    return Asked(space, features, work, gpu, problem, version, by_cost_model(space, work, gpu))


def fitting(asked: Asked) -> list[tuple[Config, float]]:
    """The configs that fit the GPU, fastest predicted first, with the predicted seconds."""
    predicted = ((config, predict(asked.work(config), asked.gpu)) for config in asked.space)
    return sorted(((config, it.seconds) for config, it in predicted if it is not None), key=lambda pair: pair[1])


def fixed(space: Space, config: Config, work: Callable[[Config], Work], gpu: Gpu) -> Choice:
    """A config somebody else decided on: to measure it. Raises ValueError unless it is the space's and fits."""
    if config not in space:
        raise ValueError(f"the space {space.name!r} has no config {dict(config)}")
    prediction = predict(work(config), gpu)
    if prediction is None:
        raise ValueError(f"the config {dict(config)} of the space {space.name!r} does not fit the {gpu.name}")
    return Choice(config, FIXED, prediction.seconds, prediction.bound)


def tables(gpu: Gpu, caller: Caller | None = None) -> Tables:
    """What is known of ``gpu``, read from the disk once a process. Raises SchemaError, OSError for a lock file."""
    if caller is not None:
        join(caller)
    key = (gpu.name, gpu.multiprocessors)
    found = _tables.get(key)
    if found is not None:
        return found
    with _loading:
        if key not in _tables:
            records = store().read(("tuned", "met"))
            _met.update(record.problem for record in records if isinstance(record, Met) and record.of_gpu(gpu))
            found = Tables(of_gpu(lock_entries(), gpu), of_gpu(records, gpu), _shipped(gpu))
            if caller is not None:
                _check_lock(found.lock, caller)
                _check_gpu(lock_entries(), gpu)
                caller.agree(gpu, found, _reloads[key])
            _tables[key] = found
        return _tables[key]


def store() -> Store:
    """This user's store: one for the process, so one shard."""
    global _store
    with _loading:
        if _store is None:
            _store = Store()
        return _store


def load_lock(path: Path | str | None) -> None:
    """Let this lock file's choices win over all others in this process, None: no file's; ``FASTCONV_LOCK`` names one
    from outside. Raises SchemaError naming the field, OSError."""
    global _locked
    entries = [] if path is None else read_table(Path(path))
    with _loading:
        _locked = entries
        _drop_tables()
    forget()


def join(caller: Caller) -> None:
    """Drop tables and choices where the caller's process has joined others, which then agree: to be called where a call
    is decided, so that one decided already costs nothing, and keeps its tile until another call joins."""
    if caller.joined():
        with _loading:
            _tables.clear()
            _reloads.clear()
        forget()


def _drop_tables() -> None:
    _reloads.update(_tables.keys())
    _tables.clear()


def learn(entry: Tuned) -> None:
    """Keep what was found, in this process and in the store."""
    store().append(entry)
    with _loading:
        found = _tables.get((entry.gpu, entry.multiprocessors))
        if found is not None:
            found.user = Table([*found.user.entries, entry])
    forget()


def forget() -> None:
    """Drop every choice made, and what depends on one: tables changed."""
    _choices.clear()
    for drop in _dependents:
        drop()


def reload() -> None:
    """Read store, lock file and tables again when they are next needed."""
    global _store, _locked
    with _loading:
        _store, _locked = None, None
        _drop_tables()
        _met.clear()
        _attempted.clear()
    forget()


def on_change(drop: Callable[[], None]) -> None:
    """Call ``drop`` whenever choices made before no longer hold."""
    _dependents.append(drop)


def install_measurer(measurer: Callable[[Asked], Tuned | None] | None) -> None:
    """Who measures a problem where the regime says "first" or "force"; it returns what it found, or None."""
    global _measurer
    _measurer = measurer


def now() -> str:
    """The date as records have it, UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _measure(asked: Asked, known: Tables, again: bool) -> None:
    """Measure what no table has, or ``again`` what no lock file has; once a process, one thread at a time."""
    if getattr(_measuring, "now", False):
        return
    with _one_measures:
        identity = asked.problem, asked.version, asked.gpu
        layers = [known.lock] if again else [table for _, table in known.layers]
        if identity in _attempted or any(table.exact(asked.problem, asked.version) for table in layers):
            return
        if _measurer is None:
            _tell("tune='first' and 'force' need something that measures; none is installed, so tables decide")
            return
        _attempted.add(identity)
        _measuring.now = True
        try:
            entry = _measurer(asked)
        except Exception as error:
            _tell(f"{asked.problem.describe()}: not measured: {type(error).__name__}: {error}")
            return
        finally:
            _measuring.now = False
        if entry is not None:
            store().append(entry)
            known.user = Table([*known.user.entries, entry])


def _note(record: Met) -> None:
    with _loading:
        new = record.problem not in _met
        _met.add(record.problem)
    if new:
        store().append(record, durable=False)


def lock_entries() -> list[Tuned]:
    """What the lock file in force holds, read once; none where there is no such file. Raises SchemaError, OSError."""
    global _locked
    if _locked is None:
        path = os.environ.get("FASTCONV_LOCK")
        try:
            _locked = read_table(Path(path)) if path else []
        except OSError as error:
            raise OSError(error.errno, f"FASTCONV_LOCK: {error.strerror}", path) from error
        except SchemaError as error:
            raise type(error)(f"FASTCONV_LOCK: {error}") from error
    return _locked


def _check_lock(lock: Table, caller: Caller) -> None:
    stale = [entry for entry in lock.entries if entry.version != caller.version(entry.problem.space)]
    if stale:
        old, new = stale[0].version.json, caller.version(stale[0].problem.space).json
        differs = ", ".join(f"{name} {old[name]} is now {new[name]}" for name in old if old[name] != new[name])
        _tell(f"lock file: {len(stale)} of {len(lock)} problems are of another version and left out ({differs})")


def _check_gpu(locked: list[Tuned], gpu: Gpu) -> None:
    if locked and not of_gpu(locked, gpu):
        theirs = f"the {locked[0].gpu} with {locked[0].multiprocessors} multiprocessors"
        _tell(f"lock file: of {theirs}, left out on the {gpu.name} with {gpu.multiprocessors}")


def _shipped(gpu: Gpu) -> list[Tuned]:
    try:
        return shipped(gpu)
    except (SchemaError, OSError) as error:
        _tell(f"the table shipped for the {gpu.name} is left out: {error}")
        return []


def _tell(message: str) -> None:
    if message not in _told:
        _told.add(message)
        log.warning("%s", message)
