"""The pixel GEMM's fprop and dgrad compiled for GPUs that are not here, and the result read.

Slow: at the tiles chosen for ResNet-50, VGG-16 and a U-Net at batch 64 and 256, plain and with the largest epilogues;
and every tile of the spaces.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec

import pytest
import torch

from convolutions import Case, of_networks
from fastconv.autotune import Gpu
from fastconv.kernels import dispatch, mend
from fastconv.kernels.conv_pixels import conv_pixels
from fastconv.kernels.dispatch import Layout
from fastconv.kernels.epilogue import PLAIN, Epilogue
from fastconv.kernels.inspect import GPUS, Compiled, compile_all
from fastconv.kernels.launch import Launch
from fastconv.kernels.layout import pointer_type
from fastconv.kernels.tiles import CONV_PIXELS, CONV_PIXELS_FP32

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(mend.interpreting(), reason="one process cannot both interpret and compile"),
]

NETWORKS, BATCHES = ("resnet50", "vgg16", "unet"), (64, 256)
JOBS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
TENSOR_CORES = {90: "wgmma", 100: "tcgen05"}
each_gpu = pytest.mark.parametrize("gpu", GPUS[1:], ids=lambda gpu: f"sm_{gpu.arch}")
missing = ", ".join(name for name in ("rich", "typer") if find_spec(name) is None)


def epilogues(dtype: torch.dtype) -> tuple[Epilogue, ...]:
    """None, all that inference can have, and training's; the last two with a bias."""
    inference = Epilogue(*("*fp32",) * 5, residual=pointer_type(dtype), act="prelu")
    return PLAIN, inference, Epilogue(statistics=True)


def complaints(launches: Iterable[Launch], gpu: Gpu) -> str:
    """What is wrong with the binaries, a line each."""
    distinct = {launch.compile_key: launch for launch in launches}
    compiled = compile_all(((launch, gpu) for launch in distinct.values()), JOBS)
    lines = []
    for key, launch in distinct.items():
        what = {name: value for name, value in launch.constants.items() if isinstance(value, int)}
        lines += [f"{what} {launch.num_warps} warps: {wrong}" for wrong in _wrong(compiled[key, gpu.arch], launch)]
    return "\n".join(lines)


def _wrong(binary: Compiled, launch: Launch) -> list[str]:
    wrong = []
    if binary.stack or binary.spills:
        wrong.append(f"{binary.spills} spills, {binary.stack} bytes of stack, {binary.registers} registers")
    if binary.tensor_cores != TENSOR_CORES[binary.arch]:
        wrong.append(f"tensor cores by {binary.tensor_cores}")
    if binary.arch == 90 and set(binary.operands) != {"shared memory"}:
        wrong.append(f"first operands from {binary.operands}")
    if binary.serialised:
        wrong.append("waits for every wgmma")
    if binary.copies < 2:
        wrong.append(f"{binary.copies} steps on their way while one is computed")
    opcodes = {name.split(".")[0] for name in binary.opcodes}
    if not {"UTMALDG", "UTMASTG"} <= opcodes or "LDGSTS" in opcodes:
        wrong.append("operands not moved by bulk copies alone")
    wide = set(binary.global_accesses("LDG")) | set(binary.global_accesses("STG"))
    if launch.pointers[2:8] == (None,) * 6 and wide:
        wrong.append(f"other accesses of {wide} bytes")
    return wrong


@pytest.mark.slow
@pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")
@each_gpu
def test_networks_use_the_hardware(gpu: Gpu, record_property) -> None:
    launches: dict[tuple, Launch] = {}
    for problem, _ in of_networks(NETWORKS, BATCHES):
        for direction in ("fprop", "dgrad"):
            for epilogue in epilogues(problem.dtype):
                layout = Layout(bias=epilogue != PLAIN, epilogue=epilogue)
                plan = dispatch.plan(direction, problem, gpu, layout)
                if plan.family == "pixels":
                    launches |= {launch.compile_key: launch for launch in plan.launches}
    assert {launch.constants["DGRAD"] for launch in launches.values()} == {False, True}
    record_property("line", f"{len(launches)} pixel GEMMs for {gpu.name}: {', '.join(NETWORKS)}, batch {BATCHES}")
    wrong = complaints(launches.values(), gpu)
    assert not wrong, wrong


@pytest.mark.slow
@each_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_tile_uses_the_hardware(gpu: Gpu, dtype: torch.dtype) -> None:
    exact = dtype is torch.float32
    square = Case("", 256, 256, 256, (28, 28), (3, 3), (1, 1), (1, 1)).problem(dtype)
    cube = Case("", 256, 256, 256, (8, 8, 8), (3, 3, 3), (1, 1, 1), (1, 1, 1)).problem(dtype)
    plain, inference, training = epilogues(dtype)
    if exact:
        space, forms = CONV_PIXELS_FP32, ((square, "fprop", inference),)
    else:
        space, forms = CONV_PIXELS, ((square, "dgrad", inference), (square, "fprop", training), (cube, "dgrad", plain))
    launches = [
        conv_pixels(direction, problem, config, "tf32" if exact else "ieee", bias=epilogue != PLAIN, epilogue=epilogue)
        for problem, direction, epilogue in forms
        for config in space
        if gpu.wgmma or not config["PAIRS"]
    ]
    wrong = complaints(launches, gpu)
    assert not wrong, wrong
