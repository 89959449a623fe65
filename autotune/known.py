"""The tables in force in this process: the lock file, this user's measurements and the shipped table of each GPU."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fastconv.autotune.adapter import Adapter
from fastconv.autotune.gpus import Gpu
from fastconv.autotune.records import Identity, ProblemKey, Tuned, Untuned
from fastconv.autotune.schema import SchemaError
from fastconv.autotune.store import Store
from fastconv.autotune.table import Table, Tables, of_gpu, read_table, shipped

log = logging.getLogger("fastconv")

_tables: dict[tuple[str, int], Tables] = {}
_reloads: Counter[tuple[str, int]] = Counter()  # since this process joined others
_locked: list[Tuned] | None = None
_noted: set[ProblemKey] = set()
_store: Store | None = None
_loading = threading.RLock()
_told: set[str] = set()
_dependents: list[Callable[[], None]] = []
# The identities of the questions that this process has measured, or tried to.
attempted: set[Identity] = set()


def tables(gpu: Gpu, adapter: Adapter | None = None) -> Tables:
    """The tables of ``gpu``, read from the disk once a process. Raises the lock file's SchemaError, OSError."""
    if adapter is not None:
        join(adapter)
    key = (gpu.name, gpu.multiprocessors)
    found = _tables.get(key)
    if found is not None:
        return found
    with _loading:
        if key not in _tables:
            records = store().read(("tuned", "met"))
            _noted.update(record.problem for record in records if isinstance(record, Untuned) and record.of_gpu(gpu))
            found = Tables(of_gpu(lock_entries(), gpu), of_gpu(records, gpu), _shipped(gpu))
            if adapter is not None:
                _check_lock(found.lock, adapter)
                _check_gpu(lock_entries(), gpu)
                adapter.agree(gpu, found, _reloads[key])
            _tables[key] = found
        return _tables[key]


def store() -> Store:
    """This user's store, one for the process, so that it writes one shard."""
    global _store
    with _loading:
        if _store is None:
            _store = Store()
        return _store


def load_lock(path: Path | str | None) -> None:
    """Use this lock file, or none, in place of the one that ``FASTCONV_LOCK`` names. Raises SchemaError naming the
    field, OSError."""
    global _locked
    entries = [] if path is None else read_table(Path(path))
    with _loading:
        _locked = entries
        _drop_tables()
    forget()


def join(adapter: Adapter) -> None:
    """Drop tables and choices if this process has joined a job since the last call, so that all its processes agree.

    Called for new calls only: a known call costs nothing, and keeps its tile until a new one joins.
    """
    if adapter.joined():
        with _loading:
            _tables.clear()
            _reloads.clear()
        forget()


def _drop_tables() -> None:
    _reloads.update(_tables.keys())
    _tables.clear()


def learn(entry: Tuned) -> None:
    """Keep an entry in this process and in the store."""
    store().append(entry)
    with _loading:
        found = _tables.get((entry.gpu, entry.multiprocessors))
        if found is not None:
            found.user = Table([*found.user.entries, entry])
    forget()


def forget() -> None:
    """Tables have changed: drop every choice, and what depends on one."""
    for drop in _dependents:
        drop()


def reload() -> None:
    """Forget what was read: the next choice reads store, lock file and tables again."""
    global _store, _locked
    with _loading:
        _store, _locked = None, None
        _drop_tables()
        _noted.clear()
        attempted.clear()
    forget()


def on_change(drop: Callable[[], None]) -> None:
    """Call ``drop`` whenever earlier choices no longer hold."""
    _dependents.append(drop)


def note(record: Untuned) -> None:
    """Write down a problem that no table knew; each once a process."""
    with _loading:
        new = record.problem not in _noted
        _noted.add(record.problem)
    if new:
        store().append(record, durable=False)


def lock_entries() -> list[Tuned]:
    """The entries of the lock file in force, read once. Raises SchemaError, OSError."""
    global _locked
    if _locked is None:
        path = os.environ.get("FASTCONV_LOCK")
        try:
            _locked = read_table(Path(path)) if path else []
        except OSError as error:
            raise OSError(error.errno, f"FASTCONV_LOCK: {error.strerror}", path) from error
        except SchemaError as error:
            raise type(error)(f"FASTCONV_LOCK: {error}") from error
    return _locked


def _check_lock(lock: Table, adapter: Adapter) -> None:
    stale = [entry for entry in lock.entries if entry.version != adapter.version(entry.problem.space)]
    if stale:
        old, new = stale[0].version.json, adapter.version(stale[0].problem.space).json
        differs = ", ".join(f"{name} {old[name]} is now {new[name]}" for name in old if old[name] != new[name])
        warn_once(f"lock file: {len(stale)} of {len(lock)} problems are of another version and left out ({differs})")


def _check_gpu(locked: list[Tuned], gpu: Gpu) -> None:
    if locked and not of_gpu(locked, gpu):
        theirs = f"the {locked[0].gpu} with {locked[0].multiprocessors} multiprocessors"
        warn_once(f"lock file: of {theirs}, left out on the {gpu.name} with {gpu.multiprocessors}")


def _shipped(gpu: Gpu) -> list[Tuned]:
    try:
        return shipped(gpu)
    except (SchemaError, OSError) as error:
        warn_once(f"the table shipped for the {gpu.name} is left out: {error}")
        return []


def warn_once(message: str) -> None:
    """Log a warning, unless this process has logged it before."""
    if message not in _told:
        _told.add(message)
        log.warning("%s", message)
