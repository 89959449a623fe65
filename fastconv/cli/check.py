"""``fastconv check``: every kernel against PyTorch on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def check(
    quick: Annotated[bool, typer.Option("--quick", help="Half of the problems.")] = False,
) -> int:
    """Run every kernel and compare with PyTorch in fp64: forward and every gradient, each precision, telling problems.

    On a GPU, or without one on Triton's interpreter. Exit code 1 when a kernel is wrong.
    """
    import torch

    from fastconv.cli import BadUsage
    from fastconv.cli.measure.screen import Progress, console
    from fastconv.kernels import mend

    gpu = torch.cuda.is_available() and not mend.interpreting()
    if not gpu and not mend.interpreting():
        raise BadUsage("PyTorch sees no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU")
    device = torch.device("cuda" if gpu else "cpu")
    screen = console()
    where = torch.cuda.get_device_name() if gpu else "the CPU, by Triton's interpreter (TF32 is not modelled there)"
    screen.print(f"Every kernel against PyTorch in fp64, on {where}.")
    with Progress(screen) as progress:
        rows = compare_all(device, quick, progress)
    for table in tables(rows):
        screen.print(table)
    wrong = sum(not row["right"] for row in rows)
    screen.print(f"{len(rows)} results compared, {wrong} wrong.")
    return 1 if wrong else 0


def compare_all(device: Any, quick: bool, progress: Any) -> list[dict[str, Any]]:
    """A row for each precision, problem and direction; one row alone for a problem that raises."""
    from fastconv.cli.measure import problems
    from fastconv.cli.measure.clock import reason

    cases = problems.QUICK if quick else problems.CASES
    precisions = problems.precisions(device)
    progress.begin("problems", len(cases) * len(precisions))
    rows: list[dict[str, Any]] = []
    for case in cases:
        for precision in precisions:
            try:
                rows += problems.compare(case, precision, device)
            except Exception as error:  # a row of the table, not its end
                row = dict.fromkeys(("error", "tolerance"), float("nan")) | {"launches": [], "right": False}
                row |= {"case": case.name, "function": case.function, "direction": "raised", "precision": precision}
                rows.append(row | {"reason": reason(error)})
            progress.tick(case.name)
    return rows


def tables(rows: list[dict[str, Any]]) -> list[Any]:
    """A summary by direction, precision and kind of convolution, and what was wrong, problem by problem."""
    from rich.table import Table

    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        kind = "transposed" if "transpose" in row["function"] else "convolution"
        groups.setdefault((kind, row["direction"], row["precision"]), []).append(row)
    summary = Table(title="Kernels against PyTorch")
    for name in ("", "direction", "precision", "kernels"):
        summary.add_column(name)
    for name in ("problems", "launches", "error / tolerance", "worst problem", ""):
        summary.add_column(name, justify="left" if name in ("worst problem", "") else "right")
    for (kind, direction, precision), members in sorted(groups.items()):
        # A NaN is worse than any number.
        worst = max(members, key=lambda row: (row["error"] != row["error"], row["error"] / row["tolerance"]))
        summary.add_row(
            *(kind, direction, precision, ", ".join(sorted({name for row in members for name in row["launches"]}))),
            *(str(len(members)), str(sum(len(row["launches"]) for row in members))),
            f"{worst['error']:.1e} / {worst['tolerance']:.1e}",
            worst["case"],
            "right" if all(row["right"] for row in members) else "[bold red]WRONG",
        )
    wrong = [row for row in rows if not row["right"]]
    if not wrong:
        return [summary]
    failures = Table(title="Wrong")
    for name in ("problem", "function", "direction", "precision", "error", "tolerance", "why"):
        failures.add_column(name)
    for row in wrong:
        why = row.get("reason") or ("too far off" if row["launches"] else "no kernel ran")
        values = (row[name] for name in ("case", "function", "direction", "precision"))
        failures.add_row(*values, f"{row['error']:.1e}", f"{row['tolerance']:.1e}", why)
    return [summary, failures]
