"""Where a tuning run's times come from: configs compiled beside it, measured in the worker."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastconv.autotune import Config
from fastconv.autotune.choose import Asked
from fastconv.autotune.measure import Failed, Resources
from fastconv.tuning.process import Worker

log = logging.getLogger("fastconv")
Compile = Callable[[Asked, Sequence[Config]], Sequence[Resources | Failed]]


@dataclass
class Benches:
    """A `Bench` for each problem, all in one worker; ``failures`` counts what was not measured, by its status."""

    worker: Worker
    compile: Compile
    failures: Counter[str] = field(default_factory=Counter)

    def __call__(self, asked: Asked) -> Bench:
        return Bench(asked, self)

    def failed(self, asked: Asked, config: Config, failure: Failed) -> None:
        self.failures[failure.status] += 1
        # A wrong result is a kernel's fault, and everybody's business.
        level = logging.WARNING if failure.status == "wrong" else logging.INFO
        log.log(level, "%s %s: %s: %s", asked.problem.describe(), dict(config), failure.status, failure.message)


@dataclass(frozen=True)
class Bench:
    """`fastconv.autotune.measure.Bench` of one problem."""

    asked: Asked
    of: Benches

    def resources(self, configs: Sequence[Config]) -> Sequence[Resources | Failed]:
        found = self.of.compile(self.asked, configs)
        for config, each in zip(configs, found, strict=True):
            if isinstance(each, Failed):
                self.of.failed(self.asked, config, each)
        return found

    def run(self, config: Config | None) -> float | Failed:
        found = self.of.worker.run(self.asked.problem, config)
        if isinstance(found, Failed) and config is not None:
            self.of.failed(self.asked, config, found)
        return found
