"""What only a GPU can walk of measuring: events, CUDA graphs, cuDNN, kernels that kill the process."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastconv
from fastconv.autotune import Store
from fastconv.autotune.known import reload
from fastconv.autotune.tune import Failed
from fastconv.kernels import dispatch
from fastconv.kernels.launch.device import here
from fastconv.measuring import first, worker
from fastconv.measuring.clock import CudaClock
from fastconv.measuring.problem_to_run import to_run
from fastconv.measuring.process import COMMAND, Worker
from tests.measuring.test_problem_to_run import CALLS, asked_by

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path))
    reload()
    yield Store()
    monkeypatch.undo()
    reload()


@pytest.mark.parametrize("name", ["3x3 stride 2", "even filter, same", "first layer", "depthwise", "max", "average"])
def test_every_direction_is_right_and_timed(name: str) -> None:
    gpu = dispatch.target(here.at())
    with here.stream(here.Stream()):
        measure = worker.Measuring(gpu, here.at(), CudaClock())
        for task in asked_by(CALLS[name], torch.bfloat16, gpu):
            seconds = [measure(task.question.problem, task.question.choice.config) for _ in range(2)]
            assert all(1e-7 < each < 1e-2 for each in seconds)
            if to_run(task.question.problem, gpu)[0].native:
                assert 1e-7 < measure(task.question.problem, None) < 1e-2


@pytest.mark.parametrize(
    ("how", "status"),
    [("illegal access", "crashed"), ("hang", "hung"), ("out of memory", "out_of_memory"), ("wrong", "wrong")],
)
def test_harm_ends_the_worker_alone(how: str, status: str) -> None:
    gpu = dispatch.target(here.at())
    question = asked_by(CALLS["1x1"], torch.bfloat16, gpu)[0].question
    with Worker([sys.executable, "-m", "tests.measuring.faulty", how], patience=60.0) as it:
        assert it.gpu == gpu
        assert isinstance(it.run(question.problem, None), float)
        it._patience = 15.0  # a first answer takes longer than a hang need be waited for
        failed = it.run(question.problem, question.choice.config)
        it._patience = 60.0
        assert isinstance(failed, Failed) and failed.status == status, failed
        assert isinstance(it.run(question.problem, None), float)


def test_asked_for_a_call_is_tuned_when_it_is_first_met(store: Store) -> None:
    x = torch.randn(16, 64, 14, 14, device=here.at(), dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    w = torch.randn(128, 64, 3, 3, device=here.at(), dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    expected = torch.nn.functional.conv2d(x, w, padding=1)
    try:
        with fastconv.settings(tune="first", prefer="triton"):
            for _ in range(2):
                y = fastconv.functional.conv2d(x, w, padding=1)
                torch.testing.assert_close(y, expected, rtol=3e-2, atol=1.0)
                found = store.read(("tuned",))
                assert len(found) >= 1
        count = len(store.read(("measured",)))
        fastconv.functional.conv2d(x, w, padding=1)
        assert len(store.read(("measured",))) == count
    finally:
        for each in first._workers.values():
            each.close()


def test_the_worker_is_on_the_device_it_is_told() -> None:
    with Worker([*COMMAND, "--device", "0"]) as it:
        assert it.gpu == dispatch.target(here.at(0))
