"""Fixtures of every kernel test: new memory holds nothing like a result, and kernels touch only their operands."""

from collections.abc import Callable, Iterator

import pytest
import torch

from convolutions import DEVICE
from fastconv.autotune import gpus
from fastconv.kernels import dispatch
from fastconv.kernels.launch.interpreter import interpreting
from guards import guarded_memory, poisoned_memory

__all__ = ["bulk_copies", "guarded_memory", "poisoned_memory"]


@pytest.fixture(autouse=True)
def _every_launch(poisoned_memory: None, guarded_memory: None) -> None:
    """Every test runs in poisoned and guarded memory."""


@pytest.fixture(autouse=True)
def fp32_products(set_fp32_precision: Callable[[str], None]) -> None:
    """fp32 products are TF32, PyTorch's default for convolutions, which more kernels serve."""
    set_fp32_precision("tf32")


@pytest.fixture
def bulk_copies() -> Iterator[None]:
    """Plans have bulk copies: a GPU's own, or an H200's in the interpreter."""
    if not interpreting():
        if not dispatch.target(torch.device(DEVICE)).bulk:
            pytest.skip("needs a GPU with bulk tensor copies")
        yield
    else:
        with dispatch.use_target(gpus.H200):
            yield
