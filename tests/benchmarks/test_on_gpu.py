"""What only a GPU can walk of the measuring: events, CUDA graphs, kernels compiled ahead. No time is asked for."""

import dataclasses
import io
import math

import pytest
import torch
from rich.console import Console

from fastconv.benchmarks import checks, layer_lists, models, registry
from fastconv.benchmarks.checks.check import compare
from fastconv.benchmarks.measure import blocks, compile_first, network, operator_times, operators
from fastconv.benchmarks.report.console import Progress
from fastconv.kernels.launch.device import here
from fastconv.measuring.clock import CudaClock

pytestmark = pytest.mark.gpu
GPU = here.at()
NEVER = dict.fromkeys(network.MODES, math.inf)  # torch.compile takes longer than all tests of this file


@pytest.fixture
def progress() -> Progress:
    return Progress(Console(file=io.StringIO()))


@pytest.mark.parametrize("operator", checks.CHECKS, ids=lambda operator: operator.name)
def test_each_operator_is_right_on_its_first_problem(operator: checks.Check) -> None:
    case = operator.cases[0]
    part = compile_first.compile_kernels(lambda: list(compare(operator, case, "tf32", GPU)))
    assert (part["verdict"], part["reason"]) == ("right", None)
    assert part["kernels"] > 0
    assert [row for row in compare(operator, case, "tf32", GPU) if not row["right"]] == []


def test_a_block_is_replayed_from_cuda_graphs(progress: Progress, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "COMPILE_SECONDS", NEVER)
    loaded = blocks.load_blocks(blocks.DRY, 16, 64)
    part = blocks.measure(loaded, network.MODES, torch.bfloat16, GPU, CudaClock(), 1e12, progress, lambda part: None)
    assert part["verdict"] == "right", part["reason"]
    for row in part["rows"]:
        eager, ours, compiled = row["providers"]
        assert compiled["reason"] == "no time left"
        for provider in (eager, ours):
            assert provider["reason"] is None and provider["graph"]
            assert provider["ms"]["median"] > 0 and provider["gb_per_s"] > 0 and provider["peak_bytes"] > 0


def test_an_operator_of_each_entry_is_timed(progress: Progress, monkeypatch) -> None:
    monkeypatch.setattr(operator_times, "COMPILE_SECONDS", math.inf)
    monkeypatch.setattr(operator_times, "DOUBTED", 0.0)  # so that every row is measured in the other way too
    entries = [dataclasses.replace(entry, batches=(4,)) for entry in registry.ENTRIES]
    first = {case.entry.name: case for case in registry.cases(entries, layer_lists.find, torch.bfloat16)[::-1]}
    races = [operators.Race(case, registry.providers(case.entry.providers)) for case in first.values()]
    setup = operator_times.Setup(torch.bfloat16, GPU, CudaClock())
    compiled = compile_first.compile_kernels(lambda: operators.plan_each(races, setup))
    assert (compiled["verdict"], compiled["reason"]) == ("right", None) and compiled["kernels"] > 0
    parts = operators.measure(races, setup, 1e12, progress, lambda part: None)
    assert {part["id"] for part in parts} == {f"operators-{entry.name}" for entry in registry.ENTRIES}
    for part in parts:
        assert part["verdict"] == "right", part["reason"]
        assert part["copy_bandwidth"] > 1e11 and part["matrix_rate"] > 1e12
        for row in part["rows"]:
            for provider in row["providers"]:
                if provider["provider"] == registry.COMPILED:
                    assert provider["status"] == "skipped"
                    continue
                assert (provider["status"], provider["reason"], provider["graph"]) == ("ok", None, True), row
                assert provider["ms"]["median"] > 0 and provider["alone_ms"]["median"] > 0
            assert row["speed"] > 0 and row["ceiling"] > 0 and row["again"]["status"] == "ok", row


@pytest.mark.parametrize("mode", network.MODES)
def test_a_network_is_timed_by_every_provider_but_the_compiled(mode: str, progress: Progress, monkeypatch) -> None:
    monkeypatch.setattr(network, "COMPILE_SECONDS", NEVER)
    work = network.Workload(models.load("resnet18", 32, 128), mode, torch.bfloat16, GPU)
    compared = network.check(work)
    assert compared["verdict"] == "right", compared["reason"]
    *_, part = network.measure(work, compared, CudaClock(), 1e12, progress, lambda part: None)
    assert part["verdict"] == "right", part["reason"]
    statuses = {row["provider"]: (row["status"], row["reason"]) for row in part["rows"]}
    for name, status in statuses.items():
        assert status == (("skipped", "no time left") if "torch.compile" in name else ("ok", None)), name
