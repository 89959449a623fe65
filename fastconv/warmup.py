"""Compiles every kernel that a model will launch before it is called: in parallel, and found without computing."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from fastconv.autotune.adapter import MEASURING
from fastconv.autotune.gpus import gpu_called
from fastconv.dry_run import make_calls
from fastconv.kernels import dispatch
from fastconv.kernels.compile.ahead import compile_each, load
from fastconv.kernels.launch import interpreter, launch
from fastconv.kernels.launch.device import here
from fastconv.settings import settings

log = logging.getLogger("fastconv")
SECONDS = 2.0  # between two lines of progress


@dataclass(frozen=True)
class Warmup:
    """What `warmup` did."""

    kernels: int  # distinct binaries that are launched
    compiled: int  # how many of them were compiled now; the others were in Triton's cache
    seconds: float
    gpu: str | None  # None: nothing is launched on a GPU
    note: str | None = None  # why there was nothing to compile, or the model had to be run

    def __str__(self) -> str:
        if self.gpu is None:
            return f"nothing to compile: {self.note}"
        line = f"{self.kernels} kernels for the {self.gpu}: {self.compiled} compiled in {self.seconds:.1f} s"
        return f"{line}, {self.kernels - self.compiled} from Triton's cache" + (f" ({self.note})" if self.note else "")


def warmup(
    model: Module,
    *inputs: Any,
    train: bool = False,
    gpu: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Warmup:
    """Compile every kernel that ``model(*inputs)`` launches, on all cores; with ``train`` its backward pass too.

    Afterwards a first step compiles nothing, a CUDA graph can be captured, and another process finds the kernels in
    Triton's cache. Call it as the model will be called: inside torch.autocast if the model will be, with inputs of the
    same shapes, dtypes and memory formats. The model runs once, on a copy without data, in training or inference mode
    as ``train`` says; one that asks for values runs once more on a true copy, and what is left compiles there. Nothing
    of the model changes.

    ``gpu``: "H200" or another known GPU, instead of the device that the model is on, which may be the CPU; nothing is
    loaded then. ``progress(done, all)`` is called after each kernel; without it lines go to the log "fastconv" at level
    INFO. Under TRITON_INTERPRET, on a CPU and for a model without fastconv's layers there is nothing to compile, as the
    result and a warning of the log say. Nothing is measured: if settings say "first" or "force", the tiles are those of
    "cached", and the first call measures.

    Raises ValueError on an unknown ``gpu``; RuntimeError if a kernel does not compile, naming it, and while a CUDA
    graph is captured; else what the model raises.
    """
    named = None if gpu is None else gpu_called(gpu)
    if interpreter.interpreting():
        return _nothing("kernels are interpreted in this process (TRITON_INTERPRET)")
    if isinstance(model, DistributedDataParallel):
        model = model.module
    tensors = [t for t in (*model.parameters(), *model.buffers(), *tree_leaves(inputs)) if isinstance(t, Tensor)]
    devices = list(dict.fromkeys(t.device for t in tensors if here.holds(t.device)))
    if named is None and not devices:
        return _nothing("the model and its inputs are on the CPU; gpu= compiles for a GPU that is not here")
    if devices and here.is_current_stream_capturing():
        raise RuntimeError("fastconv.warmup compiles, and a CUDA graph is being captured: call it before the capture")
    target = named or dispatch.target(devices[0])
    with contextlib.ExitStack() as looking:
        if named is not None:
            looking.enter_context(dispatch.use_target(named))
        if settings.tune in MEASURING:
            looking.enter_context(settings(tune="cached"))
        records = looking.enter_context(launch.record())
        note = make_calls(model, inputs, train, named is None)
    launches = list({record.launch.compile_key: record.launch for record in records}.values())
    if not launches:
        return _nothing("the model launches none of fastconv's kernels; fastconv.convert(model) swaps its layers")
    started = time.perf_counter()
    found = compile_each(((it, target) for it in launches), lambda binary: binary.cached, None, progress or _logged())
    for failure in found.failures.values():
        raise RuntimeError(failure)
    if named is None:
        for device in devices:
            load(launches, device)
    new = sum(not cached for cached in found.results.values())
    done = Warmup(len(launches), new, time.perf_counter() - started, target.name, note)
    log.info("warmup: %s", done)
    return done


def _nothing(why: str) -> Warmup:
    log.warning("warmup: nothing to compile: %s", why)
    return Warmup(0, 0, 0.0, None, why)


def _logged() -> Callable[[int, int], None]:
    """Progress as lines of the log, with the time left."""
    started = last = time.monotonic()

    def tell(done: int, everything: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS and done < everything:
            last = now
            left = (now - started) / done * (everything - done)
            log.info("warmup: %d of %d kernels compiled, about %.0f s left", done, everything, left)

    return tell
