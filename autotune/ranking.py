"""How well the cost model ranks: predictions held against measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from fastconv.autotune.records import Measured, ProblemKey


@dataclass(frozen=True)
class Fit:
    """Of one problem. A regret is how much longer the best measured of the first k predicted takes than the best."""

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
    """Spearman's; 0 where either does not vary."""
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
    """A fit for each problem, GPU and version with three configs measured or more, in the order they were met.

    Of several measurements of a config the shortest counts: what disturbs one makes it longer.
    """
    groups: dict[tuple[object, ...], dict[tuple[object, ...], tuple[float, float]]] = {}
    problems: dict[tuple[object, ...], Measured] = {}
    for each in records:
        if each.config is None or each.seconds is None or each.predicted is None:
            continue
        group: tuple[object, ...] = (each.problem, each.gpu, each.multiprocessors, each.version)
        problems.setdefault(group, each)
        config = tuple(sorted(each.config.items()))
        before = groups.setdefault(group, {}).get(config, (0.0, each.seconds))
        groups[group][config] = (each.predicted, min(each.seconds, before[1]))
    found = []
    for group, times in groups.items():
        if len(times) >= 3:
            predicted, measured = zip(*times.values(), strict=True)
            regrets = (regret(predicted, measured, 1), regret(predicted, measured, 5))
            first = problems[group]
            found.append(Fit(first.problem, first.gpu, len(times), rank_correlation(predicted, measured), *regrets))
    return found


@dataclass(frozen=True)
class Summary:
    """Means over problems."""

    problems: int
    correlation: float
    top1: float
    top5: float


def summary(found: Sequence[Fit]) -> Summary | None:
    """None where there is nothing to sum up."""
    if not found:
        return None
    means = (mean(fit.correlation for fit in found), mean(fit.top1 for fit in found), mean(fit.top5 for fit in found))
    return Summary(len(found), *means)
