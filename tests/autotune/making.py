"""Records and searches that several tests make."""

from typing import Any

from fastconv.autotune.gpus import H200
from fastconv.autotune.records import Measured, ProblemKey, Tuned, Untuned, Version

VERSION = Version("3.7.1", "0123abcd", True, 1)
DATE = "2025-01-31T12:00:00"


def problem(space: str = "gemm", direction: str = "fprop", C: int = 64, **sizes: int) -> ProblemKey:
    return ProblemKey.of(space, {"direction": direction, "filter": "3x3"}, {"C": C}, {"N": 32, "H": 56, **sizes})


def measured(index: int = 0, status: str = "ok", of: ProblemKey | None = None, **changes: Any) -> Measured:
    values: dict[str, Any] = {
        "config": {"TILE": index, "num_warps": 4},
        "status": status,
        "seconds": 1e-5 * (1 + index) if status == "ok" else None,
        "predicted": 2e-5,
        "date": DATE,
    }
    values.update(changes)
    return Measured(of or problem(), H200.name, H200.multiprocessors, VERSION, **values)


def met(of: ProblemKey | None = None) -> Untuned:
    return Untuned(of or problem(), H200.name, H200.multiprocessors, VERSION, DATE)


def tuned(of: ProblemKey | None = None, version: Version = VERSION, gpu: Any = H200, **changes: Any) -> Tuned:
    values: dict[str, Any] = {
        "config": {"TILE": 1},
        "seconds": 1e-5,
        "default": {"TILE": 0},
        "default_seconds": 2e-5,
        "also": (),
        "pytorch": None,
        "noise": 0.01,
        "measurements": 16,
        "date": DATE,
        "fastconv": "0.1.0",
    }
    values.update(changes)
    return Tuned(of or problem(), gpu.name, gpu.multiprocessors, version, **values)
