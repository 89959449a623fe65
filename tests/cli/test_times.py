"""The GPU's road walked on the CPU: providers, layers, host time, with clocks that are made up or mean nothing."""

from __future__ import annotations

import io
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastconv.cli import models, run
from fastconv.cli.measure import layers, network, results
from fastconv.cli.measure.clock import HostClock, Rounds, Sample, interleave
from fastconv.cli.measure.results import Part
from fastconv.cli.measure.screen import Progress

CPU = torch.device("cpu")


def one_round(candidates: Any, sample: Any, *, deadline: float, **rounds: int) -> Rounds:
    """For what is interpreted: rounds themselves are tested with clocks that are made up."""
    return interleave(candidates, sample, deadline=deadline, least=1, most=1)


COMPARED = {"verdict": "right", "rows": [{"tensor": "output", "eager": 0.005, "allowed": 0.01}]}


@pytest.fixture
def progress() -> Progress:
    return Progress(Console(file=io.StringIO()))


def returned_clock(call: Any, repeats: int = 1, *, cold: bool = False) -> Sample:
    """A clock that takes what a call returns for its milliseconds."""
    return Sample(device=call().item(), host=0.5)


def taking(milliseconds: float) -> Callable[[], torch.Tensor]:
    return lambda: torch.tensor(milliseconds)


def providers(monkeypatch: pytest.MonkeyPatch, *stages: dict[str, Callable[[], Any]], seconds: float = 0.0) -> None:
    """Time these steps instead, all but the first stage asking for ``seconds`` beforehand."""
    built = tuple(
        {name: (lambda step=step: step, seconds if number else 0.0) for name, step in stage.items()}
        for number, stage in enumerate(stages)
    )
    monkeypatch.setattr(network, "_providers", lambda work: built)


@pytest.fixture
def work() -> network.Workload:
    return network.Workload(models.load("tests.cli.tiny:network", 4, 9), "train", torch.float32, CPU)


def by_name(part: Part) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in part["rows"]}


def test_times_are_relative_to_eager_and_its_second_self_is_the_noise(
    work: network.Workload, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "YARDSTICK_PROVIDER", "eager")
    providers(monkeypatch, {"eager": taking(3.0), "ours": taking(2.0)})
    part = network.measure(work, COMPARED, returned_clock, math.inf, progress, lambda part: None)
    rows = by_name(part)
    assert part["verdict"] == "right"
    assert part["noise"] == 0.0
    assert rows["ours"]["speed"] == 1.5
    assert rows["ours"]["samples_per_s"] == 2000.0
    assert rows["ours"]["step_ms"] == {"median": 2.0, "p20": 2.0, "p80": 2.0, "samples": 30}


def test_what_compiles_for_long_comes_after_times_are_saved(
    work: network.Workload, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Part] = []

    def killed() -> None:
        raise KeyboardInterrupt

    providers(monkeypatch, {"eager": taking(3.0)}, {"compiled": killed})
    with pytest.raises(KeyboardInterrupt):
        network.measure(work, COMPARED, returned_clock, math.inf, progress, saved.append)
    assert by_name(saved[-1])["eager"]["step_ms"]["median"] == 3.0

    providers(monkeypatch, {"eager": taking(3.0)}, {"compiled": killed}, seconds=60.0)
    part = network.measure(work, COMPARED, returned_clock, time.monotonic() + 30, progress, lambda part: None)
    assert by_name(part)["compiled"]["reason"] == "no time left"


def test_failing_providers_are_rows(
    work: network.Workload, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def late() -> torch.Tensor:
        if next(calls) > network.WARM_UP_STEPS + 3:
            raise RuntimeError("CUDA error")
        return torch.tensor(1.0)

    def early() -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    providers(monkeypatch, {"early": early, "late": late}, {"fine": taking(1.0)})
    part = network.measure(work, COMPARED, returned_clock, math.inf, progress, lambda part: None)
    rows = by_name(part)
    assert part["verdict"] == "right"
    assert {name: row["status"] for name, row in rows.items()} == {"early": "failed", "late": "failed", "fine": "ok"}
    assert rows["early"]["reason"] == "OutOfMemoryError: tried to allocate 2 GiB"
    assert rows["late"]["reason"] == "RuntimeError: CUDA error"


def test_a_provider_with_another_output_is_not_timed(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    work = network.Workload(models.load("tests.cli.tiny:network", 4, 9), "infer", torch.float32, CPU)
    providers(monkeypatch, {"eager": taking(1.0), "near": taking(1.01), "far": taking(1.1), "nan": taking(math.nan)})
    part = network.measure(work, COMPARED, returned_clock, math.inf, progress, lambda part: None)
    assert {name: row["status"] for name, row in by_name(part).items()} == {
        "eager": "ok",
        "near": "ok",
        "far": "wrong",
        "nan": "wrong",
    }
    assert (part["verdict"], part["reason"]) == ("wrong", "wrong output: far, nan")
    assert "step_ms" not in by_name(part)["far"]


def test_providers_without_time_are_rows(
    work: network.Workload, progress: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow() -> torch.Tensor:
        time.sleep(0.1)
        return torch.tensor(1.0)

    deadline = time.monotonic() + 0.2
    providers(monkeypatch, {"slow": slow, "never": pytest.fail})
    rows = by_name(network.measure(work, COMPARED, returned_clock, deadline, progress, lambda part: None))
    assert (rows["never"]["status"], rows["never"]["reason"]) == ("skipped", "no time left")
    assert rows["slow"]["step_ms"]["samples"] == 3


def test_no_time_is_taken_where_the_numbers_are_wrong(work: network.Workload, progress: Progress) -> None:
    clock = pytest.fail
    for verdict in ("wrong", "failed"):
        part = network.measure(work, {"verdict": verdict}, clock, math.inf, progress, pytest.fail)  # type: ignore[arg-type]
        assert part["verdict"] == "skipped"
        assert part["rows"] == []


@pytest.mark.parametrize("mode", network.MODES)
def test_every_provider_runs_where_it_can(mode: str, progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interleave", one_round)
    work = network.Workload(models.load("tests.cli.tiny:network", 2, 5), mode, torch.bfloat16, CPU)
    part = network.measure(work, COMPARED, HostClock(), math.inf, progress, lambda part: None)
    rows = by_name(part)
    assert len(rows) == 7
    for name, row in rows.items():
        # Only a CUDA graph needs the GPU itself.
        assert row["status"] == ("failed" if "graph" in name else "ok"), row
        if row["status"] == "ok":
            assert bool(row["launches"]) == name.startswith("fastconv")
            assert mode == "train" or row["difference"] < 0.02


def test_layers_of_resnet50_are_found_without_computing() -> None:
    found = layers.distinct_layers(models.load("resnet50", 64), torch.bfloat16)
    assert sum(layer.count for layer in found) == 53
    (first,) = (layer for layer in found if layer.problem.in_channels == 3)
    assert not first.needs_dgrad
    assert all(layer.needs_dgrad for layer in found if layer is not first)
    # 4.09 billion multiplications an image.
    assert sum(layer.count * layer.problem.flops for layer in found) / 64 == pytest.approx(2 * 4.09e9, rel=0.01)


def test_layers_are_compared_then_timed_slowest_first(progress: Progress) -> None:
    subject = models.load("tests.cli.tiny:network", 2, 9)
    saved: list[Part] = []
    part = layers.measure(subject, torch.bfloat16, CPU, HostClock(), time.monotonic() + 60, progress, saved.append)
    assert part["verdict"] == "right", part["reason"]
    assert sorted(row["direction"] for row in part["rows"]) == ["dgrad", "fprop", "fprop", "wgrad", "wgrad"]
    assert all(row["status"] == "ok" and row["launches"] and row["tile"] for row in part["rows"])
    speeds = [row["speed"] for row in part["rows"]]
    assert speeds == sorted(speeds)
    assert len(saved) == 2


def test_layers_without_time_and_wrong_layers_are_rows(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = models.load("tests.cli.tiny:network", 2, 9)
    part = layers.measure(subject, torch.float32, CPU, HostClock(), 0.0, progress, lambda part: None)
    assert {row["status"] for row in part["rows"]} == {"skipped"}
    assert part["verdict"] == "skipped"

    right = layers._ours
    monkeypatch.setattr(layers, "_ours", lambda *args: lambda: right(*args)() * 1.1)
    part = layers.measure(subject, torch.float32, CPU, HostClock(), math.inf, progress, lambda part: None)
    assert {row["status"] for row in part["rows"]} == {"wrong"}
    assert part["verdict"] == "wrong"
    assert "speed" not in part["rows"][0]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_our_operators_and_pytorchs_mean_the_same(rank: int) -> None:
    problem = layers.ConvProblem(
        batch=2,
        in_channels=3,
        out_channels=4,
        groups=1,
        input_size=(6, 5, 7)[:rank],
        filter_size=(3, 2, 3)[:rank],
        output_size=(3, 2, 4)[:rank],
        stride=(2, 2, 2)[:rank],
        padding=(1, 0, 1)[:rank],
        dilation=(1, 1, 1)[:rank],
        dtype=torch.float32,
    )
    operands = layers._operands(problem, "fprop", CPU)
    for direction in layers.DIRECTIONS:
        ours, theirs = (side(problem, direction, *operands)() for side in (layers._ours, layers._theirs))
        torch.testing.assert_close(ours, theirs)


def test_host_time_of_both_functions_with_and_without_gradient() -> None:
    part = layers.host_time(CPU, 0.0)
    assert part["verdict"] == "right"
    assert [(row["function"], row["gradient"]) for row in part["rows"]] == [
        ("fastconv", False),
        ("PyTorch", False),
        ("fastconv", True),
        ("PyTorch", True),
    ]
    assert all(row["host_us"]["median"] > 0 for row in part["rows"])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--infer"], ["compile", "check-infer", "time-infer"]),
        (["--layers", "--model", "tests.cli.tiny:network", "--size", "5"], ["compile", "host", "layers"]),
    ],
    ids=["network", "layers"],
)
def test_a_dry_run_leaves_the_file_and_its_plot(
    options: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(network, "interleave", one_round)
    monkeypatch.setattr(layers, "interleave", one_round)
    assert run(["bench", "--dry-run", "--out", str(tmp_path), *options]) == 0
    data = results.read(tmp_path / "bench.json")
    assert [part["id"] for part in data["parts"]] == parts
    assert data["dry_run"]
    assert (tmp_path / f"{parts[-1]}.png").exists()
    shown = capsys.readouterr().out
    assert shown.startswith("DRY RUN")
    assert run(["bench", "--show", str(tmp_path / "bench.json")]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[:6] == shown.splitlines()[:6]
