"""``python -m tests.emulator.count``: the table of counts in kernels/families/README.md, written anew or checked.

Each kernel family runs a layer of a known network with the tile that is chosen for it, a few programs of its grid, on
an emulated GPU that counts. Whole grids of a smaller layer with the same tile tell the distinct bytes that a launch
meets. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from tests import emulator
from tests.emulator.counters import SECTOR

PAGE = Path(__file__).parents[2] / "kernels" / "families" / "README.md"
BEGIN, END = "<!-- counts: python -m tests.emulator.count -->", "<!-- end of counts -->"
VERSION = f"Counted with Triton {triton.__version__}."
SAMPLE = 6
Shapes = tuple[tuple[int, ...], ...]
HEAD = (
    "| GPU | kernel | layer, pass | load | store | wavefronts | all | instructions | L2 / model | unique |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Layer:
    """``call(functional, *tensors)`` of shapes, and smaller shapes whose whole grid is run with the same tiles."""

    name: str
    shapes: Shapes
    small: Shapes
    options: dict[str, Any]
    kernels: dict[str, str]  # GPU -> "pass:kernel" of each row
    function: str = "conv2d"


def _conv(
    name: str, image: tuple[int, ...], weight: tuple[int, ...], small: tuple[int, ...], kernels: dict[str, str],
    bias: bool = False, **options: Any,
) -> Layer:  # fmt: skip
    rest = (weight, weight[:1]) if bias else (weight,)
    return Layer(name, (image, *rest), (small, *rest), options, kernels)


LAYERS = (
    _conv("ResNet-50 1x1, 64 to 256 at 56", (64, 64, 56, 56), (256, 64, 1, 1), (2, 64, 56, 56),
          {"H200": "fprop:conv_gemm_kernel wgrad:conv_gemm_wgrad_kernel wgrad:split_sum_kernel"}),
    _conv("ResNet-50 1x1, 1024 to 256 at 14", (64, 1024, 14, 14), (256, 1024, 1, 1), (2, 1024, 14, 14),
          {"H200": "fprop:conv_gemm_kernel"}),
    _conv("ResNet-50 1x1 stride 2, 256 to 512 at 56", (64, 256, 56, 56), (512, 256, 1, 1), (64, 256, 8, 8),
          {"H200": "fprop:conv_pixels_kernel"}, stride=2),
    _conv("ResNet-50 3x3, 128 at 28", (64, 128, 28, 28), (128, 128, 3, 3), (64, 128, 6, 6),
          {"H200": "fprop:conv_pixels_kernel wgrad:conv_pixels_wgrad_kernel",
           "A100": "fprop:conv_gather_kernel wgrad:conv_wgrad_kernel"}, padding=1),
    _conv("ResNet-50 3x3 stride 2, 128 at 56", (64, 128, 56, 56), (128, 128, 3, 3), (64, 128, 8, 8),
          {"H200": "dgrad:conv_pixels_kernel", "A100": "dgrad:conv_gather_kernel"}, padding=1, stride=2),
    _conv("ResNet-50 3x3, 256 at 14, batch 8", (8, 256, 14, 14), (256, 256, 3, 3), (4, 256, 14, 14),
          {"H200": "fprop:conv_spatial_kernel wgrad:conv_wgrad_kernel"}, padding=1),
    _conv("ResNet-50 3x3, 512 at 7, batch 1", (1, 512, 7, 7), (512, 512, 3, 3), (1, 512, 7, 7),
          {"H200": "fprop:conv_finish_kernel"}, padding=1),
    _conv("ResNet-50 7x7 stride 2, 3 to 64 at 224", (64, 3, 224, 224), (64, 3, 7, 7), (2, 3, 56, 56),
          {"H200": "fprop:conv_rows_weight_kernel fprop:conv_rows_kernel wgrad:conv_rows_wgrad_kernel",
           "A100": "fprop:conv_rows_kernel"}, padding=3, stride=2),
    _conv("ResNeXt-50 3x3, 32 groups, 128 at 56", (64, 128, 56, 56), (128, 4, 3, 3), (1, 128, 28, 28),
          {"H200": "fprop:conv_gather_kernel wgrad:conv_wgrad_kernel"}, padding=1, groups=32),
    _conv("MobileNetV2 3x3 depthwise, 144 at 56", (64, 144, 56, 56), (144, 1, 3, 3), (2, 144, 28, 28),
          {"H200": "fprop:conv_depthwise_kernel wgrad:conv_depthwise_wgrad_kernel"}, padding=1, groups=144),
    _conv("VGG-16 3x3, 512 at 14", (64, 512, 14, 14), (512, 512, 3, 3), (64, 512, 2, 2),
          {"H200": "bias:channel_sum_kernel"}, bias=True, padding=1),
    Layer("ResNet-50 max pool 3x3 stride 2, 64 at 112", ((64, 64, 112, 112),), ((2, 64, 32, 32),),
          {"kernel_size": 3, "stride": 2, "padding": 1},
          {"H200": "forward:pool_kernel backward:pool_gradient_kernel"}, "max_pool2d"),
    Layer("ResNet-50 average pool, 2048 at 7", ((64, 2048, 7, 7),), ((4, 2048, 7, 7),), {"output_size": 1},
          {"H200": "forward:pool_kernel"}, "adaptive_avg_pool2d"),
    Layer("ResNet-50 1x1 + batch norm + ReLU, 128 at 28",
          ((64, 128, 28, 28), (128, 128, 1, 1), (128,), (128,)), ((1, 128, 28, 28), (128, 128, 1, 1), (128,), (128,)),
          {"training": True, "momentum": 0.1, "eps": 1e-5},
          {"H200": "fprop:combine_statistics_kernel apply:batch_norm_act_kernel sums:batch_norm_act_sums_kernel"
                   " gradient:batch_norm_act_gradient_kernel"}, "conv2d_bn_act"),
)  # fmt: skip


def passes(layer: Layer, shapes: Shapes, configs: dict[Any, Any] | None = None) -> tuple[list[Any], dict[Any, Any]]:
    """(what runs for the layer, forward and backward, each with its `Work`; the tiles in order), without running it.

    ``configs``: tiles to take instead of the chosen ones.
    """
    import fastconv.functional as F
    from fastconv.kernels.tiles.autotuned import considering
    from fastconv.traffic import Traffic

    seen: list[tuple[Any, Any]] = []
    tiles: dict[Any, Any] = {}

    def consider(space: Any, features: Any, work: Any, gpu: Any, choice: Any) -> Any:
        key = (space.name, sum(name == space.name for name, _ in tiles))
        if configs is not None and key in configs:
            choice = replace(choice, config=configs[key])
        tiles[key] = choice.config
        seen.append((choice, work(choice.config)))
        return choice

    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(considering(consider))
        tensors: list[Any] = []
        for shape in shapes:
            t = torch.empty(shape, dtype=torch.bfloat16)
            if len(shape) == 4:
                t = t.to(memory_format=torch.channels_last)
            tensors.append(t.requires_grad_())
        function: Callable[..., Any] = getattr(F, layer.function)
        if layer.function == "conv2d_bn_act":  # no bias, no running statistics
            tensors = [*tensors[:2], None, *tensors[2:], None, None]
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        traffic = stack.enter_context(Traffic())
        y = function(*tensors, **layer.options)
        y.backward(torch.empty_like(y))
    return [(p, next((w for c, w in seen if c is p.choice), None)) for p in traffic.passes], tiles


def count(record: Any, sample: int) -> dict[str, Any]:
    """The counters of a launch on zeros."""
    from fastconv.kernels.launch.launch import run

    # (A few pixels of room: strides may leave gaps.)
    tensors = [
        None if shape is None else torch.zeros(prod(shape) + 4096, dtype=dtype)
        for shape, dtype in zip(record.shapes, record.dtypes, strict=True)
    ]
    with emulator.options(counters=True, sample=sample, races=False):
        run(record.launch, *tensors)
    counters = emulator.launches()[-1].counters
    assert counters is not None
    return counters


def find(found: list[Any], name: str, kernel: str) -> tuple[Any, Any]:
    """(the launch, the pass's `Work` if it is of this launch) of a pass."""
    helps = kernel.startswith(("split_sum", "conv_finish", "conv_rows_weight", "combine"))
    for p, work in found:
        for record in p.launches:
            if record.name == kernel and p.name.split(",")[0] == name:
                return record, None if helps else work
    raise ValueError(f"no {kernel} in {[(p.name, [r.name for r in p.launches]) for p, _ in found]}")


def measured(gpu: str) -> None:
    """Prints the rows of one GPU, which this process emulates."""
    for layer in LAYERS:
        if gpu not in layer.kernels:
            continue
        whole, tiles = passes(layer, layer.shapes)
        small, _ = passes(layer, layer.small, tiles)
        for entry in layer.kernels[gpu].split():
            name, kernel = entry.split(":")
            record, work = find(whole, name, kernel)
            twin, _ = find(small, name, kernel)
            counters = count(record, SAMPLE)
            row = {"gpu": gpu, "layer": f"{layer.name}, {name}", "kernel": kernel, "counters": counters}
            if work is not None:
                # What one program moves.
                sectors = counters["global"]["load"]["sectors"] + counters["bulk"]["load"]["sectors"]
                asked = SECTOR * sectors / counters["programs"]
                distinct = sum(count(record, 1)["unique_bytes"].values())
                model = work.programs * work.steps * work.step_bytes / prod(record.launch.grid)
                row |= {"asked": asked / model, "distinct": distinct / model}
            row["unique"] = sum(count(twin, 0)["unique_bytes"].values()) / sum(twin.bytes)
            print(json.dumps(row), flush=True)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    counters = row["counters"]
    loop = counters["main_loop"]

    def moved(how: str) -> str:
        pointers, boxes = counters["global"][how], counters["bulk"][how]
        cells = []
        if pointers["requests"]:
            cells.append(
                " / ".join(f"{pointers[of] / pointers['requests']:.1f}" for of in ("sectors", "least_sectors"))
            )
        if boxes["sectors"]:
            cells.append(f"boxes {boxes['sectors'] / boxes['least_sectors']:.2f}")
        return ", ".join(cells)

    least = sum(counters["shared_wavefronts_without_conflicts"].values())
    everywhere = f"{sum(counters['shared_wavefronts'].values()) / least:.2f}" if least else ""
    inside = f"{loop['wavefronts'] / loop['least_wavefronts']:.2f}" if loop and loop["least_wavefronts"] else ""
    if loop:
        instructions = f"{loop['instructions']:.0f}"
    else:
        instructions = (
            f"({sum(counters['warp_instructions'].values()) / (counters['programs'] * counters['warps']):.0f})"
        )
    model = f"{row['asked']:.2f}" if "asked" in row else ""
    if model and not 1 / 1.3 < row["asked"] < 1.3:
        model += f" ({row['distinct']:.2f})"
    cells = [row["gpu"], row["kernel"].removesuffix("_kernel"), row["layer"], moved("load"), moved("store")]
    cells += [inside, everywhere, instructions, model, f"{row['unique']:.2f}"]
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    rows: list[dict[str, Any]] = []
    for gpu in ("H200", "A100"):
        command = [sys.executable, "-m", "tests.emulator.count", "--rows", gpu]
        # Tiles are what every machine chooses.
        with tempfile.TemporaryDirectory() as cache:
            env = os.environ | {"FASTCONV_DEVICE": f"tests.emulator:{gpu}", "FASTCONV_CACHE_DIR": cache}
            env.pop("TRITON_INTERPRET", None)
            out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows += [json.loads(text) for text in out.splitlines()]
    return "\n".join([BEGIN, HEAD, *map(line, rows), "", VERSION, END])


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.emulator.count", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the table is not what is counted")
    parser.add_argument("--rows", choices=("H200", "A100"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rows:
        measured(given.rows)
        return
    page = PAGE.read_text()
    if given.check and VERSION not in page:
        print(f"not checked: {PAGE.name}'s counts are another Triton's than {triton.__version__}")
        return
    fresh = page.split(BEGIN)[0] + table() + page.split(END)[1]
    if given.check and fresh != page:
        sys.exit(f"{PAGE.name}'s counts are stale: python -m tests.emulator.count")
    if not given.check:
        PAGE.write_text(fresh)


if __name__ == "__main__":
    main()
