"""A worker that pretends to measure, for tests: its times and failures are read from the file it is given.

``python -m tests.measuring.pretending FILE DESCRIPTOR``. FILE is JSON: ``gpu`` as in `Gpu`; ``times``: seconds by
`key_of`; ``failures``: how a config fails, by the same keys. Each question is noted in ``FILE.asked``.
"""

import ctypes
import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastconv.autotune import Config, Gpu, ProblemKey
from fastconv.measuring.process import Measure, Refused, serve


def key_of(problem: ProblemKey, config: Config | None) -> str:
    return f"{problem.describe()} {None if config is None else sorted(config.items())}"


def fail(how: str) -> float:
    if how == "exception":
        raise RuntimeError("planted\nin two lines")
    if how == "wrong":
        raise Refused("wrong", "planted")
    if how == "illegal access":
        raise Refused("crashed", "CUDA error: an illegal memory access was encountered", fatal=True)
    if how == "memory":
        raise MemoryError("planted")
    if how == "hang":
        time.sleep(3600)
    if how == "exit":
        os._exit(3)
    if how == "abort":
        print("planted, said before the end", file=sys.stderr, flush=True)
        os.abort()
    if how == "segmentation fault":
        ctypes.string_at(0)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(how)


def start(path: Path) -> tuple[Gpu, Measure]:
    plan = json.loads(path.read_text())
    if "refuses" in plan:
        raise RuntimeError(plan["refuses"])
    noise = random.Random(os.getpid())

    def measure(problem: ProblemKey, config: Config | None) -> float:
        key = key_of(problem, config)
        with open(f"{path}.asked", "a") as file:
            file.write(f"{os.getpid()} {key}\n")
        time.sleep(plan.get("takes", 0.0))
        if key in plan["failures"]:
            return fail(plan["failures"][key])
        return plan["times"].get(key, plan.get("otherwise", 1e-3)) * noise.uniform(0.99, 1.01)

    return Gpu(**plan["gpu"]), measure


def write(path: Path, gpu: Gpu, times: dict[str, float], failures: dict[str, str], **more: Any) -> list[str]:
    """The command of a worker that pretends so."""
    path.write_text(json.dumps({"gpu": asdict(gpu), "times": times, "failures": failures, **more}))
    return [sys.executable, "-m", "tests.measuring.pretending", str(path)]


def asked(path: Path) -> list[str]:
    """The keys of all questions so far, in their order."""
    file = Path(f"{path}.asked")
    return [line.split(" ", 1)[1] for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":
    serve(int(sys.argv[2]), lambda: start(Path(sys.argv[1])))
