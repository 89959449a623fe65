"""``fastconv inspect`` without an operator: the kernels of ResNet-50's telling layers, a row for each binary."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastconv.autotune import Config, Gpu
from fastconv.kernels import dispatch
from fastconv.kernels.compile.sass import compile_all
from fastconv.kernels.families import channel_sum
from fastconv.kernels.families.batch_norm import pass_tile
from fastconv.kernels.families.family import Layout
from fastconv.kernels.launch.launch import Launch
from fastconv.kernels.problem.conv import DIRECTIONS, ConvProblem, conv_problem


def _layer(channels: int, size: int, filters: int, filter_size: int, stride: int = 1) -> ConvProblem:
    return conv_problem(
        (64, channels, size, size),
        (filters, channels, filter_size, filter_size),
        None,
        (stride,) * 2,
        (filter_size // 2,) * 4,
        (1, 1),
        1,
        torch.bfloat16,
    )


# ResNet-50's layers at batch 64: the first, then both filter sizes, with and without stride, on large and small maps.
LAYERS = (
    _layer(3, 224, 64, 7, 2),
    _layer(128, 56, 128, 3, 2),
    _layer(64, 56, 256, 1),
    _layer(64, 56, 64, 3),
    _layer(512, 7, 512, 3),
    _layer(256, 56, 512, 1, 2),
    _layer(1024, 14, 256, 1),
)
QUICK = 3


def launches_of(problem: ConvProblem, bias: bool, gpu: Gpu) -> list[tuple[str, Config, Launch]]:
    """(direction, config, launch) of every launch that training one layer takes on ``gpu``, with dense operands."""
    found = []
    for direction in DIRECTIONS:
        plan = dispatch.plan(direction, problem, gpu, Layout(bias=bias and direction == "fprop"))
        found += [(direction, plan.choice.config, launch) for launch in plan.launches if plan.choice is not None]
    if not bias:
        return found
    pixels, channels = problem.output_pixels, problem.out_channels
    config = pass_tile(pixels, channels, problem.dtype.itemsize, 1, True, gpu).config
    launches = channel_sum.channel_sum(pixels, channels, channels, problem.dtype, config)
    return found + [("bias gradient", config, launch) for launch in launches]


def report(
    problems: Iterable[ConvProblem], gpus: Iterable[Gpu], progress: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """One row for each distinct binary and GPU, named by the first problem that runs it."""
    launches: dict[tuple[Any, Gpu], tuple[str, ConvProblem, Config, Launch]] = {}
    for gpu in gpus:
        for problem in problems:
            for direction, config, launch in launches_of(problem, True, gpu):
                launches.setdefault((launch.compile_key, gpu), (direction, problem, config, launch))
    compiled = compile_all(((launch, gpu) for (_, gpu), (*_, launch) in launches.items()), progress=progress)
    rows = []
    for (key, gpu), (direction, problem, config, launch) in launches.items():
        binary = compiled[key, gpu.arch]
        programs, limit = binary.occupancy(gpu)
        rows.append(
            {
                "kernel": launch.name,
                "direction": direction,
                "target": gpu.name,
                "problem": problem.describe(),
                "config": dict(config),
                "registers": binary.registers,
                "spills": binary.spills,
                "stack": binary.stack,
                "shared_memory": binary.shared_memory,
                "occupancy": programs,
                "occupancy_limit": limit,
                "tensor_cores": binary.tensor_cores,
                "wgmma_serialised": binary.serialised,
                "step_instructions": binary.step,
                "load_bytes": binary.load_bytes,
                "async_load_bytes": binary.global_accesses("LDGSTS"),
                "store_bytes": binary.global_accesses("STG"),
            }
        )
    return rows
