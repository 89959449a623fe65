"""Calls as CUDA graphs, so that the host's time is not in theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from fastconv.measuring.clock import reason


class Captured:
    """A call as a CUDA graph, captured on the current stream, which is not the default one, with memory of its own or
    of ``pool``: replays it and returns what the captured call returned.

    Raises what the call raised, or else what the capture did; later captures and allocations are as if there had been
    none, but for those in the same pool, which nothing is to be captured in again.
    """

    def __init__(self, call: Callable[[], Any], pool: torch.cuda.MemPool | None = None) -> None:
        self.call = call  # keeps the operands that the graph reads alive
        self.graph = torch.cuda.CUDAGraph()
        self.pool = torch.cuda.MemPool() if pool is None else pool
        uses = self.pool.use_count()
        torch.cuda.synchronize()
        try:
            # Not by torch.cuda.graph, which gives all of the allocator's memory back each time.
            self.graph.capture_begin(pool=self.pool.id)  # type: ignore[arg-type]  # torch has a name for such a pair
            try:
                self.result = call()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # which says no more than that the capture has failed
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
    """Have the allocator forget a capture that failed and began with so many uses of its pool.

    How much of that PyTorch does depends on its version. What is left would hold the pool's memory for ever, and as
    long as a capture seems to go on no memory of any pool is given back.
    """
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # it has ended: from 2.12 on a failing capture_end does that
        torch._C._cuda_endAllocateToPool(device, pool.id)
    graph.reset()
    while pool.use_count() > uses:
        torch._C._cuda_releasePool(device, pool.id)


def captured(
    capture: Callable[[Callable[[], Any]], Captured],
    call: Callable[[], Any],
    entry: dict[str, Any],
    device: torch.device,
) -> Callable[[], Any]:
    """``call`` by ``capture`` as a CUDA graph; as it is, with the reason in ``entry``, where it cannot become one."""
    entry["graph"] = False
    if device.type != "cuda":
        return call
    try:
        graph = capture(call)
    except Exception as error:
        entry["reason"] = f"no CUDA graph: {reason(error)}"
        return call
    entry["graph"] = True
    return graph
