"""Where fastconv stands: what the times of a row mean, of an operator's rows together, and for the targets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastconv.benchmarks.calls import ORDER, TOGETHER
from fastconv.benchmarks.registry import EAGER, OURS, OURS_NCHW, Entry, Target
from fastconv.benchmarks.report.results import Part

Row = dict[str, Any]
DOUBTED = 1.1  # a speed over eager's beyond which it is measured again, in another way


@dataclass(frozen=True)
class Ceilings:
    """``bandwidth``: bytes a second, read and written, of a copy too large for any cache; ``matrix``: operations a
    second of a large product of bf16 matrices."""

    bandwidth: float
    matrix: float

    def floor_ms(self, moved: int, flops: int) -> float:
        """The least milliseconds for ``moved`` bytes and ``flops`` operations side by side."""
        return max(moved / self.bandwidth, flops / self.matrix) * 1e3


def complete(row: Row, entry: Entry, ceilings: Ceilings) -> None:
    """Complete a row: speeds over the fastest of PyTorch's, over the rivals and over eager channels_last; rates, shares
    of the ceilings, and what is owed and missed.

    The lower speed of two measurements counts. If the second one failed, the row has no speed and so no win: the first
    one's over eager is "unconfirmed". If eager has no time to measure against again, a doubtful speed over the others
    is "unconfirmed" too."""
    times = {provider["provider"]: provider["ms"]["median"] for provider in row["providers"] if "ms" in provider}
    if row["ours"] not in times or row["status"] != "ok":
        return
    mine = times[row["ours"]]
    theirs = {name: time for name, time in times.items() if not name.startswith(OURS)}
    believed: float | None = 1.0
    if "again" in row:
        again, once = row["again"].get("speed_over_eager"), theirs[EAGER] / mine
        believed = None if again is None else min(1.0, again / once)
        row["unconfirmed"] = once if again is None else None

    def speed(names: Iterable[str]) -> float | None:
        found = [theirs[name] for name in names if name in theirs]
        if not found or believed is None:
            return None
        over = min(found) / mine
        return over * believed if EAGER in theirs or over <= DOUBTED else None

    row["speed"], row["speed_over_rivals"] = speed(theirs), speed(entry.rivals)
    row["speed_over_eager"] = speed([EAGER])
    if theirs and EAGER not in theirs and row["speed"] is None:
        row["unconfirmed"] = min(theirs.values()) / mine
    row["layout_ms"] = times[OURS_NCHW] - mine if OURS_NCHW in times else None
    row["gb_per_s"] = row["bytes"] / mine / 1e6
    row["tflops"] = row["flops"] / mine / 1e9 if row["flops"] else None
    row["share"] = row["bytes"] / mine * 1e3 / ceilings.bandwidth
    row["matrix_share"] = row["flops"] / mine * 1e3 / ceilings.matrix
    row["ceiling"] = ceilings.floor_ms(row["bytes"], row["flops"]) / mine
    missed = [row["speed_over_rivals"] is not None and row["speed_over_rivals"] < entry.speed]
    missed.append(entry.share is not None and row["large"] and row["share"] < entry.share)
    row["missed"] = [what for what, is_missed in zip(("speed", "bandwidth"), missed, strict=True) if is_missed]


def losses_first(row: Row) -> float:
    """The key that sorts rows: wrong ones, then by speed, then those without one."""
    if row["status"] in ("wrong", "failed"):
        return -1.0
    speed = row.get("speed")
    return math.inf if speed is None else speed


def means(rows: Iterable[Row]) -> list[Row]:
    """Geometric means of the speeds over eager channels_last by direction, for each network and for all together,
    weighted by how often a network makes the call."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in _timed(rows):
        for network, count in (*row["networks"].items(), ("all", sum(row["networks"].values()))):
            if count:
                sums = found.setdefault((row["direction"], network, row["batch"]), {"weight": 0, "log": 0.0, "rows": 0})
                sums["weight"] += count
                sums["log"] += count * math.log(row["speed_over_eager"])
                sums["rows"] += 1
    return [
        {"direction": direction, "network": network, "batch": batch, "rows": sums["rows"]}
        | {"speed": math.exp(sums["log"] / sums["weight"])}
        for (direction, network, batch), sums in sorted(found.items(), key=_reading_order)
    ]


def _reading_order(item: tuple[tuple[str, str, int], Any]) -> tuple[Any, ...]:
    direction, network, batch = item[0]
    return network == "all", network, batch, ORDER.index(direction)


def families(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """How many single directions of each kernel family are at least as fast as eager channels_last, how many slower."""
    found: dict[str, dict[str, int]] = {}
    for row in _timed(rows):
        if row["direction"] != TOGETHER:
            counts = found.setdefault(row["family"], {"wins": 0, "losses": 0})
            counts["wins" if row["speed_over_eager"] >= 1 else "losses"] += 1
    return found


def targets(parts: Iterable[Part], target: Target) -> Part | None:
    """The part that says how far ``target`` is met; None if no row is of its layers."""
    rows = [row for part in parts if part["kind"] == "operators" for row in part["rows"]]
    found = []
    for direction, owed in target.means.items():
        wanted = {
            id(row): sum(row["networks"].get(name, 0) for name in target.lists)
            for row in rows
            if row["direction"] == direction and row["batch"] in target.batches
        }
        mine = [row for row in rows if wanted.get(id(row))]
        if mine:
            found.append(_met(direction, owed, target, [(row, wanted[id(row)]) for row in mine]))
    if not found:
        return None
    measured = sum(row["measured"] for row in found)
    return {
        "id": "operators-targets",
        "kind": "targets",
        "title": f"Speed over eager channels_last: layers of {', '.join(target.lists)}, "
        f"batch {' and '.join(map(str, target.batches))}",
        "verdict": "right" if measured else "skipped",
        "reason": None if measured else "nothing measured",
        "least_target": target.least,
        "rows": found,
    }


def _met(direction: str, owed: float, target: Target, rows: list[tuple[Row, int]]) -> Row:
    timed = [(row, count) for row, count in rows if row.get("speed_over_eager")]
    row: Row = {"direction": direction, "target": owed, "measured": len(timed), "of": target.layers(direction)}
    row |= {"mean": None, "least": None, "least_of": None, "met": None}
    if timed:
        weight = sum(count for _, count in timed)
        row["mean"] = math.exp(sum(count * math.log(it["speed_over_eager"]) for it, count in timed) / weight)
        slowest = min((it for it, _ in timed), key=lambda it: it["speed_over_eager"])
        row |= {"least": slowest["speed_over_eager"], "least_of": slowest["operator"]}
        under = row["least"] < target.least
        # Layers that were not measured can still be slow.
        row["met"] = False if under else row["mean"] >= owed if row["measured"] == row["of"] else None
    return row


def _timed(rows: Iterable[Row]) -> Iterable[Row]:
    return (row for row in rows if row.get("speed_over_eager") and row["status"] == "ok")


def verdict(rows: list[Row]) -> Mapping[str, Any]:
    """A part's verdict by its rows: right if none is wrong and one was measured."""
    bad = [f"{row['direction']} of {row['operator']}" for row in rows if row["status"] in ("wrong", "failed")]
    if bad:
        return {"verdict": "wrong", "reason": f"{len(bad)} wrong or failed, the first {bad[0]}"}
    if any(row["status"] == "ok" for row in rows):
        return {"verdict": "right", "reason": None}
    return {"verdict": "skipped", "reason": next((row["reason"] for row in rows), "nothing to measure")}
