"""The runs of ``fastconv bench``: on a GPU numbers, then times; without one numbers, then the compiler's report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastconv.benchmarks import layer_lists, registry
from fastconv.benchmarks.measure import blocks, compile_first, host_time, network, operators
from fastconv.benchmarks.models import LoadedModel, load, torchvision
from fastconv.benchmarks.report import tables
from fastconv.benchmarks.report.console import Progress
from fastconv.benchmarks.report.results import Part, Results, read
from fastconv.cli.errors import BadUsage, bad_usage
from fastconv.cli.options import dtype_option
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.device import here
from fastconv.measuring import reason
from fastconv.measuring.clock import Clock, CudaClock, HostClock

# The default model, batch and size; a model that the user names has a size of its own.
GPU = ("resnet50", 64, None)
DRY = ("fastconv.benchmarks.measure.lenet:LeNet5", 4, 12)
OPERATORS_BATCH = 64  # for the operators of a network that the user names
INTERPRETED_BATCH, INTERPRETED_SIZE = 2, 64  # for a network that the user names, interpreted
QUICK_STEPS = 20
UNMEASURED = (
    "\nNot measured: speed and memory. PyTorch sees no GPU here, and an interpreter's times say nothing about one; "
    "the same command measures them on a machine with one."
)


@dataclass(frozen=True)
class Options:
    """The command's options; None: the user said nothing."""

    model: str | None = None
    batch: int | None = None
    size: int | None = None
    dtype: str | None = None
    train: bool | None = None
    ops: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    blocks: bool = False
    seconds: float | None = None
    quick: bool = False
    dry_run: bool = False

    @property
    def modes(self) -> tuple[str, ...]:
        return network.MODES if self.train is None else ("train",) if self.train else ("infer",)

    @property
    def operators(self) -> bool:
        return bool(self.ops or self.layers)

    @property
    def limit(self) -> float:
        return self.seconds or (40.0 if self.quick else 100.0)


class Output:
    """Takes a run's parts to the result file and the terminal and, on the way out, even interrupted, to plots."""

    def __init__(self, folder: Path, options: Options, screen: Console) -> None:
        with bad_usage():
            self.results = Results(folder, dry_run=options.dry_run)
        self._screen = screen
        self._unshown: dict[str, Part] = {}

    def put(self, part: Part) -> None:
        """A finished part."""
        self.save(part)
        self._show(part["id"])

    def save(self, part: Part) -> None:
        """A part that may grow: to the file at once, to the terminal if nothing more comes."""
        with bad_usage():
            self.results.put(part)
        self._unshown[part["id"]] = part

    def _show(self, name: str) -> None:
        self._screen.print(tables.render(self._unshown.pop(name)), markup=False)  # errors have brackets

    def __enter__(self) -> Output:
        self._screen.print(tables.heading(self.results.data))
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._unshown):
            self._show(name)
        self._screen.print(f"\nWritten: {self.results.path}", markup=False)
        try:
            _draw(self.results.data, self.results.path.parent, self._screen)
        except OSError as error:
            self._screen.print(f"Cannot write the plots: {error}", markup=False)


Run = Callable[[Options, Path, Console], Results]


def choose(options: Options) -> Run:
    """The run for this machine. Raises BadUsage if an option means nothing on it."""
    _check(options)
    if options.dry_run and here.real and not interpreter.interpreting():
        raise BadUsage("--dry-run needs the interpreter: run it with TRITON_INTERPRET=1")
    if options.dry_run or (here.is_available() and not interpreter.interpreting()):
        return timed_run
    if not interpreter.interpreting():
        raise BadUsage("PyTorch sees no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU")
    timed = {"--ops": options.ops, "--layers": options.layers, "--blocks": options.blocks, "--seconds": options.seconds}
    for option, value in timed.items():
        if value:
            raise BadUsage(f"{option} is about times, which need a GPU")
    if options.model is not None:
        return compared_run
    for option, value in (("--batch", options.batch), ("--size", options.size), ("--train/--infer", options.train)):
        if value is not None:
            raise BadUsage(f"{option} without a GPU needs --model")
    return interpreted_run


@bad_usage()
def _check(options: Options) -> None:
    """Raise BadUsage if options exclude each other, or a name is unknown."""
    for option, value in (("--ops", options.ops), ("--layers", options.layers), ("--model", options.model)):
        if options.blocks and value:
            raise BadUsage(f"{option} and --blocks exclude each other: blocks are of networks of their own")
    if not options.operators:
        if options.providers:
            raise BadUsage("--provider says who runs --ops")
        return
    if options.layers and options.model:
        raise BadUsage("--layers and --model exclude each other: both say whose operators")
    if options.train is not None:
        raise BadUsage("--train/--infer is about networks; of operators each direction is measured")
    if options.size and not options.model:
        raise BadUsage("--size needs --model: layers in lists have sizes of their own")
    registry.entries(options.ops)
    if options.providers:
        registry.providers(options.providers)
    for name in options.layers:
        layer_lists.find(name)


def timed_run(options: Options, out: Path, screen: Console) -> Results:
    """A network on the GPU, or operators or blocks of several; in a dry run tiny ones, on the CPU or a stand-in."""
    started = time.monotonic()
    interpreted = interpreter.interpreting()
    device = torch.device("cpu") if interpreted else here.at()
    clock = HostClock() if interpreted else CudaClock()
    dtype = dtype_option(options.dtype or "bfloat16")
    prepared = _blocks if options.blocks else _operators if options.operators else _network
    # A wrong name is refused here, before an earlier result is written over.
    with bad_usage():
        measure = prepared(options, dtype)
    with Output(out, options, screen) as output, Progress(screen) as progress:
        # cuDNN is at its best when it picks its algorithms by measuring them.
        torch.backends.cudnn.benchmark = True
        measure(Timing(options.modes, dtype, device, clock, started + options.limit, output, progress))
    return output.results


@dataclass(frozen=True)
class Timing:
    """What the parts of a timed run share. ``deadline``: seconds of time.monotonic()."""

    modes: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    clock: Clock
    deadline: float
    output: Output
    progress: Progress

    def compile(self, calls: Callable[[], object]) -> None:
        """Compile ahead what ``calls()`` launches."""
        self.progress.begin("compiling", 1)
        self.output.put(compile_first.compile_kernels(calls))


def _network(options: Options, dtype: torch.dtype) -> Callable[[Timing], None]:
    return partial(_measure_network, _loaded(options))


def _measure_network(loaded: LoadedModel, it: Timing) -> None:
    dense = loaded.memory_format
    with bad_usage():
        works = [network.Workload(loaded, mode, it.dtype, it.device) for mode in it.modes]
    it.compile(lambda: [work.step(work.converted(), work.input(dense))() for work in works])
    runs = []
    for work in works:
        it.progress.begin(f"{work.description['title']}: comparing", 1)
        compared = network.check(work)
        it.output.put(compared)
        runs.append(network.measure(work, compared, it.clock, it.deadline, it.progress, it.output.save))
    # One stage of every mode, then the next, so that what compiles for long is last.
    for _ in zip_longest(*runs):
        pass


def _operators(options: Options, dtype: torch.dtype) -> Callable[[Timing], None]:
    cases = registry.cases(*_entries_and_lists(options), dtype)
    if not cases:
        asked = " and no ".join(entry.name for entry in registry.entries(options.ops))
        raise BadUsage(f"{options.model or ', '.join(options.layers)} calls no {asked} operator")
    if options.dry_run:
        cases = registry.tiny(cases)
    named = options.providers
    races = [operators.Race(case, registry.providers(named or case.entry.providers)) for case in cases]
    return partial(_measure_operators, races)


def _measure_operators(races: list[operators.Race], it: Timing) -> None:
    setup = operators.Setup(it.dtype, it.device, it.clock)
    it.compile(lambda: operators.plan_each(races, setup))
    it.output.put(host_time.host_time(it.device, it.deadline))
    for part in operators.measure(races, setup, it.deadline, it.progress, it.output.save):
        it.output.put(part)


def _entries_and_lists(options: Options) -> tuple[list[registry.Entry], Callable[[str], layer_lists.LayerList]]:
    """The entries, and what finds their lists: the shipped ones, the user's, or the one of the user's network."""
    entries = registry.entries(options.ops)
    if options.model is not None:
        listed = layer_lists.of(load(options.model, options.batch or OPERATORS_BATCH, options.size))
        return [replace(entry, lists=(options.model,), batches=(1,)) for entry in entries], lambda name: listed
    changes: dict[str, Any] = {"lists": options.layers} if options.layers else {}
    changes |= {"batches": (options.batch,)} if options.batch else {}
    return [replace(entry, **changes) for entry in entries], layer_lists.find


def _blocks(options: Options, dtype: torch.dtype) -> Callable[[Timing], None]:
    chosen, batch, size = (blocks.DRY, 2, 32) if options.dry_run else (blocks.BLOCKS, 64, None)
    found = blocks.load_blocks(chosen, options.batch or batch, options.size or size)
    return partial(_measure_blocks, found)


def _measure_blocks(found: list[blocks.Block], it: Timing) -> None:
    it.compile(lambda: blocks.call_each(found, it.modes, it.dtype, it.device))
    it.output.put(
        blocks.measure(found, it.modes, it.dtype, it.device, it.clock, it.deadline, it.progress, it.output.save)
    )


def compared_run(options: Options, out: Path, screen: Console) -> Results:
    """The user's network on the interpreter: outputs and every gradient, no times."""
    assert options.model is not None
    with bad_usage():
        loaded = load(options.model, options.batch or INTERPRETED_BATCH, options.size or INTERPRETED_SIZE)
    dtype = dtype_option(options.dtype or "float32")
    with Output(out, options, screen) as output, Progress(screen) as progress:
        progress.begin(loaded.name, len(options.modes))
        for mode in options.modes:
            with bad_usage():
                work = network.Workload(loaded, mode, dtype, torch.device("cpu"))
            output.put(network.check(work))
            progress.tick(mode)
        screen.print(UNMEASURED)
    return output.results


def interpreted_run(options: Options, out: Path, screen: Console) -> Results:
    """LeNet-5 in training, ResNet-18's blocks, and beside them the compiler's report."""
    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise BadUsage("the images come with scikit-learn: pip install 'fastconv[cli]'") from error
    with bad_usage():
        torchvision()  # if it is missing, the run ends before the training, not after it
    from fastconv.benchmarks.measure import lenet, resnet_blocks
    from fastconv.benchmarks.measure.compiler_report import COMMAND, Compilation

    dtypes = [torch.float32] if options.quick else [torch.float32, torch.bfloat16]
    if options.dtype is not None:
        dtypes = [dtype_option(options.dtype)]
    steps = QUICK_STEPS if options.quick else lenet.STEPS
    command = (*COMMAND, "--quick") if options.quick else COMMAND
    with Output(out, options, screen) as output, Compilation(command) as compilation, Progress(screen) as progress:
        progress.begin("LeNet-5, plain and converted", steps)
        output.put(lenet.run(steps, progress.tick))
        progress.begin("ResNet-18's blocks", 2 * len(dtypes))
        for part in resnet_blocks.run(dtypes, progress.tick):
            output.put(part)
        progress.begin("compiling every kernel for A100, H100/H200 and B200", 1)
        output.put(compilation.part())
        screen.print(UNMEASURED)
    return output.results


def show(path: Path, screen: Console) -> None:
    """Show the tables of the result file ``path``, and draw its plots again beside it. Raises BadUsage if it cannot be
    read, or the plots not be written."""
    with bad_usage():
        data = read(path)
    try:
        screen.print(tables.heading(data))
        for part in data["parts"]:
            screen.print(tables.render(part), markup=False)
        _draw(data, path.parent, screen)
    except OSError as error:
        raise BadUsage(f"cannot write the plots: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Reading checks fields that all parts have, not each row of every kind.
        raise BadUsage(f"{path} is damaged: {reason(error)}") from error


def _draw(data: dict[str, Any], folder: Path, screen: Console) -> None:
    try:
        from fastconv.benchmarks.report import plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        screen.print("No plots: pip install 'fastconv[cli]' brings matplotlib")
        return
    for path in plots.draw(data, folder):
        screen.print(f"Written: {path}", markup=False)


def _loaded(options: Options) -> LoadedModel:
    model, batch, size = DRY if options.dry_run else GPU
    if options.model is not None:
        model, size = options.model, None
    return load(model, options.batch or batch, options.size or size)
