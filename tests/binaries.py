"""What tests that compile for GPUs which are not here share: their marks, and what is wrong with any binary."""

import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import pytest

from fastconv.autotune import Gpu
from fastconv.kernels.compile.sass import Compiled
from tests.marks import compiling

# A file's pytestmark.
COMPILING = [pytest.mark.compile, compiling]
# Processes of pytest-xdist share the cores; the last one at work takes two.
JOBS = max(2, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}
_missing = ", ".join(name for name in ("rich", "typer") if find_spec(name) is None)
needs_networks = pytest.mark.skipif(bool(_missing), reason=f"not installed: {_missing}")


def each(gpus: Iterable[Gpu], slow: Callable[[Gpu], bool] = lambda gpu: False) -> Any:
    """A test's ``gpu`` one by one. Compiling takes long: what is ``slow`` runs when a kernel changes
    (`make test-tiles`)."""
    marked = [pytest.param(gpu, marks=pytest.mark.slow) if slow(gpu) else gpu for gpu in gpus]
    return pytest.mark.parametrize("gpu", marked, ids=lambda gpu: f"sm_{gpu.arch}")


def spilled(binary: Compiled, allowed: int = 0) -> list[str]:
    """A complaint about more than ``allowed`` bytes of stack a thread."""
    if binary.stack <= allowed and (allowed or not binary.spills):
        return []
    return [f"{binary.spills} spills, {binary.stack} bytes of stack, {binary.registers} registers"]


def slowed(binary: Compiled) -> list[str]:
    """Complaints about a product of bulk copies: registers in memory, no matrix unit, or one that waits for the product
    or for the operands of each step."""
    wrong = spilled(binary)
    if binary.tensor_cores != TENSOR_CORES[binary.arch]:
        wrong.append(f"tensor cores by {binary.tensor_cores}")
    if binary.serialised:
        wrong.append("waits for every wgmma")
    if binary.copies < 2:
        wrong.append(f"{binary.copies} steps on their way while one is computed")
    return wrong
