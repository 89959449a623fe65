"""Tables of tuned problems: lookup, and the files they are kept in (shipped tables and lock files)."""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastconv.autotune import schema
from fastconv.autotune.gpus import Gpu
from fastconv.autotune.records import REACH, SCHEMA, VERSION, ProblemKey, Record, Tuned, Version, from_json, from_line
from fastconv.autotune.space import Config
from fastconv.autotune.store import publish

# The tables that come with fastconv.
FOLDER = Path(str(files("fastconv.autotune"))) / "tables"
SOURCES = ("lock file", "measured here", "table")
MAX_FILE = 1 << 25
MAX_PROBLEMS = 20_000

_FILE = schema.record(
    {
        "schema": schema.integer(1, SCHEMA),
        "gpu": schema.text(),
        "multiprocessors": schema.integer(1, 10**5),
        "date": schema.text(40),
        "fastconv": schema.text(60),
        "versions": schema.listing(schema.record(VERSION), 256),
        # Each field is checked when its record is made.
        "problems": schema.listing(lambda value, where: value, MAX_PROBLEMS),
        "model": schema.text(),
    },
    required=7,
)


class Table:
    """Tuned problems of one GPU. The later of two entries for one problem and version counts, by date."""

    def __init__(self, entries: Iterable[Tuned] = ()) -> None:
        self._exact: dict[tuple[ProblemKey, Version], Tuned] = {}
        for entry in sorted(entries, key=lambda entry: entry.date):
            self._exact[entry.problem, entry.version] = entry
        self._comparable: dict[tuple[Any, ...], list[Tuned]] = {}
        for entry in self._exact.values():
            self._comparable.setdefault(entry.problem.comparable, []).append(entry)

    def __len__(self) -> int:
        return len(self._exact)

    @property
    def entries(self) -> list[Tuned]:
        return list(self._exact.values())

    def exact(self, problem: ProblemKey, version: Version) -> Tuned | None:
        return self._exact.get((problem, version))

    def bucket(self, problem: ProblemKey, version: Version) -> list[Tuned]:
        """Entries whose batch and image sizes are nearly the problem's, nearest first."""
        return [entry for entry in self.nearest(problem, version) if entry.problem.same_bucket(problem)]

    def nearest(self, problem: ProblemKey, version: Version) -> list[Tuned]:
        """Entries within REACH doublings of the problem, nearest first."""
        return [entry for entry in self.seeds(problem) if entry.version == version]

    def seeds(self, problem: ProblemKey) -> list[Tuned]:
        """What a search may begin with: entries within REACH, stale ones too, nearest first."""
        entries = self._comparable.get(problem.comparable, ())
        near = [(problem.distance(entry.problem), entry) for entry in entries]
        return [entry for distance, entry in sorted(near, key=lambda each: each[0]) if distance <= REACH]


class Tables:
    """The tables of one GPU, in the order they are asked: lock file, this user's measurements, the shipped table."""

    def __init__(self, lock: Iterable[Tuned], user: Iterable[Tuned], shipped: Iterable[Tuned]) -> None:
        self.lock, self.user, self.shipped = Table(lock), Table(user), Table(shipped)

    @property
    def layers(self) -> tuple[tuple[str, Table], ...]:
        return tuple(zip(SOURCES, (self.lock, self.user, self.shipped), strict=True))

    def __len__(self) -> int:
        return sum(len(table) for _, table in self.layers)

    def seeds(self, problem: ProblemKey) -> list[Config]:
        """Two configs that a search may begin with, this user's first."""
        return [entry.config for table in (self.user, self.shipped) for entry in table.seeds(problem)][:2]

    def dump(self) -> str:
        """All entries, as ``replace`` takes them."""
        return base64.b85encode(zlib.compress(self._lines())).decode()

    def digest(self) -> str:
        """Equal for equal dumps."""
        return hashlib.sha256(self._lines()).hexdigest()

    def _lines(self) -> bytes:
        lines = [line for _, table in self.layers for line in (*sorted(e.line for e in table.entries), "")]
        return "\n".join(lines).encode()

    def replace(self, dumped: bytes) -> None:
        """Take another process's tables. Raises SchemaError if they are damaged."""
        layers: list[list[Tuned]] = [[], [], []]
        try:
            parts = zlib.decompress(base64.b85decode(dumped)).split(b"\n")
        except (zlib.error, ValueError) as error:
            raise schema.SchemaError(f"another process's tables: {error}") from None
        layer = 0
        for index, line in enumerate(parts[:-1]):
            if not line:
                layer += 1
                continue
            entry = from_line(line, f"another process's tables, line {index + 1}")
            if not isinstance(entry, Tuned) or layer > 2:
                raise schema.SchemaError(f"another process's tables, line {index + 1}: not a tuned problem")
            layers[layer].append(entry)
        self.lock, self.user, self.shipped = map(Table, layers)


def read_table(path: Path) -> list[Tuned]:
    """The entries of a shipped table or a lock file, all of one GPU. Raises SchemaError naming the field, OSError."""
    if path.stat().st_size > MAX_FILE:
        raise schema.SchemaError(f"{path}: over {MAX_FILE >> 20} MiB")
    whole = schema.parse(path.read_bytes(), str(path))
    schema.check_version(whole, SCHEMA, str(path), "schema")
    whole = _FILE(whole, str(path))
    entries: list[Tuned] = []
    for index, value in enumerate(whole["problems"]):
        where = f"{path}: problems[{index}]"
        if not isinstance(value, dict):
            raise schema.SchemaError(f"{where}: expected an object, but got {value!r:.60}")
        number = schema.integer(0, len(whole["versions"]) - 1)(value.get("version"), f"{where}.version")
        common = {"schema": whole["schema"], "record": "tuned"}
        common |= {name: whole[name] for name in ("gpu", "multiprocessors", "fastconv")}
        entry = from_json({**value, **common, "version": whole["versions"][number]}, where)
        assert isinstance(entry, Tuned)
        entries.append(entry)
    return entries


def write_table(path: Path, entries: Iterable[Tuned], fastconv: str, date: str, model: str | None = None) -> None:
    """Publish a table of one GPU's entries, sorted, a problem a line. ``fastconv``: the version or commit that writes
    it; ``model``: what a lock file is for. Raises ValueError for no entries or several GPUs, OSError."""
    entries = list(entries)
    gpus = {(entry.gpu, entry.multiprocessors) for entry in entries}
    if len(gpus) != 1:
        raise ValueError(f"{path}: a table holds the measurements of one GPU, but got {len(gpus)}")
    ((gpu, multiprocessors),) = gpus
    latest = Table(entries).entries
    versions = sorted({entry.version for entry in latest}, key=lambda version: schema.dump(version.json))
    head: dict[str, Any] = {"schema": SCHEMA, "gpu": gpu, "multiprocessors": multiprocessors, "date": date}
    head |= {"fastconv": fastconv} | ({} if model is None else {"model": model})
    head["versions"] = [version.json for version in versions]
    lines = []
    for entry in sorted(latest, key=lambda entry: schema.dump([entry.problem.json, entry.version.json])):
        values = {name: value for name, value in entry.values.items() if name != "fastconv"}
        number = versions.index(entry.version)
        lines.append(schema.dump({"problem": entry.problem.json, **values, "version": number}))
    # The head has a field a line too: what changed shows in a diff.
    fields = [f"{schema.dump(name)}:{schema.dump(value)}" for name, value in head.items()]
    body = ",\n".join([*fields, '"problems":[\n' + ",\n".join(lines) + "\n]"])
    publish(path, f"{{\n{body}\n}}\n".encode())


def file_name(gpu: str) -> str:
    """The shipped table's file for a device name: ``nvidia-h200.json``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def shipped(gpu: Gpu) -> list[Tuned]:
    """The entries of the table that comes with fastconv for this GPU; none without a table."""
    path = FOLDER / file_name(gpu.name)
    return [entry for entry in read_table(path) if entry.of_gpu(gpu)] if path.is_file() else []


def of_gpu(records: Iterable[Record], gpu: Gpu) -> list[Tuned]:
    return [record for record in records if isinstance(record, Tuned) and record.of_gpu(gpu)]
