"""``fastconv cache``: what it shows is what the store holds, and what cannot be done changes nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastconv.autotune import Store, table
from fastconv.autotune.gpus import A100
from fastconv.autotune.store import MAX_LINE, MAX_SHARD
from fastconv.autotune.table import write_table
from fastconv.cli import run
from fastconv.kernels.dispatch import version_of
from tests.autotune.making import DATE, measured, met, problem, tuned


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path / "cache"))
    return Store()


def files(store: Store) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.folder.glob("*")} if store.folder.exists() else {}


def test_list_counts_by_gpu_and_kernel(store: Store, capsys) -> None:
    assert run(["cache", "list"]) == 0
    assert "0 records in 0 files" in capsys.readouterr().out
    fresh = problem("conv_gather")
    store.append(tuned(fresh, version_of("conv_gather")))
    store.append(tuned(fresh))
    store.append(measured(of=fresh))
    store.append(measured(1, "crashed", of=fresh))
    store.append(met(fresh))
    store.append(met(problem("conv_gather", C=32)))
    store.append(tuned(gpu=A100))
    assert run(["cache", "list"]) == 0
    out = capsys.readouterr().out
    assert "7 records in 1 files" in out
    row = next(line for line in out.splitlines() if "H200" in line)
    assert [cell.strip() for cell in row.split("│")[2:8]] == ["conv_gather", "1", "1", "1", "1", "1"]
    assert "A100" in out


def test_show_names_winner_default_and_what_is_stale(store: Store, capsys) -> None:
    tiles = {"config": {"TILE": 2}, "default": {"TILE": 4}}
    store.append(tuned(problem("conv_gather"), version_of("conv_gather"), pytorch=3e-5, **tiles))
    store.append(tuned(problem("conv_wgrad", C=128), gpu=A100))
    assert run(["cache", "show"]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "conv_gather" in line]
    assert line.startswith("  conv_gather H=56 N=32 C=64")
    assert "TILE2 10.0 us, default TILE4 20.0 us, PyTorch 30.0 us, noise 1.0%, 2025" in line
    assert out.count("stale") == 1 and "2 problems" in out
    assert run(["cache", "show", "conv_wgrad C=128"]) == 0
    assert "1 problems with 'conv_wgrad C=128'" in capsys.readouterr().out
    assert run(["cache", "show", "--gpu", "H200"]) == 0
    assert "A100" not in capsys.readouterr().out


def test_export_import_merge_and_clear(store: Store, tmp_path, monkeypatch, capsys) -> None:
    records = [measured(1), tuned(), met()]
    for record in records:
        store.append(record)
    out = str(tmp_path / "all.jsonl")
    assert run(["cache", "export", out]) == 0
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path / "other"))
    assert run(["cache", "import", out, "--gpu", "H200"]) == 0
    assert "3 of 3 records were new; 1 are of other versions and seed" in capsys.readouterr().out
    assert Store().read() == records
    assert run(["cache", "import", out, "--gpu", "H200"]) == 0
    assert "0 of 3" in capsys.readouterr().out
    assert run(["cache", "merge"]) == 0
    assert "nothing to merge" in capsys.readouterr().out
    assert run(["cache", "clear"]) == 2
    assert "--yes" in capsys.readouterr().err and Store().read() == records
    assert run(["cache", "clear", "--yes"]) == 0
    assert Store().read() == [] and Store(tmp_path / "cache/tune").read() == records


def test_of_several_gpus_all_or_one_are_taken(store: Store, tmp_path, monkeypatch, capsys) -> None:
    other = replace(A100, name="NVIDIA GTX 1650", multiprocessors=14)  # the table has none of that name
    records = [tuned(), tuned(gpu=A100), tuned(gpu=other)]
    for record in records:
        store.append(record)
    out = str(tmp_path / "all.jsonl")
    assert run(["cache", "export", out]) == 0
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path / "other"))
    assert run(["cache", "import", out, "--gpu", "H200"]) == 2
    assert "of the NVIDIA A100 with 108 multiprocessors and the NVIDIA GTX 1650 with 14" in capsys.readouterr().err
    assert run(["cache", "import", out, "--gpu", "all"]) == 0
    assert Store().read() == records
    for name, record in zip(("H200", "sm_80", other.name), records, strict=True):
        monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path / "cache"))
        assert run(["cache", "export", out, "--gpu", name]) == 0
        assert "1 records written" in capsys.readouterr().out
        monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path / name))
        assert run(["cache", "import", out, "--gpu", name]) == 0
        assert Store().read() == [record]
        assert run(["cache", "show", "--gpu", name]) == 0
        assert record.gpu in capsys.readouterr().out


def test_tables_are_imported_too(store: Store, tmp_path) -> None:
    path = tmp_path / "table.json"
    write_table(path, [tuned()], "0.1.0", DATE, "resnet50")
    for indent in (None, 2):  # as other tools write it
        path.write_text(json.dumps(json.loads(path.read_text()), indent=indent))
        assert run(["cache", "import", str(path), "--gpu", "H200"]) == 0
    assert store.read() == [tuned()]


def test_verify_names_what_cannot_be_read(store: Store, tmp_path, capsys) -> None:
    store.append(tuned())
    assert run(["cache", "verify"]) == 0
    assert "1 records, all sound" in capsys.readouterr().out
    (store.folder / "torn.jsonl").write_text(tuned().line + "\n" + tuned().line[:-9])
    assert run(["cache", "verify"]) == 1
    assert "torn.jsonl line 2" in capsys.readouterr().out
    bad = tmp_path / "bad.json"
    write_table(bad, [tuned()], "0.1.0", DATE)
    bad.write_text(bad.read_text().replace('"seconds":', '"second":', 1))
    assert run(["cache", "verify", str(bad)]) == 1
    assert "problems[0]" in capsys.readouterr().out


def test_verify_reads_every_shipped_table(store: Store, tmp_path, monkeypatch, capsys) -> None:
    """Whatever product of a known GPU it is of."""
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    (tmp_path / "nvidia-a100-pcie-40gb.json").write_text("{}")
    assert run(["cache", "verify"]) == 1
    assert "nvidia-a100-pcie-40gb.json" in capsys.readouterr().out


def test_verify_names_what_is_left_out(store: Store, tmp_path, monkeypatch, capsys) -> None:
    store.append(tuned())
    (store.folder / "folder.jsonl").mkdir()
    with (store.folder / "large.jsonl").open("wb") as file:
        file.truncate(MAX_SHARD + 1)
    assert run(["cache", "verify"]) == 1
    out = capsys.readouterr().out
    assert "folder.jsonl: cannot be read" in out and "large.jsonl: over 256 MiB" in out and out.count("\n") == 2
    path = tmp_path / "file"
    path.write_text("")
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(path))
    assert run(["cache", "verify"]) == 1
    assert f"{path}/tune: cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (tuned(gpu=A100).line, "of the NVIDIA A100 with 108 multiprocessors, not of the H200 alone; --gpu all"),
        (tuned().line.replace('"schema":1', '"schema":9'), "line 1: schema 9 is of a newer fastconv"),
        (tuned().line + "\n" + tuned().line.replace('"TILE":1', '"TILE":"x"', 1), "line 2.config.TILE"),
        ("nothing", "no JSON"),
        (tuned().line + "\n" + "x" * (MAX_LINE + 1), "line 2: over 64 KiB"),
        (json.dumps({"schema": 1, "record": "tuned"}), "line 1: the field 'gpu' is missing"),
        ('{\n"schema":1}', "the field 'gpu' is missing"),
    ],
)
def test_what_cannot_be_imported_is_one_line_and_changes_nothing(
    content: str, why: str, store: Store, tmp_path, capsys
) -> None:
    store.append(measured())
    before = files(store)
    path = tmp_path / "file"
    path.write_text(content)
    assert run(["cache", "import", str(path), "--gpu", "H200"]) == 2
    error = capsys.readouterr().err
    assert why in error and error.startswith("fastconv: ") and error.count("\n") == 1
    assert files(store) == before


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("cache", "Missing argument"),
        ("cache burn", "'burn' is not one of"),
        ("cache import", "needs a file"),
        ("cache export", "needs a file"),
        ("cache merge spare", "takes no 'spare'"),
        ("cache list --gpu H200", "takes no --gpu"),
        ("cache list --yes", "takes no --yes"),
        ("cache import missing --gpu H200", "missing: No such file"),
        ("cache export missing --gpu GTX", "gpu 'GTX' is not one of A100"),
        ("cache export missing --gpu GTX", "; recorded are NVIDIA H200"),
        ("cache verify missing", "missing: No such file"),
        ("cache export /proc/nowhere/file", "/proc/nowhere"),
    ],
)
def test_bad_usage_is_one_line(line: str, why: str, store: Store, capsys) -> None:
    store.append(measured())
    before = files(store)
    assert run(line.split()) == 2
    error = capsys.readouterr().err
    assert why in error and error.startswith("fastconv: ") and error.count("\n") == 1
    assert files(store) == before


def test_a_store_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "file"
    path.write_text(tuned().line)
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(path))  # a file where a folder is needed
    assert run(["cache", "import", str(path), "--gpu", "H200"]) == 2
    error = capsys.readouterr().err
    assert "cache import" in error and error.count("\n") == 1
