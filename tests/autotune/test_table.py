"""Tables: what is found for a problem, and what a file of them must look like."""

import dataclasses
import json
from typing import Any

import pytest

from fastconv.autotune.gpus import A100, H200, known_gpus
from fastconv.autotune.schema import NewerSchema, SchemaError
from fastconv.autotune.table import FOLDER, Table, file_name, read_table, shipped, write_table
from tests.autotune.making import DATE, VERSION, problem, tuned

OTHER = dataclasses.replace(VERSION, triton="3.6.0")


def names(entries: list[Any]) -> list[Any]:
    return [dict(entry.problem.sizes)["N"] for entry in entries]


def test_exact_is_of_one_version_and_the_latest() -> None:
    old = tuned(seconds=4.0, date="2024-12-31T23:59:59Z")
    table = Table([tuned(seconds=1.0), tuned(seconds=2.0), tuned(version=OTHER, seconds=3.0), old])
    assert len(table) == 2
    found = table.exact(problem(), VERSION)
    assert found is not None and found.seconds == 2.0
    assert table.exact(problem(N=31), VERSION) is None
    assert table.exact(problem(), dataclasses.replace(VERSION, source="another")) is None


def test_bucket_is_of_near_sizes_and_equal_channels() -> None:
    table = Table(
        [
            *(tuned(problem(N=n)) for n in (16, 24, 40, 64)),
            tuned(problem(C=128)),
            tuned(problem(direction="dgrad")),
            tuned(problem(H=55, N=33)),
            tuned(problem(N=31), version=OTHER),
        ]
    )
    assert names(table.bucket(problem(), VERSION)) == [33, 40, 24]


def test_nearest_is_by_doublings_within_reach_and_of_one_kind() -> None:
    table = Table([tuned(problem(N=n)) for n in (1, 8, 64, 1 << 20)] + [tuned(problem("other")), tuned(problem(C=128))])
    found = table.nearest(problem(), VERSION)
    assert [(dict(e.problem.sizes)["N"], dict(e.problem.channels)["C"]) for e in found] == [
        (64, 64),
        (8, 64),
        (32, 128),
        (1, 64),
    ]
    assert found[0].problem.distance(problem()) == pytest.approx(1, abs=0.05)


def test_stale_entries_seed() -> None:
    table = Table([tuned(version=OTHER), tuned(problem(N=64))])
    assert names(table.seeds(problem())) == [32, 64]
    assert names(table.nearest(problem(), VERSION)) == [64]


def test_table_survives_its_file_sorted(tmp_path) -> None:
    entries = [
        tuned(problem(N=n), version=version, pytorch=3e-5, also=(({"TILE": 3}, 2e-5),))
        for n in (64, 2, 128)
        for version in (VERSION, OTHER)
    ]
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    write_table(first, entries, "abc1234", DATE)
    write_table(second, [*reversed(entries), tuned(problem(N=2), date="2020-01-01", seconds=9.0)], "abc1234", DATE)
    assert first.read_bytes() == second.read_bytes(), "sorted, the latest of each"
    found = read_table(first)
    expected = {(e.problem, e.version): dataclasses.replace(e, fastconv="abc1234") for e in entries}
    assert {(e.problem, e.version): e for e in found} == expected
    text = json.loads(first.read_text())
    assert list(text) == ["schema", "gpu", "multiprocessors", "date", "fastconv", "versions", "problems"]
    assert len(first.read_text().splitlines()) == 7 + 2 + len(entries) + 1, "a problem a line"


@pytest.mark.parametrize("entries", [[], [tuned(), tuned(gpu=A100)]], ids=["none", "two GPUs"])
def test_table_is_of_one_gpu(tmp_path, entries: Any) -> None:
    with pytest.raises(ValueError, match="measurements of one GPU"):
        write_table(tmp_path / "t.json", entries, "abc", DATE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.update(schema=2), "newer fastconv"),
        (lambda t: t.pop("gpu"), "'gpu' is missing"),
        (lambda t: t.update(command="rm"), "no field 'command'"),
        (lambda t: t.update(gpu="/dev/nvidia0"), r"gpu: expected a name"),
        (lambda t: t["problems"][0].update(version=1), r"problems\[0\].version: expected an integer of 0 to 0"),
        (lambda t: t["problems"][0].update(module="os"), r"problems\[0\]: there is no field 'module'"),
        (lambda t: t["problems"][0].update(seconds="1"), r"problems\[0\].seconds: expected a number"),
        (lambda t: t["problems"][0]["config"].update(TILE=-1), r"problems\[0\].config.TILE: expected an integer"),
        (lambda t: t["problems"].append([]), r"problems\[1\]: expected an object"),
        (lambda t: t.update(problems={}), "problems: expected a list"),
        (lambda t: t.update(problems=[{}] * 20_001), "list of at most 20000"),
        (lambda t: t.update(versions=[]), "expected an integer of 0 to -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistake_in_a_file_is_named(tmp_path, change: Any, error: str) -> None:
    path = tmp_path / "table.json"
    write_table(path, [tuned()], "abc", DATE)
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))
    with pytest.raises(SchemaError, match=error) as caught:
        read_table(path)
    assert "\n" not in str(caught.value) and "table.json" in str(caught.value)
    assert isinstance(caught.value, NewerSchema) == ("newer" in error)


@pytest.mark.parametrize(
    "content", [b"", b"\x80", b"[" * 10**5, b"[]", b'{"schema": 1, "gpu": NaN}'], ids=lambda it: repr(it[:20])
)
def test_what_is_no_table_is_one_error(tmp_path, content: bytes) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(SchemaError):
        read_table(path)


def test_a_file_too_large_is_not_read(tmp_path) -> None:
    path = tmp_path / "t.json"
    with open(path, "wb") as file:
        file.truncate((1 << 25) + 1)
    with pytest.raises(SchemaError, match="over 32 MiB"):
        read_table(path)


def test_shipped_tables_are_sound() -> None:
    assert file_name("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090.json"
    for gpu in known_gpus():
        assert all(entry.of_gpu(gpu) for entry in shipped(gpu))
    for path in FOLDER.glob("*.json"):
        assert read_table(path) and path.name == file_name(read_table(path)[0].gpu)
    assert shipped(dataclasses.replace(H200, name="NVIDIA Nothing")) == []
