"""The ranks that torchrun started share one tuning run: each tells its values, and all wait for all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

RENDEZVOUS = timedelta(seconds=120)


class RunLost(RuntimeError):
    """Another rank, or the store that all share, is gone."""


@dataclass(frozen=True)
class Ranks:
    """This process, ``rank``, among the ranks of a run, with torch.distributed's key-value store."""

    store: Any = None
    rank: int = 0
    members: tuple[int, ...] = (0,)

    @property
    def leads(self) -> bool:
        return self.rank == self.members[0]

    def exchange(self, name: str, value: Any, seconds: float, leave: bool = False) -> dict[int, Any]:
        """Each member's value, as JSON; waits at most ``seconds`` for them. A member that is to ``leave`` and does not
        lead waits for nobody. Raises RunLost."""
        if self.members == (self.rank,):
            return {self.rank: value}
        with _store_errors():
            self.store.set(f"{name}/{self.rank}", json.dumps(value))
            if leave and not self.leads:
                return {}
            self.store.wait([f"{name}/{rank}" for rank in self.members], timedelta(seconds=seconds))
            return {rank: json.loads(self.store.get(f"{name}/{rank}")) for rank in self.members}


def join() -> Ranks:
    """This process in the run that torchrun started; without torchrun its only rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://", timeout=RENDEZVOUS))
    return Ranks(PrefixStore("fastconv/tune", store), rank, tuple(range(world_size)))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # DistNetworkError, DistStoreError
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunLost(f"the run's other ranks are gone ({line}); run again to go on") from error
