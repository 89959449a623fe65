"""``fastconv bench``: real networks, converted, against PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bench(
    model: Annotated[
        str | None, typer.Option(help="A name of torchvision's or timm's, or module:factory. On a GPU: resnet50.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images in the batch. On a GPU: 64.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of an image. The model's own, or 224.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. On a GPU: bfloat16.")] = None,
    train: Annotated[bool | None, typer.Option("--train/--infer", help="One of the two; both if not told.")] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Convolutions and pools of real networks one by one.")
    ] = False,
    kind: Annotated[
        list[str] | None, typer.Option(help="With --layers: pool, depthwise, grouped, first-layer or dense; several.")
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
    from fastconv.cli import BadUsage
    from fastconv.cli.measure import operators, roads
    from fastconv.cli.measure.results import read
    from fastconv.cli.measure.screen import console

    screen = console()
    if show is not None:
        roads.show(read(show), show.parent, screen)
        return 0
    for option, value in (("--layers", layers), ("--model", model)):
        if blocks and value:
            raise BadUsage(f"{option} and --blocks exclude each other: blocks are of networks of their own")
    kinds, known = tuple(kind or ()), [known.name for known in operators.KINDS]
    if kinds and not layers:
        raise BadUsage("--kind says which of --layers")
    for name in kinds:
        if name not in known:
            raise BadUsage(f"--kind {name!r} is not one of {', '.join(known)}")
    wishes = roads.Wishes(model, batch, size, dtype, train, layers, kinds, blocks, seconds, quick, dry_run)
    return 1 if roads.choose(wishes)(wishes, out, screen).wrong else 0
