"""Every known GPU has a plan for each of the telling layers; one family by itself, if several would serve a call."""

from dataclasses import replace

import pytest
import torch

import fastconv
import fastconv.functional
from fastconv.autotune import Gpu, known_gpus
from fastconv.cli.inspect_layers import LAYERS
from fastconv.kernels import dispatch
from fastconv.kernels.launch import launch
from fastconv.kernels.problem.conv import DIRECTIONS
from tests.marks import interpreted

# Families of GPUs whose tensor cores read operands of bulk copies.
BULK = {"gemm", "pixels", "spatial"}


@pytest.mark.parametrize("gpu", known_gpus(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_gpu_serves_the_telling_layers(gpu: Gpu, dtype: torch.dtype) -> None:
    families = set()
    for layer in LAYERS:
        for batch in (1, 20, 256):
            for direction in DIRECTIONS:
                plan = dispatch.plan(direction, replace(layer, batch=batch, dtype=dtype), gpu)
                assert plan.launches, plan
                families.add(plan.family)
    assert bool(families & BULK) == gpu.bulk, families


def kernels_of(x: torch.Tensor, weight: torch.Tensor, groups: int) -> set[str]:
    with fastconv.settings(strict=True), launch.record() as records:
        y = fastconv.functional.conv2d(x, weight, padding=1, groups=groups)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, padding=1, groups=groups))
    return {record.name for record in records}


@interpreted
def test_one_family_serves_what_another_would_and_then_no_more() -> None:
    x, weight = torch.randn(2, 8, 5, 5), torch.randn(8, 1, 3, 3)
    usual = kernels_of(x, weight, 8)  # which is kept for the next call
    with dispatch.only_family("gather"):
        alone = kernels_of(x, weight, 8)
    assert (usual, alone) == ({"conv_depthwise_kernel"}, {"conv_gather_kernel"})
    assert kernels_of(x, weight, 8) == usual


@interpreted
def test_an_only_family_says_why_it_does_not_serve() -> None:
    refusal = pytest.raises(RuntimeError, match=r"no kernel for this call \(depthwise: 8 input channels a group\)")
    with dispatch.only_family("depthwise"), refusal:
        kernels_of(torch.randn(2, 8, 5, 5), torch.randn(8, 8, 3, 3), 1)


def test_an_unknown_family_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="depthwise, gather"), dispatch.only_family("winograd"):
        pass
