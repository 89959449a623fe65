"""What configs take of a GPU that is not here, by the compiler, and that the worker is spared what cannot be good."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastconv.autotune.gpus import H200
from fastconv.autotune.records import Measured, Record
from fastconv.autotune.tune import Failed, Footprint, tune
from fastconv.kernels.compile.ahead import Binaries
from fastconv.kernels.launch.launch import Uncovered
from fastconv.measuring import compiling, problem_to_run
from fastconv.measuring.compiling import Compiler
from fastconv.measuring.process import Worker
from fastconv.measuring.runner import WorkerRunner
from tests.measuring import pretending
from tests.measuring.test_problem_to_run import CALLS, asked_by


def asked() -> Any:
    return asked_by(CALLS["grouped"], torch.bfloat16, H200)[0].question


@pytest.mark.compile
def test_registers_and_shared_memory_are_the_compilers() -> None:
    question = asked()
    configs = [config for config, _ in question.fitting()]
    with Compiler(H200) as compiler:
        found = compiler.footprints(question, configs[:2])
        assert all(isinstance(each, Footprint) and 0 < each.registers <= 255 for each in found)
        compiler.compile_ahead([question], 2)
        began = time.monotonic()
        assert compiler.footprints(question, configs[:2]) == found
        assert time.monotonic() - began < 5, "each binary once"


def read(wanted: Any, registers: int) -> Any:
    """What `read_each` finds of binaries that take so many registers."""
    binary = SimpleNamespace(registers=registers, spills=0, shared_memory=1024)
    return Binaries({(launch.compile_key, gpu.arch): binary for launch, gpu in wanted}, {})


def test_each_binary_is_compiled_once_and_a_failure_is_its_own(monkeypatch) -> None:
    question = asked()
    configs = [config for config, _ in question.fitting()]
    compiled: list[Any] = []

    def read_each(wanted: Any, jobs: Any) -> Any:
        found = read(wanted, 99)
        compiled.extend(found.results)
        return Binaries({}, dict.fromkeys(found.results, "kernel does not compile")) if len(compiled) == 1 else found

    monkeypatch.setattr(compiling, "read_each", read_each)
    with Compiler(H200, 3) as compiler:
        assert compiler.footprints(question, configs[:1]) == [Failed("failed", "kernel does not compile")]
        both = compiler.footprints(question, configs[:2])
        assert both == [Failed("failed", "kernel does not compile"), Footprint(99, 0, 1024)]
        assert len(compiled) == len(set(compiled)) == 2
        planned = problem_to_run.ProblemToRun.planned

        def refuses(self: Any, gpu: Any, config: Any = None) -> Any:
            if config == configs[2]:
                raise Uncovered("gather: no")
            return planned(self, gpu, config)

        monkeypatch.setattr(problem_to_run.ProblemToRun, "planned", refuses)
        assert compiler.footprints(question, configs[2:3]) == [Failed("failed", "cannot be planned: gather: no")]


def test_the_next_problems_are_compiled_meanwhile(monkeypatch) -> None:
    first, second, third = (
        asked_by(CALLS[name], torch.bfloat16, H200)[0].question for name in ("grouped", "1x1", "max")
    )
    begun, go_on = threading.Event(), threading.Event()
    threads: list[str] = []

    def read_each(wanted: Any, jobs: Any) -> Any:
        threads.append(threading.current_thread().name)
        if threads[-1].startswith("ahead"):
            begun.set()
            assert go_on.wait(30)
        return read(wanted, 64)

    monkeypatch.setattr(compiling, "read_each", read_each)
    with Compiler(H200) as compiler:
        compiler.compile_ahead([first, second, third], 2)
        assert begun.wait(30)
        # Not begun yet: it is not waited for.
        assert compiler.footprints(third, [third.fitting()[0][0]]) == [Footprint(64, 0, 1024)]
        assert threads[-1].startswith("asked")
        go_on.set()
        configs = [config for config, _ in first.fitting()[:2]]
        assert len(compiler.footprints(first, configs)) == 2
        assert sum(name.startswith("asked") for name in threads) == 1, "waited for, and not compiled again"


def test_what_spills_or_does_not_compile_never_reaches_the_gpu(tmp_path) -> None:
    question = asked()
    configs = [config for config, _ in question.fitting()]
    default = question.choice.config
    bad = {index: config for index, config in enumerate(configs) if config != default and index < 4}
    kept: list[Record] = []

    def compiled(question: Any, found: Any) -> list[Any]:
        said: dict[int, Footprint | Failed] = {
            0: Footprint(255, 16, 0),
            1: Failed("failed", "no"),
            2: Footprint(64, 0, 1 << 20),
        }
        return [
            said.get(configs.index(c), Footprint(64, 0, 1024)) if c in bad.values() else Footprint(64, 0, 1024)
            for c in found
        ]

    plan = tmp_path / "plan"
    command = pretending.write(plan, H200, {}, {}, otherwise=1e-4)
    with Worker(command) as worker:
        found = tune(question, WorkerRunner(question, worker, compiled), kept.append, top_k=len(configs))
    assert found is not None
    never = {pretending.key_of(question.problem, config) for index, config in bad.items() if index < 3}
    assert never and not never & set(pretending.asked(plan))
    failed = {r.status for r in kept if isinstance(r, Measured) and r.status != "ok"}
    assert failed <= {"spills", "failed", "too_large"} and len(failed) >= 2
