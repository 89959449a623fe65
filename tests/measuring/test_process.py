"""The measuring worker: whatever becomes of it, its parent goes on and knows why there is no time."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fastconv.autotune.gpus import H200, INTERPRETER
from fastconv.autotune.tune import Failed, Footprint, tune
from fastconv.measuring.process import Worker, WorkerError
from fastconv.measuring.runner import WorkerRunner
from tests.autotune.making import problem
from tests.autotune.test_tune import new_question
from tests.marks import interpreted
from tests.measuring import pretending

CONFIG = {"TILE": 1}
OTHER = {"TILE": 2}


def worker(tmp_path: Path, how: str | None = None, **more: Any) -> Worker:
    failures = {} if how is None else {pretending.key_of(problem(), CONFIG): how}
    command = pretending.write(tmp_path / "plan", H200, {}, failures, otherwise=2e-3, **more)
    return Worker(command, patience=20.0 if how != "hang" else 1.0)


def pid_of(it: Worker) -> int:
    assert it._process is not None
    return it._process.pid


@pytest.mark.parametrize(
    ("how", "status", "why", "survives"),
    [
        ("exception", "failed", "RuntimeError: planted", True),
        ("wrong", "wrong", "planted", True),
        ("memory", "out_of_memory", "MemoryError: planted", True),
        ("illegal access", "crashed", "illegal memory access", False),
        ("abort", "crashed", "ended by SIGABRT: planted, said before the end", False),
        ("segmentation fault", "crashed", "ended by SIGSEGV", False),
        ("exit", "crashed", "ended with exit code 3", False),
        ("hang", "hung", "no answer within 1 s", False),
        ("kill", "out_of_memory", "killed twice", False),
    ],
)
def test_a_failure_is_told_and_the_next_question_answered(
    how: str, status: str, why: str, survives: bool, tmp_path
) -> None:
    with worker(tmp_path, how) as it:
        assert it.gpu == H200
        assert it.run(problem(), OTHER) == pytest.approx(2e-3, rel=0.02)
        before = pid_of(it)
        failed = it.run(problem(), CONFIG)
        assert isinstance(failed, Failed) and failed.status == status and why in failed.message
        assert "\n" not in failed.message
        assert it.run(problem(), OTHER) == pytest.approx(2e-3, rel=0.02)
        assert (pid_of(it) == before) == survives
        last = pid_of(it)
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


def test_a_worker_that_somebody_kills_costs_nothing(tmp_path) -> None:
    with worker(tmp_path, takes=0.5) as it:
        assert it.gpu == H200
        threading.Timer(0.2, os.kill, (pid_of(it), signal.SIGKILL)).start()
        assert it.run(problem(), CONFIG) == pytest.approx(2e-3, rel=0.02)
    assert len(pretending.asked(tmp_path / "plan")) == 2


def test_kills_at_random_moments_cost_no_config(tmp_path) -> None:
    """A run goes on over a worker that is killed again and again, and blames nobody."""
    generator = random.Random(0)
    ended = threading.Event()
    kept: list[Any] = []
    kills = 0

    def killing(it: Worker) -> None:
        nonlocal kills
        next_at = generator.randint(3, 9)
        while not ended.wait(0.002):
            # A few answers lie between two kills, so that no config is in flight at both.
            if len(pretending.asked(tmp_path / "plan")) >= next_at and it._process is not None:
                time.sleep(generator.uniform(0, 0.04))
                it._process.kill()
                kills += 1
                next_at = len(pretending.asked(tmp_path / "plan")) + generator.randint(3, 9)

    with worker(tmp_path, takes=0.02) as it:
        killer = threading.Thread(target=killing, args=(it,))
        killer.start()
        try:
            question = new_question()
            runner = WorkerRunner(question, it, lambda question, configs: [Footprint(64, 0, 1024) for _ in configs])
            found = tune(question, runner, kept.append)
        finally:
            ended.set()
            killer.join()
    assert found is not None and kills >= 3
    assert all(record.status == "ok" for record in kept[:-1])
    assert len(pretending.asked(tmp_path / "plan")) - len(kept[:-1]) <= kills


def test_an_interrupt_ends_the_worker_and_its_answer_is_nobodys(tmp_path) -> None:
    with worker(tmp_path, takes=0.5) as it:
        assert it.gpu == H200
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            it.run(problem(), CONFIG)
        assert it._process is None
        assert it.run(problem(), OTHER) == pytest.approx(2e-3, rel=0.02)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ([sys.executable, "-c", "import sys; sys.exit('no such\\nthing')"], "ended with exit code 1: thing"),
        (["refuses"], "RuntimeError: PyTorch sees no GPU"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "not started within"),
    ],
    ids=["exits", "refuses", "sleeps"],
)
def test_a_worker_that_does_not_start_is_one_line(command: list[str], why: str, tmp_path) -> None:
    if command == ["refuses"]:
        command = pretending.write(tmp_path / "plan", H200, {}, {}, refuses="PyTorch sees no GPU")
    slow = "sleep" in command[-1]
    with Worker(command, start=0.3 if slow else 60.0) as it, pytest.raises(WorkerError, match=why):
        it.run(problem(), CONFIG)
    assert it._process is None


def test_a_worker_ends_with_its_parent(tmp_path) -> None:
    command = pretending.write(tmp_path / "plan", H200, {}, {pretending.key_of(problem(), CONFIG): "hang"})
    script = f"""
import os, threading
from fastconv.measuring.process import Worker
from tests.autotune.making import problem
from tests.autotune.test_tune import new_question
it = Worker({command!r})
it.gpu
print(it._process.pid, flush=True)
threading.Timer(0.3, os.kill, (os.getpid(), 9)).start()
it.run(problem(), {CONFIG!r})
"""
    root = str(Path(__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    for _ in range(100):
        if not Path(f"/proc/{int(run.stdout)}").exists() or "State:\tZ" in _status(int(run.stdout)):
            return
        time.sleep(0.05)
    raise AssertionError("it goes on")


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return "State:\tZ"


def test_the_parent_needs_no_torch() -> None:
    script = "import sys, fastconv.measuring.process; assert not {'torch', 'triton'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False).returncode == 0


@pytest.mark.slow
@interpreted
def test_the_real_worker_measures_what_it_is_asked() -> None:
    from fastconv.measuring.problem_to_run import to_run
    from tests.measuring.test_problem_to_run import tiny

    question = to_run(tiny(), INTERPRETER)[1]
    kept: list[Any] = []
    with Worker() as it:
        assert it.gpu == INTERPRETER
        unknown = it.run(problem(), CONFIG)
        assert isinstance(unknown, Failed) and unknown.status == "failed" and "not a problem" in unknown.message
        runner = WorkerRunner(question, it, lambda question, configs: [Footprint(0, 0, 0) for _ in configs])
        found = tune(question, runner, kept.append, trials=6, top_k=4)
    assert found is not None and found.problem == question.problem and found.pytorch is not None
    assert all(record.status == "ok" for record in kept[:-1])
