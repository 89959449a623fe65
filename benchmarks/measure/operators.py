"""Convolutions and pools one by one, each direction apart and all together, against PyTorch: a part for each entry.

`fastconv.benchmarks.registry` declares what is measured, `operator_times` takes a row's times, and `report.targets`
says what they mean.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastconv
from fastconv.benchmarks.calls import LARGE, Operator
from fastconv.benchmarks.measure import ceilings
from fastconv.benchmarks.measure.directions import fakes
from fastconv.benchmarks.measure.operator_times import COMPILE_SECONDS, Setup, conditions, failed, measure_row, prepared
from fastconv.benchmarks.registry import COMPILED, TARGET, Case, Entry, Provider
from fastconv.benchmarks.report import targets
from fastconv.benchmarks.report.console import Progress
from fastconv.benchmarks.report.results import Part
from fastconv.kernels.dispatch import Plan
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.measuring import reason
from fastconv.traffic import Traffic

ROW_SECONDS = 0.6  # guess for a row without torch.compile, until some have been measured
COMPILE_SHARE = 0.5  # of the time: torch.compile's if there is not enough for every row


@dataclass
class Race:
    """A case, the providers that run it in turns, and the rows of its result, one for each direction."""

    case: Case
    providers: tuple[Provider, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def entry(self) -> Entry:
        return self.case.entry

    @property
    def compiled(self) -> bool:
        """Whether it is owed a time of torch.compile, which its entry has to beat."""
        return COMPILED in self.entry.rivals and any(provider.name == COMPILED for provider in self.providers)


@dataclass
class Pace:
    """How long rows take, and so how long torch.compile may: the time that the rows to come do not need. If there is
    not enough for all, it has ``share`` seconds: for races that are owed a time of it, and if they leave some, for the
    first race of every entry."""

    share: float
    rows: list[float] = field(default_factory=list)  # seconds of each, without torch.compile
    compiled: list[float] = field(default_factory=list)  # seconds of torch.compile for each

    def for_compiling(self, races: Sequence[Race], first: bool, left: float) -> float:
        """Seconds of torch.compile for the first of ``races`` if all have ``left``; ``first``: it is its entry's."""
        row = _typical(self.rows, ROW_SECONDS)
        owed = 0.0 if races[0].compiled else self._owed(races, row, left)
        spare = left - row * sum(len(race.rows) for race in races)
        share = self.share if races[0].compiled or first else 0.0
        return min(max(spare, share) - owed, left)

    def _owed(self, races: Sequence[Race], row: float, left: float) -> float:
        """Seconds of torch.compile for those of ``races`` that are owed it and that there is time for."""
        each, owed = _typical(self.compiled, COMPILE_SECONDS), 0.0
        for race in races:
            compiling = each * len(race.rows) * race.compiled
            left -= row * len(race.rows) + compiling
            if left < 0:
                break
            owed += compiling
        return owed

    def note(self, race: Race, seconds: float) -> None:
        """``race`` has taken ``seconds``."""
        compiled = [it["seconds"] for row in race.rows for it in row["providers"] if "seconds" in it]
        self.compiled += compiled
        self.rows.append((seconds - sum(compiled)) / len(race.rows))
        self.share -= sum(compiled)


def _typical(seconds: list[float], guess: float) -> float:
    """The median of the last ten; ``guess`` until there are some."""
    return statistics.median(seconds[-10:]) if len(seconds) > 5 else guess


def plan_each(races: Sequence[Race], setup: Setup) -> None:
    """Give each race its rows, with what will run. Its calls without data launch all that is compiled ahead."""
    with torch.autograd.set_multithreading_enabled(False):
        for race in races:
            race.rows = race.rows or [_planned(race, direction, setup) for direction in race.case.operator.directions]


def _planned(race: Race, direction: str, setup: Setup) -> dict[str, Any]:
    operator = race.case.operator
    row: dict[str, Any] = {
        "operator": f"{operator.function} {'x'.join(map(str, operator.input))}",
        "direction": direction,
        "batch": race.case.batch,
        "networks": dict(race.case.networks),
        "ours": None,  # the first of our providers that serves it: the row's speeds are its times
        "bytes": None,
        "flops": 0,
        # A share of the bandwidth is owed only if no cache helps.
        "large": operator.streams and math.prod(operator.input) * setup.dtype.itemsize >= LARGE,
        "status": "ok",
        "reason": None,
        "providers": [],
    }
    plans: list[Plan] = []
    for provider in filter(attrgetter("ours"), race.providers):
        try:
            found = _plans(provider, operator, direction, setup)
        except Exception as error:
            # A single family need not serve everything.
            unserved = {"status": "skipped" if provider.family else "failed", "reason": reason(error)}
            row["providers"].append({"provider": provider.name, **unserved})
            if not plans and not provider.family:
                return row | unserved
        else:
            if not plans:
                plans, row["ours"] = found, provider.name
    if not plans:
        return row | {key: row["providers"][0][key] for key in ("status", "reason")}
    only = plans[0].choice if len(plans) == 1 else None
    return row | {
        "operator": plans[0].problem.describe(),
        "bytes": sum(plan.problem.bytes for plan in plans),
        "flops": sum(plan.problem.flops for plan in plans if isinstance(plan.problem, ConvProblem)),
        "family": ", ".join(dict.fromkeys(plan.family for plan in plans)),
        "tile": None if only is None else dict(only.config),
    }


def _plans(provider: Provider, operator: Operator, direction: str, setup: Setup) -> list[Plan]:
    with FakeTensorMode(), fastconv.settings(strict=True, prefer="triton"):
        call = prepared(provider, operator, direction, fakes(operator, setup.dtype, setup.device))
        with Traffic() as traffic:
            call()
    return [found.plan for found in traffic.passes if found.plan is not None]


def measure(
    races: Sequence[Race], setup: Setup, deadline: float, progress: Progress, save: Callable[[Part], None]
) -> list[Part]:
    """Every direction of every race, compared, then timed: a part for each entry, losses to PyTorch first, and one for
    the target if any of its layers is among them.

    ``save`` gets a race's part after it. Rows without time before ``deadline`` and providers that fail say so. `Pace`
    says which rows torch.compile is measured in.
    """
    plan_each(races, setup)
    parts: dict[str, Part] = {}
    progress.begin("operators", len(races))
    with conditions(setup.device):
        limits = ceilings.measure(setup.device, setup.clock)
        pace = Pace(COMPILE_SHARE * (deadline - time.monotonic()))
        for done, race in enumerate(races):
            first, started = race.entry.name not in parts, time.monotonic()
            part = parts.setdefault(race.entry.name, _part(race, setup, limits))
            if started > deadline:
                for row in race.rows:
                    row |= {"status": "skipped", "reason": "no time left"}
            else:
                compiling = pace.for_compiling(races[done:], first, deadline - started)
                _measure_race(race, setup, deadline, started + compiling)
                pace.note(race, time.monotonic() - started)
            for row in race.rows:
                targets.complete(row, race.entry, limits)
            part["rows"] = sorted((*part["rows"], *race.rows), key=targets.losses_first)
            part |= {"means": targets.means(part["rows"]), "families": targets.families(part["rows"])}
            part |= targets.verdict(part["rows"])
            save(part)
            progress.tick(race.rows[0]["operator"])
    found = list(parts.values())
    met = targets.targets(found, TARGET)
    return [*found, met] if met else found


def _part(race: Race, setup: Setup, limits: ceilings.Ceilings) -> Part:
    entry, dtype = race.entry, str(setup.dtype).removeprefix("torch.")
    return {
        "id": f"operators-{entry.name}",
        "kind": "operators",
        "title": f"{entry.name.capitalize()} operators of {', '.join(entry.lists)}, {dtype}",
        "dtype": dtype,
        "copy_bandwidth": limits.bandwidth,
        "matrix_rate": limits.matrix,
        "speed_target": entry.speed,
        "rivals": list(entry.rivals),
        "share_target": entry.share,
        "rows": [],
    }


def _measure_race(race: Race, setup: Setup, deadline: float, compile_deadline: float) -> None:
    torch._dynamo.reset()  # another operator's guards count against the limit of recompilations
    for row in race.rows:
        if row["status"] != "ok":
            continue
        try:
            measure_row(row, race.case.operator, race.providers, setup, deadline, compile_deadline)
        except Exception as error:
            row |= failed(error)
