"""How well the cost model ranks: predictions held against measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from fastconv.autotune.records import Identity, Measured, ProblemKey
from fastconv.autotune.search import Key, key_of


@dataclass(frozen=True)
class Fit:
    """One problem's. A regret: how much longer the best measured of the first k predicted takes than the best."""

    problem: ProblemKey
    gpu: str
    configs: int
    correlation: float  # Spearman's, of predicted and measured times
    top1: float
    top5: float


def ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            found[index] = (start + 1 + end) / 2
        start = end
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's; 0 if either does not vary."""
    x, y = ranks(a), ranks(b)
    middle = (len(x) + 1) / 2
    deviations = [(i - middle, j - middle) for i, j in zip(x, y, strict=True)]
    norm = (sum(i * i for i, _ in deviations) * sum(j * j for _, j in deviations)) ** 0.5
    return sum(i * j for i, j in deviations) / norm if norm else 0.0


def regret(predicted: Sequence[float], measured: Sequence[float], first: int) -> float:
    """How much longer the best of the ``first`` predicted takes than the best of all, relative."""
    order = sorted(range(len(predicted)), key=lambda index: predicted[index])
    return min(measured[index] for index in order[:first]) / min(measured) - 1


def fits(records: Iterable[Measured]) -> list[Fit]:
    """A fit for each problem, GPU and version with at least three configs measured, in the order they were met.

    The shortest measurement of a config counts: what disturbs one makes it longer.
    """
    groups: dict[Identity, dict[Key, tuple[float, float]]] = {}
    for each in records:
        if each.config is None or each.seconds is None or each.predicted is None:
            continue
        times = groups.setdefault(each.identity, {})
        before = times.get(key_of(each.config), (0.0, each.seconds))
        times[key_of(each.config)] = (each.predicted, min(each.seconds, before[1]))
    found = []
    for (problem, gpu, *_), times in groups.items():
        if len(times) >= 3:
            predicted, measured = zip(*times.values(), strict=True)
            regrets = (regret(predicted, measured, 1), regret(predicted, measured, 5))
            found.append(Fit(problem, gpu, len(times), rank_correlation(predicted, measured), *regrets))
    return found


@dataclass(frozen=True)
class Summary:
    """Means over problems."""

    problems: int
    correlation: float
    top1: float
    top5: float


def summary(found: Sequence[Fit]) -> Summary | None:
    """None if there are no fits."""
    if not found:
        return None
    means = (mean(fit.correlation for fit in found), mean(fit.top1 for fit in found), mean(fit.top5 for fit in found))
    return Summary(len(found), *means)
