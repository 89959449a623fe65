"""How a tuning run gets the times of configs: this process has them compiled, the worker times them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastconv.autotune import Config
from fastconv.autotune.choose import Question
from fastconv.autotune.tune import Failed, Footprint
from fastconv.measuring.process import Worker

log = logging.getLogger("fastconv")


@dataclass(frozen=True)
class WorkerRunner:
    """`fastconv.autotune.tune.Runner` of one problem."""

    question: Question
    worker: Worker
    compile_configs: Callable[[Question, Sequence[Config]], Sequence[Footprint | Failed]]

    def compile(self, configs: Sequence[Config]) -> Sequence[Footprint | Failed]:
        found = self.compile_configs(self.question, configs)
        for config, each in zip(configs, found, strict=True):
            if isinstance(each, Failed):
                self._log(config, each)
        return found

    def run(self, config: Config | None) -> float | Failed:
        found = self.worker.run(self.question.problem, config)
        if isinstance(found, Failed) and config is not None:
            self._log(config, found)
        return found

    def _log(self, config: Config, failure: Failed) -> None:
        # A wrong result is a kernel's fault, so every user is told.
        level = logging.WARNING if failure.status == "wrong" else logging.INFO
        problem = self.question.problem.describe()
        log.log(level, "%s %s: %s: %s", problem, dict(config), failure.status, failure.message)
