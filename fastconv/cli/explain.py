"""``fastconv explain``: what runs for each layer of a model, in which tile, and what is left to PyTorch, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from fastconv.cli.errors import BadUsage, bad_usage


def explain(
    model: Annotated[str, typer.Option(help="A name of torchvision's or timm's, or module:factory.")],
    batch: Annotated[int, typer.Option(min=1, help="Images in the batch.")] = 1,
    size: Annotated[int | None, typer.Option(min=1, help="Side of an image; the model's own, or 224.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "bfloat16",
    train: Annotated[bool, typer.Option(help="Explain a training step, else inference.")] = False,
    gpu: Annotated[str | None, typer.Option(help="Plan for A100, H100, H200 or B200 instead of this machine.")] = None,
) -> int:
    """Print what every layer of a model runs: what is fused, kernels, tiles, bytes; what PyTorch does and why."""
    import contextlib

    import torch

    import fastconv
    from fastconv.benchmarks.models import load
    from fastconv.cli.options import dtype_option, gpu_option
    from fastconv.kernels import dispatch
    from fastconv.kernels.launch.device import here

    precision = dtype_option(dtype)
    target = contextlib.nullcontext() if gpu is None else dispatch.use_target(gpu_option(gpu))
    device = here.at() if here.is_available() else torch.device("cpu")
    with bad_usage():
        loaded = load(model, batch, size)
    network = fastconv.convert(loaded.model.to(device, precision), memory_format=loaded.memory_format).train(train)
    x = torch.empty(loaded.input_shape, device=device, dtype=precision, memory_format=loaded.memory_format)
    with target, torch.set_grad_enabled(train):
        try:
            explanation = fastconv.explain(network, x)
        except Exception as error:  # the network's own code: anything
            raise BadUsage(loaded.refusal(error)) from error
    print(explanation)
    return 0
