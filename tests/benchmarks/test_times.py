"""What a GPU's run does, on the CPU: providers, layers, host time, with clocks that are made up or mean nothing."""

import io
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from fastconv.autotune import gpus
from fastconv.benchmarks import models
from fastconv.benchmarks.measure import blocks, host_time, network, operator_times
from fastconv.benchmarks.report import results
from fastconv.benchmarks.report.console import Progress
from fastconv.benchmarks.report.results import Part
from fastconv.cli import run
from fastconv.kernels import dispatch
from fastconv.kernels.problem.conv import conv_problem
from fastconv.measuring.clock import HostClock, Rounds, Sample, interleave, within
from tests.marks import interpreted

pytestmark = interpreted
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
    """Time the steps of ``stages`` instead; all stages except the first ask for ``seconds`` beforehand."""
    built = tuple(
        {name: (lambda step=step: step, seconds if number else 0.0) for name, step in stage.items()}
        for number, stage in enumerate(stages)
    )
    monkeypatch.setattr(network, "_providers", lambda work: built)


def measured(*arguments: Any) -> Part:
    """What is there after the last stage."""
    *_, part = network.measure(*arguments)
    return part


@pytest.fixture
def work() -> network.Workload:
    return network.Workload(models.load("tests.cli.tiny:network", 4, 9), "train", torch.float32, CPU)


def by_name(part: Part) -> dict[str, dict[str, Any]]:
    return {row["provider"]: row for row in part["rows"]}


def test_times_are_relative_to_eager_and_its_second_self_is_the_noise(
    work: network.Workload, progress: Progress, monkeypatch
) -> None:
    monkeypatch.setattr(network, "YARDSTICK_PROVIDER", "eager")
    providers(monkeypatch, {"eager": taking(3.0), "ours": taking(2.0)})
    part = measured(work, COMPARED, returned_clock, math.inf, progress, lambda part: None)
    rows = by_name(part)
    assert part["verdict"] == "right"
    assert part["noise"] == 0.0
    assert rows["ours"]["speed"] == 1.5
    assert rows["ours"]["samples_per_s"] == 2000.0
    assert rows["ours"]["step_ms"] == {"median": 2.0, "p20": 2.0, "p80": 2.0, "samples": 30}


def test_what_compiles_for_long_comes_after_times_are_saved(
    work: network.Workload, progress: Progress, monkeypatch
) -> None:
    saved: list[Part] = []

    def killed() -> None:
        raise KeyboardInterrupt

    providers(monkeypatch, {"eager": taking(3.0)}, {"compiled": killed})
    with pytest.raises(KeyboardInterrupt):
        measured(work, COMPARED, returned_clock, math.inf, progress, saved.append)
    assert by_name(saved[-1])["eager"]["step_ms"]["median"] == 3.0
    providers(monkeypatch, {"eager": taking(3.0)}, {"compiled": killed}, seconds=60.0)
    part = measured(work, COMPARED, returned_clock, time.monotonic() + 30, progress, lambda part: None)
    assert by_name(part)["compiled"]["reason"] == "no time left"


def test_failing_providers_are_rows(work: network.Workload, progress: Progress, monkeypatch) -> None:
    calls = itertools.count()

    def late() -> torch.Tensor:
        if next(calls) > network.WARM_UP_STEPS + 3:
            raise RuntimeError("CUDA error")
        return torch.tensor(1.0)

    def early() -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    providers(monkeypatch, {"early": early, "late": late}, {"fine": taking(1.0)})
    part = measured(work, COMPARED, returned_clock, math.inf, progress, lambda part: None)
    rows = by_name(part)
    assert part["verdict"] == "right"
    assert {name: row["status"] for name, row in rows.items()} == {"early": "failed", "late": "failed", "fine": "ok"}
    assert rows["early"]["reason"] == "OutOfMemoryError: tried to allocate 2 GiB"
    assert rows["late"]["reason"] == "RuntimeError: CUDA error"


def test_a_provider_with_another_output_is_not_timed(progress: Progress, monkeypatch) -> None:
    work = network.Workload(models.load("tests.cli.tiny:network", 4, 9), "infer", torch.float32, CPU)
    providers(monkeypatch, {"eager": taking(1.0), "near": taking(1.01), "far": taking(1.1), "nan": taking(math.nan)})
    part = measured(work, COMPARED, returned_clock, math.inf, progress, lambda part: None)
    assert {name: row["status"] for name, row in by_name(part).items()} == {
        "eager": "ok",
        "near": "ok",
        "far": "wrong",
        "nan": "wrong",
    }
    assert (part["verdict"], part["reason"]) == ("wrong", "wrong output: far, nan")
    assert "step_ms" not in by_name(part)["far"]


def test_providers_without_time_are_rows(work: network.Workload, progress: Progress, monkeypatch) -> None:
    def slow() -> torch.Tensor:
        time.sleep(0.1)
        return torch.tensor(1.0)

    deadline = time.monotonic() + 0.2
    providers(monkeypatch, {"slow": slow, "never": pytest.fail})
    rows = by_name(measured(work, COMPARED, returned_clock, deadline, progress, lambda part: None))
    assert (rows["never"]["status"], rows["never"]["reason"]) == ("skipped", "no time left")
    assert rows["slow"]["step_ms"]["samples"] == 3


def test_no_time_is_taken_where_the_numbers_are_wrong(work: network.Workload, progress: Progress) -> None:
    clock = pytest.fail
    for verdict in ("wrong", "failed"):
        part = measured(work, {"verdict": verdict}, clock, math.inf, progress, lambda part: None)
        assert part["verdict"] == "skipped"
        assert part["rows"] == []


@pytest.mark.parametrize("mode", network.MODES)
def test_every_provider_runs_where_it_can(mode: str, progress: Progress, monkeypatch) -> None:
    monkeypatch.setattr(network, "interleave", one_round)
    work = network.Workload(models.load("tests.cli.tiny:network", 2, 5), mode, torch.bfloat16, CPU)
    part = measured(work, COMPARED, HostClock(), math.inf, progress, lambda part: None)
    rows = by_name(part)
    assert len(rows) == 7
    for name, row in rows.items():
        # Only a CUDA graph needs the GPU itself.
        assert row["status"] == ("failed" if "graph" in name else "ok"), row
        if row["status"] == "ok":
            assert bool(row["launches"]) == name.startswith("fastconv")
            assert mode == "train" or row["difference"] < 0.02


def test_host_time_of_both_functions_with_and_without_gradient() -> None:
    part = host_time.host_time(CPU, 0.0)
    assert part["verdict"] == "right"
    assert [(row["function"], row["gradient"]) for row in part["rows"]] == [
        ("fastconv", False),
        ("PyTorch", False),
        ("fastconv", True),
        ("PyTorch", True),
    ]
    assert all(row["host_us"]["median"] > 0 for row in part["rows"])
    assert {row["problem"] for row in part["rows"]} == {"1x16x8x8 float32"}


def test_host_time_is_measured_of_a_call_that_needs_descriptors() -> None:
    images, channels, side, dtype = host_time.CALLS[1]
    x, w = (images, channels, side, side), (channels, channels, 3, 3)
    problem = conv_problem(x, w, None, (1, 1), (1, 1, 1, 1), (1, 1), 1, dtype)
    assert dispatch.plan("fprop", problem, gpus.H200).family == "pixels"


def test_modes_take_turns_stage_by_stage(work: network.Workload, progress: Progress, monkeypatch) -> None:
    providers(monkeypatch, {"eager": taking(3.0)}, {"graph": taking(2.0)})
    saved: list[Part] = []
    run = network.measure(work, COMPARED, returned_clock, math.inf, progress, saved.append)
    assert list(by_name(next(run))) == ["eager"]
    assert "step_ms" in by_name(saved[-1])["eager"]
    assert list(by_name(next(run))) == ["eager", "graph"]
    assert len(list(run)) == 1


def test_a_compiler_that_does_not_end_is_stopped(work: network.Workload, progress: Progress, monkeypatch) -> None:
    def endless() -> torch.Tensor:
        while True:
            time.sleep(0.01)

    # Whatever is left of a minute.
    monkeypatch.setattr(network, "within", lambda seconds: within(min(seconds, 0.05) if seconds < 60 else seconds))
    providers(monkeypatch, {"eager": taking(3.0)}, {"endless": endless}, seconds=0.1)
    part = measured(work, COMPARED, returned_clock, time.monotonic() + 60, progress, lambda part: None)
    assert by_name(part)["endless"]["reason"].startswith("TimeoutError: not done after")
    assert by_name(part)["eager"]["step_ms"]["median"] == 3.0


@pytest.fixture
def block() -> blocks.Block:
    layers = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return blocks.Block(models.LoadedModel("tiny", layers, (2, 8, 6, 6)), (2, 16, 6, 6), needs_dx=True)


def test_a_block_has_the_shapes_of_its_network() -> None:
    (block,) = blocks.load_blocks(blocks.DRY, 1, 32)
    assert block.loaded.input_shape == (1, 64, 8, 8) and block.output_shape == (1, 128, 4, 4) and block.needs_dx


def block_part(block: blocks.Block, progress: Progress, deadline: float = math.inf) -> Part:
    saved: list[Part] = []
    clock = HostClock()
    # In fp32, because a ReLU that bfloat16 switches is a large share of a few pixels.
    part = blocks.measure([block], ["train"], torch.float32, CPU, clock, deadline, progress, saved.append)
    assert saved[-1] == part
    return part


def test_a_block_is_compared_then_timed_beside_its_bytes(block: blocks.Block, progress: Progress, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "interleave", one_round)
    part = block_part(block, progress)
    (row,) = part["rows"]
    assert part["verdict"] == "right", row
    assert row["error"] <= row["allowed"]
    assert row["launches"]["batch_norm_act_sums_kernel"] == 1
    eager, ours, compiled = row["providers"]
    for provider in row["providers"]:
        assert provider["status"] == "ok" and provider["ms"]["median"] > 0 and not provider["graph"]
    assert 0 < ours["bytes"] < eager["bytes"]
    assert ours["gb_per_s"] == pytest.approx(ours["bytes"] / ours["ms"]["median"] / 1e6)
    assert compiled["bytes"] is None
    assert eager["speed"] == 1.0


def test_one_blocks_failing_provider_leaves_the_others(block: blocks.Block, progress: Progress, monkeypatch) -> None:
    monkeypatch.setattr(blocks, "interleave", one_round)

    def fails() -> Any:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    def providers(work: blocks.BlockWorkload) -> dict[str, Any]:
        step = work.step(work.fresh(torch.channels_last), work.input(torch.channels_last))
        return {"eager channels_last": (lambda: step, 0.0), "fastconv": (fails, 0.0), "never": (pytest.fail, 1e9)}

    monkeypatch.setattr(blocks, "_providers", providers)
    part = block_part(block, progress, time.monotonic() + 60)
    (row,) = part["rows"]
    assert part["verdict"] == "wrong"
    assert row["reason"] == "fastconv: OutOfMemoryError: tried to allocate 2 GiB"
    assert row["providers"][0]["ms"]["samples"] == 1
    assert row["providers"][2]["reason"] == "no time left"


def test_blocks_without_time_and_wrong_blocks_are_rows(block: blocks.Block, progress: Progress, monkeypatch) -> None:
    part = block_part(block, progress, 0.0)
    assert (part["verdict"], part["rows"][0]["status"]) == ("skipped", "skipped")
    monkeypatch.setattr(network, "check", lambda work: {"verdict": "wrong", "reason": "too far off"})
    part = block_part(block, progress)
    assert (part["verdict"], part["rows"][0]["reason"]) == ("wrong", "too far off")
    assert part["rows"][0]["providers"] == []


@pytest.mark.slow
def test_blocks_have_the_shapes_of_their_networks() -> None:
    found = {block.loaded.name: block for block in blocks.load_blocks(blocks.BLOCKS, 64, None)}
    assert len(found) == len(blocks.BLOCKS)
    assert found["resnet50 layer4.0"].loaded.input_shape == (64, 1024, 14, 14)
    assert found["resnet50 layer4.0"].output_shape == (64, 2048, 7, 7)
    assert found["vgg16_bn features.40:43"].loaded.input_shape == (64, 512, 14, 14)
    assert [type(layer).__name__ for layer in found["vgg16_bn features.7:10"].loaded.model] == [
        *("Conv2d", "BatchNorm2d", "ReLU")
    ]
    assert [name for name, block in found.items() if not block.needs_dx] == ["vgg16_bn features.0:3"]


M11 = ["operators-pool", "operators-first-layer"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--infer"], ["compile", "check-infer", "time-infer"]),
        (["--blocks", "--infer", "--batch", "1"], ["compile", "blocks"]),
        (["--ops", "first-layer"], ["compile", "host", "operators-first-layer", "operators-targets"]),
        (["--layers", "m11", "--ops", "pool,first-layer"], ["compile", "host", *M11]),
    ],
    ids=["network", "blocks", "operators", "layers"],
)
def test_a_dry_run_leaves_the_file_and_its_plot(
    options: list[str], parts: list[str], tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(network, "interleave", one_round)
    monkeypatch.setattr(operator_times, "interleave", one_round)
    monkeypatch.setattr(blocks, "interleave", one_round)
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
