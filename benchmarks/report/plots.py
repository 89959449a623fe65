"""A result file as plots, one PNG for each part with something to show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastconv.benchmarks.report.results import Part


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots of the result document ``data`` into ``folder`` and return their paths."""
    written = []
    for part in data["parts"]:
        plot = PLOTS.get(part["kind"])
        if plot is None or not _has_content(part):
            continue
        figure = Figure(figsize=(9, 5), layout="constrained")  # not pyplot: it would look for a display
        plot(figure, part)
        mark = "DRY RUN: times mean nothing\n" if data["dry_run"] else ""
        figure.suptitle(f"{mark}{part['title']}\n{data['environment'].get('gpu') or 'no GPU'}", fontsize=10)
        path = folder / f"{part['id']}.png"
        figure.savefig(path, dpi=150)
        written.append(path)
    return written


def _has_content(part: Part) -> bool:
    timed = {"time": "step_ms", "operators": "speed", "targets": "mean", "blocks": "noise"}.get(part["kind"])
    return timed is None or any(row.get(timed) is not None for row in part["rows"])


def _training(figure: Figure, part: Part) -> None:
    plain, ours = part["losses"]["plain"], part["losses"]["fastconv"]
    losses, difference = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    losses.plot(plain, label="PyTorch", linewidth=4, alpha=0.4)
    losses.plot(ours, label="fastconv", linewidth=1)
    losses.set(ylabel="loss")
    losses.legend()
    difference.plot([abs(a - b) for a, b in zip(plain, ours, strict=True)], "k.")
    difference.axhline(part["tolerance"], color="red", linewidth=0.5)
    difference.set_yscale("symlog", linthresh=1e-8)
    difference.set(xlabel="step", ylabel="difference")


def _times(figure: Figure, part: Part) -> None:
    axes = figure.subplots()
    rows = [row for row in part["rows"] if "step_ms" in row][::-1]
    times = [row["step_ms"] for row in rows]
    below = [time["median"] - time["p20"] for time in times]
    above = [time["p80"] - time["median"] for time in times]
    colours = ["tab:green" if row["provider"].startswith("fastconv") else "tab:gray" for row in rows]
    names = [row["provider"] for row in rows]
    axes.barh(names, [time["median"] for time in times], xerr=[below, above], color=colours, capsize=3)
    axes.set(xlabel="milliseconds a step (median, whiskers from the 20th to the 80th percentile)")


def _operators(figure: Figure, part: Part) -> None:
    speeds, shares = figure.subplots(1, 2)
    for direction in dict.fromkeys(row["direction"] for row in part["rows"]):
        rows = [row for row in part["rows"] if row["direction"] == direction and row.get("speed")]
        moved = [row["bytes"] / 1e6 for row in rows]
        speeds.plot(moved, [row["speed"] for row in rows], "o", label=direction, alpha=0.7)
        shares.plot(moved, [row["ceiling"] for row in rows], "o", label=direction, alpha=0.7)
    speeds.axhline(1, color="gray", linewidth=0.5)
    if part["share_target"]:
        shares.axhline(part["share_target"], color="red", linewidth=0.5)
    speeds.set(xscale="log", xlabel="MB", ylabel="speed relative to PyTorch's fastest", ylim=(0, None))
    shares.set(xscale="log", xlabel="MB", ylabel="share of the nearer ceiling (red: owed)", ylim=(0, None))
    speeds.legend()


def _targets(figure: Figure, part: Part) -> None:
    axes = figure.subplots()
    rows = [row for row in part["rows"] if row["mean"] is not None]
    names = [f"{row['direction']}\n{row['measured']} of {row['of']} layers" for row in rows]
    axes.bar(names, [row["mean"] for row in rows], color="tab:green", label="geometric mean")
    axes.plot(names, [row["least"] for row in rows], "kv", label="least")
    axes.plot(names, [row["target"] for row in rows], "r_", markersize=60, label="target of the mean")
    axes.axhline(part["least_target"], color="red", linewidth=0.5, label="target of the least")
    axes.set(ylabel="speed over eager channels_last", ylim=(0, None))
    axes.legend()


def _blocks(figure: Figure, part: Part) -> None:
    rows = [row for row in part["rows"] if row.get("noise") is not None][::-1]
    names = dict.fromkeys(
        provider["provider"] for row in rows for provider in row["providers"] if provider.get("speed")
    )
    figure.set_figheight(max(4.0, 1.5 + 0.25 * len(rows)))
    axes = figure.subplots()
    for name in names:
        speeds = {
            index: provider["speed"]
            for index, row in enumerate(rows)
            for provider in row["providers"]
            if provider["provider"] == name and provider.get("speed")
        }
        axes.plot(list(speeds.values()), list(speeds), "o", label=name)
    axes.axvline(1, color="gray", linewidth=0.5)
    axes.set_yticks(range(len(rows)), [f"{row['block']}, {row['mode']}" for row in rows])
    axes.set(xlabel="speed relative to the first", xlim=(0, None))
    axes.legend()


PLOTS: dict[str, Callable[[Figure, Part], None]] = {
    "training": _training,
    "time": _times,
    "operators": _operators,
    "targets": _targets,
    "blocks": _blocks,
}
