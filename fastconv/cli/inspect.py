"""``fastconv inspect``: what the compiler makes of a kernel for any GPU, without that GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from fastconv.cli.errors import BadUsage

PLOTS = (".png", ".svg", ".pdf")


def inspect(
    operator: Annotated[
        str | None, typer.Argument(help="conv2d, max_pool2d... Without one: the kernels of ResNet-50's telling layers.")
    ] = None,
    input: Annotated[str | None, typer.Option(help="Its input's shape: 64x64x56x56.")] = None,
    weight: Annotated[str | None, typer.Option(help="A convolution's weight: 64x64x3x3.")] = None,
    kernel_size: Annotated[str | None, typer.Option(help="A pool's window: 3, or 3x2.")] = None,
    norm_type: Annotated[float | None, typer.Option(help="Of an lp pool: 2 unless given.")] = None,
    output_size: Annotated[str | None, typer.Option(help="An adaptive pool's output: 7x7.")] = None,
    stride: Annotated[str | None, typer.Option(help="2, or 2x1. Of a convolution 1, of a pool its window.")] = None,
    padding: Annotated[str | None, typer.Option(help="1, or 1x0; of a convolution also same.")] = None,
    output_padding: Annotated[str | None, typer.Option(help="A transposed convolution's.")] = None,
    dilation: Annotated[str | None, typer.Option(help="2, or 2x1.")] = None,
    groups: Annotated[int | None, typer.Option(min=1)] = None,
    ceil_mode: Annotated[bool, typer.Option("--ceil-mode", help="A pool's windows over the edge count.")] = False,
    exclude_padding: Annotated[
        bool, typer.Option("--exclude-padding", help="Averages of what is inside: count_include_pad=False.")
    ] = False,
    return_indices: Annotated[bool, typer.Option("--return-indices", help="A max pool's, as PyTorch has them.")] = (
        False
    ),
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    precision: Annotated[str | None, typer.Option(help="Of float32: tf32, as PyTorch has it, or ieee.")] = None,
    bias: Annotated[bool, typer.Option("--bias")] = False,
    bn: Annotated[bool, typer.Option("--bn", help="Batch norm by running statistics behind the convolution.")] = False,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Batch norm by the batch's statistics, as in training.")
    ] = False,
    act: Annotated[str | None, typer.Option(help="With batch norm: the activation behind it, relu or another.")] = None,
    residual: Annotated[bool, typer.Option("--residual", help="With batch norm: what is added before it.")] = False,
    contiguous: Annotated[bool, typer.Option("--contiguous", help="Plain NCHW tensors, not channels_last.")] = False,
    infer: Annotated[bool, typer.Option("--infer", help="Without gradients: the forward pass as inference has it.")] = (
        False
    ),
    gpu: Annotated[str | None, typer.Option(help="Its name, or sm_90. This machine's, or H200.")] = None,
    direction: Annotated[str | None, typer.Option(help="One pass: fprop, dgrad, wgrad; forward, backward.")] = None,
    family: Annotated[str | None, typer.Option(help="A kernel family that is not the first to serve it.")] = None,
    config: Annotated[str | None, typer.Option(help="Of one pass: BLOCK_M=128,num_warps=8.")] = None,
    compare: Annotated[tuple[str, str] | None, typer.Option(metavar="A B", help="Two configs beside each other.")] = (
        None
    ),
    plot: Annotated[Path | None, typer.Option(help="Draw what is predicted of every tile: a .png, .svg or .pdf.")] = (
        None
    ),
    sass: Annotated[bool, typer.Option("--sass", help="The listing, and no table.")] = False,
    ptx: Annotated[bool, typer.Option("--ptx", help="The same of PTX.")] = False,
    ttgir: Annotated[bool, typer.Option("--ttgir", help="The same of Triton's own code.")] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Without an operator: fewer layers.")] = False,
) -> int:
    """Compile an operator's kernels for a GPU that need not be here, and say what became of them.

    Registers, spills, shared memory, occupancy and its limit; the instructions; copies in flight, bytes, FLOPs; the
    roofline's time and the predicted one. None of the times is measured.
    """
    from fastconv.benchmarks.report.console import console
    from fastconv.cli.options import dtype_option, gpu_here, gpu_option

    sizes = {"--input": input, "--weight": weight, "--kernel-size": kernel_size, "--output-size": output_size}
    sizes |= {"--stride": stride, "--padding": padding, "--output-padding": output_padding, "--dilation": dilation}
    further: dict[str, Any] = {"--groups": groups, "--bias": bias, "--bn": bn, "--statistics": statistics}
    further |= {"--norm-type": norm_type, "--ceil-mode": ceil_mode, "--exclude-padding": exclude_padding}
    further |= {"--return-indices": return_indices, "--precision": precision}
    further |= {"--act": act, "--residual": residual, "--contiguous": contiguous, "--infer": infer}
    further |= {"--direction": direction, "--family": family, "--config": config, "--compare": compare}
    further |= {"--plot": plot, "--sass": sass, "--ptx": ptx, "--ttgir": ttgir}
    given = {name: value for name, value in (sizes | further).items() if value is not None and value is not False}
    target = gpu_option(gpu) if gpu else None
    if operator is None:
        for name in given:
            raise BadUsage(f"{name} says something of an operator: fastconv inspect conv2d {name} ...")
        return _report(target, quick, json)

    from fastconv.cli import inspect_operator

    if operator not in inspect_operator.OPERATORS:
        raise BadUsage(f"{operator!r} is not one of {', '.join(inspect_operator.OPERATORS)}")
    _refuse(operator, given, quick)
    fused = inspect_operator.Fused(statistics, act, residual) if bn or statistics else None
    call = inspect_operator.OperatorCall(
        operator,
        _sizes("--input", given["--input"]),
        _sizes("--weight", given["--weight"]) if weight else None,
        _arguments(operator, given),
        dtype_option(dtype),
        bias,
        fused,
        not contiguous,
        not infer and (fused is None or statistics),
        _precision(precision, dtype),
    )
    configs = [None if text is None else _config(text) for text in compare or (config,)]
    listings = [name for name, wanted in (("sass", sass), ("ptx", ptx), ("ttgir", ttgir)) if wanted]
    arguments = (call, target or gpu_here(), family, direction, configs, listings)
    with _bar(json or bool(listings)) as progress:
        found = inspect_operator.inspect(*arguments, progress)
    if plot is not None:
        draw(found, ("A", "B") if compare else ("this one",), plot)
    if json:
        print(dumps({"passes": [it.json() for passes in found for it in passes]}, indent=1))
        return 0
    screen = console()
    if listings:
        for it in (it for passes in found for it in passes):
            for record, binary in zip(it.launches, it.binaries, strict=True):
                for name, text in binary.listings.items():
                    print(f"// {record.name}, {it.found.name}, {it.gpu.name}, {name}\n{text}")
        return 0
    for passes in zip(*found, strict=True):
        for renderable in tables(passes, ("A", "B") if compare else ("",)):
            screen.print(renderable)
    if plot is not None:
        screen.print(f"Written: {plot}")
    return 0


# The options that each kind of operator takes; it needs the first.
FUSED = ("--bn", "--statistics", "--act", "--residual")
TAKES = {
    "conv": ("--weight", "--stride", "--padding", "--dilation", "--groups", "--bias", *FUSED),
    "conv_transpose": (
        *("--weight", "--stride", "--padding", "--output-padding", "--dilation", "--groups", "--bias", *FUSED),
    ),
    "max_pool": ("--kernel-size", "--stride", "--padding", "--dilation", "--ceil-mode", "--return-indices"),
    "avg_pool": ("--kernel-size", "--stride", "--padding", "--ceil-mode", "--exclude-padding"),
    "lp_pool": ("--kernel-size", "--norm-type", "--stride", "--ceil-mode"),
    "adaptive_max_pool": ("--output-size", "--return-indices"),
    "adaptive_avg_pool": ("--output-size",),
}


def _refuse(operator: str, given: dict[str, Any], quick: bool) -> None:
    """Raise BadUsage if options are missing, or say nothing of this operator."""
    takes = TAKES[operator[:-2]]
    for name in ("--input", takes[0]):
        if name not in given:
            raise BadUsage(f"{operator} needs {name}")
    for name in {name for names in TAKES.values() for name in names} & set(given) - set(takes):
        raise BadUsage(f"{operator} takes no {name}")
    if "--bn" not in given and "--statistics" not in given:
        for name in {"--act", "--residual"} & set(given):
            raise BadUsage(f"{name} is fused behind batch norm: add --bn or --statistics")
    for first, second in (("--bn", "--statistics"), ("--config", "--compare"), ("--statistics", "--infer")):
        if first in given and second in given:
            raise BadUsage(f"{first} and {second} exclude each other")
    if quick:
        raise BadUsage("--quick is of the report without an operator")
    path = given.get("--plot")
    if path is not None and path.suffix not in PLOTS:
        raise BadUsage(f"--plot {path}: not a file of {', '.join(PLOTS)}")
    if path is not None and not path.parent.is_dir():
        raise BadUsage(f"--plot {path}: no such folder")


def _sizes(name: str, text: str) -> tuple[int, ...]:
    words = text.lower().replace(",", "x").split("x")
    if not all(word.isdecimal() for word in words):
        raise BadUsage(f"{name} {text!r}: numbers with an x between them are expected, as 64x64x3x3")
    return tuple(map(int, words))


def _precision(precision: str | None, dtype: str) -> str:
    from fastconv.cli.options import dtype_option

    if precision not in (None, "tf32", "ieee"):
        raise BadUsage(f"--precision {precision!r} is not one of tf32, ieee")
    if precision is not None and dtype_option(dtype).itemsize < 4:
        raise BadUsage(f"--precision is of float32's products, not of {dtype}'s: add --dtype float32")
    return precision or "tf32"


def _arguments(operator: str, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of torch.nn.functional's function of that name, beside its tensors."""
    defaults: dict[str, Any] = {"--padding": "0", "--output-padding": "0", "--dilation": "1", "--groups": 1}
    defaults |= {"--norm-type": 2.0, "--ceil-mode": False, "--return-indices": False}
    defaults["--stride"] = "1" if "conv" in operator else None
    found: dict[str, Any] = {}
    for name in TAKES[operator[:-2]]:
        value = given.get(name, defaults.get(name))
        if name in (*FUSED, "--weight", "--bias"):
            continue
        elif name == "--exclude-padding":
            found["count_include_pad"] = not value
        elif not isinstance(value, str) or (name == "--padding" and value == "same"):
            found[name[2:].replace("-", "_")] = value
        else:
            sizes = _sizes(name, value)
            found[name[2:].replace("-", "_")] = sizes[0] if len(sizes) == 1 else sizes
    return found


def _config(text: str) -> dict[str, int]:
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if not value.isdecimal():
            raise BadUsage(f"config {text!r}: {part!r} is no parameter with a number, as BLOCK_M=128")
        found[name] = int(value)
    return found


def _report(gpu: Any, quick: bool, json: bool) -> int:
    """The kernels of ResNet-50's telling layers."""
    from fastconv.benchmarks.report.console import console
    from fastconv.cli.inspect_layers import LAYERS, QUICK, report
    from fastconv.kernels.compile.sass import GPUS

    try:
        with _bar(json) as progress:
            rows = report(LAYERS[: QUICK if quick else None], [gpu] if gpu else GPUS, progress)
    except RuntimeError as error:
        raise BadUsage(str(error)) from error
    if json:
        print(dumps({"kernels": rows}, indent=1))
        return 0
    screen = console()
    for target in dict.fromkeys(row["target"] for row in rows):
        screen.print(_report_table([row for row in rows if row["target"] == target]))
    return 0


def _report_table(rows: Sequence[dict[str, Any]]) -> Any:
    from fastconv.benchmarks.report.tables import new_table, tile_text

    columns = ("", "problem", "tile", "registers", "spills", "shared KB", "programs", "tensor cores", "loads")
    table = new_table(*columns)
    table.title = rows[0]["target"]
    for row in rows:
        cores = (row["tensor_cores"] or "-") + (" SERIALISED" if row["wgmma_serialised"] else "")
        table.add_row(
            f"{row['kernel'].removesuffix('_kernel')} {row['direction']}",
            row["problem"],
            tile_text(row["config"]),
            *(str(row[key]) for key in ("registers", "spills")),
            f"{row['shared_memory'] / 1024:.0f}",
            f"{row['occupancy']} ({row['occupancy_limit']})",
            cores,
            _widths(row["load_bytes"]),
        )
    return table


def tables(passes: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """One pass with each config: a line for each config, and a table with a column for each launch."""
    from rich.table import Table

    from fastconv.benchmarks.report.tables import tile_text

    first = passes[0].json()
    lines: list[Any] = ["", f"{first['pass']}  {first['problem']}  on the {first['target']}"]
    table = Table()
    table.add_column("")
    columns = []
    for name, it in zip(names, passes, strict=True):
        row = it.json()
        head = f"  {name}{': ' if name else ''}"
        if row["config"]:
            source = f"from {row['config_source']}" + (f", {row['outside_space']}" if row["outside_space"] else "")
            head += " ".join(filter(None, (row["family"], tile_text(row["config"]), f"({source}); ")))
        work = f"{row['flops'] / 1e9:.2f} GFLOP, " if row["flops"] else ""
        head += f"{work}{row['bytes'] / 1e6:.2f} MB; roofline {_time(row['roofline'])}"
        if row["predicted"]:
            head += f"; predicted {_time(row['predicted'])}"
            again = row["predicted_from_binary"]
            if again is None:
                head += ", though the binary does not fit"
            elif again["seconds"] != row["predicted"]["seconds"]:
                head += f", by the binary's registers {_time(again)}"
        lines.append(head)
        for launch in row["launches"]:
            heading = launch["kernel"].removesuffix("_kernel")
            table.add_column(f"{name} {heading}".strip())
            columns.append(_cells(launch))
    for label in columns[0]:
        values = [cells[label] for cells in columns]
        if any(values):
            table.add_row(label, *values)
    return [*lines, table]


def _cells(launch: dict[str, Any]) -> dict[str, str]:
    step, cores = launch["step_instructions"], launch["tensor_cores"] or "none"
    if launch["wgmma_serialised"]:
        cores += ", each waited for"
    copies = f"{launch['copies_in_flight']} steps, {launch['bytes_in_flight'] / 1024:.0f} KB a program"
    waves = launch["waves"]
    return {
        "grid": "x".join(map(str, launch["grid"])),
        "warps, stages": f"{launch['warps']}, {launch['stages']}",
        "registers a thread": str(launch["registers"]),
        "spills": f"{launch['spills']} instructions, {launch['stack']} bytes a thread" if launch["stack"] else "none",
        "shared memory": f"{launch['shared_memory'] / 1024:.1f} KB",
        "tensor memory": f"{launch['tensor_columns']} columns" if launch["tensor_columns"] else "",
        "programs a multiprocessor": f"{launch['occupancy']}, limited by {launch['occupancy_limit']}",
        "waves": "" if waves is None else f"{waves:.2f}",
        "tensor cores": cores,
        "first operand in": ", ".join(launch["first_operands"]),
        "products that go on at a wait": ", ".join(map(str, launch["wgmma_waits"])),
        "copies in flight": copies if launch["copies_in_flight"] else "",
        "instructions": f"{sum(launch['mix'].values())}: {_counts(launch['mix'])}",
        "of one step": f"{step}: {_counts(launch['step_mix'])}" if step else "",
        "loads": _widths(launch["load_bytes"]),
        "asynchronous loads": _widths(launch["async_load_bytes"]),
        "stores": _widths(launch["store_bytes"]),
        "operands": f"{launch['bytes'] / 1e6:.2f} MB",
    }


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in found.items())


def _widths(found: dict[int, int]) -> str:
    return ", ".join(f"{count} x {width} B" for width, count in found.items())


def _time(prediction: dict[str, Any]) -> str:
    return f"{prediction['seconds'] * 1e6:.1f} us ({prediction['bound']})"


def draw(found: Sequence[Sequence[Any]], names: Sequence[str], path: Path) -> None:
    """Plot what is predicted of every tile of each pass's space, with the ones that ``found`` has marked by ``names``;
    above, which tiles are not tried and why. Raises BadUsage."""
    import re
    import textwrap

    from fastconv.benchmarks.report.tables import tile_text

    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise BadUsage("--plot needs matplotlib: pip install 'fastconv[cli]'") from error
    shown = [alike for alike in zip(*found, strict=True) if alike[0].considered is not None]
    if not shown:
        raise BadUsage("--plot: these passes have one form and no tile to choose")

    def tile(config: Any) -> str:
        return tile_text({name: it for name, it in config.items() if name not in ("SPLITS", "num_warps", "num_stages")})

    spaces = [list(it.considered.each_config(it.gpu)) for it, *_ in shown]
    width = max(10.0, 0.12 * max(len({tile(config) for config, *_ in configs}) for configs in spaces))
    figure = Figure(figsize=(width, 5 * len(shown)), layout="constrained")  # not pyplot: it would look for a display
    for axes, alike, configs in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, spaces, strict=True):
        it = alike[0]
        tried = [(tile(config), seconds * 1e6) for config, seconds, _ in configs if seconds is not None]
        order = list(dict.fromkeys(name for name, _ in sorted(tried, key=lambda pair: pair[1])))
        order += [name for name in dict.fromkeys(tile(config) for config, *_ in configs) if name not in order]
        axes.plot([order.index(name) for name, _ in tried], [us for _, us in tried], "o", label="predicted")
        for name, marker, taken in zip(names, "sD", alike, strict=False):
            chosen = taken.predicted(False)
            if tile(taken.config) not in order:
                order.append(tile(taken.config))  # it has values outside the space
            if chosen is not None:
                style = {"fillstyle": "none", "markersize": 12, "color": "black", "linestyle": "none", "label": name}
                axes.plot(order.index(tile(taken.config)), chosen[0] * 1e6, marker, **style)
        axes.axhline(it.roofline[0] * 1e6, color="gray", linewidth=0.8, label="roofline")
        top = max((us for _, us in tried), default=1.0)
        # A rule says the same of many configs, except for numbers.
        reasons = [(tile(config), re.sub(r"\d+", "n", why)) for config, _, why in configs if why]
        for level, why in enumerate(dict.fromkeys(why for _, why in reasons), 1):
            places = sorted({order.index(name) for name, other in reasons if other == why})
            axes.plot(places, [top * 1.25**level] * len(places), "x", label=textwrap.fill(why, 40))
        axes.set_yscale("log")
        axes.set_xticks(range(len(order)), order, rotation=90, fontsize=7)
        axes.set(ylabel="microseconds, predicted", title=f"{it.found.name}  {it.problem}, {it.gpu.name}")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise BadUsage(f"--plot {path}: {error.strerror}") from error


@contextlib.contextmanager
def _bar(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error's terminal, or nothing if standard output is for a program."""
    from rich.console import Console

    from fastconv.benchmarks.report.console import Progress

    quiet = quiet or not Console(stderr=True).is_terminal
    begun = False

    def tick(done: int, everything: int) -> None:
        nonlocal begun
        if not begun:
            bar.begin("compiling", everything)
            begun = True
        bar.tick()

    with Progress(Console(stderr=True, quiet=quiet)) as bar:
        yield tick
