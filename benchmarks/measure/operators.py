"""Convolutions and pools one by one, each direction apart and all together, against PyTorch: a part for each entry.

What is measured is declared in `fastconv.benchmarks.registry`; what a row's times are, `operator_times` says, and what
they mean, `standing`.
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
from fastconv.benchmarks.measure.operator_times import COMPILE_SECONDS, Bench, conditions, failed, measure_row, prepared
from fastconv.benchmarks.registry import COMPILED, TARGET, Case, Entry, Provider
from fastconv.benchmarks.report import targets
from fastconv.benchmarks.report.console import Progress
from fastconv.benchmarks.report.results import Part
from fastconv.kernels.dispatch import Plan
from fastconv.measuring.clock import reason
from fastconv.traffic import Traffic

ROW_SECONDS = 0.6  # that a row needs without torch.compile, until some have been measured
COMPILE_SHARE = 0.5  # of the time, that torch.compile may take where there is not enough for every row


@dataclass
class Task:
    """A case with the rows of its result, one for each direction, and who is to run it."""

    case: Case
    providers: tuple[Provider, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def entry(self) -> Entry:
        return self.case.entry

    @property
    def compiled(self) -> bool:
        """Whether it is owed a time of torch.compile: its entry is to be faster than that."""
        return COMPILED in self.entry.rivals and any(provider.name == COMPILED for provider in self.providers)


@dataclass
class Pace:
    """How long rows take, and from that the time that torch.compile may take: what the rows to come do not need; where
    there is not enough for them all, ``share`` seconds, for tasks that are owed a time of it, and with what these leave
    for the first of every entry."""

    share: float
    rows: list[float] = field(default_factory=list)  # seconds of one, torch.compile left out
    compiled: list[float] = field(default_factory=list)  # seconds of torch.compile for one

    def for_compiling(self, tasks: Sequence[Task], first: bool, left: float) -> float:
        """Seconds of torch.compile for the first of ``tasks``, the ``first`` of its entry or not, where ``left`` are
        left for all of them."""
        row = _typical(self.rows, ROW_SECONDS)
        owed = 0.0 if tasks[0].compiled else self._owed(tasks, row, left)
        spare = left - row * sum(len(task.rows) for task in tasks)
        share = self.share if tasks[0].compiled or first else 0.0
        return min(max(spare, share) - owed, left)

    def _owed(self, tasks: Sequence[Task], row: float, left: float) -> float:
        """What torch.compile will need in those of ``tasks`` that are owed it and that there is time for."""
        each, owed = _typical(self.compiled, COMPILE_SECONDS), 0.0
        for task in tasks:
            compiling = each * len(task.rows) * task.compiled
            left -= row * len(task.rows) + compiling
            if left < 0:
                break
            owed += compiling
        return owed

    def note(self, task: Task, seconds: float) -> None:
        """``task`` has taken so many."""
        compiled = [it["seconds"] for row in task.rows for it in row["providers"] if "seconds" in it]
        self.compiled += compiled
        self.rows.append((seconds - sum(compiled)) / len(task.rows))
        self.share -= sum(compiled)


def _typical(seconds: list[float], guess: float) -> float:
    """The median of the last ten; a guess until there are some."""
    return statistics.median(seconds[-10:]) if len(seconds) > 5 else guess


def plan_each(tasks: Sequence[Task], bench: Bench) -> None:
    """Give each task its rows, with what will run, found without data: all that is launched, for compiling ahead."""
    with torch.autograd.set_multithreading_enabled(False):
        for task in tasks:
            task.rows = task.rows or [_planned(task, direction, bench) for direction in task.case.operator.directions]


def _planned(task: Task, direction: str, bench: Bench) -> dict[str, Any]:
    operator, entry = task.case.operator, task.entry
    row: dict[str, Any] = {
        "operator": f"{operator.function} {'x'.join(map(str, operator.input))}",
        "direction": direction,
        "batch": task.case.batch,
        "networks": dict(task.case.networks),
        "ours": None,  # the first of our providers that serves it: whose times the row's speeds are
        "bytes": None,
        "flops": 0,
        # Of a share of the bandwidth only that is owed which no cache helps.
        "large": operator.streams and math.prod(operator.input) * bench.dtype.itemsize >= LARGE,
        "status": "ok",
        "reason": None,
        "providers": [],
    }
    plans: list[Plan] = []
    for provider in filter(attrgetter("ours"), task.providers):
        try:
            found = _plans(provider, operator, direction, bench)
        except Exception as error:
            # A family that is to serve alone need not serve everything.
            unserved = {"status": "skipped" if provider.family else "failed", "reason": reason(error)}
            row["providers"].append({"provider": provider.name, **unserved})
            if not plans and not provider.family:
                return row | unserved
        else:
            if not plans:
                plans, row["ours"] = found, provider.name
    if not plans:
        return row | {key: row["providers"][0][key] for key in ("status", "reason")}
    alone = plans[0].choice if len(plans) == 1 else None
    return row | {
        "operator": plans[0].problem.describe(),
        "bytes": sum(entry.bytes(plan.problem) for plan in plans),
        "flops": sum(entry.flops(plan.problem) for plan in plans),
        "family": ", ".join(dict.fromkeys(plan.family for plan in plans)),
        "tile": None if alone is None else dict(alone.config),
    }


def _plans(provider: Provider, operator: Operator, direction: str, bench: Bench) -> list[Plan]:
    with FakeTensorMode(), fastconv.settings(strict=True, prefer="triton"):
        call = prepared(provider, operator, direction, fakes(operator, bench.dtype, bench.device))
        with Traffic() as traffic:
            call()
    return [found.plan for found in traffic.passes if found.plan is not None]


def measure(
    tasks: Sequence[Task], bench: Bench, deadline: float, progress: Progress, save: Callable[[Part], None]
) -> list[Part]:
    """Every direction of every task, compared, then timed: a part for each entry, what PyTorch is faster at first, and
    one for the target if any of its layers is among them.

    ``save`` gets a task's part after it. Rows that ``deadline`` leaves no time for say so; so do providers that fail.
    `Pace` says which rows torch.compile is measured in.
    """
    plan_each(tasks, bench)
    parts: dict[str, Part] = {}
    progress.begin("operators", len(tasks))
    with conditions(bench.device):
        limits = ceilings.measure(bench.device, bench.clock)
        pace = Pace(COMPILE_SHARE * (deadline - time.monotonic()))
        for done, task in enumerate(tasks):
            first, started = task.entry.name not in parts, time.monotonic()
            part = parts.setdefault(task.entry.name, _part(task, bench, limits))
            if started > deadline:
                for row in task.rows:
                    row |= {"status": "skipped", "reason": "no time left"}
            else:
                compiling = pace.for_compiling(tasks[done:], first, deadline - started)
                _measure_task(task, bench, deadline, started + compiling)
                pace.note(task, time.monotonic() - started)
            for row in task.rows:
                targets.stand(row, task.entry, limits)
            part["rows"] = sorted((*part["rows"], *task.rows), key=targets.losses_first)
            part |= {"means": targets.means(part["rows"]), "families": targets.families(part["rows"])}
            part |= targets.verdict(part["rows"])
            save(part)
            progress.tick(task.rows[0]["operator"])
    found = list(parts.values())
    met = targets.targets(found, TARGET)
    return [*found, met] if met else found


def _part(task: Task, bench: Bench, limits: ceilings.Ceilings) -> Part:
    entry, dtype = task.entry, str(bench.dtype).removeprefix("torch.")
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


def _measure_task(task: Task, bench: Bench, deadline: float, compile_deadline: float) -> None:
    torch._dynamo.reset()  # one operator's guards would count against another's limit of recompilations
    for row in task.rows:
        if row["status"] != "ok":
            continue
        try:
            measure_row(row, task.case.operator, task.providers, bench, deadline, compile_deadline)
        except Exception as error:
            row |= failed(error)
