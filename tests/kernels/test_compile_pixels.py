"""The pixel GEMM's fprop and dgrad compiled for GPUs that are not here, and the result read.

Slow: at the tiles chosen for ResNet-50, VGG-16 and a U-Net at batch 64 and 256, plain and with the largest epilogues;
and every tile of the spaces.
"""

from dataclasses import replace

import pytest
import torch

from binaries import COMPILING, complaints, each, needs_networks, slowed
from convolutions import Case, of_networks
from fastconv.autotune import Gpu
from fastconv.kernels import dispatch
from fastconv.kernels.compile.sass import GPUS, Compiled
from fastconv.kernels.families.conv_pixels import CONV_PIXELS, CONV_PIXELS_FP32, CONV_PIXELS_TCGEN05, conv_pixels
from fastconv.kernels.families.family import Layout
from fastconv.kernels.jit.epilogue import PLAIN, Epilogue
from fastconv.kernels.launch.launch import Launch
from fastconv.kernels.problem.conv import ConvProblem
from fastconv.kernels.problem.layout import pointer_type

pytestmark = COMPILING
NETWORKS, BATCHES = ("resnet50", "vgg16", "unet"), (64, 256)
each_gpu = each(GPUS[1:])


def epilogues(dtype: torch.dtype) -> tuple[Epilogue, ...]:
    """None, all that inference can have, and training's; the last two with a bias."""
    inference = Epilogue(*("*fp32",) * 5, residual=pointer_type(dtype), act="prelu")
    return PLAIN, inference, Epilogue(statistics=True)


def _wrong(_: str, launch: Launch, binary: Compiled) -> list[str]:
    wrong = slowed(binary)
    if set(binary.operands) != {"shared memory"}:
        wrong.append(f"first operands from {binary.operands}")
    if launch.constants["SUMS"] > 1 and 0 in binary.waits:
        wrong.append(f"products of a step that are waited for, though each has a sum: {binary.waits}")
    opcodes = {name.split(".")[0] for name in binary.opcodes}
    if not {"UTMALDG", "UTMASTG"} <= opcodes or "LDGSTS" in opcodes:
        wrong.append("operands not moved by bulk copies alone")
    wide = set(binary.global_accesses("LDG")) | set(binary.global_accesses("STG"))
    if launch.pointers[2:8] == (None,) * 6 and wide:
        wrong.append(f"other accesses of {wide} bytes")
    return wrong


@pytest.mark.slow
@needs_networks
@each_gpu
def test_networks_use_the_hardware(gpu: Gpu, record_property) -> None:
    found: list[tuple[ConvProblem, Launch]] = []
    for problem, _ in of_networks(NETWORKS, BATCHES):
        for direction in ("fprop", "dgrad"):
            for epilogue in epilogues(problem.dtype):
                layout = Layout(bias=epilogue != PLAIN, epilogue=epilogue)
                plan = dispatch.plan(direction, problem, gpu, layout)
                if plan.family == "pixels":
                    found += [(problem, launch) for launch in plan.launches]
    assert {launch.constants["DGRAD"] for _, launch in found} == {False, True}
    count = len({launch.compile_key for _, launch in found})
    record_property("line", f"{count} pixel GEMMs for {gpu.name}: {', '.join(NETWORKS)}, batch {BATCHES}")
    wrong = complaints(found, gpu, _wrong)
    assert not wrong, wrong


def rows_of(taps: int, problem: ConvProblem) -> ConvProblem:
    """The convolution with ``taps`` in each row of its filter."""
    filter_size, padding = (*problem.filter_size[:-1], taps), (*problem.padding[:-1], taps // 2)
    return replace(problem, filter_size=filter_size, padding=padding)


@pytest.mark.slow
@each_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_tile_uses_the_hardware(gpu: Gpu, dtype: torch.dtype) -> None:
    exact = dtype is torch.float32
    square = Case("", 256, 256, 256, (28, 28), (3, 3), (1, 1), (1, 1)).problem(dtype)
    strided = replace(square, input_size=(56, 56), stride=(2, 2))
    cube = Case("", 256, 256, 256, (8, 8, 8), (3, 3, 3), (1, 1, 1), (1, 1, 1)).problem(dtype)
    plain, inference, training = epilogues(dtype)
    if exact:
        space, forms = CONV_PIXELS_FP32, ((square, "fprop", inference),)
    else:
        space = CONV_PIXELS if gpu.wgmma else CONV_PIXELS_TCGEN05
        forms = (
            (square, "dgrad", inference),
            (square, "fprop", training),
            (cube, "dgrad", plain),
            (strided, "dgrad", inference),
        )
    launches = [
        conv_pixels(
            direction,
            rows_of(config["PAIRS"] or 3, problem),
            config,
            gpu,
            Layout(bias=epilogue != PLAIN, epilogue=epilogue),
        )[0]
        for problem, direction, epilogue in forms
        for config in space
        if problem is not strided or not config["PAIRS"]
    ]
    wrong = complaints((("a tile", launch) for launch in launches), gpu, _wrong)
    assert not wrong, wrong
