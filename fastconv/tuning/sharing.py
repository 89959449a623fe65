"""One tuning run of many processes: what each takes and finds goes through torch.distributed's key-value store.

A rank takes a problem by writing its name where nobody's is. While it runs it counts up its own heartbeat; one whose
count has stood still is lost, as is one that says it has failed, and another rank takes over what it had begun, with
its measurements. No collective: ranks may come, wait and end as they like. Clocks are never compared.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fastconv.autotune.measure import Task
from fastconv.autotune.records import Problem, Record, Version, from_line

BEAT = 1.0  # seconds between two heartbeats
LOST = 15.0  # seconds without one
RENDEZVOUS = timedelta(seconds=120)


class RunLost(RuntimeError):
    """The store that the ranks share is gone: the process or machine that held it has ended."""


class Shared:
    """This rank's part in a run. To be closed."""

    def __init__(self, store: Any, rank: int, world_size: int, beat: float = BEAT, lost: float = LOST) -> None:
        # (A torch.distributed.Store; of its methods torch's stub leaves some out.)
        self._store, self.rank, self.world_size = store, rank, world_size
        self._beat, self._lost = beat, lost
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._live, args=(store.clone(),), daemon=True)
        self._heart.start()

    def __enter__(self) -> Shared:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._heart.join()

    def claim(self, task: Task) -> bool:
        """Whether the task is this rank's now: nobody's before, or a lost rank's."""
        key = _key(task)
        with _store_errors():
            owner = int(self._store.compare_set(f"owner/{key}", "", str(self.rank)))
            if owner != self.rank and not self._done(key) and self._is_lost(owner):
                owner = int(self._store.compare_set(f"owner/{key}", str(owner), str(self.rank)))
            return owner == self.rank and not self._done(key)

    def keep(self, record: Record) -> None:
        """Let the others have a record of a task that is this rank's."""
        key = _key_of(record.problem, record.gpu, record.multiprocessors, record.version)
        with _store_errors():
            self._store.append(f"records/{key}", record.line + "\n")

    def done(self, task: Task) -> None:
        """A task of this rank's has ended, whether or not anything was found."""
        with _store_errors():
            self._store.set(f"done/{_key(task)}", "1")

    def open(self, tasks: Iterable[Task]) -> list[Task]:
        """Those that have not ended: some other rank has them, or nobody."""
        with _store_errors():
            return [task for task in tasks if not self._done(_key(task))]

    def to_take_over(self, tasks: Iterable[Task]) -> list[Task]:
        """Those of them that a lost rank had."""
        with _store_errors():
            return [task for task in tasks if self._is_lost(int(self._store.get(f"owner/{_key(task)}")))]

    def taken(self, tasks: Iterable[Task]) -> list[Task]:
        """Those that some rank has begun."""
        with _store_errors():
            return [task for task in tasks if self._store.check([f"owner/{_key(task)}"])]

    def records(self, tasks: Iterable[Task]) -> list[Record]:
        """What all ranks have kept of these tasks."""
        found: list[Record] = []
        with _store_errors():
            for task in tasks:
                key = f"records/{_key(task)}"
                if self._store.check([key]):
                    lines = self._store.get(key).split(b"\n")
                    found += [from_line(line, "another rank's record") for line in lines if line]
        return found

    def fail(self, why: str) -> None:
        """This rank measures no more: let the others have what it had, and know why."""
        with _store_errors():
            self._store.set(f"failed/{self.rank}", why)

    def failures(self) -> dict[int, str]:
        """Why the ranks that have failed did, in one line each."""
        keys = {rank: f"failed/{rank}" for rank in range(self.world_size)}
        with _store_errors():
            return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}

    def leads(self) -> bool:
        """Whether all ranks before this one are lost: it writes what the run has found. To be asked after `meet`."""
        with _store_errors():
            return all(self._is_lost(rank) for rank in range(self.rank))

    def meet(self, where: str, seconds: float) -> None:
        """Wait until every rank that is not lost has come to ``where``; at most so long."""
        end = time.monotonic() + seconds
        try:
            self._store.set(f"{where}/{self.rank}", "1")
            while time.monotonic() < end:
                ranks = [rank for rank in range(self.world_size) if not self._store.check([f"{where}/{rank}"])]
                if all(self._is_lost(rank) for rank in ranks):
                    return
                time.sleep(self._beat / 4)
        except RuntimeError:
            return  # the store's holder has left

    def _done(self, key: str) -> bool:
        return self._store.check([f"done/{key}"])

    def _is_lost(self, rank: int) -> bool:
        """Whether the other has failed, or this rank has seen its heart stand still for long. Never of itself."""
        if rank == self.rank:
            return False
        if self._store.check([f"failed/{rank}"]):
            return True
        key = f"beat/{rank}"
        count = self._store.get(key) if self._store.check([key]) else b""
        now = time.monotonic()
        before, since = self._seen.setdefault(rank, (count, now))
        if count != before:
            self._seen[rank] = count, now
            return False
        return now - since > self._lost

    def _live(self, store: Any) -> None:
        count = 0
        while True:
            try:
                store.set(f"beat/{self.rank}", str(count))
            except RuntimeError:
                return  # the main thread meets it too
            count += 1
            if self._ended.wait(self._beat):
                return


def join() -> Shared | None:
    """This process's part in the run that ``torchrun`` started; None where it did not."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    store, rank, world_size = next(_rendezvous())
    return Shared(dist.PrefixStore("fastconv/tune", store), rank, world_size)


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _rendezvous() -> Iterator[tuple[dist.Store, int, int]]:
    from torch.distributed.rendezvous import rendezvous

    return rendezvous("env://", timeout=RENDEZVOUS)


def _key(task: Task) -> str:
    asked = task.asked
    return _key_of(asked.problem, asked.gpu.name, asked.gpu.multiprocessors, asked.version)


def _key_of(problem: Problem, gpu: str, multiprocessors: int, version: Version) -> str:
    """Of a task everywhere: equal problems on equal GPUs under equal versions."""
    words = problem.describe(), gpu, multiprocessors, version.json
    return hashlib.sha256(repr(words).encode()).hexdigest()[:24]


class _store_errors:
    """Inside, a store that is gone is a `RunLost`."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):  # DistNetworkError and its kin
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunLost(f"the run's shared store is gone ({line}); run again to go on") from error
