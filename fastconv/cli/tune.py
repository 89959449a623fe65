"""``fastconv tune``: finds the fastest tile of each kernel for the problems of a model, on this machine's GPU."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastconv.autotune import Gpu, Measured, SchemaError, Store, Tuned, Untuned
from fastconv.autotune.known import reload, tables
from fastconv.autotune.known import store as user_store
from fastconv.autotune.records import Record, now
from fastconv.autotune.schema import named
from fastconv.autotune.table import Table, file_name
from fastconv.autotune.table import write_table as write_tuned
from fastconv.autotune.tune import TuningTask
from fastconv.cli.errors import BadUsage, bad_usage

if TYPE_CHECKING:
    import torch

    from fastconv.measuring.process import Worker
    from fastconv.tuning.sharing import Ranks

UNITS = {"s": 1, "m": 60, "h": 3600}


def tune(
    model: Annotated[str | None, typer.Option(help="A name of torchvision's or timm's, or module:factory.")] = None,
    layers: Annotated[str | None, typer.Option(help="A layer list by its name (resnet50), or a file.")] = None,
    from_log: Annotated[bool, typer.Option("--from-log", help="What programs here met untuned, each once.")] = False,
    batch: Annotated[int | None, typer.Option(min=1, help="Images in the batch. 64.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of a model's image; its own, or 224.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. bfloat16.")] = None,
    train: Annotated[bool, typer.Option("--train/--infer", help="A training step's problems, or inference's.")] = False,
    kernel: Annotated[list[str] | None, typer.Option(help="Only these search spaces: conv_gather,pool.")] = None,
    budget: Annotated[str, typer.Option(help="Time to spend: 90s, 10m, 1h.")] = "10m",
    top_k: Annotated[int, typer.Option(min=1, help="Configs that are compiled for each problem at first.")] = 16,
    again: Annotated[
        bool, typer.Option("--again", help="Tune what is tuned already, and retry what crashed or hung.")
    ] = False,
    gpu: Annotated[str | None, typer.Option(help="A GPU that is not here (H200): nothing is measured then.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured, and measure nothing.")
    ] = False,
    report: Annotated[
        bool,
        typer.Option("--report", help="How well the cost model ranks what was measured, and what its choice costs."),
    ] = False,
    lock: Annotated[Path | None, typer.Option(help="Write the model's tiles to this file, for FASTCONV_LOCK.")] = None,
    write_table: Annotated[
        Path | None, typer.Option(help="Write the table of all that is tuned for this GPU into this folder.")
    ] = None,
) -> int:
    """Measure the kernels' configs for a model's problems, and keep the fastest.

    Every measurement is kept at once: Ctrl-C loses nothing, and the same command goes on where it was. The time goes
    where the model's goes. Under torchrun (torchrun --nproc-per-node 8 -m fastconv.cli.tune ...) ranks divide the
    problems; one whose GPU cannot measure says so, and the others divide its problems too. (When the process of a rank
    ends, torchrun stops the others, and starts all again as often as --max-restarts says.) Exit code 1 when a kernel's
    result is wrong; under torchrun it is rank 0's.
    """
    from fastconv.cli.options import dtype_option, gpu_here, gpu_option

    sources: dict[str, object] = {"--model": model, "--layers": layers, "--from-log": from_log}
    given = [name for name, value in sources.items() if value]
    if len(given) > 1:
        raise BadUsage(f"{' and '.join(given)} exclude each other")
    if not given and not report and write_table is None:
        raise BadUsage(f"tune what? One of {', '.join(sources)}; or --report, --write-table")
    if not given and (lock is not None or dry_run):
        raise BadUsage(f"{'--lock' if lock else '--dry-run'} needs one of {', '.join(sources)}")
    if lock is not None and from_log:
        raise BadUsage("--lock is of a model or a layer list")
    of_layers: dict[str, object] = {"--batch": batch, "--dtype": dtype, "--train": train}
    for name in (name for name, value in of_layers.items() if value and not (model or layers)):
        raise BadUsage(f"{name} says something of a model or a layer list")
    if size is not None and not model:
        raise BadUsage("--size needs --model")
    options = Options(
        *(model, layers, from_log, batch or 64, size, dtype_option(dtype or "bfloat16"), train),
        *(_spaces(kernel), _seconds(budget), top_k, again, report, lock, write_table),
    )
    if gpu is not None and not (dry_run or report or lock or write_table):
        raise BadUsage("--gpu measures nothing: add --dry-run, --report, --lock or --write-table")
    _check_named(options)
    if lock is not None:
        if lock.is_dir():
            raise BadUsage(f"--lock {lock}: a folder, not a file")
        _check_writable(lock.parent, f"--lock {lock}")
    if write_table is not None:
        _check_writable(write_table, f"--write-table {write_table}")
    try:
        store = user_store()
        if given and not dry_run and gpu is None:
            return _measure(options, store)
        target = gpu_option(gpu) if gpu else gpu_here()
        tasks = collect(options, store, target) if given else []
        if dry_run:
            from fastconv.cli.tune_screen import foretold
            from fastconv.kernels.dispatch import ADAPTER

            known = tables(target, ADAPTER)
            for line in foretold(tasks, known, target, options.top_k, options.budget, options.again):
                _screen(True).print(line)
        _write(tasks, options, target, store)
        return 0
    except (SchemaError, OSError) as error:  # the store's, or those of a lock file in force
        raise BadUsage(str(error)) from error


@dataclass(frozen=True)
class Options:
    """What is to be tuned, for how long, and what is written then."""

    model: str | None
    layers: str | None
    from_log: bool
    batch: int
    size: int | None
    dtype: torch.dtype
    train: bool
    spaces: tuple[str, ...]
    budget: float
    top_k: int
    again: bool
    report: bool
    lock: Path | None
    table: Path | None  # its folder

    @property
    def name(self) -> str:
        """The name of what is tuned, as a lock file has it."""
        name = self.model or Path(self.layers or "").stem
        size = f" {self.size}px" if self.size else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{name} batch {self.batch}{size} {dtype} {'training' if self.train else 'inference'}"


def collect(options: Options, store: Store, gpu: Gpu) -> list[TuningTask]:
    """The problems that have a choice. Raises BadUsage if there are none."""
    from fastconv.benchmarks import layer_lists, models
    from fastconv.measuring import reason
    from fastconv.tuning import problems

    left: list[str] = []
    if options.model is not None:
        with bad_usage():
            loaded = models.load(options.model, options.batch, options.size)
        try:
            tasks = problems.of_model(loaded, options.dtype, options.train, gpu)
        except Exception as error:  # the network's own code: anything
            raise BadUsage(loaded.refusal(error)) from error
    elif options.layers is not None:
        with bad_usage():
            calls = layer_lists.find(options.layers).calls
        try:
            tasks = problems.of_layers(calls, options.batch, options.dtype, options.train, gpu)
        except Exception as error:  # PyTorch's: some lists are possible only for one image
            raise BadUsage(f"{options.layers} does not run on a batch of {options.batch}: {reason(error)}") from error
    else:
        tasks, left = problems.met([record for record in store.read(("met",)) if isinstance(record, Untuned)], gpu)
    if options.spaces:
        tasks = [task for task in tasks if task.question.space.name in options.spaces]
    if not tasks:
        why = f" ({left[0]})" if left else ""
        what = f" of {', '.join(options.spaces)}" if options.spaces else ""
        where = "in the log, none" if options.from_log else "none"
        raise BadUsage(f"of the problems{what} for the {gpu.name} {where} has configs to choose from{why}")
    return tasks


def _measure(options: Options, store: Store) -> int:
    """Tune on this machine's GPU, with the other ranks of the job if there are any; the exit code."""
    from fastconv.cli import refuse, tune_screen
    from fastconv.measuring.process import Worker, WorkerError
    from fastconv.tuning import sharing
    from fastconv.tuning.run import WAIT, able

    started = time.monotonic()
    failures: Counter[str] = Counter()
    why_not = None
    with Worker(worker_command(sharing.local_rank())) as worker:
        _check_writable(store.folder, f"{store.folder} (FASTCONV_CACHE_DIR names another place)", make=True)
        try:
            ranks = sharing.join()
            try:
                measuring = able(ranks, worker)
                tasks, records = _tune(options, store, worker, measuring, started)
                failed = [it for it in records if isinstance(it, Measured) and it.seconds is None and it.config]
                failures.update(it.status for it in failed)
                if measuring.leads:
                    found = [it for it in records if isinstance(it, Tuned)]
                    for line in tune_screen.found(tasks, found, time.monotonic() - started, failures):
                        _screen(True).print(line)
                    _write(tasks, options, worker.gpu, store)
            except WorkerError as error:
                if len(ranks.members) == 1:
                    raise
                why_not = str(error)
            # torchrun stops what still runs at an exit code other than 0, so only rank 0 has one, when all are done.
            left = max(0.0, started + options.budget - time.monotonic())
            why_nots = ranks.exchange("left", why_not, left + 2 * WAIT, leave=True)
            codes = [refuse(f"rank {rank}: {why}") for rank, why in why_nots.items() if why]
            return 1 if failures["wrong"] and ranks.leads else max(codes, default=0)
        except (WorkerError, sharing.RunLost) as error:
            raise BadUsage(str(error)) from error


def _tune(
    options: Options, store: Store, worker: Worker, ranks: Ranks, started: float
) -> tuple[list[TuningTask], list[Record]]:
    """(the problems, what was measured and found of them). Raises BadUsage, WorkerError, RunLost."""
    from fastconv.cli.tune_screen import Watch
    from fastconv.kernels.compile.ahead import cores
    from fastconv.kernels.dispatch import ADAPTER
    from fastconv.measuring.compiling import Compiler
    from fastconv.measuring.runner import WorkerRunner
    from fastconv.tuning import sharing
    from fastconv.tuning.run import divide, run

    gpu = worker.gpu
    screen = _screen(ranks.leads)
    tasks = collect(options, store, gpu)
    known = tables(gpu, ADAPTER)
    exact = [known.user.exact(task.question.problem, task.question.version) for task in tasks]
    part = divide(ranks, tasks, [entry for entry in exact if entry is not None], gpu, options.again)
    with contextlib.ExitStack() as stack:
        compiler = stack.enter_context(Compiler(gpu, max(1, cores() // sharing.local_world_size())))
        compiler.compile_ahead((task.question for task in part.tasks), options.top_k)
        screen.print(
            f"{options.name if not options.from_log else 'What programs met'} on the {gpu.name}: "
            f"{len(tasks)} problems, {len(tasks) - part.left} of them tuned already"
            + ("; its times mean nothing" if gpu.emulated else "")
        )
        watch = stack.enter_context(Watch(screen, len(part.tasks), started + options.budget))
        records = run(
            part,
            lambda question: WorkerRunner(question, worker, compiler.footprints),
            store,
            max(1.0, started + options.budget - time.monotonic()),
            ranks,
            merge=sharing.local_rank() == 0,
            again=options.again,
            top_k=options.top_k,
            fastconv=written_by(),
            seeds=lambda question: known.seeds(question.problem),
            tell=watch.tell,
        )
    reload()
    return tasks, records


def worker_command(device: int) -> list[str]:
    """The command that measures on the GPU of this index. Raises BadUsage without a GPU."""
    from fastconv.cli.interpreter import gpu_present
    from fastconv.measuring.process import COMMAND

    if not gpu_present():
        raise BadUsage("PyTorch sees no GPU to measure on; --dry-run --gpu H200 says what would be tuned on one")
    return [*COMMAND, "--device", str(device)]


def _write(tasks: Sequence[TuningTask], options: Options, gpu: Gpu, store: Store) -> None:
    """What is asked for beside tuning: the report, a lock file, this GPU's table."""
    from fastconv.cli.tune_screen import ranked
    from fastconv.kernels.dispatch import ADAPTER, version_of

    if options.report:
        for line in ranked(store, gpu):
            _screen(True).print(line)
    known = tables(gpu, ADAPTER)
    current = [
        entry
        for entry in Table([*known.shipped.entries, *known.user.entries]).entries
        if entry.version == version_of(entry.problem.space)
    ]
    if options.lock is not None:
        wanted = {task.question.problem for task in tasks}
        locked = [entry for entry in current if entry.problem in wanted]
        _publish(options.lock, locked, options.name)
        told = f"{len(locked)} of {len(wanted)} problems; FASTCONV_LOCK={options.lock} makes programs use them"
        print(f"{options.lock}: {told}")
    if options.table is not None:
        path = options.table / file_name(gpu.name)
        _publish(path, current, None)
        print(f"{path}: {len(current)} problems")


def _publish(path: Path, entries: Sequence[Tuned], model: str | None) -> None:
    if not entries:
        raise BadUsage(f"{path}: nothing of it is tuned yet for this GPU; nothing was written")
    try:
        write_tuned(path, entries, written_by(), now(), model and named(model))
    except OSError as error:
        raise BadUsage(f"{path}: cannot be written: {error.strerror or error}") from error


def written_by() -> str:
    """The version, with the commit if it is known."""
    import fastconv
    from fastconv.benchmarks.report.results import commit

    known = commit()
    return f"{fastconv.__version__}+{known}" if known else fastconv.__version__


def _seconds(text: str) -> float:
    """``90s``, ``10m``, ``1.5h``, or seconds. Raises BadUsage."""
    match = re.fullmatch(r"(-?\d{1,9}(?:\.\d+)?)([smh]?)", text.strip())
    if match is None:
        raise BadUsage(f"--budget {text!r}: a time is expected, as 90s, 10m or 1h")
    seconds = float(match[1]) * UNITS[match[2] or "s"]
    if seconds < 1:
        raise BadUsage(f"--budget {text}: nothing can be measured in less than a second")
    return seconds


def _spaces(names: Sequence[str] | None) -> tuple[str, ...]:
    """The names of search spaces. Raises BadUsage with those there are."""
    from fastconv.kernels.dispatch import declared_spaces

    wanted = [name for value in names or () for name in value.split(",")]
    known = declared_spaces()
    for name in wanted:
        if name not in known:
            raise BadUsage(f"--kernel {name!r} is not one of {', '.join(known)}")
    return tuple(wanted)


def _check_named(options: Options) -> None:
    """Raise BadUsage, before a GPU is taken, if no model or layer list has the user's name."""
    from fastconv.benchmarks import layer_lists, models

    with bad_usage():
        if options.model is not None:
            models.find(options.model)
        if options.layers is not None:
            layer_lists.find(options.layers)


def _check_writable(folder: Path, name: str, make: bool = False) -> None:
    """Raise BadUsage, of ``name``, if no file can be made in ``folder``; ``make``: make the folder first."""
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadUsage(f"{name}: cannot be written ({error.strerror or error})") from error


def _screen(speaks: bool) -> Any:
    from rich.console import Console

    from fastconv.benchmarks.report.console import console

    return console() if speaks else Console(quiet=True)


if __name__ == "__main__":
    from fastconv.cli import main

    sys.argv[1:1] = ["tune"]
    main()
