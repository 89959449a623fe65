"""The fused layers' kernels compiled for GPUs that are not here, at the tiles chosen for ResNet-50 and VGG-16-BN.

What an epilogue adds must not spoil the product it follows: no spills, no wgmma waited for, whole 16-byte accesses of
every tensor of the output's size.
"""

from collections.abc import Iterator

import pytest
import torch

from binaries import COMPILING, TENSOR_CORES, complaints, each, needs_networks, spilled
from convolutions import of_networks
from fastconv.autotune import Gpu
from fastconv.kernels import dispatch
from fastconv.kernels.compile.sass import GPUS, Compiled
from fastconv.kernels.families.batch_norm import Activated
from fastconv.kernels.families.family import Layout
from fastconv.kernels.jit.epilogue import Epilogue
from fastconv.kernels.launch.launch import Launch
from fastconv.kernels.ops import batch_norm
from fastconv.kernels.problem.conv import ConvProblem, conv_transpose_problem

pytestmark = COMPILING
each_gpu = each(GPUS, slow=lambda gpu: not gpu.wgmma)
NORM = ("*fp32",) * 4
# Batch norm's vectors stay fp32 under a bf16 convolution.
EPILOGUES = {
    "inference": Epilogue(*NORM, act="relu"),
    "inference with a residual": Epilogue(*NORM, residual="*bf16", act="relu"),
    "statistics": Epilogue(statistics=True),
}


def problems() -> tuple[ConvProblem, ...]:
    """The distinct convolutions of both networks; VGG-16's with batch norm are those without."""
    return tuple(dict.fromkeys(problem for problem, _ in of_networks(("resnet50", "vgg16"), (32, 256))))


# The transposed convolutions of a DCGAN and of a U-Net, as (channels in, out, size in, filter, padding), stride 2.
TRANSPOSED = ((512, 256, 8, 4, 1), (128, 64, 32, 4, 1), (1024, 512, 28, 2, 0), (128, 64, 224, 2, 0))


def transposed(k: int, c: int, size: int, filter_size: int, padding: int) -> ConvProblem:
    return conv_transpose_problem(
        *((32, k, size, size), (k, c, filter_size, filter_size), None),
        *((2, 2), (padding, padding), (0, 0), (1, 1), 1, torch.bfloat16),
    )


def convolutions(epilogue: str, gpu: Gpu) -> Iterator[tuple[ConvProblem, Launch]]:
    for problem in problems():
        # A first layer's epilogues are read beside its product.
        if problem.in_channels < 8:
            continue
        # The networks' blocks end with convolutions of this kind.
        if "residual" in epilogue and not (problem.taps == 1 and problem.out_channels == 4 * problem.in_channels):
            continue
        (launch,) = dispatch.plan("fprop", problem, gpu, Layout(epilogue=EPILOGUES[epilogue])).launches
        yield problem, launch
    if "residual" not in epilogue:
        for shape in TRANSPOSED:
            problem = transposed(*shape)
            (launch,) = dispatch.plan("dgrad", problem, gpu, Layout(epilogue=EPILOGUES[epilogue])).launches
            yield problem, launch


@needs_networks
@each_gpu
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_an_epilogue_costs_the_product_nothing(epilogue: str, gpu: Gpu) -> None:

    def complain(problem: ConvProblem, launch: Launch, binary: Compiled) -> list[str]:
        wrong = spilled(binary)
        stores, loads = binary.global_accesses("STG"), binary.global_accesses("LDG")
        if binary.tensor_cores != TENSOR_CORES[gpu.arch]:
            wrong.append(f"tensor cores by {binary.tensor_cores}")
        if binary.serialised:
            wrong.append("waits for every wgmma")
        # Tests of their families read what bulk copies move.
        if not launch.described:
            if problem.in_channels % 8 == 0 and set(binary.global_accesses("LDGSTS")) != {16}:
                wrong.append(f"asynchronous loads of {binary.global_accesses('LDGSTS')} bytes")
            # Statistics are written by one warp's row of threads, a number each.
            if not stores.get(16) or set(stores) - {16} - ({4} if epilogue == "statistics" else set()):
                wrong.append(f"stores of {stores} bytes")
            if "residual" in epilogue and loads.get(16, 0) < stores.get(16, 0):
                wrong.append(f"loads of {loads} bytes")
        return wrong

    wrong = complaints(convolutions(epilogue, gpu), gpu, complain)
    assert not wrong, wrong


def meta(shape: tuple[int, ...]) -> torch.Tensor:
    tensor = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    return batch_norm.as_pixels(tensor)


def passes(shape: tuple[int, ...], gpu: Gpu, monkeypatch) -> Iterator[tuple[str, Launch]]:
    """Every launch around a convolution of one shape of output, by what the layer is."""
    y, vector = meta(shape), torch.empty(shape[1], device="meta")
    norm, share = (vector,) * 4, 1.0
    sums = torch.empty(3, shape[1], device="meta")
    combined: list[Launch] = []
    monkeypatch.setattr(batch_norm, "run", lambda launch, *tensors: combined.append(launch))
    for partials in (1, 8, 200, 5000):
        pair = (torch.empty(partials, shape[1], device="meta"),) * 2
        batch_norm.combine_statistics(torch.empty(partials, device="meta"), *pair)
    yield from (("combine", launch) for launch in combined)
    for act, residual, z, after in (
        ("relu", None, None, False),
        ("relu", y, y, False),
        ("relu", y, None, True),
        ("silu", None, None, False),
        ("silu", y, None, False),
        ("identity", None, None, False),
    ):
        how = Activated(1e-5, act, residual_after=after)
        name = f"{act}{' + residual' if residual is not None else ''}"
        (launch,) = batch_norm._prepare_apply(gpu, (y, *norm, None, residual), how).launches
        yield f"apply {name}", launch
        kept = None if z is not None or after else residual
        operands = (y, y, z, *norm, None, kept)
        yield from ((f"sums {name}", launch) for launch in batch_norm._prepare_sums(gpu, operands, how).launches)
        need_residual = residual is not None and not after
        operands = (*operands, sums)
        (launch,) = batch_norm._prepare_gradient(gpu, operands, share, how, need_residual).launches
        yield f"gradient {name}", launch


@needs_networks
@each_gpu
def test_passes_move_16_bytes_at_a_time(gpu: Gpu, monkeypatch) -> None:
    shapes = {problem.output_shape for problem in problems()}

    def complain(name: str, launch: Launch, binary: Compiled) -> list[str]:
        wrong = spilled(binary)
        # Sums over rows end with a thread a channel; results of a channel are a few numbers.
        narrow = {"combine": {4}, "sums": {4}}.get(name.split()[0], set())
        if name.startswith(("apply", "gradient")) and set(binary.load_bytes) != {16}:
            wrong.append(f"loads of {binary.load_bytes} bytes")
        if name.startswith("sums") and launch.name != "split_sum_kernel" and set(binary.load_bytes) != {16}:
            wrong.append(f"loads of {binary.load_bytes} bytes")
        if set(binary.global_accesses("STG")) - {16} - narrow:
            wrong.append(f"stores of {binary.global_accesses('STG')} bytes")
        return wrong

    wrong = complaints([it for shape in shapes for it in passes(shape, gpu, monkeypatch)], gpu, complain)
    assert not wrong, wrong
