"""A tuning run over many problems, alone or shared by the ranks of one job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastconv.autotune import Config, Store
from fastconv.autotune.choose import Asked
from fastconv.autotune.measure import Bench, Step, Task, session
from fastconv.autotune.records import Problem, Record
from fastconv.tuning.sharing import Shared

KINDS = ("measured", "tuned")
WAIT = 0.2  # seconds between two looks at what other ranks have
END = 120.0  # seconds that ranks wait for each other at the end: a last paired run, a compiler that hangs


@dataclass(frozen=True)
class Options:
    """What `session` takes, but for what is kept and claimed."""

    budget: float  # seconds
    trials: int = 16
    top_k: int = 16
    again: bool = False
    fastconv: str = "unknown"


def run(
    tasks: Sequence[Task],
    bench_of: Callable[[Asked], Bench],
    store: Store,
    options: Options,
    *,
    seeds: Callable[[Asked], Iterable[Config]] = lambda asked: (),
    tell: Callable[[Step], object] = lambda step: None,
    shared: Shared | None = None,
    merge: bool = True,
) -> list[Record]:
    """Tune what is not tuned yet, in ``options.budget`` seconds: what was measured and found, by all ranks.

    With ``shared`` each rank takes a problem when it is free, and one of a lost rank's when nothing else is left; those
    that ``merge``, and the one that leads, put what the others found into their store. What is interrupted is in the
    store, and another run goes on with it. Raises RunLost, WorkerError.
    """
    named: dict[str, Any] = {"trials": options.trials, "top_k": options.top_k, "again": options.again, "tell": tell}
    named |= {"seeds": seeds, "fastconv": options.fastconv}
    known = store.read(KINDS)
    if shared is None:
        records: list[Record] = []

        def noted(record: Record) -> None:
            store.append(record)
            records.append(record)

        session(tasks, bench_of, noted, budget=options.budget, known=known, **named)
        return records
    end = time.monotonic() + options.budget
    at_hand: list[Task] = []
    kept: set[Problem] = set()

    def keep(record: Record) -> None:
        store.append(record)
        shared.keep(record)
        kept.add(record.problem)

    def finish(tasks: Iterable[Task]) -> None:
        for task in tasks:
            shared.done(task)
            at_hand.remove(task)

    def claim(task: Task) -> bool:
        # (One that compiling left no time for is tried again. Till then it is a lost rank's, if this one is lost.)
        finish([each for each in at_hand if each.asked.problem in kept])
        mine = shared.claim(task)
        at_hand.extend([task] if mine else [])
        return mine

    named |= {"claim": claim, "workers": shared.world_size}
    session(tasks, bench_of, keep, budget=options.budget, known=known, **named)
    finish(list(at_hand))
    # What a rank has begun is waited for, until it is done or the rank is lost.
    while begun := shared.taken(shared.open(tasks)):
        left = end - time.monotonic()
        if left <= 0:
            break
        lost = shared.to_take_over(begun)
        if not lost:
            time.sleep(WAIT)
            continue
        known = [*store.read(KINDS), *shared.records(lost)]
        session(lost, bench_of, keep, budget=left, known=known, **named)
        finish(list(at_hand))
        for task in lost:
            # The lost rank may have found its winner, and not have said that it was done.
            if shared.claim(task):
                shared.done(task)
    shared.meet("ended", END)
    records = shared.records(shared.taken(tasks))
    if merge or shared.leads():
        store.add(records)
    return records
