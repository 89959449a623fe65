"""Grouped and first-layer kernels compiled for GPUs that are not here, at the tiles chosen for real networks.

ResNeXt-50's grouped layers and the first layers of ResNet-50, EfficientNet-B0 and VGG-16, in bf16 at batch 32 and 256.
"""

from collections.abc import Iterable
from typing import NamedTuple

import pytest
import torch

from binaries import COMPILING, TENSOR_CORES, complaints, each, spilled
from fastconv.autotune import Gpu
from fastconv.kernels import dispatch
from fastconv.kernels.compile.sass import GPUS, Compiled
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
# The rest that a packed tile's code depends on: runs of 1 to 5 channels, dtype, rank, one tap.
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


class Product(NamedTuple):
    problem: ConvProblem
    direction: str
    epilogue: str
    family: str

    def describe(self) -> str:
        return f"{self.family} {self.direction} {self.epilogue} {self.problem.describe()}"


def planned(
    problems: Iterable[ConvProblem], gpu: Gpu, epilogues: Iterable[str] = EPILOGUES
) -> list[tuple[Product, Launch]]:
    found = []
    for problem in problems:
        for direction in DIRECTIONS:
            for name in epilogues if direction == "fprop" else ("plain",):
                plan = dispatch.plan(direction, problem, gpu, Layout(epilogue=EPILOGUES[name]))
                found += [(Product(problem, direction, name, plan.family), launch) for launch in plan.launches]
    return found


def product_complaints(launch: Launch, binary: Compiled, allowed: int = 0) -> list[str]:
    # Below 255 registers ptxas gives a few to hold one more program; at 255 it has run out of them.
    wrong = spilled(binary, allowed if binary.registers < 255 else 0)
    if "BLOCK_C" in launch.constants and binary.tensor_cores != TENSOR_CORES[binary.arch]:
        wrong.append(f"tensor cores by {binary.tensor_cores}")
    if binary.serialised:
        wrong.append("waits for every wgmma")
    return wrong


def spills_beyond_a_few(_: Product, launch: Launch, binary: Compiled) -> list[str]:
    return product_complaints(launch, binary, allowed=32)


@each_gpu
def test_groups_share_tensor_cores(gpu: Gpu) -> None:
    """x comes by 16 bytes, asynchronously, and the weight by the runs of a group's channels, of 8 bytes and more."""

    def complain(it: Product, launch: Launch, binary: Compiled) -> list[str]:
        wrong = product_complaints(launch, binary)
        if launch.name == "split_sum_kernel":
            return wrong
        asynchronous = binary.global_accesses("LDGSTS")
        few = it.problem.in_channels // it.problem.groups == 4 and it.direction != "wgrad"
        if it.family != "grouped" or set(asynchronous) != {16} | ({8} if few else set()) or asynchronous[16] < 8:
            wrong.append(f"asynchronous loads of {asynchronous} bytes")
        if it.direction != "wgrad" and not binary.global_accesses("STG").get(16):
            wrong.append(f"stores of {binary.global_accesses('STG')} bytes")
        return wrong

    wrong = complaints(planned(RESNEXT, gpu), gpu, complain)
    assert not wrong, wrong


@on_hopper_at_least
def test_other_groups_do_not_spill(gpu: Gpu, set_fp32_precision) -> None:
    set_fp32_precision("tf32")
    wrong = complaints(planned(GROUPS, gpu, ("plain", "statistics")), gpu, spills_beyond_a_few)
    assert not wrong, wrong


@each_gpu
def test_first_layers_read_rows(gpu: Gpu) -> None:
    """No load of x waits or holds only a channel; the rows' weight comes by 16 bytes."""
    with dispatch.only_family("rows"):
        found = planned(FIRST, gpu)

    def complain(it: Product, launch: Launch, binary: Compiled) -> list[str]:
        wrong = product_complaints(launch, binary)
        if launch.name not in ("conv_rows_kernel", "conv_rows_wgrad_kernel"):
            return wrong
        if binary.global_accesses("LDGSTS").keys() != {launch.constants["VEC"] * 2, 16}:
            wrong.append(f"asynchronous loads of {binary.global_accesses('LDGSTS')} bytes")
        # A NaN's tile is walked by one element of x and one of the weight at a time.
        narrow = sum(count for width, count in binary.global_accesses("LDG").items() if width < 4)
        if narrow > (2 if it.direction == "fprop" else 0):
            wrong.append(f"loads of {binary.global_accesses('LDG')} bytes")
        if it.direction == "fprop" and not binary.global_accesses("STG").get(16):
            wrong.append(f"stores of {binary.global_accesses('STG')} bytes")
        # A gather of (tap, channel) pairs takes 235.
        if it.epilogue == "plain" and binary.registers > (232 if gpu.arch == 80 else 200):
            wrong.append(f"{binary.registers} registers")
        return wrong

    assert {it.family for it, _ in found} == {"rows"}
    wrong = complaints(found, gpu, complain)
    assert not wrong, wrong


@pytest.mark.parametrize("gpu", GPUS[1:], ids=lambda gpu: f"sm_{gpu.arch}")
def test_rows_by_bulk_copies(gpu: Gpu) -> None:
    """Both operands come from shared memory, by copies that run ahead, although a NaN's tile is walked again."""
    with dispatch.only_family("row_boxes"):
        found = [(it, launch) for it, launch in planned(FIRST, gpu) if launch.name == "conv_row_boxes_kernel"]

    def complain(it: Product, launch: Launch, binary: Compiled) -> list[str]:
        wrong = product_complaints(launch, binary, allowed=32)
        if set(binary.operands) != {"shared memory"} or binary.copies < 2:
            wrong.append(f"{binary.copies} copies ahead of operands from {binary.operands}")
        opcodes = {opcode.split(".")[0] for opcode in binary.opcodes}
        plain = it.epilogue == "plain"
        if plain and (not {"UTMALDG", "UTMASTG"} <= opcodes or opcodes & {"LDG", "LDGSTS", "STG"}):
            wrong.append(f"{opcodes}")
        return wrong

    wrong = complaints(found, gpu, complain)
    assert found and not wrong, wrong


@on_hopper_at_least
def test_other_first_layers_do_not_spill(gpu: Gpu, set_fp32_precision) -> None:
    set_fp32_precision("tf32")
    with dispatch.only_family("rows"):
        found = planned(ROWS, gpu, ("plain", "statistics"))
    assert {it.family for it, _ in found} == {"rows"}
    wrong = complaints(found, gpu, spills_beyond_a_few)
    assert not wrong, wrong
