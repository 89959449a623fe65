"""The result file: written part by part, checked on reading, and everything shown is rendered from it."""

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastconv.benchmarks.report import plots, results, tables
from fastconv.benchmarks.report.results import KINDS, SCHEMA, Results, read
from fastconv.cli import bench_run, run

TIMES = {"median": 2.0, "p20": 1.5, "p80": 3.0, "samples": 5}


def part(kind: str, **content: Any) -> dict[str, Any]:
    return {"id": kind, "kind": kind, "title": f"the {kind} part", "verdict": "right", "reason": None, **content}


ERRORS = {"ours": 1e-3, "eager": 2e-3, "allowed": 4e-3, "right": True}
PARTS = {
    "training": part(
        "training",
        losses={"plain": [2.0, 1.0], "fastconv": [2.0, 1.00001]},
        accuracy={"plain": 0.8, "fastconv": 0.81},
        loss_difference=1e-5,
        tolerance=1e-4,
        held_out=359,
        launches={"conv_gather_kernel": 3},
    ),
    "block": part(
        "block",
        rows=[
            {"dtype": "float32", "tensor": "output", "measure": "largest", **ERRORS},
            {"dtype": "bfloat16", "tensor": "output", "measure": "norm", **ERRORS, "right": False},
        ],
        launches={},
    ),
    "check": part(
        "check",
        rows=[{"tensor": f"layer{i}.weight", **ERRORS} for i in range(9)],
        launches={"conv_wgrad_kernel": 9},
        converted="2 of 2 convolution layers",
    ),
    "time": part(
        "time",
        noise=0.012,
        rows=[
            {"provider": "eager channels_last", "status": "ok", "reason": None, "step_ms": TIMES, "host_ms": TIMES}
            | {"speed": 1.0, "samples_per_s": 1234.0, "peak_bytes": 3 << 30, "gpu_kernels": 42, "warm_up_s": 1.5},
            {"provider": "fastconv", "status": "failed", "reason": "OutOfMemoryError: tried to allocate"},
            {"provider": "torch.compile", "status": "skipped", "reason": "no time left"},
        ],
    ),
    "operators": part(
        "operators",
        dtype="bfloat16",
        copy_bandwidth=4.0e12,
        matrix_rate=8.0e14,
        speed_target=2.0,
        rivals=["eager"],
        share_target=0.85,
        means=[{"direction": "fprop", "network": "all", "batch": 64, "speed": 0.4321, "rows": 1}],
        families={"depthwise": {"wins": 7, "losses": 1}},
        rows=[
            {"operator": "N64 C64 56x56 -> K64 3x3 bfloat16", "direction": "fprop", "networks": {"a": 3, "b": 1}}
            | {"ours": "fastconv"}
            | {"bytes": 10**6, "flops": 10**9, "large": True, "family": "depthwise", "status": "ok", "reason": None}
            | {"tile": {"BLOCK_M": 128, "SPLITS": 8, "num_warps": 4, "num_stages": 3}, "noise": 0.01, "batch": 64}
            | {"speed": 0.4, "speed_over_rivals": 0.4, "gb_per_s": 2222.0, "share": 0.56, "tflops": 30.0}
            | {"missed": ["speed", "bandwidth"], "ceiling": 0.57, "layout_ms": 0.0123, "matrix_share": 0.1}
            | {"again": {"status": "ok", "copies": 2, "ms": 1.0, "eager_ms": 1.3, "speed_over_eager": 1.3}}
            | {
                "providers": [
                    {"provider": "eager", "status": "ok", "reason": None, "ms": TIMES, "alone_ms": TIMES},
                    {"provider": "fastconv", "status": "ok", "reason": None, "ms": {**TIMES, "median": 5.0}}
                    | {"alone_ms": {**TIMES, "median": 5.5}},
                    {"provider": "compile", "status": "skipped", "reason": "no time left"},
                ]
            },
            {"operator": "N64 C64 56x56 -> K64 3x3 bfloat16", "direction": "dgrad", "networks": {"a": 3}, "batch": 64}
            | {"ours": "fastconv"}
            | {"bytes": 10**6, "large": False, "family": "depthwise", "status": "ok", "reason": None, "noise": 0.01}
            | {"speed": None, "speed_over_rivals": None, "unconfirmed": 1.7, "missed": [], "providers": []}
            | {"again": {"status": "failed", "reason": "RuntimeError: no room", "copies": 2}},
            {"operator": "N64 C64 56x56 -> K64 3x3 bfloat16", "direction": "wgrad", "networks": {}, "status": "wrong"}
            | {"ours": "fastconv"}
            | {"reason": "too far from the reference", "bytes": 10**6, "large": False, "providers": [], "batch": 64},
        ],
    ),
    "targets": part(
        "targets",
        least_target=0.6,
        rows=[
            {"direction": "fprop", "target": 0.9, "measured": 3, "of": 3, "mean": 0.95, "least": 0.7}
            | {"least_of": "N64 C64 56x56 -> K64 3x3 bfloat16", "met": True},
            {"direction": "dgrad", "target": 0.85, "measured": 2, "of": 3, "mean": 0.83, "least": 0.66}
            | {"least_of": "N64 C64 56x56 -> K64 3x3 bfloat16", "met": None},
            {"direction": "wgrad", "target": 0.85, "measured": 0, "of": 3, "mean": None, "least": None}
            | {"least_of": None, "met": None},
        ],
    ),
    "blocks": part(
        "blocks",
        bandwidth=4.8e12,
        rows=[
            {"block": "resnet50 layer1.1", "mode": "train", "input_shape": [64, 256, 56, 56], "status": "ok"}
            | {"reason": None, "noise": 0.02}
            | {
                "providers": [
                    {"provider": "eager channels_last", "status": "ok", "reason": None, "ms": {**TIMES, "median": 3.0}}
                    | {"bytes": 2_000_000_000, "gb_per_s": 3000.0, "speed": 1.0},
                    {"provider": "fastconv", "status": "ok", "reason": None, "ms": TIMES, "bytes": 10**9}
                    | {"gb_per_s": 4321.0, "speed": 1.5},
                    {"provider": "torch.compile channels_last", "status": "skipped", "reason": "no time left"},
                ]
            },
            {"block": "vgg16_bn features.0:3", "mode": "infer", "input_shape": [64, 3, 224, 224], "status": "wrong"}
            | {"reason": "too far off", "providers": []},
        ],
    ),
    "host": part(
        "host",
        target_us=30.0,
        rows=[
            {
                "function": "fastconv",
                "problem": "1x16x8x8 float32",
                "gradient": False,
                "reason": None,
                "host_us": TIMES,
            },
            {"function": "PyTorch", "problem": "1x16x8x8 float32", "gradient": True, "reason": "RuntimeError: no"},
        ],
    ),
    "compile": part("compile", kernels=22, threads=16, seconds=3.5),
    "compiler": part(
        "compiler",
        rows=[
            {"kernel": "conv_gather_kernel", "direction": "fprop", "target": "NVIDIA H200", "registers": registers}
            | {"spills": 0, "shared_memory": 65536, "occupancy": 2, "tensor_cores": "wgmma", "load_bytes": {"16": 24}}
            for registers in (96, 124)
        ],
    ),
}


def text(renderable: Any, width: int = 200) -> str:
    screen = Console(file=io.StringIO(), width=width)
    screen.print(renderable)
    return screen.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_that_is_killed_keeps_its_parts(tmp_path) -> None:
    results = Results(tmp_path / "new" / "folder")
    assert read(results.path)["parts"] == []
    results.put(PARTS["training"])
    results.put(PARTS["time"])
    results.put({**PARTS["training"], "title": "again"})
    data = read(results.path)
    assert [(p["id"], p["title"]) for p in data["parts"]] == [("time", "the time part"), ("training", "again")]
    assert data["schema"] == SCHEMA
    assert list(results.path.parent.iterdir()) == [results.path]


def test_the_environment_names_what_a_figure_depends_on(tmp_path) -> None:
    environment = Results(tmp_path).data["environment"]
    assert {"gpu", "driver", "torch", "triton", "cudnn", "commit"} <= environment.keys()
    assert environment["torch"]
    assert environment["triton"]


def test_the_commit_is_what_one_is_told_or_what_git_says_of_the_checkout(tmp_path, monkeypatch) -> None:
    def git(*arguments: str, folder: Path = tmp_path / "checkout") -> str:
        names = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        done = subprocess.run(["git", *names, *arguments], cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    monkeypatch.delenv("FASTCONV_COMMIT", raising=False)
    copy, worktree = tmp_path / "checkout" / "copy", tmp_path / "worktree"
    copy.mkdir(parents=True)
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    git("worktree", "add", str(worktree))
    first = git("rev-parse", "--short=12", "HEAD")
    for checkout, said in ((copy.parent, first), (worktree, first), (copy, None)):
        monkeypatch.setattr(results, "CHECKOUT", checkout)
        assert results.commit() == said
    monkeypatch.setenv("FASTCONV_COMMIT", "abc")
    assert results.commit() == results.environment()["commit"] == "abc"


@pytest.mark.parametrize("verdict", ["right", "skipped", "wrong", "failed"])
def test_only_wrong_and_failed_parts_make_a_run_wrong(verdict: str, tmp_path) -> None:
    results = Results(tmp_path)
    results.put({**PARTS["time"], "verdict": verdict})
    assert results.wrong is (verdict in ("wrong", "failed"))


def test_a_folder_that_cannot_be_written_any_more_is_bad_usage(tmp_path) -> None:
    results = Results(tmp_path / "out")
    results.path.unlink()
    (tmp_path / "out").rmdir()
    with pytest.raises(ValueError, match=f"cannot write to --out {tmp_path / 'out'}: No such file"):
        results.put(PARTS["time"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("not JSON", "is not JSON"),
        ("[1]", "schema None"),
        (json.dumps({"schema": "fastconv-bench/99"}), "fastconv-bench/99"),
        (json.dumps({"schema": SCHEMA}), "lacks command, created"),
    ],
)
def test_what_is_no_result_file_is_refused(content: str, expected: str, tmp_path) -> None:
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(ValueError, match=expected):
        read(tmp_path / "bench.json")


def test_a_part_without_its_keys_is_refused(tmp_path) -> None:
    results = Results(tmp_path)
    with pytest.raises(ValueError, match="lacks verdict"):
        results.put({key: value for key, value in PARTS["time"].items() if key != "verdict"})
    with pytest.raises(ValueError, match="kind 'guess', not one of"):
        results.put({**PARTS["time"], "kind": "guess"})
    with pytest.raises(ValueError, match="lacks noise"):
        results.put({key: value for key, value in PARTS["time"].items() if key != "noise"})
    with pytest.raises(ValueError, match="'fine', not one of"):
        results.put({**PARTS["time"], "verdict": "fine"})


WHOLE = {"schema": SCHEMA, "created": "", "command": [], "dry_run": False, "environment": {}, "parts": [PARTS["host"]]}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ({"parts": 5}, "field parts: int is no list"),
        ({"parts": [1]}, "a part is no object"),
        ({"environment": None}, "field environment: NoneType is no dict"),
        ({"parts": [{**PARTS["host"], "kind": []}]}, "part 'host', field kind: list is no str"),
        ({"parts": [{**PARTS["host"], "id": "../host"}]}, "part '../host': its id is no name"),
        ({"parts": [{**PARTS["host"], "rows": {}}]}, "part 'host', field rows: dict is no list"),
        ({"parts": [{**PARTS["host"], "rows": [1]}]}, "a row of part 'host' is no object"),
        ({"parts": [{**PARTS["host"], "rows": [{}]}]}, "bench.json is damaged: KeyError: 'function'"),
        ({"parts": [{**PARTS["compile"], "seconds": "long"}]}, "bench.json is damaged: ValueError: "),
        ({"parts": [{**PARTS["training"], "tolerance": None}]}, "bench.json is damaged: TypeError: "),
    ],
)
def test_a_damaged_file_is_one_line(damage: dict[str, Any], expected: str, tmp_path, capsys) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(WHOLE | damage))
    assert run(["bench", "--show", str(tmp_path / "bench.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and expected in error


def test_plots_that_cannot_be_written_are_one_line(tmp_path, capsys) -> None:
    (tmp_path / "training.png").mkdir()
    screen = Console(file=io.StringIO(), width=1000)
    with bench_run.Output(tmp_path, bench_run.Options(), screen) as output:
        output.put(PARTS["training"])
    said = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert said[-1] == f"Cannot write the plots: [Errno 21] Is a directory: '{tmp_path / 'training.png'}'"
    assert run(["bench", "--show", str(tmp_path / "bench.json")]) == 2
    assert capsys.readouterr().err.startswith("fastconv: cannot write the plots: [Errno 21] Is a directory: ")


def test_what_errors_say_in_brackets_is_shown(tmp_path, capsys) -> None:
    said = "RuntimeError: expected [n, c] of [/cpu]"
    row = PARTS["host"]["rows"][1] | {"reason": said}
    content = WHOLE | {"parts": [{**PARTS["host"], "rows": [row]}]}
    (tmp_path / "bench.json").write_text(json.dumps(content))
    assert run(["bench", "--show", str(tmp_path / "bench.json")]) == 0
    assert said in capsys.readouterr().out


def test_every_kind_of_part_has_a_table() -> None:
    assert PARTS.keys() == tables.TABLES.keys() == KINDS.keys()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("training", ["81.0%", "1.0e-05", "3 x conv_gather_kernel"]),
        ("block", ["bfloat16, norm", "WRONG", "none"]),
        ("check", ["worst 6 of 9", "2 of 2 convolution layers", "9 x conv_wgrad_kernel"]),
        ("time", ["1,234", "3.00", "42", "OutOfMemoryError", "no time left", "1.2%"]),
        (
            "operators",
            [
                *("depthwise", "M128 /8", "0.40", "too far", "LOSS", "57% 2,222 GB/s", "5000.0 -70% -40%"),
                *("2000.0", "0.36", "speed, bandwidth under target", "again 1.30"),
                *("12.3", "compile: 1 rows skipped, the first: no time left", "0.43"),
                "UNCONFIRMED",
                "0 of 1 reach 2.0 of the speed of eager; 1 are slower",
                *("0 of 1 with tensors", "4,000 GB/s", "800", "7 at least as fast as eager", "1 slower"),
            ],
        ),
        ("targets", ["0.95", "0.90", "met", "open", "2 of 3", "0.66", "0.60"]),
        ("blocks", ["64x256x56x56", "1.50", "2,000", "4,321", "2.0%", "no time left", "too far off", "4,800 GB/s"]),
        ("host", ["fastconv, 1x16x8x8 float32, no gradient", "2.0", "RuntimeError: no", "under 30"]),
        ("compile", ["22 distinct kernels on 16 threads in 3.5 s"]),
        ("compiler", ["96-124", "wgmma", "64"]),
    ],
)
def test_a_part_says_what_it_found(kind: str, expected: list[str]) -> None:
    shown = text(tables.render(PARTS[kind]))
    for word in ["right", *expected]:
        assert word in shown


def test_operators_of_many_providers_fit_a_wide_terminal() -> None:
    """A row of the usual ones is a line; with more, and in fewer columns, no name and no number is cut short."""
    operators = PARTS["operators"]
    timed = operators["rows"][0]["providers"][0]

    def shown(width: int, *names: str) -> list[str]:
        row = operators["rows"][0] | {"operator": "N64 C256 14x14 -> K256 3x3 stride 2 padding 1 bfloat16"}
        row |= {"tflops": 612.0, "matrix_share": 0.7, "ceiling": 0.7, "missed": ["speed"], "again": {}}
        row |= {"family": "pixels", "tile": {"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_C": 64, "num_warps": 8}}
        row["providers"] = [timed | {"provider": name} for name in names]
        return text(tables.render({**operators, "rows": [row, row]}), width).splitlines()

    usual = ("eager", "fastconv", "fastconv-nchw", "eager-nchw", "compile")
    rows = [line for line in shown(200, *usual) if "N64 C256" in line]
    assert len(rows) == 2
    for line in rows:
        assert "padding 1, fprop" in line and "70% 612 TFLOP/s" in line and "LOSS; speed under target" in line
    narrow = " ".join(shown(150, *usual, "fastconv:gather"))
    assert "…" not in narrow and "70% 612 TFLOP/s" in narrow and "2000.0 -25% +50%" in narrow
    assert all(word in narrow for word in ("fastconv:", "gather", "eager-", "compile"))


def test_a_part_that_was_not_reached_shows_its_reason() -> None:
    for kind in ("check", "time", "compiler"):
        shown = text(tables.render({**PARTS[kind], "rows": [], "verdict": "skipped", "reason": "no time left"}))
        assert "skipped (no time left)" in shown


def test_plots_are_drawn_from_the_file_alone(tmp_path) -> None:
    results = Results(tmp_path, dry_run=True)
    for content in PARTS.values():
        results.put(content)
    results.put({**PARTS["time"], "id": "nothing-timed", "rows": PARTS["time"]["rows"][1:]})
    drawn = plots.draw(read(results.path), tmp_path)
    assert [path.name for path in drawn] == [
        *("training.png", "time.png", "operators.png", "targets.png", "blocks.png")
    ]
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_a_dry_run_says_so_first() -> None:
    data = {"dry_run": True, "environment": {"gpu": None}}
    assert tables.heading(data).startswith("DRY RUN")
