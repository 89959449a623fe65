"""Grouped and first-layer kernels compiled for GPUs that are not here, at the tiles chosen for real networks.

ResNeXt-50's grouped layers and the first layers of ResNet-50, EfficientNet-B0 and VGG-16, in bf16 at batch 32 and 256.
"""

from collections.abc import Callable, Iterator

import pytest
import torch

from binaries import COMPILING, JOBS, TENSOR_CORES, each, spilled
from fastconv.autotune import Gpu
from fastconv.kernels import dispatch
from fastconv.kernels.compile.sass import GPUS, Compiled, compile_all
from fastconv.kernels.families.family import Layout
from fastconv.kernels.jit.epilogue import Epilogue
from fastconv.kernels.launch.launch import Launch
from fastconv.kernels.problem.conv import DIRECTIONS, ConvProblem, conv_problem

pytestmark = COMPILING
each_gpu = each(GPUS, slow=lambda gpu: gpu.tcgen05)
on_hopper_at_least = each(GPUS, slow=lambda gpu: not gpu.wgmma)
EPILOGUES = {
    "plain": Epilogue(),
    "inference": Epilogue(*("*fp32",) * 4, act="relu"),
    "statistics": Epilogue(statistics=True),
}


def layer(
    channels: int,
    filters: int,
    size: int,
    taps: int = 3,
    stride: int = 1,
    groups: int = 1,
    batch: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 2,
) -> ConvProblem:
    return conv_problem(
        (batch, channels, *(size,) * rank),
        (filters, channels // groups, *(taps,) * rank),
        None,
        *((stride,) * rank, (taps // 2,) * 2 * rank, (1,) * rank),
        *(groups, dtype),
    )


RESNEXT = [
    layer(channels, channels, size, stride=stride, groups=32, batch=batch)
    for batch in (32, 256)
    for channels, size, stride in ((128, 56, 1), (256, 56, 2), (256, 28, 1), (512, 28, 2), (512, 14, 1))
]
# What else a packed tile's code depends on: runs of 1 to 5 channels, dtype, rank, one tap.
GROUPS = [
    layer(64, 64, 28, groups=32),
    layer(96, 96, 28, groups=32),
    layer(160, 160, 28, taps=5, stride=2, groups=32),
    layer(64, 128, 7, groups=16, batch=1),
    layer(128, 128, 28, groups=32, dtype=torch.float32),
    layer(64, 64, 14, groups=8, rank=3, dtype=torch.float16),
    layer(64, 32, 28, taps=1, groups=4),
]

FIRST = [
    layer(3, filters, 224, taps, stride, batch=batch)
    for batch in (32, 256)
    for filters, taps, stride in ((64, 7, 2), (32, 3, 2), (64, 3, 1))
]
# What else a row's code depends on: 1 to 4 channels, dtype, rank, filter, a single row.
ROWS = [
    layer(1, 6, 28, taps=5),
    layer(2, 24, 64, stride=2),
    layer(4, 64, 224, taps=7, stride=2),
    layer(3, 96, 224, taps=11, stride=4, dtype=torch.float16),
    layer(3, 64, 224, taps=7, stride=2, dtype=torch.float32),
    layer(3, 64, 112, taps=7, stride=2, rank=3),
    layer(1, 16, 16384, taps=9, stride=2, rank=1),
    layer(3, 33, 224, stride=2, batch=1),
]


def planned(problems: list[ConvProblem], gpu: Gpu, epilogues: tuple[str, ...] = tuple(EPILOGUES)) -> Iterator:
    """(problem, direction, epilogue, family, launch) of every distinct product."""
    seen = set()
    for problem in problems:
        for direction in DIRECTIONS:
            for name in epilogues if direction == "fprop" else ("plain",):
                plan = dispatch.plan(direction, problem, gpu, Layout(epilogue=EPILOGUES[name]))
                for launch in plan.launches:
                    if launch.compile_key not in seen:
                        seen.add(launch.compile_key)
                        yield problem, direction, name, plan.family, launch


def complaints(found: list[tuple], gpu: Gpu, allowed: int = 0) -> dict[tuple, list[str]]:
    """What is wrong with any such binary, by its compile key; and the binary."""
    compiled = compile_all(((launch, gpu) for *_, launch in found), JOBS)
    wrong: dict[tuple, list[str]] = {}
    for _, _, _, _, launch in found:
        binary = compiled[launch.compile_key, gpu.arch]
        mine = wrong.setdefault(launch.compile_key, [])
        # Below 255 registers ptxas gives a few to hold one more program; at 255 it has run out of them.
        mine += spilled(binary, allowed if binary.registers < 255 else 0)
        if "BLOCK_C" in launch.constants and binary.tensor_cores != TENSOR_CORES[gpu.arch]:
            mine.append(f"tensor cores by {binary.tensor_cores}")
        if binary.serialised:
            mine.append("waits for every wgmma")
    return wrong, compiled


def listed(found: list[tuple], wrong: dict[tuple, list[str]]) -> str:
    """The complaints, a line each."""

    def tile(launch: Launch) -> str:
        return "x".join(str(value) for name, value in launch.constants.items() if name.startswith("BLOCK"))

    return "\n".join(
        f"{family} {direction} {name} {problem.describe()}, {tile(launch)}, {launch.num_warps} warps: {what}"
        for problem, direction, name, family, launch in found
        for what in wrong[launch.compile_key]
    )


@each_gpu
def test_groups_share_tensor_cores(gpu: Gpu) -> None:
    """x comes by 16 bytes, asynchronously, and the weight by the runs of a group's channels, of 8 bytes and more."""
    found = list(planned(RESNEXT, gpu))
    wrong, compiled = complaints(found, gpu)
    for problem, direction, _, family, launch in found:
        binary: Compiled = compiled[launch.compile_key, gpu.arch]
        if launch.name == "split_sum_kernel":
            continue
        asynchronous = binary.global_accesses("LDGSTS")
        runs = {16} | ({8} if problem.in_channels // problem.groups == 4 and direction != "wgrad" else set())
        if family != "grouped" or set(asynchronous) != runs or asynchronous[16] < 8:
            wrong[launch.compile_key].append(f"{family}, asynchronous loads of {asynchronous} bytes")
        if direction != "wgrad" and not binary.global_accesses("STG").get(16):
            wrong[launch.compile_key].append(f"stores of {binary.global_accesses('STG')} bytes")
    assert not any(wrong.values()), listed(found, wrong)


@on_hopper_at_least
def test_other_groups_do_not_spill(gpu: Gpu, set_fp32_precision: Callable[[str], None]) -> None:
    set_fp32_precision("tf32")
    found = list(planned(GROUPS, gpu, ("plain", "statistics")))
    wrong, _ = complaints(found, gpu, allowed=32)
    assert not any(wrong.values()), listed(found, wrong)


@each_gpu
def test_first_layers_read_rows(gpu: Gpu) -> None:
    """No load of x waits, nor does one hold a channel alone; the packed weight comes by 16 bytes."""
    with dispatch.only_family("rows"):
        found = list(planned(FIRST, gpu))
    wrong, compiled = complaints(found, gpu)
    for _, direction, name, family, launch in found:
        if launch.name not in ("conv_rows_kernel", "conv_rows_wgrad_kernel"):
            continue
        binary: Compiled = compiled[launch.compile_key, gpu.arch]
        mine = wrong[launch.compile_key]
        if binary.global_accesses("LDGSTS").keys() != {launch.constants["VEC"] * 2, 16}:
            mine.append(f"{family}, asynchronous loads of {binary.global_accesses('LDGSTS')} bytes")
        # A NaN's tile is walked by one element of x and one of the weight at a time.
        singly = sum(count for width, count in binary.global_accesses("LDG").items() if width < 4)
        if singly > (2 if direction == "fprop" else 0):
            mine.append(f"{name}: loads of {binary.global_accesses('LDG')} bytes")
        if direction == "fprop" and not binary.global_accesses("STG").get(16):
            mine.append(f"stores of {binary.global_accesses('STG')} bytes")
        # A gather of (tap, channel) pairs takes 235.
        if name == "plain" and binary.registers > (232 if gpu.arch == 80 else 200):
            mine.append(f"{binary.registers} registers")
    assert {entry[3] for entry in found} == {"rows"}
    assert not any(wrong.values()), listed(found, wrong)


@pytest.mark.parametrize("gpu", GPUS[1:], ids=lambda gpu: f"sm_{gpu.arch}")
def test_rows_by_bulk_copies(gpu: Gpu) -> None:
    """Both operands come from shared memory, by copies that run ahead, in spite of the walk of a NaN's tile."""
    with dispatch.only_family("row_boxes"):
        found = [entry for entry in planned(FIRST, gpu) if entry[4].name == "conv_row_boxes_kernel"]
    wrong, compiled = complaints(found, gpu, allowed=32)
    for _, _, name, _, launch in found:
        binary = compiled[launch.compile_key, gpu.arch]
        mine = wrong[launch.compile_key]
        if set(binary.operands) != {"shared memory"} or binary.copies < 2:
            mine.append(f"{binary.copies} copies ahead of operands from {binary.operands}")
        opcodes = {opcode.split(".")[0] for opcode in binary.opcodes}
        if name == "plain" and (not {"UTMALDG", "UTMASTG"} <= opcodes or opcodes & {"LDG", "LDGSTS", "STG"}):
            mine.append(f"{opcodes}")
    assert found and not any(wrong.values()), listed(found, wrong)


@on_hopper_at_least
def test_other_first_layers_do_not_spill(gpu: Gpu, set_fp32_precision: Callable[[str], None]) -> None:
    set_fp32_precision("tf32")
    with dispatch.only_family("rows"):
        found = list(planned(ROWS, gpu, ("plain", "statistics")))
    wrong, _ = complaints(found, gpu, allowed=32)
    assert {entry[3] for entry in found} == {"rows"}
    assert not any(wrong.values()), listed(found, wrong)
