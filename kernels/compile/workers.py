"""Worker processes: one that crashes or hangs costs only the call it was at.

They end with their parent, however it ends, and so do processes that they started. Needs neither torch nor Triton.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

# Held from pipe to fork: a child forked between the two would keep another child's end of its pipe open.
_forking = threading.Lock()


@dataclass(frozen=True)
class Ended:
    """The end of a process, in place of its call's result."""

    how: str  # "crashes (exit code -11)", "hangs (over 120 s)"


def end_with_parent() -> None:
    """Have Linux kill this process when the thread that started it ends, however it ends; elsewhere do nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def results_of(calls: Sequence[Callable[[], Any]], jobs: int, limit: float) -> Generator[tuple[int, Any]]:
    """(index, result or Ended) of each call as it ends, from ``jobs`` forked processes; ``limit`` seconds for each.

    Processes inherit the calls and pickle results; no call may raise. Close the generator if you leave it early.
    """
    left = list(reversed(range(len(calls))))
    idle: list[_Child] = []
    busy: dict[Any, _Child] = {}  # by its connection
    try:
        while left or busy:
            while left and len(busy) < jobs:
                child = idle.pop() if idle else _Child(calls)
                child.begin(left.pop())
                busy[child.connection] = child
            soonest = min(child.begun for child in busy.values()) + limit
            for connection in wait(list(busy), max(0.0, soonest - time.monotonic())):
                child = busy.pop(connection)
                try:
                    made = child.connection.recv()
                except (EOFError, OSError):
                    yield child.index, Ended(f"crashes (exit code {child.end()})")
                else:
                    idle.append(child)
                    yield child.index, made
            for child in [child for child in busy.values() if time.monotonic() - child.begun > limit]:
                del busy[child.connection]
                child.end()
                yield child.index, Ended(f"hangs (over {limit:g} s)")
    finally:
        for child in (*busy.values(), *idle):
            child.end()


class _Child:
    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        context = multiprocessing.get_context("fork")
        with _forking, warnings.catch_warnings():
            # Newer Pythons warn of forking beside other threads; a child takes no lock of theirs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.connection, there = context.Pipe()
            self._process = context.Process(target=_serve, args=(there, calls, os.getpid()), daemon=True)
            self._process.start()
            there.close()

    def begin(self, index: int) -> None:
        self.index, self.begun = index, time.monotonic()
        with suppress(BrokenPipeError):  # if it was killed while idle, no answer comes either
            self.connection.send(index)

    def end(self) -> int | None:
        """End the process with all that it started, if it still runs; return its exit code."""
        if not self.connection.closed:
            self.connection.close()
            assert self._process.pid is not None
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.join()
        return self._process.exitcode


def _serve(connection: Connection, calls: Sequence[Callable[[], Any]], parent: int) -> None:
    # In a session of its own no Ctrl-C reaches it, and all that it starts can be ended with it.
    os.setsid()
    end_with_parent()
    if os.getppid() != parent:
        return
    while True:
        connection.send(calls[connection.recv()]())
