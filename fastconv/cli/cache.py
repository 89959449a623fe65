"""``fastconv cache``: what was measured on this machine: list, show, export, import, merge, clear, verify."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastconv.autotune import Measured, SchemaError, Store, Tuned, Untuned
from fastconv.autotune.records import Record
from fastconv.autotune.store import MAX_LINE, read_lines
from fastconv.autotune.table import Table, read_table
from fastconv.cli.errors import BadUsage


class Action(str, Enum):
    list = "list"
    show = "show"
    export = "export"
    import_ = "import"
    merge = "merge"
    clear = "clear"
    verify = "verify"


FILES = (Action.export, Action.import_, Action.verify)  # that take a file


def cache(
    action: Annotated[Action, typer.Argument(help="What to do.")],
    argument: Annotated[
        str | None, typer.Argument(help="export, import, verify: a file. show: words that a problem's line holds.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="show, export, import: of this GPU alone (H200, or as list has its name); import: or all."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="clear: without asking.")] = False,
) -> int:
    """What tuning found on this machine, in FASTCONV_CACHE_DIR.

    list: how much of which GPU. show: each problem's winner. export, import: all of it as a file, or what is of one
    GPU; import takes lock files and tables too, and what is of this machine's GPU unless --gpu says otherwise. merge:
    the files of ended processes become one. clear: remove all. verify: whether all of it, or a file, can be read; exit
    code 1 where not.
    """
    if argument is None and action in (Action.export, Action.import_):
        raise BadUsage(f"cache {action.value} needs a file: fastconv cache {action.value} FILE")
    if argument is not None and action not in (*FILES, Action.show):
        raise BadUsage(f"cache {action.value} takes no {argument!r}")
    if gpu is not None and action not in (Action.show, Action.export, Action.import_):
        raise BadUsage(f"cache {action.value} takes no --gpu")
    if yes and action is not Action.clear:
        raise BadUsage(f"cache {action.value} takes no --yes")
    store = Store()
    try:
        if action is Action.list:
            return _list(store)
        if action is Action.show:
            return _show(store, argument or "", gpu)
        if action is Action.verify:
            return _verify(store, argument)
        if action is Action.import_:
            return _import(store, Path(str(argument)), gpu)
        if action is Action.export:
            records = store.read()
            count = store.export(Path(str(argument)), filter(_of(gpu, records), records))
            print(f"{count} records written to {argument}")
        elif action is Action.merge:
            count = store.merge()
            print(f"{count} files merged into one" if count else "nothing to merge")
        else:
            print(f"{_clear(store, yes)} files removed from {store.folder}")
        return 0
    except OSError as error:
        where = error.filename or argument or store.folder
        raise BadUsage(f"cache {action.value}: {where}: {error.strerror or error}") from error


def _list(store: Store) -> int:
    from fastconv.benchmarks.report.console import console
    from fastconv.benchmarks.report.tables import new_table

    records = store.read()
    size = sum(path.stat().st_size for path in _files(store))
    print(f"{store.folder}: {len(records)} records in {len(_files(store))} files, {size / 1e6:.1f} MB")
    if not records:
        return 0
    current = _versions(records)
    table = new_table("GPU", "kernels", "tuned", "stale", "measurements", "failures", "met untuned", "last")
    groups: dict[tuple[str, int, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.gpu, record.multiprocessors, record.problem.space].append(record)
    for (name, multiprocessors, space), group in sorted(groups.items()):
        tuned = {(r.problem, r.version) for r in group if isinstance(r, Tuned)}
        fresh = {problem for problem, version in tuned if version == current[space]}
        counts = Counter(type(record).__name__ for record in group)
        failed = sum(isinstance(r, Measured) and r.status != "ok" for r in group)
        met = {r.problem for r in group if isinstance(r, Untuned)} - fresh
        table.add_row(
            f"{name}, {multiprocessors} multiprocessors",
            space,
            *(str(n) for n in (len(fresh), len(tuned) - len(fresh), counts["Measured"] - failed, failed, len(met))),
            max(str(getattr(record, "date", "")) for record in group),
        )
    console().print(table)
    return 0


def _show(store: Store, words: str, gpu: str | None) -> int:
    from fastconv.benchmarks.report.tables import tile_text

    records = [record for record in store.read(("tuned",)) if isinstance(record, Tuned)]
    by_gpu: dict[tuple[str, int], list[Tuned]] = defaultdict(list)
    for record in filter(_of(gpu, records), records):
        by_gpu[record.gpu, record.multiprocessors].append(record)
    current = _versions(records)
    shown = 0
    for (name, multiprocessors), group in sorted(by_gpu.items()):
        print(f"{name}, {multiprocessors} multiprocessors")
        for entry in sorted(Table(group).entries, key=lambda entry: entry.problem.describe()):
            line = entry.problem.describe()
            if not all(word in line for word in words.split()):
                continue
            shown += 1
            said = [f"{tile_text(dict(entry.config)) or 'its one tile'} {_us(entry.seconds)}"]
            if entry.config != entry.default:
                said.append(f"default {tile_text(dict(entry.default))} {_us(entry.default_seconds)}")
            said += [] if entry.pytorch is None else [f"PyTorch {_us(entry.pytorch)}"]
            said += [f"noise {entry.noise:.1%}", entry.date]
            said += [] if entry.version == current[entry.problem.space] else ["stale"]
            print(f"  {line}: {', '.join(said)}")
    print(f"{shown} problems" + (f" with {words!r}" if words else ""))
    return 0


def _verify(store: Store, argument: str | None) -> int:
    from fastconv.autotune.table import FOLDER

    found: list[str] = []
    if argument is not None:
        try:
            count = len(_read(Path(argument)))
        except SchemaError as error:
            found = [str(error)]
        else:
            print(f"{argument}: {count} records, all sound")
    else:
        found = store.damage()
        for path in sorted(FOLDER.glob("*.json")):
            try:
                read_table(path)
            except SchemaError as error:
                found.append(str(error))
        if not found:
            print(f"{store.folder}: {len(store.read())} records, all sound; so are the shipped tables")
    for line in found:
        print(line)
    return 1 if found else 0


def _import(store: Store, path: Path, gpu: str | None) -> int:
    """Add a file's records: all of it or nothing."""
    from fastconv.kernels import dispatch
    from fastconv.kernels.launch import interpreter
    from fastconv.kernels.launch.device import here

    try:
        records = _read(path)
    except SchemaError as error:
        raise BadUsage(str(error)) from error
    if gpu is not None:
        wanted, name = _of(gpu, records), gpu
    elif here.is_available() and not interpreter.interpreting():
        own = dispatch.target(here.at())
        wanted, name = lambda record: record.of_gpu(own), f"{own.name} with {own.multiprocessors}"
    else:
        raise BadUsage("cache import: PyTorch sees no GPU; --gpu H200 names the one that the file is for, or all")
    others = sorted({f"{r.gpu} with {r.multiprocessors} multiprocessors" for r in records if not wanted(r)})
    if others:
        raise BadUsage(
            f"{path} is of the {' and the '.join(others)}, not of the {name} alone; --gpu all takes every GPU's; "
            "nothing was imported"
        )
    new = store.add(records)
    current = _versions(records)
    stale = sum(isinstance(r, Tuned) and r.version != current[r.problem.space] for r in records)
    print(f"{new} of {len(records)} records were new" + (f"; {stale} are of other versions and seed" if stale else ""))
    return 0


def _of(gpu: str | None, records: Iterable[Record]) -> Callable[[Record], bool]:
    """Which records are of ``gpu``: those with this very name, else those of the known GPU that is called so. None and
    "all" take any. Raises BadUsage with the names there are."""
    from fastconv.cli.options import gpu_option

    if gpu is None or gpu == "all":
        return lambda record: True
    recorded = sorted({record.gpu for record in records})
    if gpu in recorded:
        return lambda record: record.gpu == gpu
    try:
        known = gpu_option(gpu)
    except BadUsage as error:
        raise BadUsage(f"{error}; recorded are {', '.join(recorded) or 'none'}") from error
    return lambda record: record.of_gpu(known)


def _read(path: Path) -> Sequence[Record]:
    """The records of an export, a table or a lock file. Raises SchemaError, OSError."""
    # A table is one object, however its lines are broken. Each line of an export says what record it is.
    with path.open("rb") as file:
        head = file.read(MAX_LINE).strip()
    return read_lines(path) if b'"record"' in head or not head else read_table(path)


def _clear(store: Store, yes: bool) -> int:
    import sys

    count = len(_files(store))
    if not yes and count:
        if not sys.stdin.isatty():
            raise BadUsage(f"cache clear would remove {count} files from {store.folder}; --yes removes them")
        typer.confirm(f"Remove {count} files from {store.folder}?", abort=True)
    return store.clear()


def _versions(records: Sequence[Record]) -> dict[str, Any]:
    """The version that measurements have now, for each space of the records."""
    from fastconv.kernels.dispatch import version_of

    return {space: version_of(space) for space in {record.problem.space for record in records}}


def _files(store: Store) -> list[Path]:
    return sorted(store.folder.glob("*.jsonl"))


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"
