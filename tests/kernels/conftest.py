"""What every test of a kernel shares: what launchers allocate holds nothing that could pass for a result, and kernels
touch nothing but their operands."""

from collections.abc import Iterator

import pytest
import torch

from convolutions import DEVICE
from fastconv.autotune import gpus
from fastconv.kernels import dispatch
from guards import guarded_memory, poisoned_memory

__all__ = ["bulk_copies", "guarded_memory", "poisoned_memory"]


@pytest.fixture(autouse=True)
def _every_launch(poisoned_memory: None, guarded_memory: None) -> None:
    """Is made in such memory."""


@pytest.fixture
def bulk_copies() -> Iterator[None]:
    """The interpreter has them where it is told so."""
    if DEVICE == "cuda":
        if not dispatch.target(torch.device(DEVICE)).bulk:
            pytest.skip("needs a GPU with bulk tensor copies")
        yield
    else:
        with dispatch.use_target(gpus.H200):
            yield
