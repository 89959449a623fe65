"""``fastconv bench``: real networks, converted, against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    model: Annotated[
        str | None, typer.Option(help="A name of torchvision's or timm's, or module:factory. On a GPU: resnet50.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images in the batch. On a GPU: 64; dense --ops: 64 and 256.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of an image. The model's own, or 224.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. On a GPU: bfloat16.")] = None,
    train: Annotated[bool | None, typer.Option("--train/--infer", help="One of the two; both if not told.")] = None,
    ops: Annotated[
        list[str] | None,
        typer.Option(help="Operators of real networks one by one: dense,pool,depthwise,grouped,first-layer or all."),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(help="With or without --ops, whose operators: a layer list by its name (resnet50), or a file."),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="Who runs --ops: fastconv,fastconv:FAMILY,fastconv-nchw,eager,eager-nchw,compile."),
    ] = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="Blocks of real networks alone, with the bytes.")] = False,
    seconds: Annotated[float | None, typer.Option(min=1, help="Time limit on a GPU. 100, with --quick 40.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file and the plots.")] = Path("fastconv-bench"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Walk the GPU's road on the CPU, tiny; its times mean nothing.")
    ] = False,
    show: Annotated[Path | None, typer.Option(help="Show an earlier run's JSON file again, and nothing else.")] = None,
) -> int:
    """Convert real CNNs and compare them with PyTorch.

    With a GPU: outputs and gradients of a network, then its times against cuDNN and torch.compile. Without one, on
    Triton's interpreter: LeNet-5 in training and ResNet-18's blocks, then what the compiler makes of each kernel. Exit
    code 1 when a number is wrong.
    """
    from fastconv.benchmarks.report.console import console
    from fastconv.cli import bench_run
    from fastconv.kernels.launch.device import here

    screen = console()
    if show is not None:
        bench_run.show(show, screen)
        return 0
    names = (_names(ops), _names(layers), _names(provider))
    dry_run = dry_run or not here.real
    options = bench_run.Options(model, batch, size, dtype, train, *names, blocks, seconds, quick, dry_run)
    return 1 if bench_run.choose(options)(options, out, screen).wrong else 0


def _names(values: list[str] | None) -> tuple[str, ...]:
    """The names of an option that may be given several times, with commas between names."""
    return tuple(name for value in values or () for name in value.split(","))
