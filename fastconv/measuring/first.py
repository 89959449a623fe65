"""Measuring a problem when a program first meets it, where the user asked for it: ``settings.tune``."""

from __future__ import annotations

import atexit
import logging
import time
from collections.abc import Sequence

import torch

from fastconv.autotune import Config, Tuned
from fastconv.autotune.choose import Asked, store, tables
from fastconv.autotune.measure import Failed, Resources, Task, session
from fastconv.kernels.tuned import CALLER, live, regime
from fastconv.measuring.compiling import Compiler
from fastconv.measuring.process import COMMAND, Worker
from fastconv.measuring.runner import Benches

log = logging.getLogger("fastconv")
SECONDS = 20.0  # for one problem, but for compiling and its last paired run

_workers: dict[int, Worker] = {}


def measure(asked: Asked, fastconv: str) -> Tuned | None:
    """Tune one problem in a process beside this one, on the same GPU; None where it is not for a GPU that is here, or
    while a CUDA graph is captured. Takes seconds, the first time more. For one thread at a time. Raises WorkerError."""
    if not live(asked.gpu) or torch.cuda.is_current_stream_capturing():
        return None
    device = torch.cuda.current_device()
    # What this process has queued would share the GPU with what is measured.
    torch.cuda.synchronize()
    worker = _workers.get(device)
    if worker is None:
        worker = _workers[device] = Worker([*COMMAND, "--device", str(device)])
        atexit.register(worker.close)
    log.info("tuning %s on the %s", asked.problem.describe(), worker.gpu.name)
    known = tables(asked.gpu, CALLER)
    seeds = [entry.config for entry in (*known.user.seeds(asked.problem), *known.shipped.seeds(asked.problem))[:2]]
    compiling = 0.0
    with Compiler(asked.gpu) as compiler:

        def compiled(asked: Asked, configs: Sequence[Config]) -> list[Resources | Failed]:
            nonlocal compiling
            began = time.monotonic()
            try:
                return compiler.resources(asked, configs)
            finally:
                compiling += time.monotonic() - began

        # The records of its measurements are kept here, what was found by `choose`.
        found = session(
            [Task(asked)],
            Benches(worker, compiled),
            lambda record: None if isinstance(record, Tuned) else store().append(record),
            budget=SECONDS,
            known=store().read(("measured",)),
            seeds=lambda asked: seeds,
            again=regime().tune == "force",
            clock=lambda: time.monotonic() - compiling,
            fastconv=fastconv,
        )
    return found[0] if found else None
