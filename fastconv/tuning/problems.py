"""The problems of a tuning run: a model's, a layer list's, or those that programs met untuned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastconv
from fastconv.autotune import Choice, Gpu, ProblemKey, Space, Untuned
from fastconv.autotune.choose import ask
from fastconv.autotune.tune import TuningTask
from fastconv.benchmarks.calls import TOGETHER, Operator
from fastconv.benchmarks.measure.directions import direction_call, fakes
from fastconv.benchmarks.models import LoadedModel, channels_last
from fastconv.dry_run import OurOperators, make_calls
from fastconv.kernels import dispatch
from fastconv.kernels.dispatch import ADAPTER
from fastconv.kernels.launch.launch import decisions
from fastconv.kernels.tiles.autotuned import considering
from fastconv.measuring.problem_to_run import Unmeasurable, to_run

Tasks = dict[ProblemKey, TuningTask]


@contextlib.contextmanager
def _asking(gpu: Gpu, found: Tasks, times: int = 1) -> Iterator[None]:
    """Add to ``found`` the problems of the calls inside the block, planned for ``gpu``, each counted ``times`` times.
    Tensors need no data."""

    def consider(space: Space, features: Any, work: Any, on: Gpu, choice: Choice) -> Choice:
        question = ask(space, features, work, on, ADAPTER)
        before = found.get(question.problem) or TuningTask(question, 0)
        found[question.problem] = replace(before, count=before.count + times)
        # A problem that PyTorch is faster at is tuned too.
        return replace(choice, pytorch_faster=False)

    with dispatch.use_target(gpu), considering(consider), decisions():
        yield


def of_model(loaded: LoadedModel, dtype: torch.dtype, train: bool, gpu: Gpu) -> list[TuningTask]:
    """The problems of one step of a model, converted. Raises what the model raises."""
    model = fastconv.convert(loaded.model, memory_format=loaded.memory_format).to(dtype)
    x = torch.empty(loaded.input_shape, dtype=dtype).to(memory_format=loaded.memory_format)
    found: Tasks = {}
    with _asking(gpu, found):
        make_calls(model, (x,), train, False)
    return _choosing(found)


def of_layers(calls: Mapping[Operator, int], batch: int, dtype: torch.dtype, train: bool, gpu: Gpu) -> list[TuningTask]:
    """The problems of the calls of a layer list, forward and, with ``train``, backward."""
    found: Tasks = {}
    for operator, count in calls.items():
        each = operator.with_batch(batch)
        direction = TOGETHER if TOGETHER in each.directions and train else each.directions[0]
        with FakeTensorMode(), torch.autograd.set_multithreading_enabled(False), _asking(gpu, found, count):
            operands = [None if t is None else channels_last(t) for t in fakes(each, dtype, torch.device("cpu"))]
            with OurOperators():
                direction_call(getattr(fastconv.functional, each.function), each, direction, operands)()
    return _choosing(found)


def met(records: Iterable[Untuned], gpu: Gpu) -> tuple[list[TuningTask], list[str]]:
    """The problems that this user's programs met on ``gpu`` and no table knew, and why others cannot be measured. Each
    counts once, because the log does not know how often a program runs it."""
    found: Tasks = {}
    left: list[str] = []
    for problem in dict.fromkeys(record.problem for record in records if record.of_gpu(gpu)):
        try:
            found[problem] = TuningTask(to_run(problem, gpu)[1])
        except Unmeasurable as error:
            left.append(str(error))
    return _choosing(found), left


def _choosing(found: Tasks) -> list[TuningTask]:
    """Those that have more than one config to choose from."""
    return [task for task in found.values() if len(task.question.fitting()) > 1]
