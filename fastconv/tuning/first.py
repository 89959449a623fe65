"""Measuring a problem when a program first meets it, where the user asked for it: ``settings.tune``."""

from __future__ import annotations

import atexit
import logging
import time

import torch

import fastconv
from fastconv.autotune import Tuned
from fastconv.autotune.choose import Asked, store, tables
from fastconv.autotune.measure import tune
from fastconv.kernels.tuned import CALLER, live
from fastconv.tuning.bench import Benches
from fastconv.tuning.compiling import Compiler
from fastconv.tuning.process import COMMAND, Worker

log = logging.getLogger("fastconv")
SECONDS = 20.0  # for one problem, its last paired run not counted

_workers: dict[int, Worker] = {}


def measure(asked: Asked) -> Tuned | None:
    """Tune one problem in a process beside this one, on the same GPU; None where it is not for a GPU that is here, or
    while a CUDA graph is captured. Takes seconds, the first time more. Raises WorkerError."""
    if not live(asked.gpu) or torch.cuda.is_current_stream_capturing():
        return None
    device = torch.cuda.current_device()
    # What this process has queued would share the GPU with what is measured.
    torch.cuda.synchronize()
    worker = _workers.get(device)
    if worker is None:
        worker = _workers[device] = Worker([*COMMAND, "--device", str(device)])
        atexit.register(worker.close)
    log.info("tuning %s", asked.problem.describe())
    known = tables(asked.gpu, CALLER)
    seeds = [entry.config for entry in (*known.user.seeds(asked.problem), *known.shipped.seeds(asked.problem))[:2]]
    earlier = [each for each in store().read(("measured",)) if (each.problem, each.version) == _identity(asked)]
    with Compiler(asked.gpu) as compiler:
        # The records of its measurements are kept here, what was found by `choose`.
        return tune(
            asked,
            Benches(worker, compiler.resources)(asked),
            lambda record: None if isinstance(record, Tuned) else store().append(record),
            known=[each for each in earlier if each.of_gpu(asked.gpu)],  # type: ignore[misc]
            seeds=seeds,
            deadline=time.monotonic() + SECONDS,
            fastconv=fastconv.__version__,
        )


def _identity(asked: Asked) -> tuple[object, object]:
    return asked.problem, asked.version
