"""wgrad of the pixel GEMM compiled for GPUs that are not here: every tile of its space, and those of networks."""

import re
from collections.abc import Iterator

import pytest
import torch

from binaries import COMPILING, complaints, each, needs_networks, slowed
from convolutions import of_networks
from fastconv.autotune import Gpu
from fastconv.autotune.gpus import B200, H200
from fastconv.kernels import dispatch
from fastconv.kernels.compile.sass import Compiled
from fastconv.kernels.families.conv_pixels_wgrad import PIXELS_WGRAD_PAIR, PIXELS_WGRAD_TILES, conv_pixels_wgrad
from fastconv.kernels.families.family import Layout
from fastconv.kernels.launch.launch import Launch
from fastconv.kernels.problem.conv import ConvProblem, conv_problem

pytestmark = COMPILING
NETWORKS, BATCHES = ("resnet50", "vgg16", "unet"), (64, 256)
# The product in Triton's GPU dialect, with both of its operands in shared memory.
PRODUCT = r"ttng\.(?:warp_group_dot|tc_gen5_mma) "
IN_PLACE = PRODUCT + r".*: !ttg\.memdesc<[^>]*, #smem[^>]*>(?: \*|,) !ttg\.memdesc<[^>]*, #smem"
each_gpu = each((H200, B200))


def layer(rank: int = 2, dtype: torch.dtype = torch.bfloat16, stride: int = 1) -> ConvProblem:
    """A layer that any tile may serve."""
    ones, shape = (1,) * rank, (256, *(16 * stride,) * rank)
    strides = (stride,) * rank
    return conv_problem((256, *shape), (256, 256, *(3,) * rank), None, strides, ones * 2, ones, 1, dtype)


def tiles() -> Iterator[Launch]:
    """One launch for each tile and depth of a step; both strides of 8 neighbouring pixels of 8 images."""
    for config in PIXELS_WGRAD_PAIR:
        if config["SPLITS"] == 2 and config["PIXELS"] == 1:
            yield conv_pixels_wgrad("wgrad", layer(), config, H200)[0]
        elif config["SPLITS"] == 2 and config["PIXELS"] == config["BLOCK_N"] == 8:
            yield from (conv_pixels_wgrad("wgrad", layer(stride=stride), config, H200)[0] for stride in (1, 2))


def others() -> Iterator[Launch]:
    """Other ranks, dtypes and layouts of a stored dw, at the tile of most registers."""
    config = max(PIXELS_WGRAD_PAIR, key=lambda c: c["BLOCK_K"] * c["BLOCK_C"] * c["TAPS"] * c["BLOCK_N"] / c["SPLITS"])
    assert config["SPLITS"] == 1
    yield conv_pixels_wgrad("wgrad", layer(3, torch.float16), config, H200)[0]
    yield conv_pixels_wgrad("wgrad", layer(), config, H200, Layout(channels_last=False))[0]


def _wrong(_: str, launch: Launch, binary: Compiled) -> list[str]:
    wrong = slowed(binary)
    # Triton brings Hopper's first operand, a box of neighbours, to registers, once for all taps.
    through = binary.arch == 90 and launch.constants["PIXELS"] > 1
    source = "registers" if through else "shared memory"
    if binary.arch == 90 and (set(binary.operands) != {source} or 0 in binary.waits):
        wrong.append(f"first operands from {binary.operands}, waits that leave {binary.waits} under way")
    products = [line for line in binary.listings["ttgir"].splitlines() if re.search(PRODUCT, line)]
    if not products or not (through or all(re.search(IN_PLACE, line) for line in products)):
        wrong.append(f"operands that are not in shared memory: {products[:1]}")
    if not any(opcode.startswith("UTMALDG") for opcode in binary.opcodes) or binary.global_accesses("LDG"):
        wrong.append(f"loads by {[opcode for opcode in binary.opcodes if 'LDG' in opcode]}")
    return wrong


@pytest.mark.slow
@each_gpu
def test_every_tile_and_variant(gpu: Gpu) -> None:
    launches = {launch.compile_key: launch for launch in (*tiles(), *others())}
    # Four tiles of neighbours, each at two strides, and two more.
    assert len(launches) == 2 * len(PIXELS_WGRAD_TILES) + 2 * 4 + 2
    wrong = complaints((("a tile", launch) for launch in launches.values()), gpu, _wrong, ("ttgir",))
    assert not wrong, wrong


@needs_networks
@each_gpu
def test_networks_take_few_tiles_of_the_space(gpu: Gpu, record_property) -> None:
    """Tiles without a split, which store dw, are compiled too; the others are among the space's."""
    plans = [dispatch.plan("wgrad", problem, gpu) for problem, _ in of_networks(NETWORKS, BATCHES)]
    launches = {plan.launches[0].compile_key: plan.launches[0] for plan in plans if plan.family == "pixels"}
    known = {launch.compile_key for launch in tiles()}
    fresh = {key: launch for key, launch in launches.items() if key not in known}
    wrong = complaints((("a network", launch) for launch in fresh.values()), gpu, _wrong, ("ttgir",))
    assert not wrong, wrong
    record_property("line", f"{len(launches)} distinct pixel wgrads for {gpu.name}: {', '.join(NETWORKS)}, {BATCHES}")
    assert 2 <= len(launches) <= 10
