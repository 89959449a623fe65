"""The measuring worker, a process of its own: an illegal access, an abort or a hang ends it, not the run.

Holds both sides of one connection. The parent sends a problem and a config as JSON; the worker answers with a time or
says why there is none. If a worker ends, or does not answer in time, that is why there is none, and the next question
starts a new one. Neither side needs torch; the parent never touches a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from fastconv.autotune import Config, Gpu, ProblemKey
from fastconv.autotune.tune import Failed
from fastconv.kernels.compile.workers import end_with_parent
from fastconv.measuring import reason

PATIENCE = 30.0  # seconds for one answer; before the first a worker draws operands and makes the reference
START = 300.0  # seconds to import torch and find the GPU, from a disk that many processes read at once
COMMAND = (sys.executable, "-m", "fastconv.measuring.worker")

# Seconds of one measurement of a config; None: of PyTorch's own op.
Measure = Callable[[ProblemKey, "Config | None"], float]


class WorkerError(RuntimeError):
    """A worker does not start. The message is one line."""


class Refused(Exception):
    """A `Measure` has no time. ``status``: one of `records.FAILURES`; ``fatal``: the process is of no more use."""

    def __init__(self, status: str, why: str, fatal: bool = False) -> None:
        super().__init__(why)
        self.status, self.fatal = status, fatal


class Worker:
    """A measuring process. A question starts it if none runs. To be closed."""

    def __init__(self, command: Sequence[str] = COMMAND, patience: float = PATIENCE, start: float = START) -> None:
        self._command, self._patience, self._start = tuple(command), patience, start
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._errors: IO[bytes] | None = None
        self._gpu: Gpu | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the process, unless one runs. Raises WorkerError."""
        self._started()

    @property
    def gpu(self) -> Gpu:
        """The GPU it measures on. Raises WorkerError."""
        self.start()
        assert self._gpu is not None
        return self._gpu

    def run(self, problem: ProblemKey, config: Config | None) -> float | Failed:
        """Seconds of one measurement, or why there is none. Raises WorkerError."""
        request = json.dumps({"problem": problem.json, "config": None if config is None else dict(config)}).encode()
        for last in (False, True):
            connection = self._started()
            try:
                connection.send_bytes(request)
                if not connection.poll(self._patience):
                    return Failed("hung", f"no answer within {self._patience:g} s")
                answer = json.loads(connection.recv_bytes())
            except (EOFError, OSError):
                code, said = self._ended()
                if code != -signal.SIGKILL:
                    return Failed("crashed", f"{_ending(code)}{said}")
                if last:
                    return Failed("out_of_memory", f"killed twice, as happens where the host's memory ends{said}")
                continue  # somebody killed it, which is not the config's fault unless it happens again
            else:
                request = b""
                if answer.get("fatal"):
                    self.close()
                return answer["seconds"] if "seconds" in answer else Failed(answer["status"], answer["why"])
            finally:
                # Interrupted, hung or ended: a late answer would be taken for the next question's.
                if request and self._connection is connection:
                    self.close()
        raise AssertionError

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        if self._errors is not None:
            self._errors.close()
        self._process = self._connection = self._errors = None

    def _started(self) -> Connection:
        if self._connection is not None and self._process is not None and self._process.poll() is None:
            return self._connection
        self.close()  # one that has ended between two questions
        here, there = Pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [*self._command, str(there.fileno())],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C reaches only the parent, which ends the worker
        )
        there.close()
        self._connection = here
        try:
            if not here.poll(self._start):
                raise WorkerError(f"the measuring process has not started within {self._start:g} s")
            ready = json.loads(here.recv_bytes())
        except (EOFError, OSError):
            code, said = self._ended()
            raise WorkerError(f"the measuring process does not start: {_ending(code)}{said}") from None
        except BaseException:
            self.close()
            raise
        if "why" in ready:
            self.close()
            raise WorkerError(f"the measuring process does not start: {ready['why']}")
        self._gpu = Gpu(**ready["gpu"])
        return here

    def _ended(self) -> tuple[int, str]:
        """Exit code of a process that hung up, and a colon with the last line it wrote."""
        assert self._process is not None and self._errors is not None
        try:
            code = self._process.wait(self._patience)
        except subprocess.TimeoutExpired:
            code = 0
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4096))
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        self.close()
        return code, f": {last[:300]}" if last else ""


def _ending(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def serve(descriptor: int, start: Callable[[], tuple[Gpu, Measure]]) -> None:
    """The worker's side: ``start()`` finds its GPU, then it measures for each question until the parent is gone."""
    end_with_parent()
    connection = Connection(descriptor)

    def answer(**values: Any) -> None:
        connection.send_bytes(json.dumps(values).encode())

    try:
        gpu, measure = start()
    except Exception as error:
        answer(why=reason(error))
        return
    answer(gpu=dataclasses.asdict(gpu))
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer(seconds=measure(ProblemKey.of(**request["problem"]), request["config"]))
        except Refused as refused:
            answer(status=refused.status, why=str(refused), fatal=refused.fatal)
        except MemoryError as error:
            answer(status="out_of_memory", why=reason(error))
        except Exception as error:
            answer(status="failed", why=reason(error))
