"""The flat GEMM, and few images over rows and rectangles of pixels, compiled for GPUs that are not here, and read.

Slow: at the tiles chosen for ResNet-50, a U-Net and EfficientNet-B0 at batch 64 and 256, and for ResNet-50 at batch 1;
and every tile of the spaces with the largest epilogues.
"""

from collections.abc import Iterable

import pytest
import torch

from binaries import COMPILING, JOBS, complaints, each, needs_networks, slowed
from convolutions import Case, of_networks
from fastconv.autotune import Gpu, Space
from fastconv.kernels import dispatch
from fastconv.kernels.compile.sass import GPUS, Compiled, compile_all
from fastconv.kernels.families.conv_gather import conv_gather
from fastconv.kernels.families.conv_gemm import (
    GEMM,
    GEMM_RESIDENT,
    GEMM_RESIDENT_SINGLE,
    GEMM_WGRAD,
    conv_gemm,
    conv_gemm_wgrad,
)
from fastconv.kernels.families.conv_spatial import SPATIAL, conv_spatial
from fastconv.kernels.families.family import Layout
from fastconv.kernels.jit.epilogue import PLAIN, Epilogue
from fastconv.kernels.launch.launch import Launch
from fastconv.kernels.problem.conv import DIRECTIONS
from fastconv.kernels.problem.layout import pointer_type

pytestmark = COMPILING
NETWORKS, BATCHES = ("resnet50", "unet", "efficientnet_b0"), (64, 256)
PRODUCTS = ("conv_gemm_kernel", "conv_gemm_wgrad_kernel", "conv_spatial_kernel")
STATISTICS = Epilogue(statistics=True)
each_gpu = each(GPUS[1:])


def inference(dtype: torch.dtype) -> Epilogue:
    """All that inference can have."""
    return Epilogue(*("*fp32",) * 5, residual=pointer_type(dtype), act="prelu")


def product_complaints(launches: Iterable[Launch], gpu: Gpu) -> str:
    return complaints((("a tile", launch) for launch in launches if launch.name in PRODUCTS), gpu, _wrong)


def _wrong(_: str, launch: Launch, binary: Compiled) -> list[str]:
    wrong = slowed(binary)
    if binary.shared_memory > GPUS[1].shared_memory:
        wrong.append(f"{binary.shared_memory} bytes of shared memory")
    # Hopper takes a rectangle, the first operand, through registers.
    source = "registers" if launch.constants.get("ROWS", 1) > 1 else "shared memory"
    if binary.arch == 90 and set(binary.operands) != {source}:
        wrong.append(f"first operands from {binary.operands}")
    opcodes = {name.split(".")[0] for name in binary.opcodes}
    # An epilogue's vectors may come by asynchronous loads of 4 bytes.
    if "UTMALDG" not in opcodes or 16 in binary.global_accesses("LDGSTS"):
        wrong.append("operands not moved by bulk copies")
    statistics = launch.name != "conv_gemm_wgrad_kernel" and launch.pointers[-1] is not None
    single = 4 if launch.constants.get("SPLIT") else 2
    if not statistics and set(binary.global_accesses("STG")) != {16 if launch.constants["VEC"] > 1 else single}:
        wrong.append(f"stores of {binary.global_accesses('STG')} bytes")
    return wrong


def planned(family: str, networks: tuple[str, ...], batches: tuple[int, ...], gpu: Gpu) -> list[Launch]:
    """What networks take of a family, plain, and fprop with statistics too."""
    found: list[Launch] = []
    for problem, _ in of_networks(networks, batches):
        for direction in DIRECTIONS:
            for epilogue in (PLAIN, STATISTICS)[: 2 if direction == "fprop" else 1]:
                plan = dispatch.plan(direction, problem, gpu, Layout(epilogue=epilogue))
                found += plan.launches if plan.family == family else ()
    return found


@pytest.mark.slow
@needs_networks
@each_gpu
def test_filters_of_one_tap_use_the_hardware(gpu: Gpu, record_property) -> None:
    launches = planned("gemm", NETWORKS, BATCHES, gpu)
    assert {launch.name for launch in launches} >= set(PRODUCTS[:2])
    count = len({launch.compile_key for launch in launches})
    record_property("line", f"{count} binaries of flat GEMMs for {gpu.name}: {', '.join(NETWORKS)}, batch {BATCHES}")
    wrong = product_complaints(launches, gpu)
    assert not wrong, wrong


@pytest.mark.slow
@needs_networks
@each_gpu
def test_few_images_use_the_hardware(gpu: Gpu) -> None:
    launches = planned("spatial", ("resnet50",), (1,), gpu)
    assert {launch.constants["DGRAD"] for launch in launches} == {True, False}
    wrong = product_complaints(launches, gpu)
    assert not wrong, wrong


@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_takes_fewer_instructions_than_the_gathers(rows: int) -> None:
    """For that reason it may stand before the gather, although the cost model, which counts none, sees no gain."""
    gpu = GPUS[1]
    problem = Case("", 4, 128, 128, (56, 56), (3, 3), padding=(1, 1)).problem(torch.bfloat16)
    tile = {"BLOCK_M": 128, "BLOCK_K": 128, "BLOCK_C": 64, "SPLITS": 1, "num_warps": 8, "num_stages": 3}
    launches = (
        conv_spatial("fprop", problem, {**tile, "ROWS": rows}, gpu)[0],
        conv_gather("fprop", problem, tile, gpu)[0],
    )
    binaries = compile_all([(launch, gpu) for launch in launches], JOBS)
    spatial, gather = (binaries[launch.compile_key, gpu.arch] for launch in launches)
    assert spatial.step is not None and gather.step is not None
    assert spatial.step < 0.8 * gather.step and spatial.registers < gather.registers


def every_tile(space: Space, dtype: torch.dtype, produced: int = 256) -> list[Launch]:
    """The products of a space's tiles with one split and several; odd channels only in fprop."""
    exact = dtype is torch.float32
    epilogues = PLAIN, inference(dtype), STATISTICS
    found: list[Launch] = []
    for config in space:
        if config["SPLITS"] > 2 or (space is not GEMM_WGRAD and (config["BLOCK_C"] == 32) is not exact):
            continue
        if space is GEMM_WGRAD:
            found += conv_gemm_wgrad("wgrad", Case("", 64, 256, 256, (56, 56), (1, 1)).problem(dtype), config, GPUS[1])
            continue
        fused = epilogues if config["SPLITS"] == 1 else (PLAIN,)
        for epilogue in fused:
            layout = Layout(bias=epilogue != PLAIN, epilogue=epilogue)
            for direction in ("fprop",) if exact or epilogue != PLAIN or produced % 2 else ("fprop", "dgrad"):
                if space is SPATIAL:
                    for stride, rank in ((1, 2), (2, 2), (1, 3))[: 3 if epilogue == PLAIN else 1]:
                        case = Case("", 4, 128, produced, (56,) * rank, (3,) * rank, (stride,) * rank, (1,) * rank)
                        if stride == 1 or config["ROWS"] == 1 or direction == "dgrad":
                            found += conv_spatial(direction, case.problem(dtype), config, GPUS[1], layout)
                else:
                    channels = 256 if space is GEMM else config["BLOCK_C"]
                    sides = (channels, produced) if direction == "fprop" else (produced, channels)
                    case = Case("", 64, *sides, (56, 56), (1, 1))
                    found += conv_gemm(direction, case.problem(dtype), config, GPUS[1], layout)
    return found


@pytest.mark.slow
@each_gpu
@pytest.mark.parametrize(
    ("space", "dtype"),
    [
        *((space, torch.bfloat16) for space in (GEMM, GEMM_RESIDENT, GEMM_WGRAD, SPATIAL)),
        *((space, torch.float32) for space in (GEMM, SPATIAL)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_every_tile_uses_the_hardware(space: Space, dtype: torch.dtype, gpu: Gpu) -> None:
    wrong = product_complaints(every_tile(space, dtype), gpu)
    assert not wrong, wrong


@pytest.mark.slow
@each_gpu
@pytest.mark.parametrize("space", [GEMM, GEMM_RESIDENT_SINGLE, SPATIAL], ids=lambda space: space.name)
def test_every_tile_of_odd_channels_uses_the_hardware(space: Space, gpu: Gpu) -> None:
    """Odd channels do not take the widest tiles of `GEMM`."""
    launches = every_tile(space, torch.bfloat16, produced=255)
    wrong = product_complaints((launch for launch in launches if launch.constants["BLOCK_K"] < 256), gpu)
    assert not wrong, wrong
