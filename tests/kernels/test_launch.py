"""A launch made again skips Triton's look at each argument, and gives the binary what a first launch gave it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fastconv.autotune.gpus import H200
from fastconv.kernels import dispatch
from fastconv.kernels.compile.ahead import _Driver
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch import launch as launches
from fastconv.kernels.launch.device import here
from fastconv.kernels.launch.launch import Launch, run
from fastconv.kernels.problem.conv import conv_problem
from tests.marks import compiling


@pytest.fixture
def on_gpu(monkeypatch) -> None:
    """Let the CPU pass for the current GPU."""
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    monkeypatch.setattr(here, "current_device", lambda: None)
    monkeypatch.setattr(here, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launches, "_loaded", set())
    monkeypatch.setattr(driver, "_active", _Driver(90))


class Binary(CompiledKernel):
    packed_metadata, function, run = "metadata", "function", None

    def __init__(self, made: list[tuple[Any, ...]]) -> None:
        self.run = lambda *arguments: made.append(("again", *arguments))
        self.made = made

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.made.append(("hooked", grid, *arguments))


class Kernel:
    arg_names = ("x", "y", "n", "eps", "BLOCK", "ACT")
    fn = SimpleNamespace(__name__="some_kernel")

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Any:
        def first(*arguments: Any, **named: Any) -> Binary:
            self.made.append(("first", grid, *arguments, named))
            return Binary(self.made)

        return first


def test_the_binary_is_kept_and_gets_every_argument_in_the_kernels_order(on_gpu: None) -> None:
    kernel, x = Kernel(), torch.zeros(4)
    launch = Launch(kernel, (7, 2, 1), ("*fp32", None), (4, 0.5), {"ACT": len, "BLOCK": 64}, 4, 3)
    for _ in range(3):
        run(launch, x, None)
    named = {"ACT": len, "BLOCK": 64, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    again = ("again", 7, 2, 1, 0, "function", "metadata", None, None, None, x, None, 4, 0.5, 64, len)
    assert kernel.made == [("first", (7, 2, 1), x, None, 4, 0.5, named), again, again]


def test_whoever_hooks_launches_is_told_of_those_made_again(on_gpu: None, monkeypatch) -> None:
    kernel, x = Kernel(), torch.zeros(4)
    launch = Launch(kernel, (7, 2, 1), ("*fp32", None), (4, 0.5), {"ACT": len, "BLOCK": 64}, 4, 3)
    run(launch, x, None)
    for hooks in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        with monkeypatch.context() as patch:
            patch.setattr(hooks, "calls", [print])
            run(launch, x, None)
    assert kernel.made[1:] == [("hooked", (7, 2, 1), x, None, 4, 0.5, 64, len)] * 2


def test_nothing_is_compiled_while_a_graph_is_captured(on_gpu: None, monkeypatch) -> None:
    kernel, x = Kernel(), torch.zeros(4)
    constants = {"ACT": len, "BLOCK": 64}
    launch, twin = (Launch(kernel, (1, 1, 1), ("*fp32", None), (4, 0.5), constants, 4, 3) for _ in range(2))
    monkeypatch.setattr(here, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"some_kernel is not compiled.*call fastconv.warmup\(model, \*inputs\)"):
        run(launch, x, None)
    assert kernel.made == []
    monkeypatch.setattr(here, "is_current_stream_capturing", lambda: False)
    run(launch, x, None)
    monkeypatch.setattr(here, "is_current_stream_capturing", lambda: True)
    run(twin, x, None)
    assert [made[0] for made in kernel.made] == ["first", "first"]


@pytest.mark.compile
@compiling
def test_a_binary_is_run_with_the_same_arguments_both_times(on_gpu: None, monkeypatch) -> None:
    given: list[tuple[Any, ...]] = []

    def ready(binary: CompiledKernel) -> None:
        binary.module = binary.function = "loaded"
        binary._run = lambda *arguments: given.append(arguments)

    monkeypatch.setattr(CompiledKernel, "_init_handles", ready)
    problem = conv_problem((2, 16, 8, 8), (16, 16, 3, 3), None, (1, 1), (1,) * 4, (1, 1), 1, torch.bfloat16)
    with dispatch.only_family("gather"):
        (launch,) = dispatch.plan("fprop", problem, H200).launches
    x, w, y = (torch.zeros(16 * 1024, dtype=torch.bfloat16) for _ in range(3))
    for _ in range(2):
        run(launch, x, w, *(None,) * 7, y, None, None, None)
    # Each launch has a copy of its metadata, the seventh; hooks, which nobody has set, are not told of the second.
    first, again = ((*arguments[:6], *arguments[9:]) for arguments in given)
    assert first == again and first[:3] == launch.grid and len(first) == 6 + len(launch.kernel.arg_names)
