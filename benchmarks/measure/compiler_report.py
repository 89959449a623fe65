"""What the compiler makes of each kernel for GPUs that need not be here, in a process of its own: one process cannot
both interpret and compile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

from fastconv.benchmarks.report.results import Part

COMMAND = (sys.executable, "-m", "fastconv", "inspect", "--json")
TITLE = "What the compiler made of each kernel for A100, H100/H200 and B200"


class Compilation:
    """A report that is made beside the block; ``part()`` waits for it, leaving the block ends it."""

    def __init__(self, command: tuple[str, ...] = COMMAND) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        # Its own process group, so that its compiling processes end with it.
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def __enter__(self) -> Compilation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()

    def part(self) -> Part:
        """Wait for the report. It names spills and serialised products, which cost speed. A process that fails makes a
        failed part."""
        part: Part = {"id": "compiler", "kind": "compiler", "title": TITLE, "rows": []}
        output, errors = self._process.communicate()
        try:
            rows = json.loads(output)["kernels"]
        except (ValueError, KeyError, TypeError):
            last = (errors.strip().splitlines() or ["no output"])[-1]
            return part | {"verdict": "failed", "reason": f"exit code {self._process.returncode}: {last}"}
        if self._process.returncode or not rows:
            return part | {"rows": rows, "verdict": "failed", "reason": f"exit code {self._process.returncode}"}
        flaws = [f"{row['kernel']} spills on {row['target']}" for row in rows if row["spills"]]
        flaws += [
            f"{row['kernel']} waits for each product on {row['target']}" for row in rows if row["wgmma_serialised"]
        ]
        return part | {"rows": rows, "verdict": "right", "reason": "; ".join(dict.fromkeys(flaws)) or None}
