"""What ``fastconv tune`` shows: its progress, what it found, what it would do, how well the cost model ranks."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import rich.table
from rich import progress
from rich.console import Console

from fastconv.autotune import Gpu, ProblemKey, Store, Tuned
from fastconv.autotune.ranking import fits
from fastconv.autotune.ranking import summary as means
from fastconv.autotune.records import OUT_OF_MEMORY, RETRIED, Measured
from fastconv.autotune.table import Table, Tables
from fastconv.autotune.tune import TuningState, TuningTask, expected_gain, share_of
from fastconv.benchmarks.report.tables import new_table, tile_text
from fastconv.kernels.compile.ahead import cores
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.pool import PoolProblem

# Guesses for the time that is foretold: a binary on one core, a problem's measurements.
COMPILE_SECONDS, MEASURE_SECONDS = 4.0, 1.5


class Watch:
    """Progress: the current problem with its best so far, how many have ended, how long it takes at most. Without a
    terminal it is a line for each problem that has ended."""

    def __init__(self, screen: Console, problems: int, end: float) -> None:
        columns = (
            progress.BarColumn(20),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[left]} {task.description}"),
        )
        self._bar = progress.Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
        self._screen, self._problems, self._ended = screen, problems, 0
        self._task = self._bar.add_task("compiling", total=problems, left="")
        self._end = end

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, state: TuningState) -> None:
        left = max(0, round(self._end - time.monotonic()))
        line = f"{' '.join(described(state.question.problem))}: {state.measured} configs"
        if state.failed:
            line += f", {state.failed} failed"
        if state.best_seconds is not None:
            line += f", best {_us(state.best_seconds)} us"
            if state.default_seconds is not None:
                line += f" of {_us(state.default_seconds)}"
        at_most = f"at most {left // 60}:{left % 60:02} left,"
        self._bar.update(self._task, advance=int(state.done), description=line, left=at_most)
        self._ended += state.done
        if state.done and not self._screen.is_terminal:
            self._screen.print(f"{self._ended}/{self._problems} {at_most} {line}", soft_wrap=True)


def found(
    tasks: Sequence[TuningTask], entries: Sequence[Tuned], seconds: float, failures: Mapping[str, int]
) -> list[Any]:
    """What a run found, the largest savings first. Times are measured, each problem by itself."""
    counts = {task.question.problem: task.count for task in tasks}
    best = {entry.problem: entry for entry in entries if entry.problem in counts}
    gains = {problem: counts[problem] * (it.default_seconds - it.seconds) for problem, it in best.items()}
    lines: list[Any] = []
    won = [problem for problem, entry in best.items() if entry.config != entry.default]
    if won:
        table = _problems("us", "default us", "PyTorch us", "noise", "tile")
        for problem in sorted(won, key=lambda problem: -gains[problem]):
            it = best[problem]
            pytorch = "" if it.pytorch is None else _us(it.pytorch)
            figures = _us(it.seconds), _us(it.default_seconds), pytorch, f"{it.noise:.1%}"
            table.add_row(*described(problem), str(counts[problem]), *figures, tile_text(dict(it.config)))
        lines.append(table)
    before = sum(counts[problem] * it.default_seconds for problem, it in best.items())
    line = f"{len(best)} problems tuned in {seconds:.0f} s: {len(won)} have another tile than the default"
    if best:
        line += f"; together {(before - sum(gains.values())) * 1e3:.2f} ms where the defaults take {before * 1e3:.2f}"
        line += f"; PyTorch is faster at {sum(it.pytorch_faster for it in best.values())}"
    lines.append(line)
    tried = dict.fromkeys(RETRIED, "tried again with --again") | {OUT_OF_MEMORY: "tried by the next run"}
    counted: defaultdict[str, list[str]] = defaultdict(list)
    for status, count in failures.items():
        counted[tried.get(status, "not tried again")].append(f"{count} {status}")
    return [*lines, *(f"not measured, and {when}: {', '.join(each)}" for when, each in counted.items())]


def foretold(tasks: Sequence[TuningTask], known: Tables, gpu: Gpu, top_k: int, budget: float, again: bool) -> list[Any]:
    """What a run would do; all times are predicted."""
    table = _problems("configs", "default us", "saves us", "default")
    table.title = f"Predicted for the {gpu.name}; nothing is measured"
    binaries, open_tasks = 0, []
    for task in sorted(tasks, key=lambda task: -share_of(task)):
        question, configs = task.question, task.question.fitting()
        tuned = known.user.exact(question.problem, question.version) is not None and not again
        if not tuned:
            open_tasks.append(task)
            binaries += min(top_k, len(configs))
        times = _us(question.choice.seconds), "tuned" if tuned else _us(expected_gain(question))
        row = str(task.count), str(len(configs)), *times, tile_text(dict(question.choice.config))
        table.add_row(*described(question.problem), *row)
    whole = sum(map(share_of, open_tasks))
    least = whole - sum(task.count * expected_gain(task.question) for task in open_tasks)
    needed = max(binaries * COMPILE_SECONDS / cores(), len(open_tasks) * MEASURE_SECONDS)
    line = (
        f"{len(open_tasks)} problems to tune, {binaries} configs to compile at first: about {needed / 60:.1f} min of "
        f"at most {budget / 60:.1f}; their defaults take {whole * 1e3:.2f} ms, the best tiles {least * 1e3:.2f} "
        "(predicted)"
    )
    return [table, line]


def ranked(store: Store, gpu: Gpu) -> list[Any]:
    """By kernel: the cost model's ranking against what was measured, and what its choice costs."""
    records = [record for record in store.read(("measured", "tuned")) if record.of_gpu(gpu)]
    each = fits(record for record in records if isinstance(record, Measured))
    entries = Table(record for record in records if isinstance(record, Tuned)).entries
    if not each:
        return [f"nothing is measured yet on the {gpu.name}"]
    columns = "rank correlation", "top-1 regret", "top-5 regret", "default's", "worst", "PyTorch faster"
    table = new_table("kernel", "problems", *columns)
    table.title = f"The cost model against measurements on the {gpu.name}; regrets relative to the best measured"
    if gpu.emulated:
        table.title = f"{gpu.name}: its times mean nothing"
    for space in [*sorted({fit.problem.space for fit in each}), None]:
        part = means([fit for fit in each if space in (None, fit.problem.space)])
        assert part is not None
        tuned = [entry for entry in entries if space in (None, entry.problem.space)]
        costs = [entry.default_seconds / entry.seconds - 1 for entry in tuned]
        table.add_row(
            space or "all",
            str(part.problems),
            *(f"{part.correlation:.2f}", f"{part.top1:.1%}", f"{part.top5:.1%}"),
            *((f"{mean(costs):.1%}", f"{max(costs):.1%}") if costs else ("", "")),
            f"{sum(entry.pytorch_faster for entry in tuned)} of {len(tuned)}",
        )
    return [table]


def described(problem: ProblemKey) -> tuple[str, str]:
    """(kernel, the problem in the words of its operator, or as tables know it if another version wrote it)."""
    kind = dict(problem.kind)
    try:
        line = (PoolProblem if "pool" in kind else ConvProblem).from_key(problem).describe()
    except (KeyError, ValueError):
        return problem.space, problem.describe().removeprefix(f"{problem.space} ")
    return problem.space, f"{kind['direction']} {line}" if "direction" in kind else line


def _problems(*columns: str) -> rich.table.Table:
    """A table whose rows begin as `described` has them."""
    table = new_table("kernel", "problem", "times", *columns)
    table.columns[1].justify = "left"
    return table


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"
