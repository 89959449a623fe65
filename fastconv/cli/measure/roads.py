"""The ways ``fastconv bench`` goes: on a GPU numbers then times, without one numbers then the compiler's report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console

from fastconv.cli import BadUsage, options
from fastconv.cli.measure import tables
from fastconv.cli.measure.clock import CudaClock, HostClock
from fastconv.cli.measure.results import Part, Results
from fastconv.cli.measure.screen import Progress
from fastconv.cli.models import Subject, load, torchvision
from fastconv.kernels import mend
from fastconv.kernels.problem import DIRECTIONS

# Model, batch and size where the user names none; a named model has a size of its own.
GPU = ("resnet50", 64, None)
DRY = ("fastconv.cli.measure.lenet:LeNet5", 4, 12)
INTERPRETED_BATCH, INTERPRETED_SIZE = 2, 64  # of a network that the user names
QUICK_STEPS = 20
UNMEASURED = (
    "\nNot measured: speed and memory. PyTorch sees no GPU here, and an interpreter's times say nothing about one; "
    "the same command measures them on a machine with one."
)
INFERENCE_SHARE = 0.35  # of the time limit; a training step takes three times as long, and compiles three directions


@dataclass(frozen=True)
class Wishes:
    """The command's options; None where the user said nothing."""

    model: str | None = None
    batch: int | None = None
    size: int | None = None
    dtype: str | None = None
    train: bool | None = None
    layers: bool = False
    seconds: float | None = None
    quick: bool = False
    dry_run: bool = False

    @property
    def modes(self) -> tuple[str, ...]:
        return ("infer", "train") if self.train is None else ("train",) if self.train else ("infer",)

    @property
    def limit(self) -> float:
        return self.seconds or (40.0 if self.quick else 100.0)


class Output:
    """Where a road leaves its parts: the result file, the terminal, and on the way out, even interrupted, plots."""

    def __init__(self, folder: Path, wishes: Wishes, screen: Console) -> None:
        self.results = Results(folder, dry_run=wishes.dry_run)
        self._screen = screen

    def put(self, part: Part) -> None:
        """A part that is done."""
        self.results.put(part)
        self._screen.print(tables.render(part))

    def __enter__(self) -> Output:
        self._screen.print(tables.heading(self.results.data))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._screen.print(f"\nWritten: {self.results.path}")
        _draw(self.results.data, self.results.path.parent, self._screen)


Road = Callable[[Wishes, Path, Console], Results]


def choose(wishes: Wishes) -> Road:
    """The road for this machine. Raises BadUsage where a wish has no meaning on it."""
    if wishes.dry_run:
        if not mend.interpreting():
            raise BadUsage("--dry-run needs the interpreter: run it with TRITON_INTERPRET=1")
        return timed_road
    if torch.cuda.is_available() and not mend.interpreting():
        return timed_road
    if not mend.interpreting():
        raise BadUsage("PyTorch sees no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU")
    for option, value in (("--layers", wishes.layers), ("--seconds", wishes.seconds)):
        if value:
            raise BadUsage(f"{option} is about times, which need a GPU")
    if wishes.model is not None:
        return compared_road
    for option, value in (("--batch", wishes.batch), ("--size", wishes.size), ("--train/--infer", wishes.train)):
        if value is not None:
            raise BadUsage(f"{option} without a GPU needs --model")
    return interpreted_road


def timed_road(wishes: Wishes, out: Path, screen: Console) -> Results:
    """One network on the GPU: whole, or layer by layer. ``wishes.dry_run``: the same on the CPU, with a tiny one."""
    from fastconv.cli.measure import ahead, layers, network

    started = time.monotonic()
    device = torch.device("cpu" if wishes.dry_run else "cuda")
    clock = HostClock() if wishes.dry_run else CudaClock()
    subject = _subject(wishes, *(DRY if wishes.dry_run else GPU))
    dtype = options.dtype(wishes.dtype or "bfloat16")
    # What cuDNN's speed is worth comparing with: it picks its algorithms by measuring them.
    torch.backends.cudnn.benchmark = True
    directions = DIRECTIONS if wishes.layers or "train" in wishes.modes else DIRECTIONS[:1]
    with Output(out, wishes, screen) as output, Progress(screen) as progress:
        progress.begin("compiling", 1)
        output.put(ahead.compile_kernels(subject, dtype, directions, device))
        if wishes.layers:
            deadline = started + wishes.limit
            output.put(layers.host_time(device, deadline))
            output.put(layers.measure(subject, dtype, device, clock, deadline, progress, output.results.put))
            return output.results
        for mode in wishes.modes:
            share = INFERENCE_SHARE if mode == "infer" and len(wishes.modes) > 1 else 1.0
            progress.begin(f"{subject.name}, {mode}: comparing", 1)
            work = network.Workload(subject, mode, dtype, device)
            compared = network.check(work)
            output.put(compared)
            deadline = started + share * wishes.limit
            output.put(network.measure(work, compared, clock, deadline, progress, output.results.put))
    return output.results


def compared_road(wishes: Wishes, out: Path, screen: Console) -> Results:
    """The user's network on the interpreter: outputs and every gradient, no times."""
    from fastconv.cli.measure import network

    assert wishes.model is not None
    subject = load(wishes.model, wishes.batch or INTERPRETED_BATCH, wishes.size or INTERPRETED_SIZE)
    dtype = options.dtype(wishes.dtype or "float32")
    with Output(out, wishes, screen) as output, Progress(screen) as progress:
        progress.begin(subject.name, len(wishes.modes))
        for mode in wishes.modes:
            output.put(network.check(network.Workload(subject, mode, dtype, torch.device("cpu"))))
            progress.tick(mode)
        screen.print(UNMEASURED)
    return output.results


def interpreted_road(wishes: Wishes, out: Path, screen: Console) -> Results:
    """LeNet-5 in training, ResNet-18's blocks, and beside them the compiler's report."""
    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise BadUsage("the images come with scikit-learn: pip install 'fastconv[cli]'") from error
    torchvision()  # missing, it is missed before the training and not after
    from fastconv.cli.measure import blocks, lenet
    from fastconv.cli.measure.compiler import COMMAND, Compilation

    dtypes = [torch.float32] if wishes.quick else [torch.float32, torch.bfloat16]
    if wishes.dtype is not None:
        dtypes = [options.dtype(wishes.dtype)]
    steps = QUICK_STEPS if wishes.quick else lenet.STEPS
    command = (*COMMAND, "--quick") if wishes.quick else COMMAND
    with (
        Output(out, wishes, screen) as output,
        Compilation(command) as compilation,
        Progress(screen) as progress,
    ):
        progress.begin("LeNet-5, plain and converted", steps)
        output.put(lenet.run(steps, progress.tick))
        progress.begin("ResNet-18's blocks", 2 * len(dtypes))
        for part in blocks.run(dtypes, progress.tick):
            output.put(part)
        progress.begin("compiling every kernel for A100, H100/H200 and B200", 1)
        output.put(compilation.part())
        screen.print(UNMEASURED)
    return output.results


def show(data: dict[str, Any], folder: Path, screen: Console) -> None:
    """Tables of an earlier run, and its plots drawn again into ``folder``."""
    screen.print(tables.heading(data))
    for part in data["parts"]:
        screen.print(tables.render(part))
    _draw(data, folder, screen)


def _draw(data: dict[str, Any], folder: Path, screen: Console) -> None:
    try:
        from fastconv.cli.measure import plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        screen.print("No plots: pip install 'fastconv[cli]' brings matplotlib")
        return
    for path in plots.draw(data, folder):
        screen.print(f"Written: {path}")


def _subject(wishes: Wishes, model: str, batch: int, size: int | None) -> Subject:
    if wishes.model is not None:
        model, size = wishes.model, None
    return load(model, wishes.batch or batch, wishes.size or size)
