"""Problems as something to run: found again from what tables know of them, right, and checked in every way."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastconv.functional as F
from fastconv.autotune import ProblemKey, Store, choose, known
from fastconv.autotune.gpus import A100, B200, H200, INTERPRETER
from fastconv.autotune.tune import TuningTask
from fastconv.dry_run import OurOperators
from fastconv.kernels.dispatch import ADAPTER
from fastconv.kernels.ops import pool as pool_ops
from fastconv.measuring import worker
from fastconv.measuring.clock import HostClock
from fastconv.measuring.problem_to_run import Unmeasurable, to_run
from fastconv.measuring.process import Refused
from fastconv.tuning import problems
from tests.autotune.making import tuned
from tests.marks import interpreted


def conv(function: str, x: tuple[int, ...], w: tuple[int, ...], **arguments: Any) -> Any:
    def call(dtype: torch.dtype) -> Tensor:
        shapes = (x, w)
        tensors = [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]
        if len(x) == 4:
            tensors = [t.to(memory_format=torch.channels_last) for t in tensors]
        return getattr(F, function)(*tensors, **arguments)

    return call


def pool(function: str, x: tuple[int, ...], *arguments: Any, contiguous: bool = False, **named: Any) -> Any:
    def call(dtype: torch.dtype) -> Tensor:
        t = torch.empty(x, dtype=dtype, requires_grad=True)
        if len(x) == 4 and not contiguous:
            t = t.to(memory_format=torch.channels_last)
        return getattr(F, function)(t, *arguments, **named)

    return call


CALLS = {
    "1x1": conv("conv2d", (2, 16, 4, 4), (32, 16, 1, 1)),
    "3x3 stride 2": conv("conv2d", (2, 16, 7, 7), (16, 16, 3, 3), stride=2, padding=1),
    "even filter, same": conv("conv2d", (1, 16, 5, 5), (16, 16, 2, 4), padding="same"),
    "1-d": conv("conv1d", (2, 8, 9), (16, 8, 3), padding=1, dilation=2),
    "3-d": conv("conv3d", (1, 8, 3, 3, 3), (8, 8, 2, 2, 2)),
    "first layer": conv("conv2d", (2, 3, 12, 12), (16, 3, 3, 3), stride=2, padding=1),
    "grouped": conv("conv2d", (2, 16, 5, 5), (16, 4, 3, 3), padding=1, groups=4),
    "depthwise": conv("conv2d", (2, 8, 6, 6), (8, 1, 3, 3), padding=1, groups=8),
    "depthwise stride 2": conv("conv2d", (2, 8, 6, 6), (16, 1, 3, 3), padding=1, groups=8, stride=2),
    "transposed": conv("conv_transpose2d", (1, 8, 3, 3), (8, 16, 4, 4), stride=2, padding=1),
    "transposed, output padding": conv("conv_transpose2d", (1, 8, 3, 3), (8, 8, 3, 3), stride=2, output_padding=1),
    "max": pool("max_pool2d", (2, 8, 7, 7), 3, 2, 1),
    "max, NCHW, ceil": pool("max_pool2d", (2, 3, 7, 7), 2, contiguous=True, ceil_mode=True),
    "average": pool("avg_pool2d", (2, 8, 6, 6), 3, 2, 1, count_include_pad=False),
    "average by a divisor": pool("avg_pool2d", (1, 8, 6, 6), 2, divisor_override=3),
    "adaptive": pool("adaptive_avg_pool2d", (1, 8, 7, 7), 3),
    "adaptive max": pool("adaptive_max_pool1d", (1, 8, 7), 3),
    "lp": pool("lp_pool2d", (1, 8, 6, 6), 2.0, 2),
    "3-d average": pool("avg_pool3d", (1, 4, 4, 4, 4), 2),
}


def asked_by(call: Any, dtype: torch.dtype, gpu: Any) -> list[TuningTask]:
    """What a call and its backward ask."""
    found: problems.Tasks = {}
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with one_thread, problems._asking(gpu, found), torch._subclasses.FakeTensorMode(), OurOperators():
        y = call(dtype)
        y.backward(torch.empty_like(y))
    assert found
    return list(found.values())


@interpreted
@pytest.mark.parametrize("name", CALLS)
def test_every_direction_is_run_as_it_was_asked_and_right(name: str) -> None:
    dtype = torch.float32 if len(name) % 2 else torch.bfloat16
    measure = worker.Measuring(INTERPRETER, torch.device("cpu"), HostClock())
    for task in asked_by(CALLS[name], dtype, INTERPRETER):
        question = task.question
        runnable, found = to_run(question.problem, INTERPRETER)
        assert (found.problem, found.choice) == (question.problem, question.choice)
        assert measure(question.problem, question.choice.config) > 0
        if runnable.native:
            assert measure(question.problem, None) > 0


@pytest.mark.parametrize("gpu", [A100, H200, B200], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("name", CALLS)
def test_problems_are_found_again_for_gpus(name: str, gpu: Any) -> None:
    for task in asked_by(CALLS[name], torch.bfloat16, gpu):
        runnable, found = to_run(ProblemKey.of(**task.question.problem.json), gpu)
        assert (found.problem, found.choice) == (task.question.problem, task.question.choice)
        slowest = found.fitting()[-1][0]
        launches = runnable.planned(gpu, slowest)[1]
        assert launches, "a config that is forced is planned"
        if dict(found.problem.kind).get("direction") == "backward":
            assert [it.kernel.fn.__module__.rpartition(".")[2] for it in launches] == ["pool_gradient"], "itself alone"


def test_a_problem_that_pytorch_is_faster_at_is_found_all_the_same(tmp_path, monkeypatch) -> None:
    """So that another run can find out whether it still is."""
    (task, *_) = asked_by(CALLS["1x1"], torch.bfloat16, H200)
    question = task.question
    slow = tuned(question.problem, question.version, config=question.choice.config, seconds=1e-3, pytorch=1e-6)
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path))
    Store().append(slow)
    known.reload()
    try:
        assert choose(question.space, question.features, question.work, H200, ADAPTER).pytorch_faster
        assert asked_by(CALLS["1x1"], torch.bfloat16, H200)[0].question.problem == question.problem
        assert to_run(question.problem, H200)[1].problem == question.problem
    finally:
        monkeypatch.undo()
        known.reload()


@interpreted
@pytest.mark.parametrize("moved", [1, 2, 3, 4])
def test_sums_over_pixels_are_right(moved: int) -> None:
    problem = ProblemKey.of("pass_split", {"element": 4, "moved": moved}, {"C": 8}, {"pixels": 50})
    measure = worker.Measuring(INTERPRETER, torch.device("cpu"), HostClock())
    for config, _ in to_run(problem, INTERPRETER)[1].fitting()[::7]:
        assert measure(problem, config) > 0


def tiny() -> ProblemKey:
    (task, *_) = asked_by(CALLS["1x1"], torch.float32, INTERPRETER)
    return task.question.problem


@pytest.mark.parametrize(
    "problem",
    [
        ProblemKey.of("conv_gather", {"direction": "upwards"}, {}, {}),
        ProblemKey.of("conv_gather", {"direction": "fprop"}, {"C": 1}, {"N": 1}),
        ProblemKey.of("pass", {"element": 2, "moved": 2}, {"C": 8}, {"pixels": 50}),
        ProblemKey.of("of_another_version", {}, {}, {}),
    ],
    ids=["direction", "sizes", "a pass", "space"],
)
def test_other_problems_are_unmeasurable(problem: ProblemKey) -> None:
    with pytest.raises(Unmeasurable, match="^" + problem.space):
        to_run(problem, H200)


@interpreted
def test_wrong_results_are_refused(monkeypatch) -> None:
    """An element that is off, one that nobody wrote, one that is written beside the operands."""
    problem = tiny()
    config = to_run(problem, INTERPRETER)[1].choice.config
    run = worker.Measuring(INTERPRETER, torch.device("cpu"), HostClock())
    whole = to_run(problem, INTERPRETER)[0].ours

    def planted(harm: Any) -> None:
        def ours(operands: Any, gpu: Any) -> Any:
            def call() -> Tensor:
                y = whole(operands, gpu)()
                harm(y, operands)
                return y

            return call

        runnable, question = to_run(problem, INTERPRETER)
        monkeypatch.setattr(worker, "to_run", lambda *_: (type(runnable)(**{**vars(runnable), "ours": ours}), question))

    def beside(t: Tensor) -> Tensor:
        return t.as_strided((1,), (1,), t.storage_offset() + t.numel())

    harms: dict[str, Any] = {
        "largest error": lambda y, operands: y[0, 7, 1, 1].add_(0.1),
        "largest error is nan": lambda y, operands: y.copy_(torch.empty_like(y)),
        "beside": lambda y, operands: beside(y).zero_(),
        "beside its operands": lambda y, operands: beside(operands[1]).zero_(),
    }
    for expected, harm in harms.items():
        planted(harm)
        with pytest.raises(Refused, match=expected) as refused:
            run(problem, config)
        assert refused.value.status == "wrong"
        run._current = None


@interpreted
@pytest.mark.parametrize("name", ["max", "adaptive max"])
def test_indices_that_are_wrong_are_refused(name: str, monkeypatch) -> None:
    """Taps that lie beside their windows' maxima, whose values are right."""
    question = asked_by(CALLS[name], torch.float32, INTERPRETER)[0].question
    assert dict(question.problem.kind)["direction"] == "forward"
    right = pool_ops.max_pool

    def off(harm: Any, *given: Any) -> Any:
        y, taps = right(*given)
        taps[:, :, -1:] = harm(taps[:, :, -1:])
        return y, taps

    harms: list[Any] = [lambda taps: 1 - taps.clamp(max=1), lambda taps: torch.full_like(taps, 255)]
    for harm in harms:
        monkeypatch.setattr(pool_ops, "max_pool", partial(off, harm))
        run = worker.Measuring(INTERPRETER, torch.device("cpu"), HostClock())
        with pytest.raises(Refused, match="at what it keeps, the largest error") as refused:
            run(question.problem, question.choice.config)
        assert refused.value.status == "wrong"


@interpreted
def test_memory_that_ends_is_said(monkeypatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(worker, "to_run", full)
    with pytest.raises(Refused, match="CUDA out of memory") as refused:
        worker.Measuring(INTERPRETER, torch.device("cpu"), HostClock())(tiny(), None)
    assert refused.value.status == "out_of_memory" and not refused.value.fatal
