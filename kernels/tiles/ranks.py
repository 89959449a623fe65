"""Processes of one job (torch.distributed) choose alike: all ranks take rank 0's tables.

Tables travel by the job's key-value store, not by a collective: ranks come to their first choice at different moments,
and some ranks of a pipeline never come. A rank waits only for rank 0's tables, and not for ever.

Decisions made before the process group existed are dropped at the first new call after it; until then known calls keep
their tile, because checking at each call would cost time. A lock file loaded after tables are in use must be loaded by
every rank; ``reloads`` then tells rank 0's new tables from its old ones.
"""

from __future__ import annotations

import logging
import threading
from datetime import timedelta

import torch.distributed

from fastconv.autotune import Gpu, SchemaError
from fastconv.autotune.known import forget
from fastconv.autotune.table import Tables

# Rank 0 may still be at its first batch.
WAIT = timedelta(seconds=60)
log = logging.getLogger("fastconv")
_told = False
_size = 1  # of the job that this process joined last
_joining = threading.Lock()


def world_size() -> int:
    """The number of ranks; 1 outside of a job."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


def joined() -> bool:
    """Whether a job of several ranks, or of another number of ranks, has appeared since the last call of this."""
    global _size
    size = world_size()
    with _joining:
        new = size not in (1, _size)
        _size = size if new else _size
    return new


def agree(gpu: Gpu, tables: Tables, reloads: int) -> None:
    """Replace this rank's tables of ``gpu`` by rank 0's if they differ, and log one line.

    ``reloads``: how often this process has dropped agreed tables; rank 0 publishes its tables under the same count.
    """
    if world_size() == 1:
        return
    rank = torch.distributed.get_rank()
    shared = torch.distributed.PrefixStore(f"fastconv/tables/{gpu.name}/{gpu.multiprocessors}/{reloads}", _job_store())
    digest = tables.digest()
    if rank == 0:
        shared.set("tables", tables.dump())
        shared.set("digest", digest)
        return
    try:
        shared.wait(["digest"], WAIT)
    except RuntimeError:
        log.warning("rank %d: rank 0 has chosen nothing for %s so far; this rank's own tables decide", rank, gpu.name)
        return
    if shared.get("digest").decode() == digest:
        return
    try:
        tables.replace(shared.get("tables"))
        forget()
    except SchemaError as error:
        log.warning("rank %d: rank 0's tables of %s cannot be read, its own decide: %s", rank, gpu.name, error)
        return
    log.warning("rank %d: its tuned tables of %s were others than rank 0's, which are used now", rank, gpu.name)


def may_measure(tune: str) -> str:
    """``tune``, a setting that measures, or "cached" in a job of several ranks: none measures by its own clock."""
    global _told
    if world_size() == 1:
        return tune
    if not _told:
        _told = True
        log.warning("tune=%r: ranks do not measure while they run; tune before with 'fastconv tune'", tune)
    return "cached"


def _job_store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()
