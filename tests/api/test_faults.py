"""What goes wrong around a computation: launches that fail, no memory, damaged or unwritable caches, GPUs that are none
of ours. One clear error or PyTorch's op with one warning; the model's state unharmed; the next call works."""

import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastconv
import fastconv.functional as F
from fastconv import arguments
from fastconv.autograd import operators
from fastconv.autotune import cost_model, gpus
from fastconv.autotune.choose import fixed
from fastconv.autotune.known import reload, store
from fastconv.kernels import dispatch
from fastconv.kernels.families import family
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch import launch as launches
from fastconv.kernels.launch.device import here
from fastconv.kernels.ops import call as calls
from fastconv.kernels.problem.conv import conv_problem
from fastconv.kernels.tiles import autotuned
from reference import integers

interpreted = pytest.mark.skipif(not interpreter.interpreting(), reason="faults are made in interpreted launches")
FINISHING = "split_sum_kernel", "pool_combine_kernel"
T4 = gpus.describe("NVIDIA T4", 75, 40, 64 << 10, 4 << 20, None)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Each test is the first to warn, and leaves nothing behind: no tile, no override, no lock."""
    said = operators._warn_once, operators._say_once, calls._say_no_room, arguments._why_not_gpu

    def forget() -> None:
        for each in said:
            each.cache_clear()
        reload()
        launches._failed.clear()

    forget()
    yield
    forget()
    assert not (launches._recorders or autotuned._considering or dispatch._forced or family._named)
    free: list[bool] = []

    def launch() -> None:
        with interpreter.LOCK:
            free.append(True)

    thread = threading.Thread(target=launch, daemon=True)
    thread.start()
    thread.join(5)
    assert free


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the log has as warnings so far."""
    return lambda: [it.getMessage() for it in caplog.records if it.levelno >= logging.WARNING]


def network() -> tuple[torch.nn.Module, Tensor]:
    """Fused and plain layers, on as little as goes."""
    layers = torch.nn.Conv2d(8, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    return torch.nn.Sequential(*layers, torch.nn.MaxPool2d(2), torch.nn.Conv2d(8, 8, 1)), torch.randn(2, 8, 4, 4)


class Fault(Exception):
    """What nobody expects."""


def at_the(number: int, error: Exception, function: Callable[..., Any]) -> tuple[Callable[..., Any], list[str]]:
    """``function``, whose call of this number raises ``error`` instead; and one entry a call."""
    made: list[str] = []

    def counted(*a: Any, **named: Any) -> Any:
        made.append(function.__name__)
        if len(made) == number:
            raise error
        return function(*a, **named)

    return counted, made


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("what", ["launch", "memory"])
def test_a_step_that_fails_anywhere_harms_no_state(what: str, monkeypatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    owner, name = (GridExecutor, "__call__") if what == "launch" else (torch.Tensor, "new_empty_strided")
    error = Fault("none of ours") if what == "launch" else torch.OutOfMemoryError("CUDA out of memory")
    model, x = network()
    model = fastconv.convert(model).train()

    def step(model: torch.nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return {**state(model), **{key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}}

    def state(model: torch.nn.Module) -> dict[str, Tensor]:
        return {key: value.clone() for key, value in model.state_dict().items()}

    # A layer's forward is done or it is not, whatever fails behind it, as in PyTorch.
    states = [state(model)]
    with torch.no_grad():
        (twin := deepcopy(model))(x)
    states.append(state(twin))
    expected = [step(deepcopy(model)), step(twin)]
    counted, made = at_the(-1, error, getattr(owner, name))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        step(deepcopy(model))
    assert len(made) >= 8
    for number in range(1, len(made) + 1):
        case = f"{what} {number} of {len(made)}"
        model.load_state_dict(states[0])
        counted, _ = at_the(number, error, getattr(owner, name))
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, counted)
            with pytest.raises(type(error), match=str(error)):
                step(model)
        done = int(model[1].num_batches_tracked)
        for key, value in model.state_dict().items():
            assert torch.equal(value, states[done][key]), f"{case}: {key}"
        for key, value in step(model).items():
            assert torch.equal(value, expected[done][key]), f"after {case}: {key}"


@pytest.fixture
def gpu_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The way of a launch on a GPU, with interpreted kernels at its end."""
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    monkeypatch.setattr(here, "current_device", lambda: None)
    monkeypatch.setattr(here, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launches, "_loaded", set())
    with dispatch.use_target(gpus.INTERPRETER):
        yield


def out_of_resources() -> Exception:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300_000, 232_448, "shared memory")


@interpreted
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        out_of_resources(),
        PermissionError(13, "Permission denied", "/home/somebody/.triton/cache"),
        json.JSONDecodeError("Expecting value", "", 0),
        Fault("error: many\nlines\n\n  of a compiler\n"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_does_not_compile_is_pytorchs_with_one_warning(
    error: Exception, gpu_of_the_cpu: None, warnings: Callable[[], list[str]], monkeypatch
) -> None:
    from triton.runtime.interpreter import GridExecutor

    plain, x = network()
    model = fastconv.convert(deepcopy(plain)).eval()
    plain.eval()
    tried: list[Any] = []

    def fail(self: Any, *_: Any, **__: Any) -> None:
        tried.append(self)
        raise error

    monkeypatch.setattr(GridExecutor, "__call__", fail)
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x))
    (line,) = warnings()
    assert line.startswith("PyTorch's own ops run where kernels cannot be launched: ") and "Triton's cache: " in line
    assert f"{type(error).__name__}: {str(error).strip().splitlines()[-1].strip()}" in line
    first = len(tried)
    with torch.no_grad():
        model(x)
    assert len(tried) == first and len(warnings()) == 1, "what failed is not compiled again"
    with (
        fastconv.settings(strict=True),
        pytest.raises(RuntimeError, match=r"cannot be launched.* settings\.strict is on"),
    ):
        model(x)


@interpreted
def test_a_pass_that_pytorch_has_not_says_what_failed(gpu_of_the_cpu: None, monkeypatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    model, x = network()
    model = fastconv.convert(model).train()
    before = deepcopy(model.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", at_the(-1, Fault(), lambda *_, **__: 1 / 0)[0])
        with pytest.raises(NotImplementedError, match="batch_norm_act_kernel cannot be launched: ZeroDivisionError"):
            model(x)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_nothing_that_failed_counts_as_loaded(gpu_of_the_cpu: None) -> None:
    class Kernel:
        arg_names, fn = ("x",), SimpleNamespace(__name__="some_kernel")

        def __getitem__(self, grid: Any) -> Any:
            raise Fault("not here")

    launch = launches.Launch(Kernel(), (1, 1, 1), ("*fp32",), (), {}, 4, 3)
    for _ in range(2):
        with pytest.raises(launches.Failed, match=r"^some_kernel cannot be launched: Fault: not here"):
            launches.run(launch, torch.zeros(4))
    assert not launches._loaded


class Crowded:
    """A GPU whose memory has no room for partial sums."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused = 0
        allocate = torch.Tensor.new_empty

        def new_empty(t: Tensor, *a: Any, **named: Any) -> Tensor:
            if sys._getframe(1).f_code.co_name == "workspace":
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return allocate(t, *a, **named)

        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def _split_convolution() -> Tensor:
    """wgrad's pixels in splits, and the bias's."""
    draw = torch.Generator().manual_seed(0)
    leaves = [integers(shape, 2, draw).float().requires_grad_() for shape in ((2, 8, 6, 6), (8, 8, 3, 3), (8,))]
    y = F.conv2d(*leaves, padding=1)
    y.backward(integers(tuple(y.shape), 1, draw).float())
    return torch.cat([y.flatten(), *(t.grad.flatten() for t in leaves)])  # type: ignore[union-attr]


def _split_pools() -> Tensor:
    x = integers((1, 2, 64), 9, torch.Generator().manual_seed(0)).float()
    maximum, index = F.adaptive_max_pool1d(x, 1, return_indices=True)
    return torch.cat([maximum.flatten(), index.flatten(), F.adaptive_avg_pool1d(x, 1).flatten()])


def _split_norm() -> Tensor:
    """Batch norm's sums over pixels."""
    x = integers((2, 4, 6, 6), 2, torch.Generator().manual_seed(0)).float().requires_grad_()
    weight, gamma, beta = torch.ones(4, 4, 1, 1), torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    norm = torch.zeros(4), torch.full((4,), 0.25)
    y = F.conv2d_bn_act(x, weight, None, gamma, beta, *norm, training=False, momentum=0.1, eps=0.0, act="identity")
    y.backward(torch.ones_like(y))
    return torch.cat([y.flatten(), gamma.grad, beta.grad])  # type: ignore[list-item]


def _in_two(space: Any, features: Any, work: Any, gpu: Any, choice: Any) -> Any:
    """Every reduction that can be is split."""
    config = {**choice.config, "SPLITS": 2}
    return fixed(space, config, work, gpu) if config in space else choice


@interpreted
@pytest.mark.parametrize("compute", [_split_convolution, _split_pools, _split_norm])
def test_where_partial_sums_find_no_memory_there_are_none(
    compute: Callable[[], Tensor], warnings: Callable[[], list[str]], monkeypatch
) -> None:
    with (
        dispatch.use_target(gpus.A100 if compute is _split_pools else gpus.INTERPRETER),
        autotuned.considering(_in_two),
    ):
        with launches.record() as records:
            expected = compute()
        splits = sum(it.name in FINISHING for it in records)
        with fastconv.settings(numerics="stable"):
            stable = compute()
        reload()
        crowded = Crowded(monkeypatch)
        with fastconv.settings(numerics="stable"), pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
            compute()
        assert not warnings()
        crowded.refused = 0
        with launches.record() as records:
            # Integers sum to the same in any order.
            assert torch.equal(compute(), expected) and torch.equal(stable, expected)
        refused = crowded.refused
        assert refused >= splits > 0 and not any(it.name in FINISHING for it in records)
        (line,) = warnings()
        assert line.startswith("no memory is left for partial sums")
        assert torch.equal(compute(), expected)
        assert crowded.refused == refused, "what found no memory does not ask again"


def test_no_tile_takes_a_workspace_over_the_limit(monkeypatch) -> None:
    problem = conv_problem((256, 512, 65, 65), (512, 512, 3, 3), None, (1, 1), (2,) * 4, (2, 2), 1, torch.bfloat16)
    moved: list[int] = []

    def seen(space: Any, features: Any, work: Any, gpu: Any, choice: Any) -> Any:
        moved.append(work(choice.config).extra_bytes)
        return choice

    with autotuned.considering(seen):
        for limit in (cost_model.MAX_WORKSPACE, 50 << 20):
            monkeypatch.setattr(cost_model, "MAX_WORKSPACE", limit)
            dispatch.plan("wgrad", problem, gpus.H200)
            reload()
    free, limited = moved
    assert free / 2 <= 512 << 20 and 0 < limited / 2 <= 50 << 20 < free / 2


@interpreted
@pytest.mark.parametrize("fault", ["file", "garbage", "homeless"])
def test_a_store_that_is_damaged_or_unwritable_costs_a_warning(
    fault: str, tmp_path, warnings: Callable[[], list[str]], monkeypatch
) -> None:
    place = tmp_path / "cache"
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(place))
    if fault == "file":
        place.write_text("not a folder")
    elif fault == "garbage":
        (place / "tune").mkdir(parents=True)
        (place / "tune" / "garbage.jsonl").write_bytes(bytes(range(256)) * 9 + b'\n{"record": "tuned", "sch')
        (place / "tune" / "folder.jsonl").mkdir()
    else:
        monkeypatch.delenv("FASTCONV_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    problem = conv_problem((1, 8, 9, 9), (8, 8, 3, 3), None, (1, 1), (1,) * 4, (1, 1), 1, torch.bfloat16)
    reload()
    for _ in range(2):
        plan = dispatch.plan("fprop", problem, gpus.A100)
        assert plan.choice is not None and plan.choice.source == "cost model"
    for _ in range(2):
        assert store().append(SimpleNamespace(line="{}"), durable=False) is (fault == "garbage")  # type: ignore[arg-type]
    assert warnings()
    assert len(set(warnings())) == len(warnings())


def test_a_gpu_of_another_maker_or_too_old_is_pytorchs_with_one_warning(
    warnings: Callable[[], list[str]], monkeypatch
) -> None:
    x: Any = SimpleNamespace(dtype=torch.float32, layout=torch.strided, is_cuda=True, get_device=lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for _ in range(2):
        assert arguments.why_not_served(x) == "this PyTorch is built for AMD's GPUs, the kernels are for NVIDIA's"
    assert warnings() == [f"PyTorch's own ops run on cuda:0: {arguments.why_not_served(x)}"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(here, "is_available", lambda: True)
    for gpu, reason in ((T4, "the NVIDIA T4's compute capability 7.5 is below 8.0"), (gpus.A100, None)):
        arguments._why_not_gpu.cache_clear()
        monkeypatch.setattr(dispatch, "target", lambda device, gpu=gpu: gpu)
        assert [arguments.why_not_served(x), arguments.why_not_served(x)] == [reason, reason]
    assert warnings()[1:] == ["PyTorch's own ops run on cuda:0: the NVIDIA T4's compute capability 7.5 is below 8.0"]


@interpreted
def test_every_operator_of_ours_refuses_a_gpu_that_is_too_old() -> None:
    """Those that are called by themselves, or in a compiled graph."""
    x, w, y = torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3), torch.ones(1, 2, 2, 2)
    with dispatch.use_target(T4), launches.record() as records:
        assert torch.equal(F.conv2d(x, w), torch.nn.functional.conv2d(x, w))
        assert torch.equal(torch.ops.fastconv.channel_sum(y), torch.tensor([4.0, 4.0]))
        assert torch.equal(F.max_pool2d(x, 2), y)
        with pytest.raises(NotImplementedError, match=r"NVIDIA T4's compute capability 7\.5 is below 8\.0"):
            ones = torch.ones(2)
            torch.ops.fastconv.batch_norm_act(y, ones, ones, None, None, None, None, 0.0, "relu", 0.0, 0.0, False, True)
    assert not records
