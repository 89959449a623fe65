"""What the compiler made of each kernel for GPUs that need not be here, in a process of its own: one process cannot
both interpret and compile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import TracebackType

from fastconv.cli.interpreter import SWITCH
from fastconv.cli.measure.results import Part

COMMAND = (sys.executable, "-m", "fastconv.kernels.inspect", "--json")
TITLE = "What the compiler made of each kernel for A100, H100/H200 and B200"


class Compilation:
    """Runs beside the caller from ``with`` on; ``part()`` waits for it. Leaving the block ends it."""

    def __init__(self, command: tuple[str, ...] = COMMAND) -> None:
        environment = {name: value for name, value in os.environ.items() if name != SWITCH}
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Compilation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def part(self) -> Part:
        """Wait for the report. A kernel that spills is wrong; a process that fails is a failed part."""
        part: Part = {"id": "compiler", "kind": "compiler", "title": TITLE, "rows": []}
        output, errors = self._process.communicate()
        try:
            rows = json.loads(output)["kernels"]
        except (ValueError, KeyError, TypeError):
            last = (errors.strip().splitlines() or ["no output"])[-1]
            return part | {"verdict": "failed", "reason": f"exit code {self._process.returncode}: {last}"}
        spilling = [f"{row['kernel']} for {row['target']}" for row in rows if row["spills"]]
        if spilling:
            return part | {"rows": rows, "verdict": "wrong", "reason": f"registers spill: {', '.join(spilling)}"}
        if self._process.returncode or not rows:
            return part | {"rows": rows, "verdict": "failed", "reason": f"exit code {self._process.returncode}"}
        return part | {"rows": rows, "verdict": "right", "reason": None}
