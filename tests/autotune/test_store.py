"""The store: nothing is lost but the measurement in flight, whatever ends a process or breaks a file."""

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastconv.autotune.records import KINDS, Measured, Record, from_line
from fastconv.autotune.schema import NewerSchema, SchemaError
from fastconv.autotune.store import MAX_LINE, Store, cache_dir, publish, read_lines
from tests.autotune.making import measured, met, problem, tuned

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "tune")


def shards(store: Store) -> list[Path]:
    return sorted(store.folder.iterdir())


@pytest.mark.parametrize("record", [measured(), measured(3, "hung"), measured(config=None), met(), tuned()])
def test_record_survives_its_line(record: Any) -> None:
    assert from_line(record.line.encode(), "x") == record
    also = tuned(also=(({"TILE": 2}, 3e-5),), pytorch=4e-5)
    assert from_line(also.line.encode(), "x") == also


def changed(record: Any, path: str, value: Any) -> bytes:
    whole = json.loads(record.line)
    *outer, last = path.split(".")
    inner = whole
    for name in outer:
        inner = inner[name]
    inner[last] = value
    return json.dumps(whole).encode()


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [
        (measured(), "seconds", "fast"),
        (measured(), "seconds", -1.0),
        (measured(), "seconds", None),
        (measured(), "status", "fine"),
        (measured(), "status", "hung"),
        (measured(), "config", {"TILE": 1.5}),
        (measured(), "config", {"TILE": True}),
        (measured(), "config", {f"P{i}": 1 for i in range(40)}),
        (measured(), "gpu", "../../etc/passwd"),
        (measured(), "gpu", "x" * 101),
        (measured(), "problem.space", "__import__('os')"),
        (measured(), "problem.sizes", {"N": -1}),
        (measured(), "problem.kind", {"filter": ["3"]}),
        (measured(), "problem.path", "x"),
        (measured(), "version.source", None),
        (measured(), "record", "pickle"),
        (measured(), "schema", "1"),
        (measured(), "extra", 1),
        (tuned(), "also", [{"config": {}}]),
        (tuned(), "noise", 1e9),
    ],
    ids=lambda value: value.kind if isinstance(value, Record) else str(value)[:30],
)
def test_wrong_field_is_named(record: Any, field: str, value: Any) -> None:
    with pytest.raises(SchemaError, match=rf"^x.*{field.split('.')[-1]}|no field '{field.split('.')[-1]}'"):
        from_line(changed(record, field, value), "x")


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[1]", b"NaN", b"[" * 100_000, b"\xff\xfe", b"1" * 5000, b'{"schema": true}'],
    ids=lambda line: repr(line[:20]),
)
def test_no_json_is_one_error(line: bytes) -> None:
    with pytest.raises(SchemaError):
        from_line(line, "x")


def test_newer_schema_is_told_apart() -> None:
    with pytest.raises(NewerSchema, match="newer fastconv"):
        from_line(changed(measured(), "schema", 2), "x")


def test_what_is_appended_is_read(store: Store) -> None:
    assert store.read() == [] and not store.folder.exists()
    records = [measured(1), tuned(), met(), measured(2, "wrong")]
    assert all(store.append(record) for record in records)
    assert len(shards(store)) == 1
    assert Store(store.folder).read() == records
    assert Store(store.folder).read(("tuned",)) == [records[1]]
    assert Store(store.folder).damage() == []


def test_cache_dir_follows_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("FASTCONV_CACHE_DIR", "/y")
    assert cache_dir() == Path("/y") and Store().folder == Path("/y/tune")
    monkeypatch.delenv("FASTCONV_CACHE_DIR")
    assert cache_dir() == Path("/x/fastconv")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache/fastconv"


@pytest.mark.parametrize("kinds", [KINDS, ("tuned",)], ids=str)
def test_torn_line_costs_itself_and_one_warning(store: Store, kinds: tuple[str, ...], caplog) -> None:
    for index in range(3):
        store.append(tuned(problem(N=index)))
    path = shards(store)[0]
    path.write_bytes(path.read_bytes()[:-20])
    reader = Store(store.folder)
    with caplog.at_level(logging.WARNING, "fastconv"):
        for _ in range(2):
            assert [record.problem for record in reader.read(kinds)] == [problem(N=0), problem(N=1)]
    assert len(caplog.records) == 1 and "line 3" in caplog.text
    assert len(reader.damage()) == 1


def test_corrupt_shard_costs_its_damaged_lines(store: Store, caplog) -> None:
    store.append(measured(1))
    other = Store(store.folder)
    for index in (2, 3):
        other.append(measured(index))
    lines = other._path.read_bytes().split(b"\n")  # type: ignore[union-attr]
    damaged = [b"\x00" * 100, lines[0][:30] + b"\xff" + lines[0][31:], b"x" * (MAX_LINE + 1), lines[1], b"{}"]
    other._path.write_bytes(b"\n".join(damaged))  # type: ignore[union-attr]
    found = Store(store.folder).read()
    assert sorted(record.config["TILE"] for record in found) == [1, 3]  # type: ignore[attr-defined]
    assert len(caplog.records) == 1 and "and 3 more" in caplog.text


def test_newer_schema_is_refused_with_one_line(store: Store, caplog) -> None:
    store.append(measured(1))
    store.append(measured(2))
    path = shards(store)[0]
    path.write_bytes(path.read_bytes().replace(b'"schema":1', b'"schema":7', 1))
    assert [r.config for r in Store(store.folder).read()] == [measured(2).config]  # type: ignore[attr-defined]
    assert len(caplog.records) == 1 and "schema 7 is of a newer fastconv" in caplog.text
    store.append(measured(3))
    with open(path, "rb") as file:
        before = file.read()
    Store(store.folder).append(measured(4))
    assert Store(store.folder).merge() == 0 and path.read_bytes() == before, "what a newer one wrote stays"


def test_forked_process_writes_a_shard_of_its_own(store: Store) -> None:
    store.append(measured(1))
    child = os.fork()
    if child == 0:
        os._exit(0 if store.append(measured(2)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    store.append(measured(3))
    assert len(shards(store)) == 2
    assert sorted(r.config["TILE"] for r in Store(store.folder).read()) == [1, 2, 3]  # type: ignore[attr-defined]


@pytest.mark.parametrize("folder", ["/proc/fastconv", "/dev/null/fastconv"])
def test_store_that_cannot_be_made_warns_once(folder: str, caplog) -> None:
    store = Store(Path(folder))
    assert not store.append(measured()) and not store.append(measured())
    assert [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert len(caplog.records) == 1
    assert store.read() == []


def test_read_only_store_is_read_and_warned_of_once(store: Store, monkeypatch, caplog) -> None:
    store.append(measured(1))
    opened = os.open

    def read_only(path: Any, flags: int, *mode: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    reader = Store(store.folder)
    assert not reader.append(measured(2)) and not reader.append(measured(3))
    assert reader.read() == [measured(1)]
    assert len(caplog.records) == 1 and "Read-only file system" in caplog.text


def test_full_disk_warns_once_and_tears_nothing(store: Store, monkeypatch, caplog) -> None:
    """A write of half a line, as a disk gives that fills up; then none; then, room made, the store goes on."""
    store.append(measured(1))
    write = os.write
    with monkeypatch.context() as context:
        context.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
        assert not store.append(measured(2))
        context.setattr(os, "ftruncate", lambda file, size: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
        assert not store.append(measured(3))

        def full(file: int, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        context.setattr(os, "write", full)
        assert not store.append(measured(4))
    assert store.append(measured(5))
    assert [r.config["TILE"] for r in Store(store.folder).read()] == [1, 5]  # type: ignore[index, attr-defined]
    assert sum("left out" in record.getMessage() for record in caplog.records) == 1, "the half that could not be undone"


def test_limit_on_file_size_is_a_full_disk(store: Store) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from tests.autotune.making import measured
from fastconv.autotune.store import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(Path(sys.argv[1]))
assert store.append(measured(1))
size = store._path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
print(store.append(measured(2)), store.append(measured(3)), store._path.stat().st_size == size)
"""
    run = python(code, str(store.folder))
    assert run.stdout.split() == ["False", "False", "True"], run.stderr
    assert run.stderr.count("cannot be written") == 1
    assert store.read() == [measured(1)]


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(), text=True, capture_output=True, timeout=60
    )


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


# Each child appends as fast as it can and says what is on the disk. To spare an interpreter's start, one parent
# without torch forks them all.
WRITERS = """
import os, sys
from pathlib import Path
from tests.autotune.making import measured
from fastconv.autotune.store import Store
assert "torch" not in sys.modules
folder = Path(sys.argv[1])
for line in sys.stdin:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        store, writer = Store(folder), int(line)
        for index in range(10**6):
            if store.append(measured(index, date=f"writer-{writer}")):
                os.write(1, f"{writer} {index}\\n".encode())
        os._exit(0)
    os.write(1, f"pid {child}\\n".encode())
    os.waitpid(child, 0)
    os.write(1, f"ended {line}".encode())
"""


def test_kill_at_any_moment_loses_the_measurement_in_flight_alone(store: Store, record_property, caplog) -> None:
    generator = random.Random(0)
    process = subprocess.Popen(
        [sys.executable, "-c", WRITERS, str(store.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdin is not None and process.stdout is not None
    said: dict[int, int] = {}
    for writer in range(200):
        process.stdin.write(f"{writer}\n")
        process.stdin.flush()
        word, pid = process.stdout.readline().split()
        assert word == "pid"
        said[writer] = -1
        for _ in range(generator.randrange(20)):
            said[writer] = int(process.stdout.readline().split()[1])
        time.sleep(generator.uniform(0, 0.004))
        os.kill(int(pid), signal.SIGKILL)
        for line in process.stdout:
            word, number = line.split()
            if word == "ended":
                break
            said[int(word)] = int(number)
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    found: dict[str, list[int]] = {}
    for record in store.read():
        assert isinstance(record, Measured) and record.config is not None
        found.setdefault(record.date, []).append(record.config["TILE"])
    for writer, last in said.items():
        tiles = found.get(f"writer-{writer}", [])
        assert tiles == list(range(len(tiles))) and len(tiles) - 1 in (last, last + 1), f"writer {writer}"
    total = sum(map(len, found.values()))
    assert total > 1500
    record_property("line", f"store: 200 kills, {total} measurements written, none lost but those in flight")


def test_sixteen_writers_at_once(store: Store, record_property) -> None:
    code = """
import os, sys
from pathlib import Path
from tests.autotune.making import measured
from fastconv.autotune.store import Store
children = []
for writer in range(16):
    child = os.fork()
    if child == 0:
        store = Store(Path(sys.argv[1]))
        good = all([store.append(measured(index, date=f"writer-{writer}")) for index in range(50)])
        # Merging at the same time must take nothing from those that still write.
        if writer % 4 == 0:
            store.merge()
        os._exit(0 if good else 1)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""
    run = python(code, str(store.folder))
    assert run.returncode == 0 and not run.stderr, run.stderr
    expected = {(f"writer-{writer}", index) for writer in range(16) for index in range(50)}

    def found() -> set[tuple[str, int]]:
        records = Store(store.folder).read()
        return {(record.date, record.config["TILE"]) for record in records}  # type: ignore[attr-defined]

    assert found() == expected
    left = len(shards(store))
    assert Store(store.folder).merge() == left and len(shards(store)) == 1
    assert found() == expected


def test_merge_leaves_a_shard_in_use(store: Store) -> None:
    store.append(measured(1))
    other = Store(store.folder)
    other.append(measured(2))
    for index in (3, 4):
        ended = Store(store.folder)
        ended.append(measured(index))
        ended.append(measured(9))
        os.close(ended._file)  # type: ignore[arg-type]
    assert other.merge() == 2
    assert len(shards(store)) == 3
    store.append(measured(5))
    found = [record.config["TILE"] for record in Store(store.folder).read()]  # type: ignore[attr-defined]
    assert sorted(found) == [1, 2, 3, 4, 5, 9]


def test_merge_makes_nothing_too_large_to_be_read(store: Store, monkeypatch) -> None:
    for index in (1, 2, 3):
        ended = Store(store.folder)
        ended.append(measured(index))
        os.close(ended._file)  # type: ignore[arg-type]
    size = max(path.stat().st_size for path in shards(store))
    monkeypatch.setattr("fastconv.autotune.store.MAX_SHARD", 2 * size + 1)
    assert store.merge() == 2
    assert sorted(r.config["TILE"] for r in store.read()) == [1, 2, 3]  # type: ignore[attr-defined]


def test_cleared_store_goes_on(store: Store) -> None:
    store.append(measured(1))
    assert Store(store.folder).clear() == 1
    assert store.append(measured(2))
    assert Store(store.folder).read() == [measured(2)]


def test_export_and_import(store: Store, tmp_path) -> None:
    for index in (1, 2, 2):
        store.append(measured(index))
    path = tmp_path / "out.jsonl"
    assert store.export(path) == 2
    other = Store(tmp_path / "other")
    other.append(measured(1))
    assert other.add(read_lines(path)) == 1 and other.add(read_lines(path)) == 0
    assert other.read() == [measured(1), measured(2)]
    path.write_bytes(path.read_bytes() + b'{"schema":1}\n')
    with pytest.raises(SchemaError, match=r"out.jsonl line 3\.record"):
        read_lines(path)


def test_on_a_full_disk_all_is_added_or_nothing(store: Store, monkeypatch) -> None:
    store.append(measured(1))

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = shards(store)
    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as refusal:
            store.add([measured(2), measured(3)])
    assert Path(refusal.value.filename).parent == store.folder
    assert store.read() == [measured(1)] and shards(store) == before
    assert store.add([measured(2), measured(3)]) == 2
    assert Store(store.folder).merge() == 0, "of an ended process and one in use"
    assert sorted(r.config["TILE"] for r in store.read()) == [1, 2, 3]  # type: ignore[attr-defined]


def test_publishing_is_whole_or_nothing(tmp_path, monkeypatch) -> None:
    path = tmp_path / "table"
    publish(path, b"old")
    with monkeypatch.context() as context:
        context.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("no")))
        with pytest.raises(OSError, match="no") as refusal:
            publish(path, b"new")
    assert refusal.value.filename == str(path), "not the temporary file"
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_importing_needs_no_torch() -> None:
    run = python("import sys, fastconv.autotune.store; print(*sys.modules)")
    assert "fastconv.autotune.store" in run.stdout.split(), run.stderr
    assert not {"torch", "triton", "numpy", "fastconv.kernels"} & set(run.stdout.split())
