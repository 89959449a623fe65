"""Pooling kernels compiled for GPUs that are not here, at the tiles that dispatch chooses, and the result read.

The pools of ResNet-50, VGG-16 and GoogLeNet in bf16 at two batch sizes are to move 16 bytes a load; a handful of others
are everything else that a kernel's code depends on.
"""

from collections.abc import Iterable, Iterator
from math import prod

import pytest
import torch

from binaries import COMPILING, complaints, each
from fastconv.autotune import Gpu
from fastconv.kernels import dispatch
from fastconv.kernels.compile.sass import GPUS, Compiled
from fastconv.kernels.families.family import Layout
from fastconv.kernels.families.pool_index import pool_gather
from fastconv.kernels.launch.launch import Launch
from fastconv.kernels.problem.layout import dense_strides
from fastconv.kernels.problem.pool import POOL_DIRECTIONS, PoolProblem, index_type, largest_share

pytestmark = COMPILING
each_gpu = each(GPUS, slow=lambda gpu: gpu.tcgen05)
on_hopper_at_least = each(GPUS, slow=lambda gpu: not gpu.wgmma)


def problem(
    kind: str,
    batch: int,
    channels: int,
    size: tuple[int, ...],
    output: tuple[int, ...],
    window: int = 0,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    training: bool = True,
    include_padding: bool = True,
    norm: float = 0.0,
) -> PoolProblem:
    """Without a window adaptive."""
    rank, adaptive = len(size), not window
    windows = tuple(map(largest_share, size, output)) if adaptive else (window,) * rank
    index = index_type(prod(windows)) if kind == "max" and training else None
    steps = (stride,) * rank, (padding,) * rank, (dilation,) * rank
    return PoolProblem(
        *(kind, batch, channels, size, output, windows, *steps, dtype, adaptive, index, 0, include_padding, norm)
    )


def networks() -> Iterator[PoolProblem]:
    for batch in (32, 256):
        for training in (True, False):
            yield problem("max", batch, 64, (112, 112), (56, 56), 3, 2, 1, training=training)
            for c, h in ((64, 224), (128, 112), (256, 56), (512, 28), (512, 14)):
                yield problem("max", batch, c, (h, h), (h // 2, h // 2), 2, 2, training=training)
            for c, h in ((64, 112), (192, 56), (480, 28)):
                yield problem("max", batch, c, (h, h), (h // 2, h // 2), 3, 2, training=training)
            for c, h in ((192, 28), (256, 28), (480, 14), (512, 14), (832, 7)):
                yield problem("max", batch, c, (h, h), (h, h), 3, 1, 1, training=training)
        yield problem("average", batch, 512, (7, 7), (7, 7))
        for c in (1024, 2048):
            yield problem("average", batch, c, (7, 7), (1, 1))


OTHERS = (
    problem("max", 8, 64, (56, 56), (28, 28), 3, 2, 1, dtype=torch.float32),
    problem("average", 8, 64, (56, 56), (56, 56), 3, 1, 1, dtype=torch.float32, include_padding=False),
    problem("max", 8, 3, (56, 56), (28, 28), 3, 2, 1),
    problem("max", 8, 64, (56, 56), (52, 52), 3, 1, dilation=2),
    problem("max", 8, 64, (60, 60), (20, 20), 3, 3),
    problem("max", 8, 256, (20, 20), (20, 20), 5, 1, 2),
    problem("max", 8, 256, (20, 20), (20, 20), 13, 1, 6),
    problem("max", 8, 64, (16, 56, 56), (8, 28, 28), 3, 2, 1),
    problem("max", 8, 64, (16, 56, 56), (16, 56, 56), 3, 1, 1, dtype=torch.float32),
    problem("max", 8, 64, (10, 13), (7, 7)),
    problem("average", 8, 64, (10, 13), (7, 7)),
    problem("average", 1, 64, (224, 224), (1, 1)),
    problem("max", 1, 64, (224, 224), (1, 1)),
    problem("max", 1, 64, (8, 60, 60), (1, 2, 2), dtype=torch.float32),
    problem("lp", 8, 64, (57, 57), (28, 28), 3, 2, norm=2.0),
    problem("lp", 8, 64, (58, 58), (56, 56), 3, 1, norm=3.0, dtype=torch.float32),
    problem("lp", 8, 64, (56, 56), (28, 28), 3, 2, norm=3.0),
    problem("lp", 8, 64, (20, 20), (8, 8), 13, 1, norm=3.0),
    # 64-bit offsets
    problem("max", 3, 64, (4096, 4096), (2048, 2048), 3, 2, 1),
    problem("average", 3, 64, (256, 256, 256), (128, 128, 128), 3, 2, 1),
)


def launches(problems: Iterable[PoolProblem], gpu: Gpu, channels_last: bool) -> list[tuple[PoolProblem, Launch]]:
    """(problem, launch) in both directions, and of the gather by taps if there are any."""
    found: list[tuple[PoolProblem, Launch]] = []
    for pool in problems:
        view = pool.as_rank3 if channels_last else pool.as_rank3.planes
        made: list[Launch] = []
        for direction, shape in zip(POOL_DIRECTIONS, (view.input_shape, view.output_shape), strict=True):
            if direction == "backward" and pool.kind == "max" and pool.index is None:
                continue
            layout = Layout(source_strides=dense_strides(shape), channels_last=channels_last)
            plan = dispatch.plan(direction, pool, gpu, layout)
            assert plan.choice is not None
            made += plan.launches
            if direction == "forward" and pool.index is not None:
                for strides in (layout.source_strides, None):
                    made.append(pool_gather(pool, plan.choice.config, channels_last, strides))
        found += [(pool, launch) for launch in made]
    return found


def spilled(pool: PoolProblem, launch: Launch, binary: Compiled) -> list[str]:
    # Below 255 registers ptxas gives a few to hold one more program; at 255 it has run out of them.
    if not binary.spills or (binary.stack <= 32 and binary.registers < 255):
        return []
    return [f"{binary.spills} spills, {binary.stack} bytes of stack, {binary.registers} registers"]


def narrow(pool: PoolProblem, launch: Launch, binary: Compiled) -> list[str]:
    """A complaint about anything but 16 bytes of values and 8 of taps a thread."""
    # A stack that no instruction touches costs nothing.
    wrong = [f"{binary.spills} spills"] if binary.spills else []
    if launch.name == "pool_gather_kernel":
        return wrong
    taps = {8} if pool.index is not None else set()
    loads, stores = binary.load_bytes, binary.global_accesses("STG")
    forward = launch.name == "pool_kernel"
    if set(loads) != ({16} if forward else {16} | taps):
        wrong.append(f"loads of {loads} bytes")
    # The lanes of a window shared leave their result to a few threads.
    if set(stores) != ({16} | taps if forward else {16}) and launch.constants.get("LANES", 1) == 1:
        wrong.append(f"stores of {stores} bytes")
    return wrong


@each_gpu
def test_networks_move_16_bytes_at_a_time(gpu: Gpu, record_property) -> None:
    found = launches(networks(), gpu, True)
    wrong = complaints(found, gpu, narrow)
    assert not wrong, wrong
    count = len({launch.compile_key for _, launch in found})
    record_property("line", f"{count} distinct compiles for {gpu.name}: the pools of three networks")
    assert count <= 24


@on_hopper_at_least
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "planes"])
def test_other_variants_do_not_spill(channels_last: bool, gpu: Gpu) -> None:
    found = launches(OTHERS, gpu, channels_last)
    assert any(launch.constants.get("WIDE") for _, launch in found)
    assert {"pool_combine_kernel", "pool_pixel_gradient_kernel"} <= {launch.name for _, launch in found}
    wrong = complaints(found, gpu, spilled)
    assert not wrong, wrong
