"""Processes that compile: if one crashes or hangs only its call has no result, and none outlives the parent."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastconv.autotune.gpus import H200
from fastconv.kernels.compile import ahead as compiling
from fastconv.kernels.compile.workers import Ended, results_of
from fastconv.kernels.launch.launch import Launch

ROOT = Path(__file__).parents[2]


def hang(file: Path) -> None:
    """Hang beside a child process, as a compiler with its assembler."""
    file.write_text(str(subprocess.Popen(["sleep", "3600"]).pid))
    time.sleep(3600)


def gone(pid: int) -> bool:
    for _ in range(200):
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_one_that_crashes_or_hangs_costs_only_its_call(tmp_path) -> None:
    calls: list[Any] = [partial(pow, 2, index) for index in range(8)]
    calls[2], calls[5] = partial(os._exit, 3), partial(hang, tmp_path / "assembler")
    found = dict(results_of(calls, 2, 1.0))
    assert found == {
        **{index: 2**index for index in range(8)},
        2: Ended("crashes (exit code 3)"),
        5: Ended("hangs (over 1 s)"),
    }
    assert gone(int((tmp_path / "assembler").read_text())), "with what it started"


def test_one_that_is_killed_between_two_calls_costs_one_of_them() -> None:
    results = results_of([os.getpid] * 3, 1, 60.0)
    _, pid = next(results)
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    found = [made for _, made in results]
    assert found[0] == Ended("crashes (exit code -9)") and isinstance(found[1], int)


def test_left_early_they_end() -> None:
    with closing(results_of([os.getpid, partial(time.sleep, 3600)], 2, 60.0)) as results:
        (_, pid) = next(results)
    assert gone(pid)


def test_they_end_with_a_parent_that_is_killed_and_hold_no_pipe() -> None:
    script = """
import os, time
from fastconv.kernels.compile.workers import results_of
print(os.getpid(), next(results_of([os.getpid, lambda: time.sleep(3600)], 2, 60.0))[1], flush=True)
os.kill(os.getpid(), 9)
"""
    # run() reads until every holder of the pipe has closed it.
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert all(gone(int(pid)) for pid in run.stdout.split())


def test_a_compiler_that_hangs_or_crashes_is_a_failure_of_its_binary(monkeypatch) -> None:
    class Kernel:
        def __init__(self, name: str, compiles: Any) -> None:
            self.fn, self._compiles = SimpleNamespace(__name__=name), compiles

        def warmup(self, *_: Any, **__: Any) -> Any:
            return self._compiles()

    def no_tool() -> None:
        raise RuntimeError("in two lines\nno ptxas")

    kernels = {
        "good": lambda: "binary",
        "hangs": partial(time.sleep, 3600),
        "crashes": partial(os._exit, 3),
        "refuses": no_tool,
    }
    launches = [Launch(Kernel(name, how), (1, 1, 1), (), (), {}, 4, 3) for name, how in kernels.items()]
    monkeypatch.setattr(compiling, "LIMIT", 1.0)
    monkeypatch.setattr(compiling.interpreter, "interpreting", lambda: False)
    told: list[tuple[int, int]] = []
    found = compiling.compile_each(
        ((it, H200) for it in launches), lambda binary: binary.kernel, 3, lambda *done: told.append(done)
    )
    assert list(found.results.values()) == ["binary"] and told == [(done, 4) for done in (1, 2, 3, 4)]
    why = {failure.split()[0]: failure.split("3 stages: ")[1] for failure in found.failures.values()}
    assert why == {
        "hangs": "the compiler hangs (over 1 s)",
        "crashes": "the compiler crashes (exit code 3)",
        "refuses": "RuntimeError: no ptxas",
    }
