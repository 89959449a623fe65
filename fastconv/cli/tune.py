"""``fastconv tune``: finds the fastest tile of each kernel for the problems of a model, on the GPU that is here."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from fastconv.autotune import Gpu, Store, Tuned
    from fastconv.autotune.records import Record
    from fastconv.autotune.tune import TuningTask
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
    from fastconv.autotune import SchemaError
    from fastconv.autotune.known import store as user_store
    from fastconv.cli import options
    from fastconv.cli.errors import BadUsage

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
    wishes = Wishes(
        *(model, layers, from_log, batch or 64, size, options.dtype(dtype or "bfloat16"), train),
        *(_spaces(kernel), _seconds(budget), top_k, again),
    )
    if gpu is not None and not (dry_run or report or lock or write_table):
        raise BadUsage("--gpu measures nothing: add --dry-run, --report, --lock or --write-table")
    _check_named(wishes)
    if lock is not None:
        if lock.is_dir():
            raise BadUsage(f"--lock {lock}: a folder, not a file")
        _check_writable(lock.parent, f"--lock {lock}")
    if write_table is not None:
        _check_writable(write_table, f"--write-table {write_table}")
    try:
        store = user_store()
        if given and not dry_run and gpu is None:
            return _measure(wishes, store, report, lock, write_table)
        target = options.gpu(gpu) if gpu else _here()
        tasks = collect(wishes, store, target) if given else []
        if dry_run:
            from fastconv.autotune.known import tables
            from fastconv.cli import tuned

            known = tables(target, _caller())
            for line in tuned.foretold(tasks, known, target, wishes.top_k, wishes.budget, wishes.again):
                _screen(True).print(line)
        _write(tasks, wishes, target, store, report, lock, write_table)
        return 0
    except (SchemaError, OSError) as error:  # of a lock file that is in force, of the store
        raise BadUsage(str(error)) from error


@dataclass(frozen=True)
class Wishes:
    """What is to be tuned, and for how long."""

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

    @property
    def name(self) -> str:
        """Of what is tuned, as a lock file has it."""
        name = self.model or Path(self.layers or "").stem
        size = f" {self.size}px" if self.size else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{name} batch {self.batch}{size} {dtype} {'training' if self.train else 'inference'}"


def collect(wishes: Wishes, store: Store, gpu: Gpu) -> list[TuningTask]:
    """The problems that have a choice. Raises BadUsage where there are none."""
    from fastconv.autotune import Untuned
    from fastconv.benchmarks import layer_lists, models
    from fastconv.cli.errors import BadUsage, bad_usage
    from fastconv.measuring import reason
    from fastconv.tuning import problems

    left: list[str] = []
    if wishes.model is not None:
        with bad_usage():
            loaded = models.load(wishes.model, wishes.batch, wishes.size)
        try:
            tasks = problems.of_model(loaded, wishes.dtype, wishes.train, gpu)
        except Exception as error:  # the network's own code: anything
            raise BadUsage(loaded.refusal(error)) from error
    elif wishes.layers is not None:
        with bad_usage():
            calls = layer_lists.find(wishes.layers).calls
        try:
            tasks = problems.of_layers(calls, wishes.batch, wishes.dtype, wishes.train, gpu)
        except Exception as error:  # PyTorch's, of what is possible for one image alone
            raise BadUsage(f"{wishes.layers} does not run on a batch of {wishes.batch}: {reason(error)}") from error
    else:
        tasks, left = problems.met([record for record in store.read(("met",)) if isinstance(record, Untuned)], gpu)
    if wishes.spaces:
        tasks = [task for task in tasks if task.question.space.name in wishes.spaces]
    if not tasks:
        why = f" ({left[0]})" if left else ""
        what = f" of {', '.join(wishes.spaces)}" if wishes.spaces else ""
        where = "in the log, none" if wishes.from_log else "none"
        raise BadUsage(f"of the problems{what} for the {gpu.name} {where} has configs to choose from{why}")
    return tasks


def _measure(wishes: Wishes, store: Store, report: bool, lock: Path | None, write_table: Path | None) -> int:
    """Tune on the GPU that is here, with the other ranks of the job if there are any; the exit code."""
    from fastconv.autotune import Measured, Tuned
    from fastconv.cli import refuse, tuned
    from fastconv.cli.errors import BadUsage
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
                tasks, records = _tune(wishes, store, worker, measuring, started)
                failed = [it for it in records if isinstance(it, Measured) and it.seconds is None and it.config]
                failures.update(it.status for it in failed)
                if measuring.leads:
                    found = [it for it in records if isinstance(it, Tuned)]
                    for line in tuned.found(tasks, found, time.monotonic() - started, failures):
                        _screen(True).print(line)
                    _write(tasks, wishes, worker.gpu, store, report, lock, write_table)
            except WorkerError as error:
                if len(ranks.members) == 1:
                    raise
                why_not = str(error)
            # Another exit code than 0 has torchrun stop what still runs: it is rank 0's, when all are done.
            left = max(0.0, started + wishes.budget - time.monotonic())
            why_nots = ranks.exchange("left", why_not, left + 2 * WAIT, leave=True)
            codes = [refuse(f"rank {rank}: {why}") for rank, why in why_nots.items() if why]
            return 1 if failures["wrong"] and ranks.leads else max(codes, default=0)
        except (WorkerError, sharing.RunLost) as error:
            raise BadUsage(str(error)) from error


def _tune(
    wishes: Wishes, store: Store, worker: Worker, ranks: Ranks, started: float
) -> tuple[list[TuningTask], list[Record]]:
    """(the problems, what was measured and found of them). Raises BadUsage, WorkerError, RunLost."""
    from contextlib import ExitStack

    from fastconv.autotune.known import reload, tables
    from fastconv.cli import tuned
    from fastconv.kernels.compile import cores
    from fastconv.measuring.compiling import Compiler
    from fastconv.measuring.runner import WorkerRunner
    from fastconv.tuning import sharing
    from fastconv.tuning.run import divide, run

    gpu = worker.gpu
    screen = _screen(ranks.leads)
    tasks = collect(wishes, store, gpu)
    known = tables(gpu, _caller())
    exact = [known.user.exact(task.question.problem, task.question.version) for task in tasks]
    part = divide(ranks, tasks, [entry for entry in exact if entry is not None], gpu, wishes.again)
    with ExitStack() as stack:
        compiler = stack.enter_context(Compiler(gpu, max(1, cores() // sharing.local_world_size())))
        compiler.ahead((task.question for task in part.tasks), wishes.top_k)
        screen.print(
            f"{wishes.name if not wishes.from_log else 'What programs met'} on the {gpu.name}: "
            f"{len(tasks)} problems, {len(tasks) - part.left} of them tuned already"
        )
        watch = stack.enter_context(tuned.Watch(screen, len(part.tasks), started + wishes.budget))
        records = run(
            part,
            lambda question: WorkerRunner(question, worker, compiler.footprints),
            store,
            max(1.0, started + wishes.budget - time.monotonic()),
            ranks,
            merge=sharing.local_rank() == 0,
            again=wishes.again,
            top_k=wishes.top_k,
            fastconv=written_by(),
            seeds=lambda question: [
                entry.config for table in (known.user, known.shipped) for entry in table.seeds(question.problem)
            ][:2],
            tell=watch.tell,
        )
    reload()
    return tasks, records


def worker_command(device: int) -> list[str]:
    """What measures on the GPU of this index. Raises BadUsage where there is none."""
    from fastconv.cli.errors import BadUsage
    from fastconv.cli.interpreter import gpu_present
    from fastconv.measuring.process import COMMAND

    if not gpu_present():
        raise BadUsage("PyTorch sees no GPU to measure on; --dry-run --gpu H200 says what would be tuned on one")
    return [*COMMAND, "--device", str(device)]


def _write(
    tasks: Sequence[TuningTask],
    wishes: Wishes,
    gpu: Gpu,
    store: Store,
    report: bool,
    lock: Path | None,
    table: Path | None,
) -> None:
    """What is asked for beside tuning: the report, a lock file, this GPU's table."""
    from fastconv.autotune.known import tables
    from fastconv.autotune.table import Table, file_name
    from fastconv.kernels.tuned import version_of

    if report:
        from fastconv.cli import tuned

        for line in tuned.ranked(store, gpu):
            _screen(True).print(line)
    known = tables(gpu, _caller())
    current = [
        entry
        for entry in Table([*known.shipped.entries, *known.user.entries]).entries
        if entry.version == version_of(entry.problem.space)
    ]
    if lock is not None:
        wanted = {task.question.problem for task in tasks}
        locked = [entry for entry in current if entry.problem in wanted]
        _publish(lock, locked, wishes.name)
        print(f"{lock}: {len(locked)} of {len(wanted)} problems; FASTCONV_LOCK={lock} makes programs use them")
    if table is not None:
        path = table / file_name(gpu.name)
        _publish(path, current, None)
        print(f"{path}: {len(current)} problems")


def _publish(path: Path, entries: Sequence[Tuned], model: str | None) -> None:
    from fastconv.autotune.records import now
    from fastconv.autotune.schema import named
    from fastconv.autotune.table import write_table
    from fastconv.cli.errors import BadUsage

    if not entries:
        raise BadUsage(f"{path}: nothing of it is tuned yet for this GPU; nothing was written")
    try:
        write_table(path, entries, written_by(), now(), model and named(model))
    except OSError as error:
        raise BadUsage(f"{path}: cannot be written: {error.strerror or error}") from error


def written_by() -> str:
    """The version, with the commit where it is known."""
    import fastconv
    from fastconv.benchmarks.report.results import commit

    known = commit()
    return f"{fastconv.__version__}+{known}" if known else fastconv.__version__


def _seconds(text: str) -> float:
    """``90s``, ``10m``, ``1.5h``, or seconds. Raises BadUsage."""
    from fastconv.cli.errors import BadUsage

    match = re.fullmatch(r"(-?\d{1,9}(?:\.\d+)?)([smh]?)", text.strip())
    if match is None:
        raise BadUsage(f"--budget {text!r}: a time is expected, as 90s, 10m or 1h")
    seconds = float(match[1]) * UNITS[match[2] or "s"]
    if seconds < 1:
        raise BadUsage(f"--budget {text}: nothing can be measured in less than a second")
    return seconds


def _spaces(names: Sequence[str] | None) -> tuple[str, ...]:
    """The search spaces of these names. Raises BadUsage with those there are."""
    from fastconv.autotune import Space
    from fastconv.cli.errors import BadUsage
    from fastconv.kernels import tiles

    wanted = [name for value in names or () for name in value.split(",")]
    known = sorted({each.name for each in vars(tiles).values() if isinstance(each, Space)})
    for name in wanted:
        if name not in known:
            raise BadUsage(f"--kernel {name!r} is not one of {', '.join(known)}")
    return tuple(wanted)


def _check_named(wishes: Wishes) -> None:
    """Raise BadUsage where no model or layer list is called as the user has it: before a GPU is taken."""
    from fastconv.benchmarks import layer_lists, models
    from fastconv.cli.errors import bad_usage

    with bad_usage():
        if wishes.model is not None:
            models.find(wishes.model)
        if wishes.layers is not None:
            layer_lists.find(wishes.layers)


def _check_writable(folder: Path, name: str, make: bool = False) -> None:
    """Raise BadUsage, of ``name``, where no file can be made in ``folder``; ``make``: the folder first."""
    import tempfile

    from fastconv.cli.errors import BadUsage

    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadUsage(f"{name}: cannot be written ({error.strerror or error})") from error


def _here() -> Gpu:
    """The GPU of this machine, or where there is none the H200."""
    import torch

    from fastconv.autotune.gpus import H200
    from fastconv.kernels import dispatch

    return dispatch.target(torch.device("cuda", 0)) if torch.cuda.is_available() else H200


def _caller() -> Any:
    from fastconv.kernels.tuned import ADAPTER

    return ADAPTER


def _screen(speaks: bool) -> Any:
    from rich.console import Console

    from fastconv.benchmarks.report.console import console

    return console() if speaks else Console(quiet=True)


if __name__ == "__main__":
    from fastconv.cli import main

    sys.argv[1:1] = ["tune"]
    main()
