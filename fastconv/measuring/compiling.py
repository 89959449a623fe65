"""What configs take of a GPU: compiles them in processes that touch none, the next problems' in the background."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fastconv.autotune import Config, Gpu, ProblemKey
from fastconv.autotune.choose import Question
from fastconv.autotune.tune import Failed, Footprint
from fastconv.kernels.compile.sass import read_each
from fastconv.kernels.launch.launch import Launch, Uncovered
from fastconv.measuring.problem_to_run import ProblemToRun, to_run

Outcome = Footprint | Failed


# One thread plans at a time: the target and the config that a plan is made for are the process's.
_planning = threading.Lock()


class Compiler:
    """Compiles configs of problems on ``gpu``, each binary once, in ``jobs`` processes. To be closed."""

    def __init__(self, gpu: Gpu, jobs: int | None = None) -> None:
        self.gpu, self._jobs = gpu, jobs
        self._problems: dict[ProblemKey, ProblemToRun] = {}
        self._binaries: dict[Any, Outcome] = {}
        self._ahead: dict[ProblemKey, Future[list[Outcome]]] = {}
        self._background, self._foreground = (ThreadPoolExecutor(1, name) for name in ("ahead", "asked"))

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        """What has not begun is left."""
        for executor in (self._background, self._foreground):
            executor.shutdown(wait=True, cancel_futures=True)

    def compile_ahead(self, questions: Iterable[Question], top_k: int) -> None:
        """Compile each question's ``top_k`` predicted fastest configs, in this order, while others are measured."""
        for question in questions:
            configs = [config for config, _ in question.fitting()[:top_k]]
            self._ahead[question.problem] = self._background.submit(self._compile, question, configs)

    def footprints(self, question: Question, configs: Sequence[Config]) -> list[Outcome]:
        """What each config takes, or why it does not compile."""
        coming = self._ahead.pop(question.problem, None)
        if coming is not None and not coming.cancel():
            coming.result()
        return self._foreground.submit(self._compile, question, configs).result()

    def _compile(self, question: Question, configs: Sequence[Config]) -> list[Outcome]:
        with _planning:
            planned = [self._planned(question.problem, config) for config in configs]
        launches = [it for each in planned if not isinstance(each, Failed) for it in each]
        missing = [(it, self.gpu) for it in launches if it.compile_key not in self._binaries]
        if missing:
            compiled = read_each(missing, self._jobs)
            self._binaries |= {key: Failed("failed", why) for (key, _), why in compiled.failures.items()}
            for (key, _), it in compiled.results.items():
                self._binaries[key] = Footprint(it.registers, it.spills, it.shared_memory)
        return [
            each if isinstance(each, Failed) else _most([self._binaries[it.compile_key] for it in each])
            for each in planned
        ]

    def _planned(self, problem: ProblemKey, config: Config) -> list[Launch] | Failed:
        if problem not in self._problems:
            self._problems[problem] = to_run(problem, self.gpu)[0]
        try:
            return self._problems[problem].planned(self.gpu, config)[1]
        except (Uncovered, ValueError) as error:
            return Failed("failed", f"cannot be planned: {error}")


def _most(binaries: Sequence[Outcome]) -> Outcome:
    """The largest footprint of a config's launches, or a failure among them."""
    for each in binaries:
        if isinstance(each, Failed):
            return each
    taken = [each for each in binaries if isinstance(each, Footprint)]
    return Footprint(*(max(getattr(each, name) for each in taken) for name in Footprint.__dataclass_fields__))
