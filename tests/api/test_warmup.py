"""Compiling what a model will launch before it does: what is found, what a launch looks up, what is said otherwise."""

import contextlib
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastconv
from fastconv import arguments, warmup
from fastconv.autotune.gpus import A100, H200, gpu_called
from fastconv.autotune.known import forget
from fastconv.dry_run import make_calls
from fastconv.kernels import dispatch
from fastconv.kernels.compile.ahead import Binaries
from fastconv.kernels.launch import interpreter, launch
from fastconv.kernels.launch.device import here
from fastconv.kernels.tiles import autotuned
from fastconv.measuring.capture import Captured
from fastconv.warmup import Warmup
from tests.marks import compiling, interpreted


class Block(nn.Module):
    """A first layer, a residual block, a depthwise and a strided convolution, a pool: most families."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, momentum=None)
        self.depthwise, self.pool = nn.Conv2d(16, 16, 3, stride=2, groups=16), nn.MaxPool2d(2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.norm(self.conv(x)) + x)
        return self.head(self.pool(self.depthwise(x)).mean((2, 3)))


class Asking(nn.Module):
    """Asks for a value before its second convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if y.sum().isfinite() else y


def converted(model: nn.Module) -> nn.Module:
    return fastconv.convert(model, memory_format=torch.channels_last)


def image(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def keys(records: list[launch.LaunchRecord]) -> set[Any]:
    return {record.launch.compile_key for record in records}


@interpreted
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_what_is_found_is_what_a_call_launches(train: bool, dtype: torch.dtype | None) -> None:
    model, x = converted(Block()), image(2, 3, 12, 12)
    autocast = contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with autocast, launch.record() as found:
        assert make_calls(model, (x,), train, False) is None
    assert model.training and all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train(train)
    with autocast, launch.record() as made, torch.set_grad_enabled(train):
        y = model(x)
        if train:
            y.sum().backward()
    assert keys(found) == keys(made)
    assert any(record.dtypes[0] == torch.bfloat16 for record in found) == (dtype is not None)


@interpreted
def test_a_frozen_batch_norm_stays_frozen() -> None:
    model, x = converted(Block()), image(2, 3, 12, 12)
    model.stem[1].eval()
    with launch.record() as found:
        make_calls(model, (x,), True, False)
    with launch.record() as made:
        model(x).sum().backward()
    assert keys(found) == keys(made)


@interpreted
def test_a_model_that_asks_for_values_runs_on_a_copy() -> None:
    model, x = converted(Asking()), image(2, 4, 6, 6)
    with launch.record() as records:
        why = make_calls(model, (x,), False, True)
    assert why is not None and why.startswith("it ran, since without data it raises DataDependentOutputException")
    with launch.record() as made, torch.no_grad():
        model(x)
    assert keys(records) == keys(made)
    with pytest.raises(Exception, match="_local_scalar_dense"):
        make_calls(model, (x,), False, False)


@interpreted
def test_the_interpreter_compiles_nothing(caplog) -> None:
    done = warmup(converted(Block()), image(2, 3, 12, 12), gpu="H200")
    assert (done.kernels, done.gpu) == (0, None)
    assert str(done).startswith("nothing to compile: kernels are interpreted")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_it_looks_at_what_the_first_call_will_measure(monkeypatch) -> None:
    regimes = []

    def listen(space: Any, features: Any, work: Any, gpu: Any, choice: Any) -> Any:
        regimes.append(autotuned.policy().tune)
        return choice

    monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    monkeypatch.setattr(sys.modules["fastconv.warmup"], "compile_each", lambda *_: Binaries({}, {}))
    model, x = converted(nn.Conv2d(16, 16, 1)), image(2, 16, 8, 8)
    for tune, expected in (("first", "cached"), ("force", "cached"), ("off", "off")):
        forget()
        with fastconv.settings(tune=tune), autotuned.considering(listen):
            assert warmup(model, x, gpu="A100").kernels == 1
        assert regimes.pop() == expected and not regimes


def test_an_unknown_gpu_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'GTX' is not one of A100, .*H200.*sm_80, .*sm_90, sm_100, sm_120$"):
        warmup(Block(), image(2, 3, 12, 12), gpu="GTX")
    assert gpu_called("h200") is gpu_called("NVIDIA H200") is H200
    assert gpu_called("sm_80") is A100
    assert gpu_called("NVIDIA A100-PCIE-40GB") == dataclasses.replace(A100, name="NVIDIA A100-PCIE-40GB")


def test_a_line_says_what_was_done() -> None:
    assert str(Warmup(5, 2, 1.25, "NVIDIA H200")) == (
        "5 kernels for the NVIDIA H200: 2 compiled in 1.2 s, 3 from Triton's cache"
    )
    assert str(Warmup(5, 2, 1.25, "NVIDIA H200", "it ran")).endswith("cache (it ran)")


@pytest.mark.compile
@compiling
@pytest.mark.parametrize(
    ("model", "gpu", "why"),
    [(converted(Block()), None, "on the CPU"), (nn.Conv2d(3, 4, 1), "H200", "fastconv.convert")],
    ids=["no GPU", "no layers"],
)
def test_where_there_is_nothing_one_line_says_so(model: nn.Module, gpu: str | None, why: str, caplog) -> None:
    if here.is_available() and gpu is None:
        pytest.skip("a GPU is here")
    assert why in str(warmup(model, image(2, 3, 12, 12), gpu=gpu))
    assert len(caplog.records) == 1 and why in caplog.text


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bool]:
    """A process whose Triton takes the CPU's tensors for an H200's, but launches nothing: for each binary that a launch
    looks up, whether it is in Triton's cache."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    hits: list[bool] = []
    call = triton.JITFunction.run

    def without_launching(kernel: Any, *tensors: Any, **how: Any) -> None:
        call(kernel, *tensors, **how | {"warmup": True})

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", Driver(), raising=False)
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit))
    monkeypatch.setattr(triton.JITFunction, "run", without_launching)
    monkeypatch.setattr(here, "current_device", lambda: None)
    monkeypatch.setattr(here, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(arguments, "_ON_CPU", True)
    return hits


@pytest.mark.compile
@compiling
def test_a_launch_finds_what_was_compiled(h200: list[bool]) -> None:
    model, x = converted(Block()), image(16, 3, 20, 20)
    ticks: list[tuple[int, int]] = []
    with torch.autocast("cpu", torch.bfloat16):
        done = warmup(model, x, train=True, gpu="H200", progress=lambda *tick: ticks.append(tick))
        assert done.kernels == done.compiled >= 10
        assert ticks == [(index + 1, done.kernels) for index in range(done.kernels)]
        assert not h200
        # As a GPU's process launches: tensors with addresses, Triton's own way from them to a binary.
        with dispatch.use_target(H200), launch.record() as made:
            model(x).sum().backward()
        assert len(keys(made)) == done.kernels == len(h200)
        assert all(h200)
        assert warmup(model, x, train=True, gpu="H200").compiled == 0


@pytest.mark.compile
@compiling
def test_a_kernel_that_does_not_compile_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def no_tool(arch: int) -> None:
        raise RuntimeError("no ptxas here\nfor this")

    monkeypatch.setattr("triton.backends.nvidia.compiler.get_ptxas", no_tool)
    with pytest.raises(
        RuntimeError, match=r"conv_gather_kernel does not compile for sm_80 with .*: RuntimeError: for this"
    ):
        warmup(converted(nn.Conv2d(16, 16, 1)), image(2, 16, 8, 8), gpu="A100")


class Kernel:
    """What counts how often it is launched."""

    def __init__(self) -> None:
        self.made = 0

    def fn(self) -> None: ...

    def __getitem__(self, grid: Any) -> Any:
        def make(*_: Any, **__: Any) -> None:
            self.made += 1

        return make


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    monkeypatch.setattr(launch, "_loaded", set())
    monkeypatch.setattr(here, "current_device", lambda: None)
    monkeypatch.setattr(here, "is_current_stream_capturing", lambda: True)


def a_launch(kernel: Kernel, warps: int = 4) -> launch.Launch:
    return launch.Launch(kernel, (1, 1, 1), ("*fp32",), (1,), {}, warps, 3)


@pytest.mark.usefixtures("capturing")
def test_during_capture_a_miss_names_the_warmup_call() -> None:
    kernel = Kernel()
    with pytest.raises(RuntimeError, match=r"fn is not compiled .* call fastconv.warmup\(model, \*inputs\)"):
        launch.run(a_launch(kernel), torch.zeros(1))
    assert kernel.made == 0


@pytest.mark.usefixtures("capturing")
def test_during_capture_what_was_made_or_warmed_up_is_launched(monkeypatch) -> None:
    kernel, made = Kernel(), a_launch(Kernel())
    with monkeypatch.context() as before:
        before.setattr(here, "is_current_stream_capturing", lambda: False)
        launch.run(made, torch.zeros(1))
    # Another launch of the same binary, for another problem.
    launch.run(a_launch(kernel), torch.zeros(1))
    launch.loaded([a_launch(kernel, 8)], None)  # type: ignore[arg-type]
    launch.run(a_launch(kernel, 8), torch.zeros(1))
    launch.run(made, torch.zeros(1))
    assert kernel.made == 2 and made.kernel.made == 2
    with pytest.raises(RuntimeError, match="is not compiled"):
        launch.run(a_launch(kernel, 2), torch.zeros(1))


@pytest.mark.gpu
@compiling
def test_a_model_is_captured_after_warmup_without_running_first() -> None:
    device = here.at()
    model, x = converted(Block()).to(device).eval(), image(16, 3, 20, 20).to(device)
    assert warmup(model, x).gpu is not None
    with torch.no_grad():
        with here.stream(here.Stream()):
            graph = Captured(lambda: model(x))
        y = graph()
        assert torch.equal(y, model(x))
