"""Every kernel a network needs, compiled before it is first called, on all cores: a first step alone would compile its
kernels one after the other."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch
import triton

from fastconv.autotune import Gpu
from fastconv.cli.measure.clock import reason
from fastconv.cli.measure.layers import Layer, distinct_layers
from fastconv.cli.measure.results import Part
from fastconv.cli.models import Subject
from fastconv.kernels import dispatch, mend
from fastconv.kernels.dispatch import Layout
from fastconv.kernels.launch import Launch

DTYPES = {"*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16}


def compile_kernels(subject: Subject, dtype: torch.dtype, directions: tuple[str, ...], device: torch.device) -> Part:
    """Compile what the network's layers launch. What fails here fails again, and visibly, where it is called."""
    part: Part = {"id": "compile", "kind": "compile", "title": "Compiling the kernels ahead", "kernels": 0}
    if mend.interpreting():
        return part | {"verdict": "skipped", "reason": "nothing is compiled under the interpreter"}
    started = time.perf_counter()
    threads = os.cpu_count() or 1
    try:
        launches = distinct_launches(distinct_layers(subject, dtype), directions, dispatch.target(device))
        with ThreadPoolExecutor(threads) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
            for launch in launches:
                operands = [None if pointer is None else DTYPES[pointer] for pointer in launch.pointers]
                launch.kernel.warmup(*operands, *launch.scalars, grid=launch.grid, **launch.arguments)
    except Exception as error:
        return part | {"verdict": "skipped", "reason": reason(error)}
    seconds = time.perf_counter() - started
    return part | {"verdict": "right", "reason": None, "kernels": len(launches), "seconds": seconds, "threads": threads}


def distinct_launches(layers: list[Layer], directions: tuple[str, ...], gpu: Gpu) -> list[Launch]:
    """One launch for each binary that ``directions`` of ``layers`` need on ``gpu``, in dense channels-last layout."""
    launches = (
        launch
        for layer in layers
        for direction in directions
        if direction != "dgrad" or layer.needs_dgrad
        for launch in dispatch.plan(
            direction, layer.problem, gpu, Layout(bias=layer.bias and direction == "fprop")
        ).launches
    )
    return list({launch.compile_key: launch for launch in launches}.values())
