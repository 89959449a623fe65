"""What configs take of a GPU, by compiling them in processes that touch none; the next problems' in the background."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastconv.autotune import Config, Gpu, Problem
from fastconv.autotune.choose import Asked, fitting
from fastconv.autotune.measure import Failed, Resources
from fastconv.kernels.conv import Uncovered
from fastconv.kernels.inspect import resources
from fastconv.kernels.launch import Launch
from fastconv.measuring.problem_to_run import Subject, subject_of

Found = Resources | Failed
Candidates = dict[Hashable, Sequence[Launch]]

# One thread at a time: what plans are made under is the process's.
_planning = threading.Lock()


class Compiler:
    """Compiles configs of problems on ``gpu``, each binary once, in ``jobs`` processes. To be closed."""

    def __init__(self, gpu: Gpu, jobs: int | None = None) -> None:
        self.gpu, self._jobs = gpu, jobs
        self._subjects: dict[Problem, Subject] = {}
        self._binaries: dict[Any, Found] = {}
        self._ahead: dict[Problem, Future[list[Found]]] = {}
        self._background, self._asked = (ThreadPoolExecutor(1, name) for name in ("ahead", "asked"))

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave what is not begun yet."""
        for executor in (self._background, self._asked):
            executor.shutdown(wait=True, cancel_futures=True)

    def ahead(self, questions: Iterable[Asked], top_k: int) -> None:
        """Compile what is predicted fastest for each, in this order, while others are measured."""
        for asked in questions:
            configs = [config for config, _ in fitting(asked)[:top_k]]
            self._ahead[asked.problem] = self._background.submit(self._compile, asked, configs)

    def resources(self, asked: Asked, configs: Sequence[Config]) -> list[Found]:
        """What each config takes, or why it does not compile."""
        coming = self._ahead.pop(asked.problem, None)
        if coming is not None and not coming.cancel():
            coming.result()
        return self._asked.submit(self._compile, asked, configs).result()

    def _compile(self, asked: Asked, configs: Sequence[Config]) -> list[Found]:
        with _planning:
            planned = [self._planned(asked.problem, config) for config in configs]
        launches = [it for each in planned if not isinstance(each, Failed) for it in each]
        missing: Candidates = {it.compile_key: [it] for it in launches if it.compile_key not in self._binaries}
        found = resources(missing, self.gpu, self._jobs) if missing else {}
        for key, it in found.items():
            self._binaries[key] = (
                Failed("failed", it) if isinstance(it, str) else Resources(it.registers, it.spills, it.shared_memory)
            )
        return [
            each if isinstance(each, Failed) else _most([self._binaries[it.compile_key] for it in each])
            for each in planned
        ]

    def _planned(self, problem: Problem, config: Config) -> list[Launch] | Failed:
        if problem not in self._subjects:
            self._subjects[problem] = subject_of(problem, self.gpu)[0]
        try:
            return self._subjects[problem].planned(self.gpu, config)[1]
        except (Uncovered, ValueError) as error:
            return Failed("failed", f"cannot be planned: {error}")


def _most(binaries: Sequence[Found]) -> Found:
    """Of a config's launches."""
    for each in binaries:
        if isinstance(each, Failed):
            return each
    taken = [each for each in binaries if isinstance(each, Resources)]
    return Resources(*(max(getattr(each, name) for each in taken) for name in Resources.__dataclass_fields__))
