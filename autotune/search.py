"""Which config to measure next: a Gaussian process over what the cost model got wrong.

The cost model ranks. Its errors are alike for configs that share sides, warps or what bounds them, so a few
measurements correct it for all. The process models ``log(measured / predicted)``. The next config has the best hope:
predicted time less one deviation. Coordinate steps around the best measured config take turns with it. The search knows
neither clock nor GPU: it is told times.

Idea: surrogates over a performance model's residual, as in GPTune; here in plain Python, for a few dozen points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, log2, sqrt

from fastconv.autotune.cost_model import Prediction
from fastconv.autotune.space import Config

# Deviations of log(measured / predicted) that all configs of a problem share, those with one bound, those of one
# neighbourhood, and each config's own, with a measurement's noise.
SHARED, BOUND, LOCAL, OWN = 0.7, 0.35, 0.3, 0.1
WIDTH = 1.5  # doublings of a parameter that a neighbourhood spans
HOPE = 1.0
VARIANCE = SHARED**2 + BOUND**2 + LOCAL**2 + OWN**2


@dataclass(frozen=True)
class Candidate:
    config: Config
    prediction: Prediction


class Search:
    """The search among one problem's candidates: ``default`` first, then ``seeds``, then what promises most."""

    def __init__(self, candidates: Sequence[Candidate], default: Config, seeds: Iterable[Config] = ()) -> None:
        self.candidates = {key_of(each.config): each for each in candidates}
        if key_of(default) not in self.candidates:
            raise ValueError(f"the default {dict(default)} is not among the candidates")
        first = dict.fromkeys(key_of(config) for config in (default, *seeds))
        self._queue = [key for key in first if key in self.candidates]
        self._times: dict[Key, float] = {}
        self._failed: set[Key] = set()
        self._process = _Process(self.candidates)
        self._step = False

    @property
    def measured(self) -> int:
        return len(self._times)

    def drop(self, config: Config) -> None:
        """The config cannot be measured, or must not be again."""
        self._failed.add(key_of(config))

    def tell(self, config: Config, seconds: float) -> None:
        """A config's time. The shortest told counts: what disturbs a measurement makes it longer."""
        key = key_of(config)
        self._times[key] = min(seconds, self._times.get(key, seconds))
        self._process.tell(key, log(self._times[key] / self.candidates[key].prediction.seconds))

    def refine(self, config: Config, prediction: Prediction) -> None:
        """A better prediction, if the config was not measured yet."""
        key = key_of(config)
        if key not in self._times:
            self.candidates[key] = Candidate(config, prediction)

    def time(self, config: Config) -> float | None:
        """The shortest time told of a config."""
        return self._times.get(key_of(config))

    def propose(self, count: int) -> list[Config]:
        """The next ``count`` configs to measure, or what is left."""
        queued = [key for key in self._queue if self._open(key)]
        left = {key: self._hope(key) for key in self.candidates if self._open(key) and key not in queued}
        best = self.best(1)
        steps = set(neighbours_of(best[0][0], left)) if best else set()
        proposed = queued[:count]
        while len(proposed) < count and left:
            self._step = not self._step
            near = [key for key in left if key in steps] if self._step else []
            key = min(near or left, key=left.__getitem__)
            del left[key]
            proposed.append(key)
        return [self.candidates[key].config for key in proposed]

    def best(self, count: int) -> list[tuple[Config, float]]:
        """The fastest measured, fastest first."""
        times = sorted(self._times.items(), key=lambda each: each[1])
        fine = [(self.candidates[key].config, seconds) for key, seconds in times if key not in self._failed]
        return fine[:count]

    def _open(self, key: Key) -> bool:
        return key not in self._times and key not in self._failed

    def _hope(self, key: Key) -> float:
        mean, deviation = self._process.at(key)
        return log(self.candidates[key].prediction.seconds) + mean - HOPE * deviation


Key = tuple[tuple[str, int], ...]


def key_of(config: Config) -> Key:
    return tuple(sorted(config.items()))


def neighbours_of(config: Config, keys: Iterable[Key]) -> list[Key]:
    """One coordinate step away: for each parameter and side the key that differs in fewest other parameters, and least.

    The space's rules may tie parameters to each other, so a step can change several.
    """
    steps: dict[tuple[str, bool], tuple[tuple[int, float], Key]] = {}
    for key in keys:
        changed = [(name, value - config[name]) for name, value in key if value != config[name]]
        size = sum(abs(log2((1 + value) / (1 + config[name]))) for name, value in key)
        for name, difference in changed:
            side = (name, difference > 0)
            found = ((len(changed), size), key)
            if side not in steps or found[0] < steps[side][0]:
                steps[side] = found
    return list(dict.fromkeys(key for _, key in steps.values()))


class _Process:
    """A Gaussian process over the candidates. Each observation adds a row to a Cholesky factor."""

    def __init__(self, candidates: Mapping[Key, Candidate]) -> None:
        self._bounds = {key: each.prediction.bound for key, each in candidates.items()}
        self._places = {key: tuple(log2(1 + value) / WIDTH for _, value in key) for key in candidates}
        self._seen: dict[Key, float] = {}
        self._rows: dict[Key, list[float]] = {}
        self._targets: list[float] = []
        self._fitted: list[Key] = []

    def tell(self, key: Key, value: float) -> None:
        if key in self._seen:
            # A changed value leaves the factor as it is; the targets are solved again.
            self._seen[key] = value
            self._targets = []
            for each in self._fitted:
                self._targets.append(self._solved(self._rows[each], len(self._targets), self._seen[each]))
            return
        self._seen[key] = value
        row = self._row(key)
        row.append(sqrt(VARIANCE - sum(x * x for x in row)))
        self._targets.append(self._solved(row, len(self._targets), value))
        self._fitted.append(key)

    def at(self, key: Key) -> tuple[float, float]:
        """Mean and deviation."""
        row = self._row(key)
        variance = max(VARIANCE - sum(x * x for x in row), 0.0)
        return sum(map(float.__mul__, row, self._targets)), sqrt(variance)

    def _solved(self, row: Sequence[float], index: int, value: float) -> float:
        return (value - sum(map(float.__mul__, row[:index], self._targets[:index]))) / row[index]

    def _row(self, key: Key) -> list[float]:
        """The key's covariances with what was seen, solved by the factor. Each is made once and kept."""
        row = self._rows.setdefault(key, [])
        for index in range(len(row), len(self._fitted)):
            other = self._fitted[index]
            factor = self._rows[other]
            known = sum(map(float.__mul__, row, factor[:index]))
            row.append((self._covariance(key, other) - known) / factor[index])
        return row

    def _covariance(self, a: Key, b: Key) -> float:
        away = sum((x - y) ** 2 for x, y in zip(self._places[a], self._places[b], strict=True))
        same = self._bounds[a] == self._bounds[b]
        return SHARED**2 + BOUND**2 * same + LOCAL**2 * exp(-away / 2)
