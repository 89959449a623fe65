"""``fastconv tune`` with a worker that pretends to measure: nothing is lost, what fails is not tried again."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastconv.autotune import Measured, Store, Tuned
from fastconv.autotune.choose import Question
from fastconv.autotune.gpus import A100, H200
from fastconv.autotune.known import load_lock, reload
from fastconv.autotune.records import FAILURES, OUT_OF_MEMORY, RETRIED, Untuned
from fastconv.autotune.table import read_table
from fastconv.autotune.tune import Failed, Footprint, TuningTask, share_of
from fastconv.benchmarks import layer_lists
from fastconv.cli import run
from fastconv.cli import tune as command
from fastconv.kernels.dispatch import version_of
from fastconv.kernels.launch.device import here
from fastconv.measuring import compiling
from fastconv.settings import settings
from fastconv.tuning import problems
from tests.autotune.making import DATE, met, problem, tuned
from tests.autotune.simulated import Timer
from tests.marks import interpreted
from tests.measuring import pretending

ROOT = Path(__file__).parents[2]
LAYERS = """{"schema": "fastconv-layers/1", "network": "small", "image": [64, 28, 28]}
{"count": 3, "function": "conv2d", "input": [64, 28, 28], "weight": [64, 64, 3, 3], "padding": 1}
{"count": 1, "function": "conv2d", "input": [64, 28, 28], "weight": [128, 64, 1, 1], "stride": 2}
{"count": 1, "function": "max_pool2d", "input": [128, 14, 14], "kernel_size": 2}
"""


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    path = tmp_path / "small.jsonl"
    path.write_text(LAYERS)
    return path


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path / "cache"))
    reload()
    yield Store()
    monkeypatch.undo()
    reload()


def tasks_of(layers: Path, train: bool = False) -> list[TuningTask]:
    return problems.of_layers(layer_lists.find(str(layers)).calls, 8, torch.bfloat16, train, H200)


def times_of(tasks: Sequence[TuningTask], seed: int = 0) -> dict[str, float]:
    timer = Timer(H200, seed)
    return {
        pretending.key_of(task.question.problem, config): timer.truth(task.question.work(config), config)
        for task in tasks
        for config, _ in task.question.fitting()
    }


def estimated(self: Any, question: Question, configs: Sequence[Any]) -> list[Footprint | Failed]:
    """In the place of a compiler: what the cost model takes it for."""
    works = [question.work(config) for config in configs]
    return [Footprint(min(work.registers, 255), 0, work.shared_memory) for work in works]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(compiling.Compiler, "_compile", estimated)

    def pretend(times: dict[str, float], failures: dict[str, str] | None = None, **more: Any) -> Path:
        line = pretending.write(tmp_path / "plan", H200, times, failures or {}, **more)
        monkeypatch.setattr(command, "worker_command", lambda device: line)
        return tmp_path / "plan"

    return pretend


def tuned_by(store: Store) -> list[Tuned]:
    return [record for record in store.read(("tuned",)) if isinstance(record, Tuned)]


def test_finds_winners_keeps_all_and_has_nothing_to_do_again(
    layers: Path, store: Store, pretend: Any, capsys, tmp_path
) -> None:
    tasks = tasks_of(layers)
    times = times_of(tasks)
    plan = pretend(times, otherwise=1e-4)
    line = ["tune", "--layers", str(layers), "--batch", "8", "--report", "--lock", str(tmp_path / "lock.json")]
    assert run([*line, "--write-table", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"small batch 8 bfloat16 inference on the NVIDIA H200: {len(tasks)} problems, 0 of them tuned" in out
    assert f"{len(tasks)} problems tuned in" in out and "rank correlation" in out
    told = [line for line in out.splitlines() if " left, " in line]
    assert [line.split(" at most ")[0] for line in told] == ["1/3", "2/3", "3/3"], "progress where there is no terminal"
    assert all(re.search(r" at most \d+:\d\d left, \w+ .*: \d+ configs, best [\d.]+ us of ", line) for line in told)
    found = tuned_by(store)
    assert {entry.problem for entry in found} == {task.question.problem for task in tasks}
    for entry in found:
        keys = {name: time for name, time in times.items() if name.startswith(entry.problem.describe())}
        assert times[pretending.key_of(entry.problem, entry.config)] <= 1.1 * min(keys.values())
        assert entry.pytorch == pytest.approx(1e-4, rel=0.02) and entry.version == version_of(entry.problem.space)
        assert entry.fastconv.startswith("0.")
    # What is measured is what was asked of the worker, all of it.
    kept = [record for record in store.read(("measured",)) if isinstance(record, Measured)]
    assert Counter(pretending.key_of(r.problem, r.config) for r in kept) == Counter(pretending.asked(plan))
    assert read_table(tmp_path / "lock.json") == sorted(
        read_table(tmp_path / "lock.json"), key=lambda e: str(e.problem.json)
    )
    assert {e.problem for e in read_table(tmp_path / "nvidia-h200.json")} == {e.problem for e in found}
    assert json.loads((tmp_path / "lock.json").read_text())["model"] == "small batch 8 bfloat16 inference"
    command._publish(tmp_path / "long.json", found, "../" + "models/" * 50)
    assert {e.problem for e in read_table(tmp_path / "long.json")} == {e.problem for e in found}
    before = len(pretending.asked(plan))
    assert run(line[:5]) == 0
    assert f"{len(tasks)} problems, {len(tasks)} of them tuned already" in capsys.readouterr().out
    assert len(pretending.asked(plan)) == before
    assert run([*line[:5], "--again"]) == 0
    assert len(pretending.asked(plan)) > before


def test_a_lock_file_decides(layers: Path, store: Store, tmp_path, pretend: Any) -> None:
    from fastconv.autotune.choose import choose
    from fastconv.kernels.dispatch import ADAPTER

    task = tasks_of(layers)[0]
    second = task.question.fitting()[1][0]
    assert second != task.question.choice.config
    times = dict.fromkeys(times_of([task]), 1e-3) | {pretending.key_of(task.question.problem, second): 1e-5}
    pretend(times, otherwise=1e-4)
    lock = tmp_path / "lock.json"
    assert run(["tune", "--layers", str(layers), "--batch", "8", "--lock", str(lock)]) == 0
    store.clear()
    reload()
    load_lock(lock)
    try:
        question = task.question
        choice = choose(question.space, question.features, question.work, H200, ADAPTER)
        assert choice.source == "lock file" and choice.config == second
    finally:
        load_lock(None)


def test_what_fails_is_told_and_tried_again_where_it_may_be_the_gpus_fault(
    layers: Path, store: Store, pretend: Any, capsys
) -> None:
    """A config is planted for every way to fail, each the fastest if it were measured."""
    tasks = tasks_of(layers)
    times = times_of(tasks)
    ways = ("exception", "wrong", "abort", "segmentation fault", "memory", "illegal access")
    statuses = dict(zip(ways, ("failed", "wrong", "crashed", "crashed", "out_of_memory", "crashed"), strict=True))
    task = max(tasks, key=lambda task: len(task.question.fitting()))
    configs = [config for config, _ in task.question.fitting() if config != task.question.choice.config]
    planted = {pretending.key_of(task.question.problem, c): how for c, how in zip(configs, ways, strict=False)}
    plan = pretend(times, planted)
    assert run(["tune", "--layers", str(layers), "--batch", "8"]) == 1, "a wrong result"
    out = capsys.readouterr().out
    failed = [r for r in store.read(("measured",)) if isinstance(r, Measured) and r.status in FAILURES]
    by_key = {pretending.key_of(r.problem, r.config): r.status for r in failed if r.config is not None}
    assert by_key == {key: statuses[how] for key, how in planted.items() if key in by_key} and len(by_key) >= 4
    assert "not measured, and not tried again: " in out and "tried by the next run: 1 out_of_memory" in out
    assert re.search(r"not measured, and tried again with --again: \d crashed\n", out)
    counted = Counter(pretending.asked(plan))
    assert all(counted[key] == 1 for key in by_key)
    assert {entry.problem for entry in tuned_by(store)} == {task.question.problem for task in tasks}
    assert run(["tune", "--layers", str(layers), "--batch", "8", "--again"]) == 0
    counted = Counter(pretending.asked(plan))
    for key, status in by_key.items():
        assert counted[key] == 1 + (status in (OUT_OF_MEMORY, *RETRIED)), "nor by another run, where it is final"


# A run in a process of its own. Arguments: the plan, with the rank if there are several, then the command line.
PROGRAM = """
import os, sys
from tests.cli.test_tune import command, compiling, estimated
from fastconv.cli import run
plan, *line = sys.argv[1:]
plan += os.environ.get("RANK", "")
compiling.Compiler._compile = estimated
command.worker_command = lambda device: [sys.executable, "-m", "tests.measuring.pretending", plan]
sys.exit(run(line))
"""


def started(plan: Path, line: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(plan), *line],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(plan: Path, count: int) -> None:
    end = time.monotonic() + 60
    while len(pretending.asked(plan)) < count:
        assert time.monotonic() < end, "it measures nothing"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_runs_lose_nothing_and_go_on(number: int, layers: Path, store: Store, pretend: Any) -> None:
    tasks = tasks_of(layers)
    plan = pretend(times_of(tasks), takes=0.02, otherwise=1e-4)
    line = ["tune", "--layers", str(layers), "--batch", "8"]
    process = started(plan, line)
    wait_for(plan, random.Random(0).randint(20, 60))
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number), error
    if number == signal.SIGINT:
        assert error == "fastconv: interrupted; what was finished has been written\n"
    before = pretending.asked(plan)
    kept = [pretending.key_of(r.problem, r.config) for r in Store().read(("measured",)) if isinstance(r, Measured)]
    assert kept in (before, before[:-1]), "all but what was in flight"
    assert run(line) == 0
    again = Counter(pretending.asked(plan)[len(before) :])
    assert {entry.problem for entry in tuned_by(store)} == {task.question.problem for task in tasks}
    # A problem whose winner was found before is not measured again.
    ended = {entry.problem for entry in Store().read(("tuned",))} & {
        r.problem
        for r in Store().read(("measured",))
        if sum(key.startswith(r.problem.describe()) for key in before) > 44
    }
    assert not [key for key in again if any(key.startswith(each.describe()) for each in ended)]


@pytest.mark.slow
def test_under_torchrun_a_rank_that_cannot_measure_leaves_all_to_the_others(
    layers: Path, store: Store, tmp_path
) -> None:
    """And a wrong result, whichever rank met it, ends nobody before the lock file is written."""
    tasks = tasks_of(layers)
    wrong = pretending.key_of(tasks[0].question.problem, tasks[0].question.fitting()[1][0])
    pretending.write(tmp_path / "plan0", H200, {}, {}, refuses="the driver is too old")
    pretending.write(tmp_path / "plan1", H200, times_of(tasks), {wrong: "wrong"})
    program, lock = tmp_path / "program.py", tmp_path / "lock.json"
    program.write_text(PROGRAM)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program), str(tmp_path / "plan")]
    line = [*torchrun, "tune", "--layers", str(layers), "--batch", "8", "--lock", str(lock)]
    process = subprocess.run(
        [sys.executable, "-m", *line],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = process.stderr
    assert "fastconv: rank 0: the measuring process does not start: RuntimeError: the driver is too old" in said
    assert process.returncode == 1 and "exitcode  : 2" in said and "exitcode  : 1" not in said, said
    assert {entry.problem for entry in read_table(lock)} == {task.question.problem for task in tasks}
    assert f"{lock.name}: {len(tasks)} of {len(tasks)} problems" in process.stdout


def test_the_budget_ends_a_run(layers: Path, store: Store, pretend: Any) -> None:
    pretend(times_of(tasks_of(layers)), takes=0.15)
    assert run(["tune", "--layers", str(layers), "--batch", "8", "--budget", "1s"]) == 0
    (found,) = tuned_by(store)
    share = {task.question.problem: share_of(task) for task in tasks_of(layers)}
    assert found.problem == max(share, key=lambda each: share[each]), "where the time goes"
    assert found.measurements < 12, "the search was cut short, its winner is held against the default all the same"


def test_dry_run_measures_nothing(layers: Path, store: Store, capsys) -> None:
    assert run(["tune", "--layers", str(layers), "--batch", "8", "--train", "--gpu", "A100", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Predicted for the NVIDIA A100; nothing is measured" in out
    assert "conv_wgrad" in out and "dgrad N8 C64 28x28 -> K64 3x3 padding 1 bfloat16" in out and "pool" in out
    assert not store.folder.exists()


def test_the_stage_of_the_gpu_machine_walks_its_road(store: Store, tmp_path, capsys) -> None:
    """The command of ``make gpu``, for a GPU that is not here."""
    (line,) = [line for line in (ROOT / ".ci/gpu").read_text().splitlines() if "fastconv tune" in line]
    words = (
        line.split(" fastconv ")[1].replace("$((limit - 20))", "220").replace('"$OUT/tuning"', str(tmp_path)).split()
    )
    (at,) = [index for index, word in enumerate(words) if word == "--write-table"]
    assert run([*words[:at], "--dry-run", "--gpu", "H200"]) == 0
    out = capsys.readouterr().out
    assert "Predicted for the NVIDIA H200" in out and "of at most 3.7" in out and "nothing is measured yet" in out
    store.append(tuned(problem("conv_gather"), version_of("conv_gather")))
    reload()
    assert run(["tune", *words[at:], "--gpu", "H200"]) == 0
    assert len(read_table(tmp_path / "nvidia-h200.json")) == 1


def test_the_log_is_what_programs_met(store: Store, pretend: Any, layers: Path, capsys) -> None:
    tasks = tasks_of(layers)
    question = tasks[0].question
    for each in (question.problem, problem("of_another_version")):
        store.append(Untuned(each, H200.name, H200.multiprocessors, question.version, DATE))
    store.append(Untuned(tasks[-1].question.problem, A100.name, A100.multiprocessors, question.version, DATE))
    pretend(times_of(tasks))
    assert run(["tune", "--from-log"]) == 0
    assert "What programs met on the NVIDIA H200: 1 problems" in capsys.readouterr().out
    assert [entry.problem for entry in tuned_by(store)] == [question.problem]


def test_a_models_problems_and_only_those_of_a_kernel(capsys) -> None:
    line = "tune --model tests.cli.tiny:every_kind --size 32 --batch 4 --train --dry-run --gpu H200"
    assert run(line.split()) == 0
    out = capsys.readouterr().out
    spaces = {line.split()[1] for line in out.splitlines() if line.startswith("│ ") and " N4 " in line}
    assert len(spaces) > 1
    wanted = sorted(spaces)[0]
    assert run([*line.split(), "--kernel", wanted]) == 0
    out = capsys.readouterr().out
    assert {line.split()[1] for line in out.splitlines() if line.startswith("│ ") and " N4 " in line} == {wanted}


def test_the_report_holds_the_cost_model_against_measurements(store: Store, capsys) -> None:
    assert run(["tune", "--report", "--gpu", "H200"]) == 0
    assert "nothing is measured yet on the NVIDIA H200" in capsys.readouterr().out
    times = {1: (1e-5, 2e-5), 2: (2e-5, 1e-5), 4: (3e-5, 3e-5), 8: (4e-5, 4e-5)}
    for tile, (predicted, seconds) in times.items():
        store.append(
            Measured(problem(), H200.name, 132, tuned().version, {"TILE": tile}, "ok", seconds, predicted, DATE)
        )
    store.append(tuned(default_seconds=1.5e-5))
    assert run(["tune", "--report", "--gpu", "H200"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "gemm" in line)
    assert [cell.strip() for cell in row.split("│")[2:-1]] == [
        "1",
        "0.80",
        "100.0%",
        "0.0%",
        "50.0%",
        "50.0%",
        "0 of 1",
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("tune", "tune what?"),
        ("tune --layers LAYERS --from-log", "--layers and --from-log exclude each other"),
        ("tune --layers LAYERS", "PyTorch sees no GPU to measure on; --dry-run"),
        ("tune --layers LAYERS --gpu H200", "--gpu measures nothing: add --dry-run, --report, --lock or --write-table"),
        ("tune --layers LAYERS --budget 0", "--budget 0: nothing can be measured in less than a second"),
        ("tune --layers LAYERS --budget 0m", "--budget 0m: nothing"),
        ("tune --layers LAYERS --budget 0.0000001", "--budget 0.0000001: nothing"),
        ("tune --layers LAYERS --budget=-5m", "--budget -5m: nothing"),
        (f"tune --layers LAYERS --budget {'9' * 400}h", "a time is expected"),
        ("tune --layers LAYERS --budget soon", "--budget 'soon': a time is expected, as 90s"),
        ("tune --layers LAYERS --gpu GTX --dry-run", "gpu 'GTX' is not one of A100"),
        ("tune --layers LAYERS --kernel cubic --dry-run", "--kernel 'cubic' is not one of conv_depthwise,"),
        (
            "tune --layers LAYERS --kernel conv_depthwise --dry-run --gpu H200",
            "of conv_depthwise for the NVIDIA H200 none",
        ),
        ("tune --layers LAYERS --dtype int8 --dry-run", "--dtype 'int8' is not one of"),
        ("tune --layers LAYERS --size 3 --dry-run", "--size needs --model"),
        ("tune --layers LAYERS --lock nowhere/lock --gpu H200", "--lock nowhere/lock: cannot be written (No such file"),
        ("tune --layers LAYERS --lock /proc/lock", "--lock /proc/lock: cannot be written ("),
        ("tune --layers LAYERS --lock .", "--lock .: a folder, not a file"),
        ("tune --layers LAYERS --lock lock --gpu H200", "lock: nothing of it is tuned yet"),
        ("tune --write-table nowhere", "--write-table nowhere: cannot be written (No such file"),
        ("tune --layers LAYERS --write-table /proc", "--write-table /proc: cannot be written ("),
        ("tune --layers LAYERS --write-table LAYERS", "small.jsonl: cannot be written (Not a directory"),
        ("tune --write-table . --gpu H200", "nvidia-h200.json: nothing of it is tuned yet"),
        ("tune --from-log --gpu H200 --dry-run", "in the log, none"),
        ("tune --from-log --batch 3", "--batch says something of a model"),
        ("tune --report --lock lock", "--lock needs one of --model"),
        ("tune --layers resnt --dry-run", "those there are: alexnet,"),
        (f"tune --layers LAYERS --dry-run --batch {2**60}", f"small.jsonl does not run on a batch of {2**60}: "),
        ("tune --layers BAD --dry-run", "bad.jsonl, line 2, field count: a positive integer of at most"),
        ("tune --model resnt18 --dry-run", "resnet18"),
        ("tune --model tests.cli.tiny:large --size 4 --dry-run", "does not run on a batch of 64x3x4x4"),
    ],
)
def test_bad_usage_is_one_line_and_changes_nothing(
    line: str, why: str, layers: Path, tmp_path, monkeypatch, capsys
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(LAYERS.replace('"count": 3', '"count": 0'))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(ROOT))
    words = [{"LAYERS": str(layers), "BAD": str(bad)}.get(word, word) for word in line.split()]
    assert run(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastconv: ") and error.count("\n") == 1 and why in error
    assert not list((tmp_path / "here").iterdir()) and not (tmp_path / "cache").exists()


def test_a_store_that_cannot_be_written_ends_it_before_anything_is_measured(
    layers: Path, pretend: Any, tmp_path, monkeypatch, capsys
) -> None:
    plan = pretend({})
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(layers))  # a file where a folder is needed
    reload()
    assert run(["tune", "--layers", str(layers)]) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and error.count("\n") == 1 and not pretending.asked(plan)


def test_a_lock_that_cannot_be_read_is_not_the_networks_fault(layers: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FASTCONV_LOCK", str(tmp_path / "nowhere"))
    assert run(["tune", "--layers", str(layers), "--dry-run", "--gpu", "H200"]) == 2
    assert capsys.readouterr().err.startswith("fastconv: FASTCONV_LOCK: No such file or directory: ")


def test_a_worker_that_does_not_start_is_one_line(layers: Path, pretend: Any, capsys) -> None:
    pretend({}, refuses="the driver is too old")
    assert run(["tune", "--layers", str(layers)]) == 2
    error = capsys.readouterr().err
    assert "does not start: RuntimeError: the driver is too old" in error and error.count("\n") == 1


@interpreted
@pytest.mark.parametrize("tune", ["first", "force"])
def test_settings_that_ask_for_measuring_do_nothing_without_a_gpu(tune: str, monkeypatch) -> None:
    import fastconv
    from fastconv.measuring import first

    monkeypatch.setattr(first, "Worker", lambda *_: pytest.fail("a worker was started"))
    with fastconv.settings(tune=tune):
        fastconv.functional.conv2d(torch.randn(1, 16, 3, 3), torch.randn(16, 16, 1, 1))
        assert first.measure(problems_asked(), "0.1.0") is None


def problems_asked() -> Question:
    from fastconv.measuring.problem_to_run import to_run

    return to_run(problems_first(), H200)[1]


def problems_first() -> Any:
    from tests.measuring.test_problem_to_run import CALLS, asked_by

    return asked_by(CALLS["1x1"], torch.bfloat16, H200)[0].question.problem


@pytest.fixture
def measuring(pretend: Any, layers: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[TuningTask, Path]]:
    """A problem, and the plan of the worker that `settings.tune` asks, as on a GPU."""
    from fastconv.measuring import first
    from fastconv.measuring.process import Worker

    task = tasks_of(layers)[0]
    plan = pretend(times_of([task]))
    monkeypatch.setattr(first, "live", lambda gpu: True)
    monkeypatch.setattr(here, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(here, "current_device", lambda: 0)
    monkeypatch.setattr(here, "synchronize", lambda: None)
    with Worker([sys.executable, "-m", "tests.measuring.pretending", str(plan)]) as worker:
        monkeypatch.setattr(first, "_workers", {0: worker})
        yield task, plan


def test_asked_for_a_problem_is_tuned_with_the_worker(measuring: tuple[TuningTask, Path], store: Store) -> None:
    from fastconv.measuring import first

    task, plan = measuring
    found = first.measure(task.question, "0.1.0")
    assert found is not None and found.problem == task.question.problem
    assert len(store.read(("measured",))) == len(pretending.asked(plan)) and not store.read(("tuned",))
    assert met().problem != found.problem
    # What an earlier process measured counts, unless all is to be measured again.
    once = len(pretending.asked(plan))
    first.measure(task.question, "0.1.0")
    twice = len(pretending.asked(plan))
    with settings(tune="force"):
        first.measure(task.question, "0.1.0")
    assert twice - once < once == len(pretending.asked(plan)) - twice


def test_asked_for_compiling_takes_none_of_a_problems_time(measuring: tuple[TuningTask, Path], monkeypatch) -> None:
    from fastconv.measuring import first

    def slowly(self: Any, question: Question, configs: Sequence[Any]) -> list[Footprint | Failed]:
        time.sleep(0.6)
        return estimated(self, question, configs)

    monkeypatch.setattr(compiling.Compiler, "_compile", slowly)
    monkeypatch.setattr(first, "SECONDS", 0.5)
    found = first.measure(measuring[0].question, "0.1.0")
    assert found is not None and found.measurements > 5
