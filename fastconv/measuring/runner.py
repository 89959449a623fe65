"""Where a tuning run's times come from: configs compiled beside it, measured in the worker."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastconv.autotune import Config
from fastconv.autotune.choose import Asked
from fastconv.autotune.measure import Failed, Resources
from fastconv.measuring.process import Worker

log = logging.getLogger("fastconv")
Compile = Callable[[Asked, Sequence[Config]], Sequence[Resources | Failed]]


@dataclass(frozen=True)
class Benches:
    """A `Bench` for each problem, all in one worker."""

    worker: Worker
    compile: Compile

    def __call__(self, asked: Asked) -> Bench:
        return Bench(asked, self)


@dataclass(frozen=True)
class Bench:
    """`fastconv.autotune.measure.Bench` of one problem."""

    asked: Asked
    of: Benches

    def resources(self, configs: Sequence[Config]) -> Sequence[Resources | Failed]:
        found = self.of.compile(self.asked, configs)
        for config, each in zip(configs, found, strict=True):
            if isinstance(each, Failed):
                _log(self.asked, config, each)
        return found

    def run(self, config: Config | None) -> float | Failed:
        found = self.of.worker.run(self.asked.problem, config)
        if isinstance(found, Failed) and config is not None:
            _log(self.asked, config, found)
        return found


def _log(asked: Asked, config: Config, failure: Failed) -> None:
    # A wrong result is a kernel's fault, and everybody's business.
    level = logging.WARNING if failure.status == "wrong" else logging.INFO
    log.log(level, "%s %s: %s: %s", asked.problem.describe(), dict(config), failure.status, failure.message)
