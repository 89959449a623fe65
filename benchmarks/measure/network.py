"""A whole network, inference and training step: compared first, then timed against PyTorch's ways of running it."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import fastconv
from fastconv.benchmarks.models import LoadedModel
from fastconv.benchmarks.report.console import Progress
from fastconv.benchmarks.report.results import Part
from fastconv.kernels.launch import launch
from fastconv.kernels.launch.device import here
from fastconv.measuring import reason
from fastconv.measuring.accuracy import Tensors, against_yardstick, fp32_convolutions, norm_error
from fastconv.measuring.capture import Captured
from fastconv.measuring.clock import Clock, interleave, release, spread, synchronize, within
from fastconv.report import convolutions, why_not_converted

MODES = ("infer", "train")
YARDSTICK_PROVIDER = "eager channels_last"
SAMPLE_MS = 20.0  # steps fill a sample to this length, beside which the events' resolution does not matter
WARM_UP_STEPS = 3
ROUND_SECONDS = 8.0  # for the rounds of one stage, unless the least number of rounds takes longer
COMPILE_SECONDS = {"infer": 15.0, "train": 30.0}  # Inductor's for a network: it does not begin with less left
DROPPING = ("StochasticDepth", "DropPath")  # torchvision's and timm's, beside torch's own dropout


class Workload:
    """One model, one batch, one mode: makes fresh copies of the model, and the step that runs one.

    Inference runs the model in ``dtype`` under ``torch.inference_mode``. A training step keeps fp32 weights and runs
    under autocast (none in fp32): forward, loss, backward, SGD with momentum.
    """

    def __init__(self, loaded: LoadedModel, mode: str, dtype: torch.dtype, device: torch.device) -> None:
        self.loaded, self.mode, self.dtype, self.device = loaded, mode, dtype, device
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(loaded.input_shape, generator=generator).to(device)
        self.labels = torch.randint(1 << 30, loaded.input_shape[:1], generator=generator).to(device)
        self.model = copy.deepcopy(loaded.model).to(device)
        # Batch norm takes no statistics of one pixel, which may be all that a single image has.
        images = torch.cat((self.x, -self.x)) if mode == "infer" and len(self.x) == 1 else self.x
        try:
            with fp32_convolutions("ieee"):
                _take_statistics(self.model, images)
        except Exception as error:  # the network's own code: anything
            raise ValueError(loaded.refusal(error)) from error

    @property
    def description(self) -> dict[str, Any]:
        name = "inference" if self.mode == "infer" else "training step"
        dtype = str(self.dtype).removeprefix("torch.")
        shape = "x".join(map(str, self.x.shape))
        return {
            "title": f"{self.loaded.name}, {name}, {shape}, {dtype}",
            "model": self.loaded.name,
            "mode": self.mode,
            "dtype": dtype,
            "input_shape": list(self.x.shape),
        }

    def fresh(self, memory_format: torch.memory_format, dtype: torch.dtype | None = None) -> nn.Module:
        """A copy of the model in ``dtype``, by default the one that this mode keeps weights in."""
        weights = self.dtype if self.mode == "infer" else torch.float32
        model = copy.deepcopy(self.model).to(dtype=dtype or weights)
        return _in_format(model, memory_format).train(self.mode == "train")

    def converted(self) -> nn.Module:
        """A copy converted by fastconv, in the dense channels-last format."""
        return fastconv.convert(self.fresh(self.loaded.memory_format))

    def input(self, memory_format: torch.memory_format, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The batch as a training loop or a server hands it over."""
        return self.x.to(dtype or self.dtype).contiguous(memory_format=memory_format)

    def step(self, model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
        """A call that runs ``model`` once and returns its output (inference) or loss (training)."""
        if self.mode == "infer":

            def infer() -> Any:
                with torch.inference_mode():
                    return model(x)

            return infer
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def train() -> Any:
            optimizer.zero_grad(set_to_none=True)
            loss = self.loss(model, x)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return train

    def forward(self, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        """The outputs that have gradients; under autocast if ``x`` has this workload's dtype and that is narrow."""
        # Weights are cast once a step: autocast's cache would gain nothing, and does not survive a graph's capture.
        low = self.dtype != torch.float32 and x.dtype == self.dtype
        with torch.autocast(self.device.type, self.dtype if low else None, enabled=low, cache_enabled=False):
            return _float_leaves(model(x))

    def loss(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Cross entropy of every ``[N, classes]`` output, mean square of every other."""
        outputs = [y.to(_wide(y)) for y in self.forward(model, x)]
        losses = [F.cross_entropy(y, self.labels % y.shape[1]) if y.dim() == 2 else y.square().mean() for y in outputs]
        return torch.stack(losses).sum()

    def outcome(self, model: nn.Module, x: torch.Tensor) -> Tensors:
        """What the comparison looks at: outputs, and in training every parameter's gradient."""
        # Dropout's masks differ between dtypes; the arithmetic is compared.
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ in DROPPING:
                module.eval()
        if self.mode == "infer":
            outputs = _float_leaves(self.step(model, x)())
            return {_numbered("output", index, outputs): y.to(_wide(y)) for index, y in enumerate(outputs)}
        loss = self.loss(model, x)
        loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        return {"loss": loss.detach(), **gradients}


def check(work: Workload) -> Part:
    """Outputs and every parameter's gradient, ours and PyTorch's in the same dtype, against wider arithmetic: ieee fp32
    for half precision, fp64 for fp32."""
    part: Part = {"id": f"check-{work.mode}", "kind": "check", **work.description, "rows": [], "launches": {}}
    part["title"] = f"{part['title']}: compared"
    if all(why_not_converted(layer) for _, layer in convolutions(work.model)):
        return part | {"verdict": "skipped", "reason": str(fastconv.report(work.model)).splitlines()[-1]}
    wide = torch.float64 if work.dtype == torch.float32 else torch.float32
    plain = work.loaded.memory_format
    try:
        with fp32_convolutions("ieee"):
            exact = work.outcome(work.fresh(plain, wide), work.input(plain, wide))
        eager = work.outcome(work.fresh(plain), work.input(plain))
        with launch.record() as records:
            model = work.converted()
            ours = work.outcome(model, work.input(plain))
    except Exception as error:
        return part | {"verdict": "failed", "reason": reason(error)}
    rows = against_yardstick(ours, eager, exact, work.dtype)
    wrong = [row["tensor"] for row in rows if not row["right"]]
    reasons = []
    if not records:
        reasons.append("no kernel of fastconv ran")
    if ours.keys() != exact.keys():
        reasons.append(f"gradients differ in number: {len(ours)} against {len(exact)}")
    if wrong:
        reasons.append(f"{len(wrong)} of {len(rows)} tensors are too far off: {', '.join(wrong[:3])}")
    return part | {
        "verdict": "wrong" if reasons else "right",
        "reason": "; ".join(reasons) or None,
        "rows": rows,
        "launches": dict(Counter(record.name for record in records)),
        "converted": fastconv.report(model).summary,
    }


@dataclass
class Ready:
    """A provider that has run: its step, and the row that its times complete."""

    step: Callable[[], Any]
    row: dict[str, Any]


Build = Callable[[], Callable[[], Any]]


def measure(
    work: Workload, compared: Part, clock: Clock, deadline: float, progress: Progress, save: Callable[[Part], None]
) -> Iterator[Part]:
    """Time every provider, in stages: each ``next`` is one more stage and gives the part so far. ``save`` gets the part
    whenever it has more in it.

    No time is taken unless ``compared`` found the numbers right. A provider that fails, has a wrong output or gets no
    time before ``deadline`` is a row that says so. Providers that compile for long, or may take the others' results
    with them, come in later stages. Each stage is timed together with all before.
    """
    part: Part = {"id": f"time-{work.mode}", "kind": "time", **work.description, "rows": [], "noise": None}
    if compared["verdict"] != "right":
        part |= {"verdict": "skipped", "reason": f"not timed: the comparison was {compared['verdict']}"}
        save(part)
        yield part
        return
    allowed = max(row["allowed"] + row["eager"] for row in compared["rows"])
    ready: dict[str, Ready] = {}
    outputs: list[torch.Tensor] = []
    torch._dynamo.reset()  # an earlier run's guards count against the limit of recompilations
    for stage in _providers(work):
        progress.begin(part["title"], len(stage))
        for name, (build, seconds) in stage.items():
            row: dict[str, Any] = {"provider": name, "status": "ok", "reason": None}
            part["rows"].append(row)
            left = deadline - time.monotonic()
            if left < seconds:
                row |= {"status": "skipped", "reason": "no time left"}
                continue
            try:
                with within(left if seconds else math.inf):
                    provider, result = warm_up(build, row, work.device)
                outputs.append(_float_leaves(result)[0])
                # A training step returns its loss, and the providers have made different numbers of steps.
                row["difference"] = norm_error(outputs[-1], outputs[0]) if work.mode == "infer" else None
                if not outputs[-1].isfinite().all() or (row["difference"] or 0.0) > allowed:
                    row |= {"status": "wrong", "reason": f"its output differs by {row['difference']}"}
                else:
                    ready[name] = provider
            except Exception as error:
                row |= {"status": "failed", "reason": reason(error)}
            save(part | _verdict(part))
            progress.tick(name)
        part["noise"] = _time(ready, work, clock, min(deadline, time.monotonic() + ROUND_SECONDS))
        part |= _verdict(part)
        save(part)
        yield part
    for provider in ready.values():
        # Last, because a profiler slows down later launches.
        provider.row["gpu_kernels"] = _gpu_kernels(provider.step) if here.holds(work.device) else None
    save(part)
    yield part


def _verdict(part: Part) -> dict[str, Any]:
    wrong = [row["provider"] for row in part["rows"] if row["status"] == "wrong"]
    if wrong:
        return {"verdict": "wrong", "reason": f"wrong output: {', '.join(wrong)}"}
    if any("step_ms" in row for row in part["rows"]):
        return {"verdict": "right", "reason": None}
    if all(row["status"] == "failed" for row in part["rows"]):
        return {"verdict": "failed", "reason": "no provider ran"}
    return {"verdict": "skipped", "reason": "no provider has been timed"}


def _time(ready: dict[str, Ready], work: Workload, clock: Clock, deadline: float) -> float | None:
    """Time all that is ``ready`` in rounds: complete their rows, drop those that fail, and return the noise."""
    steps = {name: provider.step for name, provider in ready.items()}
    if YARDSTICK_PROVIDER in steps:
        steps["A/A"] = steps[YARDSTICK_PROVIDER]  # the difference of one step under two names is the noise
    repeats = {id(provider.step): provider.row["repeats"] for provider in ready.values()}
    rounds = interleave(steps, lambda step: clock(step, repeats[id(step)]), deadline=deadline)
    times = {name: spread([sample.device for sample in samples]) for name, samples in rounds.samples.items() if samples}
    base = times.get(YARDSTICK_PROVIDER)
    for name, provider in list(ready.items()):
        if name in rounds.failures:
            provider.row |= {"status": "failed", "reason": rounds.failures[name]}
            del ready[name]
            continue
        median = times[name]["median"]
        provider.row["step_ms"] = times[name]
        provider.row["host_ms"] = spread([sample.host for sample in rounds.samples[name]])
        provider.row["samples_per_s"] = work.x.shape[0] / median * 1e3
        provider.row["speed"] = base["median"] / median if base else None
    return abs(times["A/A"]["median"] / base["median"] - 1) if base and "A/A" in times else None


def _providers(work: Workload) -> tuple[dict[str, tuple[Build, float]], ...]:
    """What is timed, in stages: how each builds a model and its step, and the seconds that it may need for that."""
    dense = work.loaded.memory_format
    # Without a GPU this is a dry run, which Inductor would spend on compiling C++.
    cuda = work.device.type == "cuda"
    backend, seconds = ("inductor", COMPILE_SECONDS[work.mode]) if cuda else ("aot_eager", 0.0)

    def eager(memory_format: torch.memory_format) -> Callable[[], Any]:
        return work.step(work.fresh(memory_format), work.input(memory_format))

    def ours() -> Callable[[], Any]:
        return work.step(work.converted(), work.input(dense))

    def compiled(model: nn.Module) -> Callable[[], Any]:
        model.compile(backend=backend, dynamic=False)
        return work.step(model, work.input(dense))

    return (
        {
            YARDSTICK_PROVIDER: (lambda: eager(dense), 0.0),
            "fastconv": (ours, 0.0),
            "eager contiguous": (lambda: eager(torch.contiguous_format), 0.0),
        },
        {
            "fastconv, CUDA graph": (lambda: Replay(ours()), 0.0),
            f"{YARDSTICK_PROVIDER}, CUDA graph": (lambda: Replay(eager(dense)), 0.0),
        },
        {"torch.compile channels_last": (lambda: compiled(work.fresh(dense)), seconds)},
        {"fastconv, torch.compile": (lambda: compiled(work.converted()), seconds)},
    )


def warm_up(build: Build, row: dict[str, Any], device: torch.device) -> tuple[Ready, Any]:
    """Build and run a provider; fill in its compile time, memory, launches and how many steps a sample holds."""
    gpu = here.holds(device)
    release(device)
    before = here.memory_allocated() if gpu else 0
    started = time.perf_counter()
    step = build()
    for _ in range(WARM_UP_STEPS):
        result = step()
    synchronize(device)
    row["warm_up_s"] = time.perf_counter() - started
    if gpu:
        here.reset_peak_memory_stats()
    with launch.record() as records:
        started = time.perf_counter()
        step()
        synchronize(device)
        took_ms = (time.perf_counter() - started) * 1e3
    # A graph takes its memory at the capture and keeps it, so a replay does not show its peak.
    captured = getattr(step, "peak_bytes", 0)
    row["peak_bytes"] = max(captured, here.max_memory_allocated()) - before if gpu else None
    row["launches"] = dict(Counter(record.name for record in records))
    row["repeats"] = math.ceil(SAMPLE_MS / took_ms) if gpu else 1
    return Ready(step, row), result


class Replay(Captured):
    """A step, captured on a stream of its own once it has run there."""

    def __init__(self, step: Callable[[], Any]) -> None:
        side = here.Stream()
        side.wait_stream(here.current_stream())
        with here.stream(side):
            for _ in range(WARM_UP_STEPS):
                step()
            here.synchronize()
            release(side.device)  # the graph takes nothing of what the allocator keeps
            here.reset_peak_memory_stats()
            super().__init__(step)
        here.current_stream().wait_stream(side)
        self.peak_bytes = here.max_memory_allocated()


def _gpu_kernels(step: Callable[[], Any]) -> int | None:
    """Kernels the GPU ran in one step, without copies and fills; None if the profiler does not work."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            here.synchronize()
        on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device) or None
    except Exception:  # the profiler needs rights that some machines do not give
        return None


def _take_statistics(model: nn.Module, x: torch.Tensor) -> None:
    """Take the batch's running statistics: with those of no data, random weights blow activations up layer by layer."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _in_format(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    # Models are made contiguous. Asking for it would rearrange weights that are not so on purpose.
    if memory_format == torch.contiguous_format:
        return model
    return model.to(memory_format=memory_format)  # type: ignore[call-overload]  # missing in torch's own stub


def _float_leaves(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _numbered(name: str, index: int, items: list[Any]) -> str:
    return name if len(items) == 1 else f"{name} {index}"
