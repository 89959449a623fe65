"""This user's measurements: append-only lines of JSON, one file (shard) for each process that writes.

A measurement is one ``write`` of one whole line to a file opened for appending, then ``fsync``. What the kernel has
taken outlives the process, so a kill loses only the line being written. ``os.replace`` publishes whole files: imports,
merged shards, tables, lock files. No file is locked for reading and no two processes write to one, so network file
systems serve as well.

A store that cannot be written or read costs one warning, never an exception: measurements are a convenience.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from fastconv.autotune.records import KINDS, SCHEMA, Record, from_line
from fastconv.autotune.schema import NewerSchema, SchemaError

# Limits of files and lines: far more than years of tuning write, far less than fills a memory.
MAX_SHARD = 1 << 28
MAX_LINE = 1 << 16

log = logging.getLogger("fastconv")


def cache_dir() -> Path:
    """``FASTCONV_CACHE_DIR``, else ``$XDG_CACHE_HOME/fastconv``, else ``~/.cache/fastconv``; it may be missing or
    read-only."""
    named = os.environ.get("FASTCONV_CACHE_DIR")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(cache or Path.home() / ".cache") / "fastconv"
    except RuntimeError:  # the machine does not know the user, as in containers
        return Path(os.devnull) / "fastconv"


class Store:
    """The shards of one folder, by default ``tune`` in ``cache_dir()``. Threads may share a store. The first append
    makes its file."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_dir() / "tune" if folder is None else folder
        self._lock = threading.Lock()
        self._file: int | None = None
        self._path: Path | None = None
        self._owner = 0  # the process that opened the file: a fork opens its own
        self._torn = False
        self._warned: set[str] = set()

    def append(self, record: Record, durable: bool = True) -> bool:
        """Whether the record was written; ``durable``: onto the disk, before this returns. Warns once, never raises."""
        line = record.line.encode() + b"\n"
        with self._lock:
            try:
                self._write(line, durable)
            except OSError as error:
                message = f"{self.folder}: cannot be written ({error}); measurements are kept in memory alone"
                self._warn(message, "cannot be written")
                return False
        return True

    def _write(self, line: bytes, durable: bool) -> None:
        file = self._shard()
        if self._torn:
            line = b"\n" + line
        before = os.fstat(file).st_size
        written = os.write(file, line)
        if written < len(line):
            self._torn = True
            os.ftruncate(file, before)
            self._torn = False
            raise OSError(f"{written} of {len(line)} bytes written")
        self._torn = False
        if durable:
            os.fsync(file)

    def _shard(self) -> int:
        if self._file is not None and self._owner == os.getpid():
            if os.fstat(self._file).st_nlink:
                return self._file
            os.close(self._file)  # cleared by another process
        self._file, self._path, self._torn, self._owner = None, None, False, os.getpid()
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = self.folder / f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o666)
            # The lock is held for the life of the process: a shard in use is not merged away.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file).st_nlink:
                self._file, self._path = file, path
                return file
            os.close(file)

    def read(self, kinds: Collection[str] = KINDS) -> list[Record]:
        """The records of ``kinds``, in the order of their shards. Unreadable lines cost a shard one warning."""
        records: list[Record] = []
        for path, data in self._shards(self._warn):
            damage: list[str] = []
            newer: NewerSchema | None = None
            for where, line in _lines(path.name, data):
                if _other_kind(line, kinds):
                    continue
                try:
                    record = _record(line, where)
                except NewerSchema as error:
                    newer = newer or error
                except SchemaError as error:
                    damage.append(str(error))
                else:
                    if record.kind in kinds:
                        records.append(record)
            if newer is not None:
                self._warn(f"{self.folder}: {newer}; such lines are left out")
            if damage:
                more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
                self._warn(f"{self.folder}: a damaged line is left out{more}: {damage[0]}")
        return records

    def damage(self) -> list[str]:
        """A line for everything in the store that cannot be read."""
        found: list[str] = []
        for path, data in self._shards(found.append):
            for where, line in _lines(path.name, data):
                try:
                    _record(line, where)
                except SchemaError as error:
                    found.append(str(error))
        return found

    def merge(self) -> int:
        """Make one shard of those of this machine's ended processes; of how many, 0 if there was nothing to do.

        Repeated and damaged lines go. A shard stays as it is if it has lines of a newer schema, or would make the
        merged one too large to be read. Raises OSError.
        """
        files: list[tuple[Path, int]] = []
        try:
            lines: dict[bytes, None] = {}
            for path in self._paths():
                if not path.name.startswith(f"{_host()}-") or path == self._path:
                    continue
                try:
                    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue  # another process merges too
                files.append((path, file))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if sum(os.fstat(each).st_size for _, each in files) > MAX_SHARD:
                        raise OSError(f"over {MAX_SHARD} bytes together")
                    lines.update(dict.fromkeys(_sound(path)))
                except (OSError, NewerSchema):
                    files.pop()
                    os.close(file)
            if len(files) < 2:
                return 0
            name = f"{_host()}-merged-{secrets.token_hex(4)}.jsonl"
            publish(self.folder / name, b"".join(line + b"\n" for line in lines))
            for path, _ in files:
                path.unlink(missing_ok=True)
            return len(files)
        finally:
            for _, file in files:
                os.close(file)

    def clear(self) -> int:
        """Remove every shard; how many there were. Raises OSError."""
        paths = self._paths()
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    def export(self, path: Path, records: Iterable[Record] | None = None) -> int:
        """Publish records, by default every sound one, as one file of lines; how many. Raises OSError."""
        lines = dict.fromkeys(record.line.encode() for record in (self.read() if records is None else records))
        publish(path, b"".join(line + b"\n" for line in lines))
        return len(lines)

    def add(self, records: Iterable[Record]) -> int:
        """Put the records that the store lacks into a new shard, all or nothing; how many. Raises OSError."""
        known = {record.line for record in self.read()}
        new = [record.line.encode() + b"\n" for record in records if record.line not in known]
        if new:
            self.folder.mkdir(parents=True, exist_ok=True)
            publish(self.folder / f"{_host()}-added-{secrets.token_hex(4)}.jsonl", b"".join(new))
        return len(new)

    def _paths(self) -> list[Path]:
        try:
            return sorted(path for path in self.folder.iterdir() if path.suffix == ".jsonl")
        except FileNotFoundError:
            return []

    def _shards(self, left_out: Callable[[str], None]) -> Iterator[tuple[Path, bytes]]:
        """Each shard's content. A shard merged away meanwhile has the folder listed again, so that nothing is missed.
        ``left_out`` is told what is left out, and why."""
        seen: set[Path] = set()
        for _ in range(5):
            try:
                paths = self._paths()
            except OSError as error:
                return left_out(f"{self.folder}: cannot be read ({error})")
            vanished = False
            for path in paths:
                if path in seen:
                    continue
                data = b""
                try:
                    if path.stat().st_size > MAX_SHARD:
                        left_out(f"{path}: over {MAX_SHARD >> 20} MiB, left out")
                    else:
                        data = path.read_bytes()
                except FileNotFoundError:
                    vanished = True
                    continue
                except OSError as error:
                    left_out(f"{path}: cannot be read ({error})")
                seen.add(path)
                yield path, data
            if not vanished:
                return

    def _warn(self, message: str, kind: str | None = None) -> None:
        """Log each message, or each kind of message, once."""
        if (kind or message) not in self._warned:
            self._warned.add(kind or message)
            log.warning("%s", message)


def read_lines(path: Path) -> list[Record]:
    """The records of an exported file. Raises SchemaError naming the line and field, OSError."""
    if path.stat().st_size > MAX_SHARD:
        raise SchemaError(f"{path}: over {MAX_SHARD >> 20} MiB")
    return [_record(line, where) for where, line in _lines(str(path), path.read_bytes())]


def publish(path: Path, data: bytes) -> None:
    """Write a file that others see whole or not at all. Raises OSError that names ``path``."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


def _lines(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield f"{name} line {number}", line


def _record(line: bytes, where: str) -> Record:
    if len(line) > MAX_LINE:
        raise SchemaError(f"{where}: over {MAX_LINE >> 10} KiB")
    return from_line(line, where)


def _sound(path: Path) -> Iterator[bytes]:
    """The readable lines of a shard. Raises NewerSchema."""
    for where, line in _lines(path.name, path.read_bytes()):
        try:
            _record(line, where)
        except NewerSchema:
            raise
        except SchemaError:
            continue
        yield line


_PREFIXES = {kind: f'{{"schema":{SCHEMA},"record":"{kind}",'.encode() for kind in KINDS}


def _other_kind(line: bytes, kinds: Collection[str]) -> bool:
    """Whether a whole line begins as a record of another kind: most do, and are skipped without parsing."""
    return line.endswith(b"}") and any(
        line.startswith(prefix) for kind, prefix in _PREFIXES.items() if kind not in kinds
    )


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname()) or "host"
