"""Calls as CUDA graphs: their times leave out the host's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from fastconv.kernels.launch.device import here
from fastconv.measuring import reason


class Captured:
    """A call as a CUDA graph. Calling it replays the graph and returns what the captured call returned.

    It is captured on the current stream, which is not the default one, with memory of its own or of ``pool``. Raises
    what the call raised, or else what the capture did. A failed capture leaves no trace in later captures and
    allocations, except in its pool, which no capture may use again.
    """

    def __init__(self, call: Callable[[], Any], pool: torch.cuda.MemPool | None = None) -> None:
        self.call = call  # keeps the operands that the graph reads alive
        self.graph = here.CUDAGraph()
        self.pool = here.MemPool() if pool is None else pool
        uses = self.pool.use_count()
        here.synchronize()
        try:
            # torch.cuda.graph would give all of the allocator's memory back each time.
            self.graph.capture_begin(pool=self.pool.id)  # type: ignore[arg-type]  # torch has a name for the pair
            try:
                self.result = call()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it says only that the capture has failed
                    self.graph.capture_end()
                raise
            self.graph.capture_end()
        except BaseException:
            _forget(self.graph, self.pool, uses)
            raise

    def __call__(self) -> Any:
        self.graph.replay()
        return self.result


def _forget(graph: torch.cuda.CUDAGraph, pool: torch.cuda.MemPool, uses: int) -> None:
    """Let the allocator forget a failed capture, before which its pool had ``uses`` uses.

    How much of this PyTorch does depends on its version. What it leaves would hold the pool's memory for ever; and
    while a capture seems to go on, no pool gives memory back.
    """
    with contextlib.suppress(RuntimeError):  # from 2.12 on a failing capture_end has done it
        here.end_allocating(pool)
    graph.reset()
    while pool.use_count() > uses:
        here.release_pool(pool)


def captured(
    capture: Callable[[Callable[[], Any]], Captured],
    call: Callable[[], Any],
    entry: dict[str, Any],
    device: torch.device,
) -> Callable[[], Any]:
    """``call`` by ``capture`` as a CUDA graph; else ``call`` itself, with the reason in ``entry``."""
    entry["graph"] = False
    if not here.holds(device):
        return call
    try:
        graph = capture(call)
    except Exception as error:
        entry["reason"] = f"no CUDA graph: {reason(error)}"
        return call
    entry["graph"] = True
    return graph
