"""Blocks of real networks one by one, inference and training step, against PyTorch, beside the bytes they move.

Times are the GPU's: each step is replayed from a CUDA graph, the L2 cache emptied before. A training step is forward
and every gradient, the input's too, for a given gradient of the output; weights stay fp32 under autocast.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastconv.benchmarks.measure import network
from fastconv.benchmarks.measure.network import YARDSTICK_PROVIDER, Replay, Workload, warm_up
from fastconv.benchmarks.models import LoadedModel, load
from fastconv.benchmarks.report.console import Progress
from fastconv.benchmarks.report.results import Part
from fastconv.kernels import dispatch
from fastconv.kernels.launch.device import here
from fastconv.measuring import reason
from fastconv.measuring.accuracy import Tensors
from fastconv.measuring.capture import captured
from fastconv.measuring.clock import Clock, Thunk, interleave, spread, within
from fastconv.traffic import Traffic

# A network of torchvision, and a module of it, or neighbours in a Sequential. torch.compile gets what time there is, in
# this order.
BLOCKS = (
    ("resnet50", "layer1.1"),
    ("resnet50", "layer2.0"),
    ("vgg16_bn", "features.7:10"),
    ("mobilenet_v2", "features.3"),
    ("resnet18", "layer1.0"),
    ("resnet50", "layer3.1"),
    ("resnet50", "layer4.1"),
    ("resnet50", "layer2.1"),
    ("resnet50", "layer1.0"),
    ("resnet50", "layer3.0"),
    ("resnet50", "layer4.0"),
    ("resnet18", "layer2.0"),
    ("vgg16_bn", "features.0:3"),
    ("vgg16_bn", "features.3:6"),
    ("vgg16_bn", "features.27:30"),
    ("vgg16_bn", "features.40:43"),
    ("mobilenet_v2", "features.2"),
    ("mobilenet_v2", "features.8"),
    ("mobilenet_v2", "features.16"),
)
DRY = (("resnet18", "layer2.0"),)
ROUND_SECONDS = 1.5  # for the rounds of one block, unless the least number of rounds takes longer
ROW_SECONDS = 1.2  # guess for a block in one mode without torch.compile, until some have been measured
COMPILE_SECONDS = {"infer": 8.0, "train": 12.0}  # Inductor's for a block: it does not begin with less left
COMPILED_PROVIDER = "torch.compile channels_last"


@dataclass(frozen=True)
class Block:
    """A module as its network calls it; ``needs_dx``: its input has a gradient there."""

    loaded: LoadedModel
    output_shape: tuple[int, ...]
    needs_dx: bool


class BlockWorkload(Workload):
    """One block, one mode. In place of a loss there is a given gradient of the output."""

    def __init__(self, block: Block, mode: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(block.loaded, mode, dtype, device)
        self.needs_dx = block.needs_dx
        self.dz = torch.randn(block.output_shape, generator=torch.Generator().manual_seed(1)).to(device)

    def step(self, model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
        """Returns the output, in training with every gradient."""
        if self.mode == "infer":
            return super().step(model, x)
        x = x.detach().requires_grad_(self.needs_dx)
        dz = self.dz.to(x.dtype).contiguous(memory_format=self.loaded.memory_format)
        leaves = ({"input": x} if self.needs_dx else {}) | dict(model.named_parameters())

        def train() -> Tensors:
            (y,) = self.forward(model, x)
            gradients = torch.autograd.grad(y, list(leaves.values()), dz)
            return {"output": y.detach(), **dict(zip(leaves, gradients, strict=True))}

        return train

    def outcome(self, model: nn.Module, x: torch.Tensor) -> Tensors:
        return super().outcome(model, x) if self.mode == "infer" else self.step(model, x)()


def load_blocks(names: Sequence[tuple[str, str]], batch: int, size: int | None) -> list[Block]:
    """The blocks with the shapes of their networks' calls, found on the meta device: no arithmetic."""
    found: dict[tuple[str, str], Block] = {}
    for model in dict.fromkeys(model for model, _ in names):
        whole = load(model, batch, size)
        shadow = copy.deepcopy(whole.model).to("meta").eval()  # a small image may have maps of one pixel
        paths = [path for name, path in names if name == model]
        calls = {path: _Boundary(_modules(shadow, path)) for path in paths}
        try:
            shadow(torch.empty(whole.input_shape, device="meta"))
        except Exception as error:
            raise ValueError(whole.refusal(error)) from error
        for path, call in calls.items():
            modules = _modules(whole.model, path)
            block = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
            loaded = LoadedModel(f"{model} {path}", block, tuple(call.input.shape))
            found[model, path] = Block(loaded, tuple(call.output.shape), call.input.requires_grad)
    return [found[name] for name in names]


class _Boundary:
    """The input of the first of ``modules`` and the output of the last."""

    input: torch.Tensor
    output: torch.Tensor

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        modules[0].register_forward_pre_hook(self._begin)
        modules[-1].register_forward_hook(self._end)

    def _begin(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        (self.input,) = inputs

    def _end(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.output = output


def _modules(model: nn.Module, path: str) -> list[nn.Module]:
    path, _, end = path.partition(":")
    if not end:
        return [model.get_submodule(path)]
    parent, _, begin = path.rpartition(".")
    return list(model.get_submodule(parent).children())[int(begin) : int(end)]


def call_each(blocks: Sequence[Block], modes: Sequence[str], dtype: torch.dtype, device: torch.device) -> None:
    """Call once what `measure` times of ours, for compiling ahead."""
    for block in blocks:
        for mode in modes:
            work = BlockWorkload(block, mode, dtype, device)
            work.step(work.converted(), work.input(block.loaded.memory_format))()


def measure(
    blocks: Sequence[Block],
    modes: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    deadline: float,
    progress: Progress,
    save: Callable[[Part], None],
) -> Part:
    """Every block in every mode, compared, then timed; ``save`` gets the part after each.

    Blocks without time before ``deadline`` and providers that fail are rows that say so. torch.compile gets the time
    that the blocks to come do not need.
    """
    name = str(dtype).removeprefix("torch.")
    part: Part = {
        "id": "blocks",
        "kind": "blocks",
        "title": f"Blocks, batch {blocks[0].loaded.input_shape[0]}, {name}, channels_last",
        "dtype": name,
        "bandwidth": dispatch.target(device).bandwidth if here.holds(device) else None,
        "rows": [],
    }
    rows = part["rows"]
    tasks = [(block, mode) for block in blocks for mode in modes]
    progress.begin(part["title"], len(tasks))
    needed: list[float] = []  # seconds of each row, without torch.compile
    for index, (block, mode) in enumerate(tasks):
        row: dict[str, Any] = {"block": block.loaded.name, "kind": type(block.loaded.model).__name__, "mode": mode}
        row |= {"input_shape": list(block.loaded.input_shape), "status": "ok", "reason": None, "providers": []}
        rows.append(row)
        started = time.monotonic()
        if started > deadline:
            row |= {"status": "skipped", "reason": "no time left"}
        else:
            each = statistics.median(needed[-5:]) if len(needed) > 2 else ROW_SECONDS
            to_come = each * (len(tasks) - index)
            try:
                _measure_row(row, BlockWorkload(block, mode, dtype, device), clock, deadline, deadline - to_come)
            except Exception as error:
                row |= {"status": "failed", "reason": reason(error)}
            compiling = sum(p.get("seconds", 0.0) for p in row["providers"] if p["provider"] == COMPILED_PROVIDER)
            needed.append(time.monotonic() - started - compiling)
        save(part | _verdict(rows))
        progress.tick(f"{row['block']}, {mode}")
    return part | _verdict(rows)


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    bad = [f"{row['block']}, {row['mode']}" for row in rows if row["status"] in ("wrong", "failed")]
    if bad:
        return {"verdict": "wrong", "reason": f"{len(bad)} wrong or failed, the first {bad[0]}"}
    measured = any(row["status"] == "ok" for row in rows)
    return {"verdict": "right", "reason": None} if measured else {"verdict": "skipped", "reason": "no time left"}


def _measure_row(
    row: dict[str, Any], work: BlockWorkload, clock: Clock, deadline: float, compile_deadline: float
) -> None:
    compared = network.check(work)
    if compared["verdict"] != "right":
        row |= {"status": compared["verdict"], "reason": compared["reason"]}
        return
    worst = compared["rows"][0]
    row |= {"worst_tensor": worst["tensor"], "error": worst["ours"], "eager_error": worst["eager"]}
    row |= {"allowed": worst["allowed"], "launches": compared["launches"]}
    torch._dynamo.reset()  # blocks of one class share their code, and so the limit of recompilations
    calls: dict[str, Thunk] = {}
    for name, (build, seconds) in _providers(work).items():
        provider: dict[str, Any] = {"provider": name, "status": "ok", "reason": None}
        row["providers"].append(provider)
        started = time.monotonic()
        left = compile_deadline - started
        if left < seconds:
            provider |= {"status": "skipped", "reason": "no time left"}
            continue
        try:
            with within(left if seconds else math.inf):
                step = warm_up(build, provider, work.device)[0].step
            provider["host_ms"] = min(clock(step).host for _ in range(3))
            # PyTorch dispatches no operator that shows what torch.compile moves.
            provider["bytes"] = None if name == COMPILED_PROVIDER else _bytes(step)
            calls[name] = captured(Replay, step, provider, work.device)
        except Exception as error:
            provider |= {"status": "failed", "reason": reason(error)}
        provider["seconds"] = time.monotonic() - started
    if YARDSTICK_PROVIDER in calls:
        calls["A/A"] = calls[YARDSTICK_PROVIDER]  # the difference of one call under two names is the noise
    until = min(deadline, time.monotonic() + ROUND_SECONDS)
    rounds = interleave(calls, lambda call: clock(call, cold=True), deadline=until, least=5)
    times = {name: spread([sample.device for sample in samples]) for name, samples in rounds.samples.items() if samples}
    eager = times.get(YARDSTICK_PROVIDER)
    for provider in row["providers"]:
        name = provider["provider"]
        if name in rounds.failures:
            provider |= {"status": "failed", "reason": rounds.failures[name]}
        elif name in times:
            milliseconds = times[name]["median"]
            provider["ms"] = times[name]
            provider["speed"] = eager["median"] / milliseconds if eager else None
            provider["gb_per_s"] = provider["bytes"] / milliseconds / 1e6 if provider["bytes"] else None
    row["noise"] = abs(times["A/A"]["median"] / eager["median"] - 1) if eager and "A/A" in times else None
    ours = next(provider for provider in row["providers"] if provider["provider"] == "fastconv")
    row |= {"status": ours["status"], "reason": f"fastconv: {ours['reason']}" if ours["reason"] else None}


def _providers(work: BlockWorkload) -> dict[str, tuple[Callable[[], Callable[[], Any]], float]]:
    """What is timed: how each builds a model and its step, and the seconds that it may need for that."""
    dense = work.loaded.memory_format
    cuda = work.device.type == "cuda"
    # Without a GPU this is a dry run, which Inductor would spend on compiling C++.
    backend, seconds = ("inductor", COMPILE_SECONDS[work.mode]) if cuda else ("aot_eager", 0.0)

    def compiled() -> Callable[[], Any]:
        model = work.fresh(dense)
        model.compile(backend=backend, dynamic=False)
        return work.step(model, work.input(dense))

    return {
        YARDSTICK_PROVIDER: (lambda: work.step(work.fresh(dense), work.input(dense)), 0.0),
        "fastconv": (lambda: work.step(work.converted(), work.input(dense)), 0.0),
        COMPILED_PROVIDER: (compiled, seconds),
    }


def _bytes(step: Callable[[], Any]) -> int:
    with Traffic() as traffic:
        step()
    return traffic.bytes
