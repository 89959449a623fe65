"""Every kernel compiled for GPUs that are not here, at the tiles that dispatch chooses, and the result read.

Three networks at two batch sizes in bf16 are the real tiles; a handful of problems are everything else that a kernel's
code depends on: dtype, precision, rank, groups, 64-bit offsets.
"""

import json
from collections.abc import Iterable

import pytest
import torch

from binaries import COMPILING, TENSOR_CORES, complaints, each, needs_networks, slowed, spilled
from convolutions import of_networks
from fastconv.autotune import Gpu
from fastconv.cli.inspect_layers import LAYERS, launches_of, report
from fastconv.kernels.compile.sass import GPUS, Compiled
from fastconv.kernels.launch.launch import Launch
from fastconv.kernels.problem.conv import ConvProblem, conv_problem

pytestmark = COMPILING
NETWORKS = ("resnet50", "vgg16", "efficientnet_b0")
BATCHES = (32, 256)
# The batch is a side of the pixel GEMM's tiles, so that two batches share few of its binaries.
MOST_COMPILES = {False: 60, True: 90}
PRODUCTS = ("conv_gather_kernel", "conv_wgrad_kernel")
BULK_PRODUCTS = (
    *("conv_pixels_kernel", "conv_pixels_wgrad_kernel", "conv_spatial_kernel"),
    *("conv_gemm_kernel", "conv_gemm_wgrad_kernel"),
)

each_gpu = each(GPUS)


def launches(problems: Iterable[tuple[ConvProblem, bool]], gpu: Gpu) -> list[tuple[ConvProblem, Launch]]:
    """(problem, launch) of each direction; ``problems`` tell whether they have a bias."""
    return [(problem, launch) for problem, bias in problems for _, _, launch in launches_of(problem, bias, gpu)]


def dense_complaints(problem: ConvProblem, launch: Launch, binary: Compiled) -> list[str]:
    wrong = spilled(binary)
    aligned = problem.in_channels % 8 == 0 and problem.out_channels % 8 == 0
    if launch.name in PRODUCTS:
        if binary.tensor_cores != TENSOR_CORES[binary.arch]:
            wrong.append(f"tensor cores by {binary.tensor_cores}")
        if binary.serialised:
            wrong.append("waits for every wgmma")
        if aligned and set(binary.global_accesses("LDGSTS")) != {16}:
            wrong.append(f"asynchronous loads of {binary.global_accesses('LDGSTS')} bytes")
    if launch.name in BULK_PRODUCTS:
        wrong += slowed(binary)
        # Hopper takes a rectangle, the first operand, through registers.
        source = "registers" if binary.arch == 90 and launch.constants.get("ROWS", 1) > 1 else "shared memory"
        if set(binary.operands) != {source}:
            wrong.append(f"first operands from {binary.operands}")
        opcodes = {name.split(".")[0] for name in binary.opcodes}
        # A walk over tiles may bring the bias ahead.
        if "UTMALDG" not in opcodes or ("LDGSTS" in opcodes and not launch.pointers[2]):
            wrong.append("operands not moved by bulk copies")
    # A bias is read once, each thread its own few elements.
    biased = launch.name in ("conv_gather_kernel", "conv_gemm_kernel", "conv_pixels_kernel") and launch.pointers[2]
    bias = launch.constants["BLOCK_K"] // 8 if biased else 0
    if aligned and sum(count for width, count in binary.load_bytes.items() if width < 16) > bias:
        wrong.append(f"loads of {binary.load_bytes} bytes")
    return wrong


@needs_networks
@each_gpu
def test_dense_layers_use_the_hardware(gpu: Gpu) -> None:
    problems = [(problem, bias) for problem, bias in of_networks(NETWORKS, BATCHES) if problem.groups == 1]
    wrong = complaints(launches(problems, gpu), gpu, dense_complaints)
    assert not wrong, wrong


@needs_networks
@each_gpu
def test_networks_share_binaries(gpu: Gpu, record_property) -> None:
    count = len({launch.compile_key for _, launch in launches(of_networks(NETWORKS, BATCHES), gpu)})
    record_property("line", f"{count} distinct compiles for {gpu.name}: {', '.join(NETWORKS)}, batch {BATCHES}")
    assert count < MOST_COMPILES[gpu.bulk]


def problem(
    channels: int = 64,
    filters: int = 128,
    size: tuple[int, ...] = (28, 28),
    taps: tuple[int, ...] = (3, 3),
    stride: int = 1,
    groups: int = 1,
    batch: int = 32,
    dtype: torch.dtype = torch.bfloat16,
) -> ConvProblem:
    return conv_problem(
        (batch, channels, *size),
        (filters, channels // groups, *taps),
        None,
        (stride,) * len(size),
        tuple(tap // 2 for tap in taps) * 2,
        (1,) * len(size),
        groups,
        dtype,
    )


OTHERS = (
    problem(dtype=torch.float16),
    problem(3, dtype=torch.float16, stride=2),
    problem(dtype=torch.float32),
    problem(256, 512, taps=(1, 1), dtype=torch.float32),
    problem(3, dtype=torch.float32, stride=2),
    problem(33, 65),
    problem(size=(1024,), taps=(5,), stride=2),
    problem(size=(8, 14, 14), taps=(3, 3, 3)),
    problem(3, 64, size=(16, 112, 112), taps=(3, 7, 7), stride=2),
    problem(128, 128, groups=4),
    problem(64, 64, groups=64),
    # 64-bit offsets
    problem(64, 64, size=(4096, 4096), batch=3),
    problem(64, 64, size=(256, 256, 256), taps=(3, 3, 3), batch=3),
)


# Layers at batch 1, whose tiles are too few for a GPU.
FEW = (
    problem(512, 512, (7, 7), batch=1),
    problem(256, 256, (14, 14), batch=1),
    problem(2048, 512, (7, 7), (1, 1), batch=1),
)


@each_gpu
def test_split_reductions_use_the_hardware(gpu: Gpu) -> None:
    found = launches([(p, False) for p in FEW], gpu)
    assert {"conv_gather_kernel", "conv_finish_kernel"} <= {launch.name for _, launch in found}
    assert any(launch.constants.get("SPLIT") for _, launch in found)
    wrong = complaints(found, gpu, dense_complaints)
    assert not wrong, wrong


@each_gpu
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_other_variants_do_not_spill(gpu: Gpu, precision: str, set_fp32_precision) -> None:
    set_fp32_precision(precision)
    chosen = [(p, True) for p in OTHERS if precision == "tf32" or p.dtype is torch.float32]
    found = launches(chosen, gpu)
    if precision == "tf32":
        assert any(launch.constants.get("WIDE") for _, launch in found)

    def complain(problem: ConvProblem, launch: Launch, binary: Compiled) -> list[str]:
        # Below 255 registers ptxas gives a few to hold one more program; at 255 it has run out of them.
        wrong = spilled(binary, allowed=32 if binary.registers < 255 else 0)
        exact = problem.dtype is torch.float32 and precision == "ieee"
        if launch.name in PRODUCTS and (binary.tensor_cores is None) != exact:
            wrong.append(f"tensor cores by {binary.tensor_cores} for {precision}")
        return wrong

    wrong = complaints(found, gpu, complain)
    assert not wrong, wrong


def test_report_has_a_row_for_each_binary() -> None:
    ticks: list[tuple[int, int]] = []
    rows = report(LAYERS[1:2], GPUS[:1], lambda *tick: ticks.append(tick))
    assert {(row["kernel"], row["direction"]) for row in rows} >= {
        ("conv_gather_kernel", "fprop"),
        ("conv_gather_kernel", "dgrad"),
        ("conv_wgrad_kernel", "wgrad"),
        ("channel_sum_kernel", "bias gradient"),
    }
    assert ticks[-1] == (len(rows), len(rows))
    assert json.loads(json.dumps(rows))[0]["target"] == GPUS[0].name
