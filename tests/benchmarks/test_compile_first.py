"""What needs the compiler: the report of a process of its own, and kernels compiled ahead of their first call."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastconv import arguments, functional
from fastconv.autotune.gpus import H200
from fastconv.benchmarks import models
from fastconv.benchmarks.measure import compile_first, compiler_report, lenet, network
from fastconv.benchmarks.measure.compiler_report import Compilation
from fastconv.benchmarks.report import results
from fastconv.cli import bench_run, run
from fastconv.kernels import dispatch
from fastconv.kernels.compile.ahead import compile_each
from fastconv.kernels.launch.device import here
from tests.marks import interpreted

CPU = torch.device("cpu")
ROW = {"kernel": "conv_gather_kernel", "direction": "fprop", "target": "NVIDIA A100", "spills": 0}
ROW |= {"registers": 128, "shared_memory": 4096, "occupancy": 2, "tensor_cores": "mma", "load_bytes": {"16": 8}}
ROW |= {"wgmma_serialised": False}


def printing(output: str, code: int = 0, error: str = "") -> tuple[str, ...]:
    script = f"import sys; print({output!r}); print({error!r}, file=sys.stderr); sys.exit({code})"
    return (sys.executable, "-c", script)


@pytest.mark.parametrize(
    ("command", "verdict", "reason"),
    [
        (printing(json.dumps({"kernels": [ROW]})), "right", None),
        (
            printing(json.dumps({"kernels": [ROW, {**ROW, "spills": 8}]})),
            "right",
            "conv_gather_kernel spills on NVIDIA A100",
        ),
        (printing("", 3, "Traceback\nValueError: no ptxas"), "failed", "exit code 3: ValueError: no ptxas"),
        (printing(json.dumps({"kernels": []})), "failed", "exit code 0"),
        (printing(json.dumps({"kernels": [ROW]}), 1), "failed", "exit code 1"),
        ((sys.executable, "-m", "fastconv.nowhere"), "failed", None),
    ],
    ids=["fine", "spills", "raises", "empty", "fails", "absent"],
)
def test_the_report_of_another_process(command: tuple[str, ...], verdict: str, reason: str | None) -> None:
    with Compilation(command) as compilation:
        part = compilation.part()
    results.check_part(part)
    assert part["verdict"] == verdict
    assert part["reason"] == reason or command[-1] == "fastconv.nowhere"


def test_the_other_process_does_not_interpret(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    script = "import os, json; print(json.dumps({'kernels': [os.environ.get('TRITON_INTERPRET')]}))"
    compilation = Compilation((sys.executable, "-c", script))
    output, _ = compilation._process.communicate()
    assert json.loads(output) == {"kernels": [None]}


def test_the_other_process_ends_with_the_block() -> None:
    with Compilation((sys.executable, "-c", "import time; time.sleep(60)")) as compilation:
        process = compilation._process
    assert process.returncode is not None


@interpreted
@pytest.mark.parametrize(("verdict", "code"), [("right", 0), ("failed", 1)])
def test_the_road_without_a_gpu(verdict: str, code: int, tmp_path, monkeypatch, capsys) -> None:
    command = printing(json.dumps({"kernels": [ROW]} if verdict == "right" else {}))
    monkeypatch.setattr(compiler_report, "Compilation", lambda _: Compilation(command))
    monkeypatch.setattr(bench_run, "QUICK_STEPS", 2)
    monkeypatch.setattr("fastconv.benchmarks.measure.resnet_blocks.CROP", 64)
    assert run(["bench", "--quick", "--out", str(tmp_path)]) == code
    parts = results.read(tmp_path / "bench.json")["parts"]
    assert [part["id"] for part in parts] == ["lenet", "block-identity", "block-downsample", "compiler"]
    assert [part["verdict"] for part in parts] == ["right"] * 3 + [verdict]
    assert "Not measured: speed and memory." in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_road_without_a_gpu(tmp_path) -> None:
    assert run(["bench", "--out", str(tmp_path)]) == 0
    training, *_, compiled = results.read(tmp_path / "bench.json")["parts"]
    assert len(training["losses"]["fastconv"]) == lenet.STEPS == 60
    assert min(training["accuracy"].values()) > 0.6
    assert training["loss_difference"] <= 1e-4
    assert {row["target"] for row in compiled["rows"]} == {"NVIDIA A100", "NVIDIA H200", "NVIDIA B200"}


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process that takes the CPU's tensors for an H200's, as far as launching."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(here, "current_device", lambda: None)
    monkeypatch.setattr(here, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(arguments, "_ON_CPU", True)
    with dispatch.use_target(H200):
        yield


@pytest.mark.compile
@pytest.mark.usefixtures("h200")
def test_a_step_is_compiled_ahead() -> None:
    loaded = models.load("tests.cli.tiny:network", 16, 16)
    work = network.Workload(loaded, "train", torch.bfloat16, CPU)

    def step() -> None:
        work.step(work.converted(), work.input(torch.channels_last))()

    part = compile_first.compile_kernels(step)
    assert (part["verdict"], part["reason"]) == ("right", None)
    with compile_first.without_launching() as records:
        step()
    names = {record.name for record in records}
    assert {"combine_statistics_kernel", "batch_norm_act_gradient_kernel"} < names
    assert part["kernels"] == len({record.launch.compile_key for record in records}) >= len(names)
    again = compile_each(((record.launch, H200) for record in records), lambda binary: binary.cached)
    assert set(again.results.values()) == {True} and not again.failures


@pytest.mark.compile
@pytest.mark.usefixtures("h200")
def test_what_raises_on_numbers_never_computed_is_compiled_up_to_there() -> None:
    x, w = torch.zeros(2, 16, 8, 8).bfloat16(), torch.zeros(16, 16, 1, 1).bfloat16()

    def calls() -> None:
        functional.conv2d(x, w)
        raise RuntimeError("no such index")

    part = compile_first.compile_kernels(calls)
    assert (part["verdict"], part["kernels"], part["reason"]) == ("right", 1, "RuntimeError: no such index")


@interpreted
def test_nothing_is_compiled_ahead_under_the_interpreter() -> None:
    part = compile_first.compile_kernels(pytest.fail)
    assert (part["verdict"], part["kernels"]) == ("skipped", 0)
