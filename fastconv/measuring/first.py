"""Measuring a problem when a program first meets it, as ``settings.tune`` may ask."""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Sequence

from fastconv.autotune import Config, Tuned
from fastconv.autotune.choose import Question
from fastconv.autotune.known import store, tables
from fastconv.autotune.tune import Failed, Footprint, TuningTask, session
from fastconv.kernels.dispatch import ADAPTER
from fastconv.kernels.launch.device import here
from fastconv.kernels.tiles.autotuned import live, policy
from fastconv.measuring.compiling import Compiler
from fastconv.measuring.process import COMMAND, Worker
from fastconv.measuring.runner import WorkerRunner

log = logging.getLogger("fastconv")
SECONDS = 20.0  # for one problem, without compiling and its last paired run

_workers: dict[int, Worker] = {}


def measure(question: Question, fastconv: str) -> Tuned | None:
    """Tune one problem in a process beside this one, on the same GPU. None if that is not here, or while a CUDA graph
    is captured. Takes seconds, the first time more. One thread at a time may call it. Raises WorkerError."""
    if not live(question.gpu) or here.is_current_stream_capturing():
        return None
    device = here.current_device() or 0  # a stand-in may have no number
    # What this process has queued would share the GPU with the measurement.
    here.synchronize()
    worker = _workers.get(device)
    if worker is None:
        worker = _workers[device] = Worker([*COMMAND, "--device", str(device)])
        atexit.register(worker.close)
    log.info("tuning %s on the %s", question.problem.describe(), worker.gpu.name)
    seeds = tables(question.gpu, ADAPTER).seeds(question.problem)
    compiling = 0.0
    with Compiler(question.gpu) as compiler:

        def compiled(question: Question, configs: Sequence[Config]) -> list[Footprint | Failed]:
            nonlocal compiling
            began = time.monotonic()
            try:
                return compiler.footprints(question, configs)
            finally:
                compiling += time.monotonic() - began

        # `choose` keeps what is found; the records of the measurements are kept here.
        found = session(
            [TuningTask(question)],
            lambda question: WorkerRunner(question, worker, compiled),
            lambda record: None if isinstance(record, Tuned) else store().append(record),
            budget=SECONDS,
            known=store().read(("measured",)),
            seeds=lambda question: seeds,
            again=policy().tune == "force",
            clock=lambda: time.monotonic() - compiling,
            fastconv=fastconv,
        )
    return found[0] if found else None
