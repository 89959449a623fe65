"""Marks of tests that compile for GPUs which are not here, and complaints about binaries."""

import os
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import pytest

from fastconv.autotune import Gpu
from fastconv.kernels.compile.sass import Compiled, compile_all
from fastconv.kernels.launch.launch import Launch
from tests.marks import compiling

# A file's pytestmark.
COMPILING = [pytest.mark.compile, compiling]
# Processes of pytest-xdist share the cores; the last one at work takes two.
JOBS = max(2, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
TENSOR_CORES = {80: "mma", 90: "wgmma", 100: "tcgen05"}
_missing = ", ".join(name for name in ("rich", "typer") if find_spec(name) is None)
needs_networks = pytest.mark.skipif(bool(_missing), reason=f"not installed: {_missing}")


def each(gpus: Iterable[Gpu], slow: Callable[[Gpu], bool] = lambda gpu: False) -> Any:
    """A test's ``gpu``, one by one; ``slow`` ones, which take long, run when a kernel changes (`make test-tiles`)."""
    marked = [pytest.param(gpu, marks=pytest.mark.slow) if slow(gpu) else gpu for gpu in gpus]
    return pytest.mark.parametrize("gpu", marked, ids=lambda gpu: f"sm_{gpu.arch}")


def complaints(
    found: Iterable[tuple[Any, Launch]],
    gpu: Gpu,
    complain: Callable[[Any, Launch, Compiled], list[str]],
    listings: Sequence[str] = (),
) -> str:
    """``complain(subject, launch, binary)`` of each distinct binary with the first subject that has it, in lines."""
    first: dict[Any, tuple[Any, Launch]] = {}
    for subject, launch in found:
        first.setdefault(launch.compile_key, (subject, launch))
    binaries = compile_all(((launch, gpu) for _, launch in first.values()), JOBS, listings=listings)
    lines = []
    for key, (subject, launch) in first.items():
        name = subject.describe() if hasattr(subject, "describe") else subject
        sides = {name: value for name, value in launch.constants.items() if isinstance(value, int)}
        wrong = complain(subject, launch, binaries[key, gpu.arch])
        lines += [f"{launch.name} of {name}, {sides} with {launch.num_warps} warps: {what}" for what in wrong]
    return "\n".join(lines)


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
