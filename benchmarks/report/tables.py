"""A result file as tables for a terminal."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastconv.benchmarks.report.results import Part
from fastconv.benchmarks.report.targets import DOUBTED

STYLES = {"right": "green", "wrong": "bold red", "failed": "bold red", "skipped": "yellow"}
ERRORS = ("ours", "eager", "allowed")
SHOWN_TENSORS = 6  # of a comparison, worst first
ENVIRONMENT = ("gpu", "driver", "cuda", "cudnn", "torch", "triton", "python", "commit")


def heading(data: dict[str, Any]) -> str:
    """One line: what ran where."""
    known = {key: data["environment"].get(key) for key in ENVIRONMENT}
    words = [known.pop("gpu") or "no GPU: Triton's interpreter on the CPU"]
    words += [f"{key} {value}" for key, value in known.items() if value]
    return ("DRY RUN, its times mean nothing; " if data["dry_run"] else "") + ", ".join(words)


def render(part: Part) -> RenderableType:
    """The part's verdict and its table."""
    verdict = Text(f"{part['title']}: ").append(part["verdict"], STYLES[part["verdict"]])
    if part["reason"]:
        verdict.append(f" ({part['reason']})")
    return Group("", verdict, *TABLES[part["kind"]](part))


def _training(part: Part) -> list[RenderableType]:
    table = new_table("", "first loss", "last loss", "accuracy")
    for name, losses in part["losses"].items():
        table.add_row(name, f"{losses[0]:.6f}", f"{losses[-1]:.6f}", f"{part['accuracy'][name]:.1%}")
    steps = len(part["losses"]["plain"])
    line = (
        f"Losses of {steps} steps differ by at most {part['loss_difference']:.1e} (allowed {part['tolerance']:.0e}); "
        f"accuracy on {part['held_out']} images held out. {_launches(part['launches'])}"
    )
    return [table, line]


def _errors(part: Part) -> list[RenderableType]:
    if not part["rows"]:
        return []
    table = new_table("", "fastconv's error", "PyTorch's", "allowed", "")
    for row in part["rows"][:SHOWN_TENSORS]:
        table.add_row(row["tensor"], *(f"{row[key]:.1e}" for key in ERRORS), _right(row))
    lines: list[RenderableType] = [table]
    if len(part["rows"]) > SHOWN_TENSORS:
        lines.append(f"The worst {SHOWN_TENSORS} of {len(part['rows'])} tensors, by error over what is allowed.")
    return [*lines, f"{part['converted']}. {_launches(part['launches'])}"]


def _block(part: Part) -> list[RenderableType]:
    measures = {row["dtype"]: row["measure"] for row in part["rows"]}
    headings = [
        f"{dtype}, {measure}\n{who}" for dtype, measure in measures.items() for who in ("ours", "PyTorch", "allowed")
    ]
    table = new_table("error of", *headings, "")
    for tensor in dict.fromkeys(row["tensor"] for row in part["rows"]):
        rows = [row for row in part["rows"] if row["tensor"] == tensor]
        worst = min(rows, key=lambda row: row["right"])
        table.add_row(tensor, *(f"{row[key]:.1e}" for row in rows for key in ERRORS), _right(worst))
    return [table, _launches(part["launches"])]


def _times(part: Part) -> list[RenderableType]:
    if not part["rows"]:
        return []
    table = new_table(
        "", "ms a step", "p20", "p80", "images/s", "speed", "host ms", "peak GB", "kernels", "warm-up s", ""
    )
    for row in part["rows"]:
        step, host = row.get("step_ms"), row.get("host_ms")
        table.add_row(
            row["provider"],
            *(_number(step and step[key], ".3f") for key in ("median", "p20", "p80")),
            _number(row.get("samples_per_s"), ",.0f"),
            _number(row.get("speed"), ".2f"),
            _number(host and host["median"], ".3f"),
            _number(row["peak_bytes"] / 2**30 if row.get("peak_bytes") else None, ".2f"),
            _number(row.get("gpu_kernels"), "d"),
            _number(row.get("warm_up_s"), ".1f"),
            row["reason"] or "",
        )
    noise = "not measured" if part["noise"] is None else f"{part['noise']:.1%}"
    return [table, f"Speed is relative to the first row; one provider measured twice differs by {noise}."]


def _operators(part: Part) -> list[RenderableType]:
    timed = dict.fromkeys(it["provider"] for row in part["rows"] for it in row["providers"] if "ms" in it)
    served = {row["ours"] for row in part["rows"]} - {None}
    # A column for each provider that is not ours in every row; lines beneath name those without any time.
    others = [name for name in timed if served != {name} and name != "fastconv-nchw"]
    copied = any(row.get("layout_ms") is not None for row in part["rows"])
    columns = ["us,\np20 p80", *(re.sub("([:-])", r"\1\n", name) for name in others), "speed", "alone"]
    table = new_table("", "times", *columns, "nearer\nceiling", *["NCHW\n+us"] * copied, "family, tile", "")
    table.box, table.collapse_padding = box.HORIZONTALS, True
    for column in table.columns[1:-2]:
        column.no_wrap = True  # numbers keep their room
    for row in part["rows"]:
        entries = {entry["provider"]: entry for entry in row["providers"]}
        times = {name: entry["ms"]["median"] * 1e3 for name, entry in entries.items() if "ms" in entry}
        alone = [entries.get(name, {}).get("alone_ms") for name in ("eager", row["ours"])]
        layout = row.get("layout_ms")
        table.add_row(
            f"{row['operator'].removesuffix(' ' + part['dtype'])}, {row['direction']}",
            str(sum(row["networks"].values()) or ""),
            _spread(entries.get(row["ours"], {}).get("ms")),
            *(_number(times.get(name), ".1f") for name in others),
            _number(row.get("speed"), ".2f"),
            _number(alone[0]["median"] / alone[1]["median"] if all(alone) else None, ".2f"),
            _nearer_ceiling(row),
            *[_number(None if layout is None else layout * 1e3, ".1f")] * copied,
            f"{row.get('family', '')} {tile_text(row.get('tile') or {})}",
            "; ".join(_remarks(row)),
        )
    return [table, *_summary(part)]


def _spread(ms: dict[str, float] | None) -> str:
    """``12.3 -2% +5%``: microseconds, and how far the 20th and the 80th percentile are from them."""
    if not ms:
        return ""
    return " ".join([f"{ms['median'] * 1e3:.1f}", *(f"{ms[key] / ms['median'] - 1:+.0%}" for key in ("p20", "p80"))])


def _nearer_ceiling(row: dict[str, Any]) -> str:
    """``57% 2,222 GB/s``: the row's share of its ceiling, memory's or tensor cores', and its rate."""
    if row.get("ceiling") is None:
        return ""
    by_matrix = row["matrix_share"] > row["share"]
    rate = f"{row['tflops']:,.0f} TFLOP/s" if by_matrix else f"{row['gb_per_s']:,.0f} GB/s"
    return f"{row['ceiling']:.0%} {rate}"


def _remarks(row: dict[str, Any]) -> Iterable[str]:
    if row["reason"]:
        yield row["reason"]
    if (row.get("speed") or 1.0) < 1.0:
        yield "LOSS"
    if row.get("missed"):
        yield f"{', '.join(row['missed'])} under target"
    again = row.get("again", {})
    if "speed_over_eager" in again:
        yield f"again {again['speed_over_eager']:.2f}"
    elif again:
        yield f"{row['unconfirmed']:.2f} of eager's, UNCONFIRMED: {again['reason']}"
    elif row.get("unconfirmed"):
        yield f"{row['unconfirmed']:.2f} of the fastest's, UNCONFIRMED: eager has no time"


def _summary(part: Part) -> Iterable[RenderableType]:
    """Lines about all rows together."""
    told: dict[tuple[str, str], list[str]] = {}
    for row in part["rows"]:
        for entry in row["providers"]:
            if entry["reason"]:
                told.setdefault((entry["provider"], entry["status"]), []).append(entry["reason"])
    for (name, status), reasons in told.items():
        yield f"{name}: {len(reasons)} rows {status}, the first: {reasons[0]}"
    timed = [row for row in part["rows"] if row.get("speed") and "noise" in row]
    if not timed:
        return
    reached = sum("speed" not in row["missed"] for row in timed)
    losses = sum(row["speed"] < 1.0 for row in timed)
    noise = statistics.median(row["noise"] for row in timed)
    yield (
        f"{reached} of {len(timed)} reach {part['speed_target']} of the speed of {' and '.join(part['rivals'])}; "
        f"{losses} are slower than PyTorch's fastest. Alone: the speed over eager's of calls from Python that the GPU "
        f"waits for; again: measured in another way, where it is beyond {DOUBTED}. One provider measured twice differs "
        f"by {noise:.1%}, the median of all rows. Ceilings: a copy's {part['copy_bandwidth'] / 1e9:,.0f} GB/s, "
        f"a bf16 product's {part['matrix_rate'] / 1e12:,.0f} TFLOP/s."
    )
    large = [row for row in timed if row["large"]] if part["share_target"] else []
    if large:
        reached = sum("bandwidth" not in row["missed"] for row in large)
        owed = f"{part['share_target']:.0%} of the copy's rate"
        yield f"{reached} of {len(large)} with tensors that no cache holds reach {owed}."
    if part["means"]:
        directions = list(dict.fromkeys(mean["direction"] for mean in part["means"]))
        table = new_table("geometric mean of speeds over eager's", "batch", *directions, "")
        for key in dict.fromkeys((mean["network"], mean["batch"]) for mean in part["means"]):
            means = {it["direction"]: it["speed"] for it in part["means"] if (it["network"], it["batch"]) == key}
            table.add_row(key[0], str(key[1]), *(_number(means.get(name), ".2f") for name in directions), "")
        yield table
    for family, counts in part["families"].items():
        yield f"{family}: {counts['wins']} at least as fast as eager channels_last, {counts['losses']} slower."


def _targets(part: Part) -> list[RenderableType]:
    table = new_table("", "mean", "target", "least", "its target", "measured", "least of", "")
    for row in part["rows"]:
        table.add_row(
            row["direction"],
            *(_number(row[key], ".2f") for key in ("mean", "target", "least")),
            f"{part['least_target']:.2f}",
            f"{row['measured']} of {row['of']}",
            row["least_of"] or "",
            {True: "met", False: "MISSED", None: "open"}[row["met"]],
        )
    return [table, "Geometric means weighted by how often a network has the layer."]


def _blocks(part: Part) -> list[RenderableType]:
    columns = ("eager ms", "fastconv ms", "p20-p80", "compiled ms", "to eager", "to compiled")
    table = new_table("", "input", *columns, "MB", "eager's", "GB/s", "eager's", "noise", "")
    for row in part["rows"]:
        eager, ours, compiled = (_provider(row, start) for start in ("eager", "fastconv", "torch.compile"))
        times = [provider.get("ms") for provider in (eager, ours, compiled)]
        medians = [time and time["median"] for time in times]
        table.add_row(
            f"{row['block']}, {row['mode']}",
            "x".join(map(str, row["input_shape"])),
            *(_number(median, ".3f") for median in medians[:2]),
            f"{times[1]['p20']:.3f}-{times[1]['p80']:.3f}" if times[1] else "",
            _number(medians[2], ".3f"),
            *(_number(other / medians[1] if other and medians[1] else None, ".2f") for other in medians[::2]),
            *(_number(it["bytes"] / 1e6 if it.get("bytes") else None, ",.0f") for it in (ours, eager)),
            *(_number(it.get("gb_per_s"), ",.0f") for it in (ours, eager)),
            _number(row.get("noise"), ".1%"),
            "; ".join(filter(None, [row["reason"], *(it.get("reason") for it in (eager, compiled))])),
        )
    line = "MB: counted from the operands of every kernel and operator, each once"
    if part["bandwidth"]:
        line += f"; the GPU's memory moves {part['bandwidth'] / 1e9:,.0f} GB/s"
    return [table, f"{line}."]


def _provider(row: dict[str, Any], start: str) -> dict[str, Any]:
    return next((provider for provider in row["providers"] if provider["provider"].startswith(start)), {})


def _host(part: Part) -> list[RenderableType]:
    table = new_table("", "microseconds a call", "p20", "p80", "")
    for row in part["rows"]:
        times = row.get("host_us")
        numbers = (_number(times and times[key], ".1f") for key in ("median", "p20", "p80"))
        called = f"{row['function']}, {row['problem']}, {'with' if row['gradient'] else 'no'} gradient"
        table.add_row(called, *numbers, row["reason"] or "")
    return [table, f"Target: under {part['target_us']:.0f} microseconds."]


def _compile(part: Part) -> list[RenderableType]:
    if not part["kernels"]:
        return []
    return [f"{part['kernels']} distinct kernels on {part['threads']} threads in {part['seconds']:.1f} s."]


def _compiler(part: Part) -> list[RenderableType]:
    columns = (
        "",
        "GPU",
        "binaries",
        "registers",
        "spilled bytes",
        "shared KB",
        "programs",
        "tensor cores",
        "load bytes",
    )
    table = new_table(*columns)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in part["rows"]:
        groups.setdefault((f"{row['kernel']}, {row['direction']}", row["target"]), []).append(row)
    for (kernel, target), rows in sorted(groups.items()):
        table.add_row(
            *(kernel, target, str(len(rows))),
            *(_range(row[key] for row in rows) for key in ("registers", "spills")),
            _range(row["shared_memory"] // 1024 for row in rows),
            _range(row["occupancy"] for row in rows),
            " ".join(sorted({row["tensor_cores"] or "none" for row in rows})),
            " ".join(sorted({width for row in rows for width in row["load_bytes"]}, key=int)),
        )
    return (
        [table, "Programs: how many fit a multiprocessor at once. Every binary is in the JSON file."] if groups else []
    )


def _range(values: Iterable[int]) -> str:
    found = list(values)
    low, high = min(found), max(found)
    return str(low) if low == high else f"{low}-{high}"


TABLES: dict[str, Callable[[Part], list[RenderableType]]] = {
    "training": _training,
    "block": _block,
    "check": _errors,
    "time": _times,
    "operators": _operators,
    "targets": _targets,
    "blocks": _blocks,
    "host": _host,
    "compile": _compile,
    "compiler": _compiler,
}


def new_table(*columns: str) -> Table:
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in (0, len(columns) - 1) else "right")
    return table


def tile_text(config: dict[str, int]) -> str:
    """``M128 K64 C64 w4 s3``: block sides, warps, stages; ``/8``: the parts of a split sum. Ones are left out."""
    short = {"num_warps": "w", "num_stages": "s", "SPLITS": "/"}
    named = ((short.get(name, name.removeprefix("BLOCK_")), value) for name, value in config.items() if value > 1)
    return " ".join(f"{name}{value}" for name, value in named)


def _right(row: dict[str, Any]) -> Text:
    return Text("right") if row["right"] else Text("WRONG", STYLES["wrong"])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _launches(launches: dict[str, int]) -> str:
    counted = ", ".join(f"{count} x {name}" for name, count in sorted(launches.items()))
    return f"Launches of fastconv's kernels: {counted or 'none'}."
