"""Captures that fail and leave nothing behind, whatever PyTorch's version undoes itself: with an allocator made up as
its own is, and on a GPU with that."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastconv.kernels.launch.device import here
from fastconv.measuring.capture import Captured, captured

CPU, GPU = torch.device("cpu"), here.at()
# What a version undoes of a capture that failed: the first nothing, the next ends allocating to the pool, then reset
# also ends its use.
VERSIONS = ("2.11", "2.12", "after")


class Allocator:
    """Pools, how many use each, and which of them a capture seems to allocate from; as in c10's."""

    def __init__(self, version: str) -> None:
        self.version = version
        self.uses: dict[tuple[int, int], int] = {}
        self.underway: set[tuple[int, int]] = set()
        self.invalid = False  # what is being captured

    def end(self, device: int, pool: tuple[int, int]) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self, device: int, pool: tuple[int, int]) -> None:
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0


class Graph:
    def __init__(self, allocator: Allocator) -> None:
        self.allocator, self.held, self.replays = allocator, False, 0

    def capture_begin(self, pool: tuple[int, int]) -> None:
        self.pool = pool
        self.allocator.uses[pool] += 1
        self.allocator.underway.add(pool)

    def capture_end(self) -> None:
        it = self.allocator
        failed, it.invalid = it.invalid, False
        if not failed or it.version != "2.11":
            it.end(0, self.pool)
        self.held = not failed or it.version == "after"
        if failed:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def reset(self) -> None:
        if self.held:
            self.allocator.release(0, self.pool)
        self.held = False

    def replay(self) -> None:
        self.replays += 1


class Pool:
    def __init__(self, allocator: Allocator) -> None:
        self.allocator, self.id = allocator, (0, len(allocator.uses) + 1)
        allocator.uses[self.id] = 1

    def use_count(self) -> int:
        return self.allocator.uses[self.id]


@pytest.fixture(params=VERSIONS)
def allocator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Allocator:
    made = Allocator(request.param)
    monkeypatch.setattr(here, "CUDAGraph", lambda: Graph(made))
    monkeypatch.setattr(here, "MemPool", lambda: Pool(made))
    monkeypatch.setattr(here, "synchronize", lambda: None)
    monkeypatch.setattr(here, "current_device", lambda: 0)
    monkeypatch.setattr(here, "end_allocating", lambda pool: made.end(0, pool.id))
    monkeypatch.setattr(here, "release_pool", lambda pool: made.release(0, pool.id))
    return made


def invalidating(allocator: Allocator) -> Callable[[], Any]:
    def call() -> Any:
        allocator.invalid = True
        raise ValueError("not while capturing")

    return call


def test_a_call_is_replayed(allocator: Allocator) -> None:
    calls: list[str] = []
    graph = Captured(lambda: calls.append("called") or 42)  # type: ignore[func-returns-value]
    assert (graph(), graph(), calls, graph.graph.replays) == (42, 42, ["called"], 2)
    assert (allocator.underway, list(allocator.uses.values())) == (set(), [2])


def test_a_failed_capture_leaves_nothing_and_raises_what_the_call_did(allocator: Allocator) -> None:
    with pytest.raises(ValueError, match="not while capturing"):
        Captured(invalidating(allocator))
    assert (allocator.underway, list(allocator.uses.values())) == (set(), [1])


def test_so_does_one_that_fails_as_it_ends_or_whose_call_does_not_harm_it(allocator: Allocator) -> None:
    with pytest.raises(RuntimeError, match="a previous error during capture"):
        Captured(lambda: setattr(allocator, "invalid", True))
    with pytest.raises(ZeroDivisionError):
        Captured(lambda: 1 // 0)
    assert (allocator.underway, list(allocator.uses.values())) == (set(), [1, 1])


def test_graphs_that_share_a_pool_keep_it(allocator: Allocator) -> None:
    pool = here.MemPool()
    graph = Captured(lambda: 1, pool)
    with pytest.raises(ValueError):
        Captured(invalidating(allocator), pool)
    assert (allocator.underway, pool.use_count(), graph()) == (set(), 2, 1)


def test_what_cannot_be_captured_is_called_as_it_is_and_says_why(allocator: Allocator) -> None:
    entry: dict[str, Any] = {}
    call = invalidating(allocator)
    assert captured(Captured, call, entry, GPU) is call
    assert entry == {"graph": False, "reason": "no CUDA graph: ValueError: not while capturing"}
    assert captured(Captured, len, entry, CPU) is len
    entry = {}
    assert captured(Captured, lambda: 3, entry, GPU)() == 3 and entry == {"graph": True}


@pytest.mark.gpu
def test_memory_is_given_back_and_graphs_are_captured_after_one_that_failed() -> None:
    def fails() -> None:
        torch.ones(1 << 26, device=GPU)
        here.synchronize()

    with here.stream(here.Stream()):
        gc.collect()
        here.empty_cache()
        before = here.memory_reserved()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="captur"):
                Captured(fails)
        gc.collect()
        here.empty_cache()
        assert here.memory_reserved() == before
        x = torch.ones(8, device=GPU)
        assert Captured(lambda: x + 1)().tolist() == [2.0] * 8
