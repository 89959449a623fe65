"""``fastconv check``: every kernel against PyTorch on this machine."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from fastconv.cli.errors import BadUsage

WRONG = "[bold red]WRONG[/]"  # in place of a precision's largest error


def check(quick: Annotated[bool, typer.Option("--quick", help="The most telling problems alone.")] = False) -> int:
    """Run every kernel and compare with PyTorch in fp64: forward and every gradient, each precision, telling problems.

    On a GPU, or without one on Triton's interpreter. Exit code 1 when a kernel is wrong.
    """
    import torch

    from fastconv.benchmarks.report.console import Progress, console
    from fastconv.kernels.launch import interpreter
    from fastconv.kernels.launch.device import here

    gpu = here.is_available() and not interpreter.interpreting()
    if not gpu and not interpreter.interpreting():
        raise BadUsage("PyTorch sees no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU")
    device = here.at() if gpu else torch.device("cpu")
    screen = console()
    where = here.get_device_name() if gpu else "the CPU, by Triton's interpreter (TF32 is not modelled there)"
    screen.print(f"Every kernel against PyTorch in fp64, on {where}.")
    with Progress(screen) as progress:
        rows = compare_all(device, quick, progress)
    for table in tables(rows):
        screen.print(table)
    wrong = sum(not row["right"] for row in rows)
    screen.print(f"{len(rows)} results compared, {wrong} wrong.")
    return 1 if wrong else 0


def compare_all(device: Any, quick: bool, progress: Any) -> list[dict[str, Any]]:
    """A row for each operator, problem, precision and result; a problem that raises has one row."""
    from fastconv.benchmarks import checks
    from fastconv.benchmarks.checks.check import compare, precisions
    from fastconv.benchmarks.measure import compile_first
    from fastconv.measuring import reason

    problems = [
        (each, case, precision)
        for each in checks.CHECKS
        for case in each.cases
        for precision in precisions(device)
        if (case.quick or not quick) and precision in (case.precisions or (precision,))
    ]

    def rows_of(each: Any, case: Any, precision: str) -> list[dict[str, Any]]:
        try:
            return list(compare(each, case, precision, device))
        except Exception as error:  # a row of the table, not its end
            row = dict.fromkeys(("error", "tolerance"), float("nan")) | {"launches": [], "right": False}
            row |= {"operator": each.name, "case": case.name, "result": "raised", "precision": precision}
            return [row | {"reason": reason(error)}]

    progress.begin("compiling", 1)
    compile_first.compile_kernels(lambda: [rows_of(*problem) for problem in problems])
    progress.begin("problems", len(problems))
    rows: list[dict[str, Any]] = []
    for problem in problems:
        rows += rows_of(*problem)
        progress.tick(problem[1].name)
    return rows


def tables(rows: list[dict[str, Any]]) -> list[Any]:
    """A summary by operator and result, and what was wrong, problem by problem."""
    from rich.table import Table

    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        results.setdefault((row["operator"], row["result"]), []).append(row)
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    summary = Table(title="Kernels against PyTorch: the largest error, in parts of what is allowed")
    for name in ("", "result", "kernels"):
        summary.add_column(name)
    for name in ("problems", "launches", *precisions):
        summary.add_column(name, justify="right")
    summary.add_column("worst problem")
    above = ("", "")
    for (operator, result), members in results.items():
        launches = Counter(name for row in members for name in row["launches"])
        kernels = ", ".join(sorted(name.removesuffix("_kernel") for name in launches))
        same = [said == before for said, before in zip((operator, kernels), above, strict=True)]
        summary.add_row(
            # Names of the row above are left out, except the kernels of another operator.
            *("" if same[0] else operator, result, "" if all(same) else kernels),
            *(str(len(members)), str(sum(launches.values()))),
            *(_worst([row for row in members if row["precision"] == precision]) for precision in precisions),
            max(members, key=_badness)["case"],
        )
        above = operator, kernels
    wrong = [row for row in rows if not row["right"]]
    if not wrong:
        return [summary]
    failures = Table(title="Wrong")
    for name in ("operator", "problem", "result", "precision", "error", "allowed", "why"):
        failures.add_column(name)
    for row in wrong:
        why = row.get("reason") or ("too far off" if row["launches"] else "no kernel ran")
        values = (row[name] for name in ("operator", "case", "result", "precision"))
        failures.add_row(*values, f"{row['error']:.1e}", f"{row['tolerance']:.1e}", why)
    return [summary, failures]


def _worst(rows: list[dict[str, Any]]) -> str:
    if not all(row["right"] for row in rows):
        return WRONG
    return f"{max(map(_badness, rows))[1]:.2f}" if rows else ""


def _badness(row: dict[str, Any]) -> tuple[bool, float]:
    """The key that finds the worst row: the error in parts of what is allowed, a NaN over any number."""
    return row["error"] != row["error"], row["error"] / row["tolerance"]
