"""Kernels compiled before they are first called, on all cores: a first step would compile them one after the other.

The calls are made without their launches, which shows what they will launch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from unittest import mock

import triton

from fastconv.benchmarks.report.results import Part
from fastconv.kernels import dispatch
from fastconv.kernels.compile.ahead import compile_each, cores
from fastconv.kernels.launch import interpreter, launch
from fastconv.kernels.launch.device import here
from fastconv.measuring import reason


def compile_kernels(calls: Callable[[], object]) -> Part:
    """Compile what ``calls()`` launches. What fails here fails again, visibly, when it is called."""
    part: Part = {"id": "compile", "kind": "compile", "title": "Compiling the kernels ahead", "kernels": 0}
    if interpreter.interpreting():
        return part | {"verdict": "skipped", "reason": "nothing is compiled under the interpreter"}
    stopped = None
    with without_launching() as records:
        try:
            calls()
        except Exception as error:  # a network does anything with numbers that were never computed
            stopped = reason(error)
    started = time.perf_counter()
    needed = {record.launch.compile_key: record.launch for record in records}
    target = dispatch.target(here.at())
    compiled = compile_each(((it, target) for it in needed.values()), lambda binary: None)
    return part | {
        "verdict": "right",
        "reason": stopped or next(iter(compiled.failures.values()), None),
        "kernels": len(needed),
        "seconds": time.perf_counter() - started,
        "threads": cores(),
    }


@contextlib.contextmanager
def without_launching() -> Iterator[list[launch.LaunchRecord]]:
    """Launches inside, on any thread, are recorded and not made: results are what their memory held before."""
    # Operators take `launch.run` by name, so Triton's own launch is replaced.
    with launch.record() as records, mock.patch.object(triton.JITFunction, "run", lambda *_, **__: None):
        yield records
