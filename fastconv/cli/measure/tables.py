"""A result file as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastconv.cli.measure.results import Part

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
    table = _table("", "first loss", "last loss", "accuracy")
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
    table = _table("", "fastconv's error", "PyTorch's", "allowed", "")
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
    table = _table("error of", *headings, "")
    for tensor in dict.fromkeys(row["tensor"] for row in part["rows"]):
        rows = [row for row in part["rows"] if row["tensor"] == tensor]
        worst = min(rows, key=lambda row: row["right"])
        table.add_row(tensor, *(f"{row[key]:.1e}" for row in rows for key in ERRORS), _right(worst))
    return [table, _launches(part["launches"])]


def _times(part: Part) -> list[RenderableType]:
    if not part["rows"]:
        return []
    table = _table("", "ms a step", "p20", "p80", "images/s", "speed", "host ms", "peak GB", "kernels", "warm-up s", "")
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


def _layers(part: Part) -> list[RenderableType]:
    table = _table(
        "", "direction", "times", "speed", "fastconv us", "cuDNN us", "p20-p80", "noise", "TFLOP/s", "tile", ""
    )
    for row in part["rows"]:
        ours, cudnn = row.get("fastconv_ms"), row.get("cudnn_ms")
        table.add_row(
            row["layer"],
            row["direction"],
            str(row["count"]),
            _number(row.get("speed"), ".2f"),
            _number(ours and ours["median"] * 1e3, ".1f"),
            _number(cudnn and cudnn["median"] * 1e3, ".1f"),
            f"{ours['p20'] * 1e3:.1f}-{ours['p80'] * 1e3:.1f}" if ours else "",
            _number(row.get("noise"), ".1%"),
            _number(row.get("tflops"), ".0f"),
            _tile(row.get("tile") or {}),
            row["reason"] or "",
        )
    lines: list[RenderableType] = [table]
    for direction in dict.fromkeys(row["direction"] for row in part["rows"]):
        speeds = [row["speed"] for row in part["rows"] if row["direction"] == direction and "speed" in row]
        if speeds:
            reached = sum(speed >= part["target"] for speed in speeds)
            lines.append(
                f"{direction}: {reached} of {len(speeds)} distinct layers reach {part['target']} of cuDNN's speed, "
                f"the slowest {min(speeds):.2f}"
            )
    return lines


def _blocks(part: Part) -> list[RenderableType]:
    columns = ("eager ms", "fastconv ms", "p20-p80", "compiled ms", "to eager", "to compiled")
    table = _table("", "input", *columns, "MB", "eager's", "GB/s", "eager's", "noise", "")
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
    table = _table("", "microseconds a call", "p20", "p80", "")
    for row in part["rows"]:
        times = row.get("host_us")
        numbers = (_number(times and times[key], ".1f") for key in ("median", "p20", "p80"))
        table.add_row(
            f"{row['function']}, {'with' if row['gradient'] else 'no'} gradient", *numbers, row["reason"] or ""
        )
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
    table = _table(*columns)
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
    "layers": _layers,
    "blocks": _blocks,
    "host": _host,
    "compile": _compile,
    "compiler": _compiler,
}


def _table(*columns: str) -> Table:
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in (0, len(columns) - 1) else "right")
    return table


def _tile(config: dict[str, int]) -> str:
    """``M128 K64 C64 w4 s3``: block sides, warps, stages; ``/8`` the parts a sum is split into."""
    short = {"num_warps": "w", "num_stages": "s", "SPLITS": "/"}
    named = ((short.get(name, name.removeprefix("BLOCK_")), value) for name, value in config.items())
    return " ".join(f"{name}{value}" for name, value in named)


def _right(row: dict[str, Any]) -> Text:
    return Text("right") if row["right"] else Text("WRONG", STYLES["wrong"])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _launches(launches: dict[str, int]) -> str:
    counted = ", ".join(f"{count} x {name}" for name, count in sorted(launches.items()))
    return f"Launches of fastconv's kernels: {counted or 'none'}."
