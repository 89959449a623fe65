"""Processes of one job (torch.distributed) choose alike: rank 0's tables are everybody's.

Through the job's key-value store, not a collective: ranks come to their first choice at different moments, and some, of
a pipeline, may never come. Only for rank 0's tables is waited, and not for ever.

What a rank decided before the job appeared is forgotten at the first call in it that was not met before. Until then
its calls of before keep their tiles: to look for a job would cost each of them time. Lock files that are loaded once
tables are in use are to be loaded by all ranks: the count tells whether rank 0's tables are those of before.
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
    """Of the job; 1 outside of one."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


def joined() -> bool:
    """Whether a job of several ranks, or of another number of them, has appeared since this was asked last."""
    global _size
    size = world_size()
    with _joining:
        new = size not in (1, _size)
        _size = size if new else _size
    return new


def agree(gpu: Gpu, tables: Tables, reloads: int) -> None:
    """Take rank 0's tables of ``gpu`` where they differ from this rank's, and say so in one line.

    ``reloads``: how often this process has dropped those agreed on, as rank 0 must have when it published those meant.
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
    """A setting ``tune`` that measures, as a rank may follow it: where there are several none does by its own clock."""
    global _told
    if world_size() == 1:
        return tune
    if not _told:
        _told = True
        log.warning("tune=%r: ranks do not measure while they run; tune before with 'fastconv tune'", tune)
    return "cached"


def _job_store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()
