"""A tuning run over many problems, by one process or by the ranks of a job."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastconv.autotune import Gpu, Store, Tuned
from fastconv.autotune.choose import Question
from fastconv.autotune.records import Record, from_line
from fastconv.autotune.tune import Runner, TuningTask, session, share_of
from fastconv.measuring.process import START, Worker, WorkerError
from fastconv.tuning.sharing import Ranks

KINDS = ("measured", "tuned")
WAIT = 120.0  # seconds that ranks wait for another's last paired run, or its compiler that hangs


@dataclass(frozen=True)
class RankTasks:
    """One rank's part of a run."""

    tasks: Sequence[TuningTask]
    left: int  # problems to tune, on all ranks
    earlier: Sequence[Record]  # what ranks found before the run


def able(ranks: Ranks, worker: Worker) -> Ranks:
    """The ranks that can measure. Raises WorkerError on a rank that cannot, RunLost."""
    why_not = None
    try:
        worker.start()
    except WorkerError as error:
        why_not = error
    said = ranks.exchange("able", why_not is None, START + WAIT)
    if why_not is not None:
        raise why_not
    return dataclasses.replace(ranks, members=tuple(rank for rank, able in said.items() if able))


def divide(
    ranks: Ranks, tasks: Sequence[TuningTask], earlier: Iterable[Tuned], gpu: Gpu, again: bool = False
) -> RankTasks:
    """Divide what no rank has tuned ``earlier``, or with ``again`` all, by predicted cost among ranks on equal GPUs.

    Raises RunLost.
    """
    mine = dataclasses.asdict(gpu)
    said = ranks.exchange("tuned", [mine, [entry.line for entry in earlier]], START + WAIT)
    found = _records(lines for _, lines in said.values())
    ended = set() if again else {(entry.problem, entry.version) for entry in found if entry.of_gpu(gpu)}
    left = [task for task in tasks if (task.question.problem, task.question.version) not in ended]
    left.sort(key=lambda task: -share_of(task))
    alike = [rank for rank, (theirs, _) in said.items() if theirs == mine]
    return RankTasks(left[alike.index(ranks.rank) :: len(alike)], len(left), found)


def run(
    part: RankTasks,
    runner_of: Callable[[Question], Runner],
    store: Store,
    budget: float,
    ranks: Ranks,
    *,
    merge: bool = True,
    again: bool = False,
    **options: Any,
) -> list[Record]:
    """Tune a part in ``budget`` seconds; what all ranks measured and found.

    Each measurement is in ``store`` at once, so another run goes on from this one's end. ``merge``: the other ranks'
    records come there too. ``options`` are those of `session`. Raises RunLost, WorkerError.
    """
    records: list[Record] = []
    failure = None

    def keep(record: Record) -> None:
        store.append(record)
        records.append(record)

    try:
        session(part.tasks, runner_of, keep, budget=budget, known=store.read(KINDS), again=again, **options)
    except WorkerError as error:
        failure = error
    said = ranks.exchange("records", [record.line for record in records], budget + WAIT)
    if failure is not None:
        raise failure
    if len(said) > 1:
        records = _records(said.values())
        if merge:
            store.add([*part.earlier, *records])
    return records


def _records(lines: Iterable[Iterable[str]]) -> list[Record]:
    return [from_line(line.encode(), "another rank's record") for each in lines for line in each]
