"""The depthwise kernels compiled for GPUs that are not here, at the tiles chosen for networks that live by them.

What a stencil at memory speed needs: 16-byte loads and stores along the channels, nothing on the stack, registers for
enough programs at once.
"""

import torch

from binaries import COMPILING, complaints, each, needs_networks, spilled
from convolutions import of_networks
from fastconv.autotune import Gpu
from fastconv.kernels import dispatch
from fastconv.kernels.compile.sass import GPUS, Compiled
from fastconv.kernels.families.family import Layout
from fastconv.kernels.jit.epilogue import PLAIN, Epilogue
from fastconv.kernels.launch.launch import Launch
from fastconv.kernels.problem.conv import DIRECTIONS, conv_problem

pytestmark = COMPILING
NETWORKS = ("mobilenet_v2", "efficientnet_b0", "convnext_tiny")
BATCHES = (32, 256)
each_gpu = each(GPUS, slow=lambda gpu: gpu.tcgen05)
on_hopper_at_least = each(GPUS, slow=lambda gpu: not gpu.wgmma)
NORM = ("*fp32",) * 4
EPILOGUES = {"plain": PLAIN, "inference": Epilogue(*NORM, act="silu"), "statistics": Epilogue(statistics=True)}


@needs_networks
@each_gpu
def test_networks_layers(gpu: Gpu) -> None:
    found: list[tuple[str, Launch]] = []
    for problem in dict.fromkeys(problem for problem, _ in of_networks(NETWORKS, BATCHES) if problem.groups > 1):
        for direction in DIRECTIONS:
            for name, epilogue in EPILOGUES.items() if direction == "fprop" else (("", PLAIN),):
                plan = dispatch.plan(direction, problem, gpu, Layout(epilogue=epilogue, taps_outermost=True))
                assert plan.family == "depthwise"
                found.append((f"{direction} {name} of {problem.describe()}", plan.launches[0]))

    def complain(_: str, launch: Launch, binary: Compiled) -> list[str]:
        wrong = spilled(binary)
        loads, stores = binary.global_accesses("LDG"), binary.global_accesses("STG")
        if launch.name == "conv_depthwise_kernel":
            # Batch norm's vectors are fp32: two loads each.
            if set(loads) != {16}:
                wrong.append(f"loads of {loads} bytes")
            outputs = launch.constants["OUTPUTS"]
            # Statistics of the tile are stored beside them: a count, and a mean and a square.
            if stores.get(16) != outputs or set(stores) - ({16, 4} if launch.pointers[-1] else {16}):
                wrong.append(f"stores of {stores} bytes")
        else:
            # The sums of long rows take four channels a thread: with eight they would not fit.
            if set(loads) != ({16} if launch.constants["ROW"] <= 3 else {8}):
                wrong.append(f"loads of {loads} bytes")
        if binary.occupancy(gpu)[0] * binary.warps < 8:
            wrong.append(f"{binary.registers} registers: {binary.occupancy(gpu)[0]} programs at once")
        return wrong

    wrong = complaints(found, gpu, complain)
    assert not wrong, wrong


ODD = (
    ((32, 33, 20, 20), (33, 1, 3, 3), (1, 1), (1, 1), (1, 1), torch.bfloat16),
    ((32, 64, 20, 20), (128, 1, 3, 3), (2, 2), (1, 1), (1, 1), torch.bfloat16),
    ((32, 64, 20, 20), (64, 1, 7, 7), (1, 1), (9, 9), (3, 3), torch.bfloat16),
    ((32, 64, 20, 20), (64, 1, 5, 5), (2, 2), (2, 2), (1, 1), torch.float32),
    ((8, 64, 8, 20, 20), (64, 1, 3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), torch.bfloat16),
    ((32, 64, 4000), (64, 1, 31), (1,), (15,), (1,), torch.bfloat16),
)


@on_hopper_at_least
def test_odd_layers_spill_nothing(gpu: Gpu) -> None:
    found: list[tuple[str, Launch]] = []
    for x, weight, stride, padding, dilation, dtype in ODD:
        problem = conv_problem(x, weight, None, stride, padding * 2, dilation, x[1], dtype)
        for direction in DIRECTIONS:
            launch = dispatch.plan(direction, problem, gpu, Layout(bias=direction == "fprop")).launches[0]
            found.append((f"{direction} of {problem.describe()}", launch))

    def complain(_: str, launch: Launch, binary: Compiled) -> list[str]:
        # Below 255 registers ptxas keeps a few values on the stack so that one more program fits.
        return spilled(binary, allowed=32 if binary.registers < 255 else 0)

    wrong = complaints(found, gpu, complain)
    assert not wrong, wrong
