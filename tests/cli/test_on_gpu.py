"""What only a GPU can walk of the measuring: events, CUDA graphs, kernels compiled ahead. No time is asked for."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console

from fastconv.cli import checks, models
from fastconv.cli.checks.operator import compare
from fastconv.cli.measure import ahead, block_times, network, operators
from fastconv.cli.measure.clock import CudaClock
from fastconv.cli.measure.screen import Progress

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
NEVER = dict.fromkeys(network.MODES, math.inf)  # torch.compile takes longer than all of these tests


@pytest.fixture
def progress() -> Progress:
    return Progress(Console(file=io.StringIO()))


@pytest.mark.parametrize("operator", checks.OPERATORS, ids=lambda operator: operator.name)
def test_each_operator_is_right_on_its_first_problem(operator: checks.Operator) -> None:
    case = operator.cases[0]
    part = ahead.compile_kernels(lambda: list(compare(operator, case, "tf32", GPU)))
    assert (part["verdict"], part["reason"]) == ("right", None)
    assert part["kernels"] > 0
    assert [row for row in compare(operator, case, "tf32", GPU) if not row["right"]] == []


def test_a_block_is_replayed_from_cuda_graphs(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_times, "COMPILE_SECONDS", NEVER)
    blocks = block_times.load_blocks(block_times.DRY, 16, 64)
    part = block_times.measure(
        blocks, network.MODES, torch.bfloat16, GPU, CudaClock(), 1e12, progress, lambda part: None
    )
    assert part["verdict"] == "right", part["reason"]
    for row in part["rows"]:
        eager, ours, compiled = row["providers"]
        assert compiled["reason"] == "no time left"
        for provider in (eager, ours):
            assert provider["reason"] is None and provider["graph"]
            assert provider["ms"]["median"] > 0 and provider["gb_per_s"] > 0 and provider["peak_bytes"] > 0


def test_an_operator_of_each_kind_is_timed(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "COMPILE_SECONDS", math.inf)
    tasks = operators.tasks_of(operators.KINDS, operators.networks_on_meta(4, None), torch.bfloat16, most=1)
    compiled = ahead.compile_kernels(lambda: operators.plan_each(tasks, torch.bfloat16, GPU))
    assert (compiled["verdict"], compiled["reason"]) == ("right", None) and compiled["kernels"] > 0
    parts = operators.measure(tasks, 4, torch.bfloat16, GPU, CudaClock(), 1e12, progress, lambda part: None)
    assert [part["id"] for part in parts] == [f"operators-{kind.name}" for kind in operators.KINDS]
    for part in parts:
        assert part["verdict"] == "right", part["reason"]
        for row in part["rows"]:
            statuses = {provider["provider"]: provider["status"] for provider in row["providers"]}
            assert statuses == dict.fromkeys(operators.ANY, "ok") | {
                operators.OURS: "ok",
                operators.COMPILED: "skipped",
            }
            assert row["speed"] > 0 and row["share"] > 0


@pytest.mark.parametrize("mode", network.MODES)
def test_a_network_is_timed_by_every_provider_but_the_compiled(
    mode: str, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "COMPILE_SECONDS", NEVER)
    work = network.Workload(models.load("resnet18", 32, 128), mode, torch.bfloat16, GPU)
    compared = network.check(work)
    assert compared["verdict"] == "right", compared["reason"]
    *_, part = network.measure(work, compared, CudaClock(), 1e12, progress, lambda part: None)
    assert part["verdict"] == "right", part["reason"]
    statuses = {row["provider"]: (row["status"], row["reason"]) for row in part["rows"]}
    for name, status in statuses.items():
        assert status == (("skipped", "no time left") if "torch.compile" in name else ("ok", None)), name
