"""The cost model held against what was measured on GPUs and committed, by what ``fastconv tune --report`` computes."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fastconv.autotune import Gpu, Measured, ProblemKey, Store, Tuned, gpu_named, predict
from fastconv.autotune.choose import RESOLUTION, Question
from fastconv.autotune.gpus import EMULATED, H200
from fastconv.autotune.ranking import Summary, fits, summary
from fastconv.autotune.records import Record
from fastconv.autotune.store import read_lines
from fastconv.autotune.table import read_table, write_table
from fastconv.benchmarks import layer_lists
from fastconv.kernels.dispatch import version_of
from fastconv.measuring.problem_to_run import Unmeasurable, to_run
from fastconv.tuning import problems
from tests.autotune.making import DATE, tuned
from tests.autotune.simulated import Timer

ROOT = Path(__file__).parents[2]
# Where `fastconv tune --write-table` and `fastconv cache export` are committed to.
FOLDERS = ROOT / "autotune" / "tables", ROOT / "benchmarks" / "results"
# Means over problems: of the ranks' correlation at least, of what the model's first choice and the best of its first
# five take longer than the best measured at most. A search on simulated GPUs, whose rates are
# up to twice what the model takes them for, gives 0.48, 0.26 and 0.01 at worst.
CORRELATION, TOP1, TOP5 = 0.4, RESOLUTION, 0.1


def committed(folders: Iterable[Path]) -> Iterator[Record]:
    """Every record of the tables and exported stores in ``folders``."""
    for folder in folders:
        for path in sorted(folder.rglob("*.json")):
            if '"versions":[' in path.read_text():
                yield from read_table(path)
        for path in sorted(folder.rglob("*.jsonl")):
            if '"record":' in path.read_text().split("\n", 1)[0]:
                yield from read_lines(path)


@cache
def asked_again(problem: ProblemKey, gpu: Gpu) -> Question | None:
    """None if this version's kernels have no such problem."""
    try:
        return to_run(problem, gpu)[1]
    except Unmeasurable:
        return None


def predicted_anew(records: Iterable[Record]) -> Iterator[Measured]:
    """Times of configs with what today's model predicts; without those of problems, configs and GPUs that this version
    does not know."""
    for record in records:
        gpu = gpu_named(record.gpu, record.multiprocessors)
        assert gpu is None or not gpu.emulated, f"{gpu.name} measures nothing"
        times: list[tuple[Any, float | None]] = []
        if isinstance(record, Tuned):
            times = [(record.config, record.seconds), (record.default, record.default_seconds), *record.also]
        elif isinstance(record, Measured) and record.config is not None:
            times = [(record.config, record.seconds)]
        question = None if gpu is None or not times else asked_again(record.problem, gpu)
        for config, seconds in times if question is not None else ():
            prediction = predict(question.work(config), question.gpu) if config in question.space else None
            if prediction is not None and seconds is not None:
                identity = record.problem, record.gpu, record.multiprocessors, record.version
                yield Measured(*identity, config, "ok", seconds, prediction.seconds, DATE)


def held(records: Iterable[Record]) -> Summary | None:
    """The means, which must keep what is promised; None without anything to hold the model against."""
    found = summary(fits(predicted_anew(records)))
    if found is not None:
        assert found.correlation >= CORRELATION and found.top1 <= TOP1 and found.top5 <= TOP5, found
    return found


def test_the_model_ranks_what_was_measured(record_property) -> None:
    found = held(committed(FOLDERS))
    if found is None:
        where = " or ".join(str(folder.relative_to(ROOT)) for folder in FOLDERS)
        pytest.skip(f"no measurements of this version's kernels are committed under {where}: 'fastconv tune' on a GPU")
    record_property(
        "line",
        f"cost model: of {found.problems} measured problems rank correlation {found.correlation:.2f}, top-1 regret "
        f"{found.top1:.1%}, top-5 regret {found.top5:.1%}",
    )


def simulated(worst_first: bool = False) -> list[Tuned | Measured]:
    """What a table holds of half of a network's problems, single measurements of the others."""
    timer, records = Timer(H200, 0), list[Tuned | Measured]()
    tasks = problems.of_layers(layer_lists.find("resnet18").calls, 64, torch.bfloat16, True, H200)
    for index, task in enumerate([task for task in tasks if 3 <= len(task.question.fitting()) <= 40][:12]):
        question = task.question
        times = [(config, timer(question.work(config), config)) for config, _ in question.fitting()]
        if worst_first:
            times = [(config, 1e-9 / seconds) for config, seconds in times]
        times.sort(key=lambda each: each[1])
        version = version_of(question.problem.space)
        if index % 2:
            (config, seconds), *others, (default, default_seconds) = times
            entry = tuned(question.problem, version, config=config, seconds=seconds, also=tuple(others[:7]))
            records.append(replace(entry, default=default, default_seconds=default_seconds))
        else:
            named = question.problem, H200.name, H200.multiprocessors, version
            records += [Measured(*named, config, "ok", seconds, 1.0, DATE) for config, seconds in times]
    return records


def test_what_is_committed_is_found_and_held(tmp_path) -> None:
    assert held(committed([tmp_path])) is None
    records = simulated()
    store = Store(tmp_path / "store")
    store.add(record for record in records if isinstance(record, Measured))
    (tmp_path / "results" / "h200").mkdir(parents=True)
    store.export(tmp_path / "results" / "h200" / "measured.jsonl")
    (tmp_path / "results" / "h200" / "operators.json").write_text('{"schema": "another\'s"}')
    (tmp_path / "tables").mkdir()
    write_table(tmp_path / "tables" / "nvidia-h200.json", [it for it in records if isinstance(it, Tuned)], "abc", DATE)
    found = held(committed([tmp_path / "tables", tmp_path / "results"]))
    assert found is not None and found.problems == 12


def test_what_an_emulated_gpu_wrote_is_refused() -> None:
    with pytest.raises(AssertionError, match="NVIDIA H200 emulated measures nothing"):
        held(replace(it, gpu=H200.name + EMULATED) for it in simulated())


def test_a_model_that_ranks_badly_is_not_let_through() -> None:
    with pytest.raises(AssertionError, match="correlation=-"):
        held(simulated(worst_first=True))
