"""A result file as plots, one PNG for each part that has something to show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastconv.cli.measure.results import Part


def draw(data: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots of the result document ``data`` into ``folder`` and return their paths."""
    written = []
    for part in data["parts"]:
        plot = PLOTS.get(part["kind"])
        if plot is None or not _has_content(part):
            continue
        figure = Figure(figsize=(9, 5), layout="constrained")  # not pyplot: it would look for a display
        axes = figure.subplots()
        plot(axes, part)
        mark = "DRY RUN: times mean nothing\n" if data["dry_run"] else ""
        axes.set_title(f"{mark}{part['title']}\n{data['environment'].get('gpu') or 'no GPU'}", fontsize=10)
        path = folder / f"{part['id']}.png"
        figure.savefig(path, dpi=150)
        written.append(path)
    return written


def _has_content(part: Part) -> bool:
    timed = {"time": "step_ms", "layers": "speed"}.get(part["kind"])
    return timed is None or any(timed in row for row in part["rows"])


def _training(axes: Axes, part: Part) -> None:
    plain, ours = part["losses"]["plain"], part["losses"]["fastconv"]
    axes.plot(plain, label="PyTorch", linewidth=4, alpha=0.4)
    axes.plot(ours, label="fastconv", linewidth=1)
    axes.set(xlabel="step", ylabel="loss")
    difference = axes.twinx()
    difference.semilogy([max(abs(a - b), 1e-9) for a, b in zip(plain, ours, strict=True)], "k:", label="difference")
    difference.axhline(part["tolerance"], color="red", linewidth=0.5)
    difference.set(ylabel="difference (red: allowed)", ylim=(1e-9, 1))
    axes.legend(loc="upper right")


def _times(axes: Axes, part: Part) -> None:
    rows = [row for row in part["rows"] if "step_ms" in row][::-1]
    _bars(axes, [row["provider"] for row in rows], [row["step_ms"] for row in rows])
    axes.set(xlabel="milliseconds a step (median, whiskers from the 20th to the 80th percentile)")


def _bars(axes: Axes, names: list[str], times: list[dict[str, Any]]) -> None:
    medians = [time["median"] for time in times]
    below = [time["median"] - time["p20"] for time in times]
    above = [time["p80"] - time["median"] for time in times]
    colours = ["tab:green" if name.startswith("fastconv") else "tab:gray" for name in names]
    axes.barh(names, medians, xerr=[below, above], color=colours, capsize=3)


def _layers(axes: Axes, part: Part) -> None:
    for direction, marker in (("fprop", "o"), ("dgrad", "s"), ("wgrad", "^")):
        rows = [row for row in part["rows"] if row["direction"] == direction and "speed" in row]
        axes.plot(
            [row["flops"] / row["bytes"] for row in rows], [row["speed"] for row in rows], marker, label=direction
        )
    axes.axhline(1, color="gray", linewidth=0.5)
    axes.axhline(part["target"], color="red", linewidth=0.5)
    axes.set(xscale="log", xlabel="FLOP per byte", ylabel="speed relative to cuDNN (red: the target)", ylim=(0, None))
    axes.legend()


PLOTS: dict[str, Callable[[Axes, Part], None]] = {"training": _training, "time": _times, "layers": _layers}
