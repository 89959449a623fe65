"""Global memory, as ranges of host memory that a launch may touch, and the shared memory of many CTAs."""

from __future__ import annotations

import ctypes
import threading
from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_WIDE: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}
_PAGE = 1 << 12
_HOST = (ctypes.c_uint8 * ((1 << 47) - _PAGE)).from_address(_PAGE)
# All of the process's memory, by the width of an access; indexed by (address - _PAGE) // width.
HOST = {width: np.frombuffer(_HOST, dtype=dtype) for width, dtype in _WIDE.items()}
TOTAL_MEMORY = 4 << 30  # of a GPU: less than the host has
SHARED_BASE = 1024  # what the system keeps for itself at the start of each CTA's shared memory
LOCAL_BASE = 1 << 60  # generic addresses of local memory and of parameters
PARAM_BASE = 1 << 61
SHARED_GENERIC = 1 << 59
# Of a byte of shared memory.
WRITTEN, IN_FLIGHT, UNFENCED = 1, 2, 4


class Fault(RuntimeError):
    """What a GPU, or compute-sanitizer, would refuse, or what is undefined."""


@dataclass(order=True)
class Range:
    start: int
    end: int
    what: str = ""
    alive: Callable[[], bool] | None = None


class Allocations:
    """The registered ranges of host memory."""

    def __init__(self) -> None:
        self._ranges: list[Range] = []
        self._lock = threading.Lock()
        self.peak = 0  # bytes at once since it was last set

    def add(self, start: int, size: int, what: str = "", alive: Callable[[], bool] | None = None) -> None:
        """Raises MemoryError beyond the GPU's memory."""
        if size <= 0:
            return
        new = Range(start, start + size, what, alive)
        with self._lock:
            at = bisect_right(self._ranges, new.start, key=lambda r: r.start)
            if at and self._ranges[at - 1].start == start and self._ranges[at - 1].end == new.end:
                self._ranges[at - 1] = new
                return
            # What lies where something new is has been freed.
            self._ranges = [r for r in self._ranges if r.end <= start or r.start >= new.end]
            insort(self._ranges, new)
        total = self.bytes()
        if total > TOTAL_MEMORY:
            raise MemoryError(f"CUDA out of memory: {total:,} bytes of {TOTAL_MEMORY:,} (emulated)")
        self.peak = max(self.peak, total)

    def bytes(self) -> int:
        return sum(r.end - r.start for r in self.ranges())

    def ranges(self) -> list[Range]:
        with self._lock:
            self._ranges = [r for r in self._ranges if r.alive is None or r.alive()]
            return list(self._ranges)

    def find(self, address: int) -> Range | None:
        with self._lock:
            at = bisect_right(self._ranges, address, key=lambda r: r.start)
            return self._ranges[at - 1] if at and address < self._ranges[at - 1].end else None


class Global:
    """What one launch may touch."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self.ranges = sorted(ranges)
        self._starts = np.array([r.start for r in self.ranges], np.uint64)
        self._ends = np.array([r.end for r in self.ranges], np.uint64)

    def outside(self, addresses: np.ndarray, size: int) -> np.ndarray | None:
        """Which of the accesses are wrong: a mask, or None."""
        low, high = int(addresses.min()), int(addresses.max())
        if not any(r.start <= low and high + size <= r.end for r in self.ranges):
            if not self.ranges:
                return np.ones(addresses.shape, bool)
            at = np.searchsorted(self._starts, addresses, "right").astype(np.int64) - 1
            bad = (at < 0) | (addresses + np.uint64(size) > self._ends[np.maximum(at, 0)])
            if bad.any():
                return bad
        bad = (addresses & np.uint64(size - 1)) != 0
        return bad if bad.any() else None

    def describe(self, address: int, size: int) -> str:
        if address % size:
            return f"{size}-byte access at 0x{address:x}, which is no multiple of {size}"
        if not self.ranges:
            return f"0x{address:x}, and the launch has no memory at all"
        near = min(self.ranges, key=lambda r: max(r.start - address, address + size - r.end))
        if address < near.start:
            where = f"{near.start - address} bytes before"
        elif address >= near.end:
            where = f"{address - near.end} bytes behind the end of"
        else:
            where = "across the end of"
        return f"0x{address:x}, {where} {near.end - near.start} bytes at 0x{near.start:x} ({near.what})"


def load(addresses: np.ndarray, width: int) -> np.ndarray:
    return HOST[width][(addresses - np.uint64(_PAGE)) >> np.uint64(width.bit_length() - 1)]


def store(addresses: np.ndarray, width: int, values: np.ndarray) -> None:
    HOST[width][(addresses - np.uint64(_PAGE)) >> np.uint64(width.bit_length() - 1)] = values


class Shared:
    """Shared memory of ``ctas`` CTAs: bytes, what is known of each, and who touched each word last."""

    def __init__(self, ctas: int, size: int, races: bool) -> None:
        self.ctas, self.size = ctas, size
        self.pitch = max(16, -(-size // 16) * 16)
        self.data = np.full((ctas, self.pitch), 0xFF, np.uint8)
        self.state = np.zeros((ctas, self.pitch), np.uint8)
        self.races, self.epoch = races, 1
        # epoch << 8 | warp of the last write, of the highest and (as 255 - warp) of the lowest reader.
        self.writer, self.high, self.low = (np.zeros((ctas, self.pitch // 4), np.uint32) for _ in range(3))
        self._rows = (np.arange(ctas, dtype=np.int64) * self.pitch)[:, None]

    def take(self, ctas: np.ndarray) -> Shared:
        part = Shared.__new__(Shared)
        part.ctas, part.size, part.pitch, part.races, part.epoch = (
            len(ctas),
            self.size,
            self.pitch,
            self.races,
            self.epoch,
        )
        for name in ("data", "state", "writer", "high", "low"):
            setattr(part, name, np.ascontiguousarray(getattr(self, name)[ctas]))
        part._rows = self._rows[: len(ctas)]
        return part

    def offsets(self, addresses: np.ndarray, size: int, mask: np.ndarray | None) -> np.ndarray:
        """Flat indices of 32-bit addresses [C, n] (or broadcastable), those that ``mask`` names, checked."""
        at = addresses.astype(np.int64) - SHARED_BASE
        at = np.broadcast_to(at, (self.ctas, at.shape[1]))
        flat = np.ascontiguousarray(at + self._rows)
        if mask is not None:
            mask = np.broadcast_to(mask, at.shape)
            at, flat = at[mask], flat[mask]
        if at.size:
            low, high = int(at.min()), int(at.max())
            if low < 0 or high + size > self.size:
                bad = low if low < 0 else high
                raise Fault(f"shared memory: {size} bytes at offset {bad} of {self.size}")
            if (at & (size - 1)).any():
                bad = int(at[(at & (size - 1)) != 0].flat[0])
                raise Fault(f"shared memory: {size}-byte access at offset {bad}, which is no multiple of {size}")
        return flat

    def _view(self, array: np.ndarray, width: int) -> np.ndarray:
        return array.reshape(-1).view(_WIDE[width])

    def load(self, flat: np.ndarray, width: int, warps: np.ndarray | None, check: bool = True) -> np.ndarray:
        """What lies at flat indices; ``warps`` that read them, of the same shape."""
        at = flat >> (width.bit_length() - 1)
        if check:
            self._readable(self._view(self.state, width)[at], width)
            if self.races and warps is not None and flat.size:
                self._reading(flat, width, warps)
        return self._view(self.data, width)[at]

    def store(
        self, flat: np.ndarray, width: int, values: np.ndarray, warps: np.ndarray | None, check: bool = True
    ) -> None:
        at = flat >> (width.bit_length() - 1)
        if check:
            state = self._view(self.state, width)
            if width == 16:
                now = state[at].view(np.uint64)
            else:
                now = state[at]
            if (now & _repeat(IN_FLIGHT, min(width, 8))).any():
                raise Fault("shared memory: a write where a copy that nothing waited for still writes")
            state[at] = _STATES[width]
            if self.races and warps is not None and flat.size:
                self._writing(flat, width, warps)
        self._view(self.data, width)[at] = values

    def _readable(self, states: np.ndarray, width: int) -> None:
        if width == 16:
            states, width = states.view(np.uint64), 8
        if states.size == 0:
            return
        known = states & _repeat(WRITTEN | IN_FLIGHT, width)
        if (known != _repeat(WRITTEN, width)).any():
            if (states & _repeat(IN_FLIGHT, width)).any():
                raise Fault("shared memory: a read of what a copy that nothing waited for still writes")
            raise Fault("shared memory: a read of bytes that nothing wrote")

    def _words(self, flat: np.ndarray, width: int, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        words, warps = (flat >> 2).ravel(), np.broadcast_to(warps, flat.shape).ravel()
        count = width // 4
        if count > 1:
            words = (words[:, None] + np.arange(count)).ravel()
            warps = np.repeat(warps, count)
        return words, warps.astype(np.uint32)

    def _reading(self, flat: np.ndarray, width: int, warps: np.ndarray) -> None:
        words, warps = self._words(flat, width, warps)
        now = np.uint32(self.epoch << 8)
        tags = now | warps
        last = self.writer.reshape(-1)[words] ^ tags
        if ((last - np.uint32(1)) < np.uint32(255)).any():
            raise Fault("shared memory: a race: a warp reads what another wrote since the last barrier")
        high, low = self.high.reshape(-1), self.low.reshape(-1)
        # Of equal indices the last one stays, and within each CTA warps ascend.
        high[words] = np.maximum(high[words], tags)
        words, tags = words[::-1], (now | (np.uint32(255) - warps))[::-1]
        low[words] = np.maximum(low[words], tags)

    def _writing(self, flat: np.ndarray, width: int, warps: np.ndarray) -> None:
        words, warps = self._words(flat, width, warps)
        tags = np.uint32(self.epoch << 8) | warps
        self._overwrites(words, tags)
        self.writer.reshape(-1)[words] = tags

    def _overwrites(self, words: np.ndarray, tags: np.ndarray) -> None:
        for array, flip in ((self.high, 0), (self.low, 255)):
            last = array.reshape(-1)[words] ^ np.uint32(flip) ^ tags
            if ((last - np.uint32(1)) < np.uint32(255)).any():
                raise Fault("shared memory: a race: a warp overwrites what another read since the last barrier")

    # Ranges, as bulk copies and matrix units touch them: ``flat`` indices of 16-byte pieces.

    def bulk_load(self, flat: np.ndarray, what: str) -> np.ndarray:
        at = flat >> 4
        states = self._view(self.state, 16)[at].view(np.uint64)
        known = states & _repeat(WRITTEN | IN_FLIGHT | UNFENCED, 8)
        if (known != _repeat(WRITTEN, 8)).any():
            if (known & _repeat(IN_FLIGHT, 8)).any():
                raise Fault(f"shared memory: {what} reads what a copy that nothing waited for still writes")
            if (known & _repeat(UNFENCED, 8)).any():
                raise Fault(f"shared memory: {what} reads what no fence.proxy.async follows")
            raise Fault(f"shared memory: {what} reads bytes that nothing wrote")
        return self._view(self.data, 16)[at]

    def unsynchronised(self, flat: np.ndarray, warp: int | None, writes: bool, reads: bool) -> bool:
        """Whether a warp other than ``warp`` wrote, or read, 16-byte pieces since the last barrier."""
        if not self.races:
            return False
        words = (flat >> 2).ravel()
        words = (words[:, None] + np.arange(4)).ravel()
        found = False
        for array, asked in ((self.writer, writes), (self.high, reads), (self.low, reads)):
            if asked:
                last = array.reshape(-1)[words]
                fresh = (last >> np.uint32(8)) == np.uint32(self.epoch)
                if warp is not None:
                    own = 255 - warp if array is self.low else warp
                    fresh &= (last & np.uint32(255)) != np.uint32(own)
                found = found or bool(fresh.any())
        return found

    def mark(self, flat: np.ndarray, width: int, state: int) -> None:
        """Set the state of pieces, and forget who wrote them."""
        self._view(self.state, width)[flat >> (width.bit_length() - 1)] = _state(state, width)

    def put(self, flat: np.ndarray, width: int, values: np.ndarray) -> None:
        """The landing of an asynchronous copy."""
        at = flat >> (width.bit_length() - 1)
        self._view(self.data, width)[at] = values
        self._view(self.state, width)[at] = _state(WRITTEN, width)

    def poison(self, flat: np.ndarray, width: int) -> None:
        at = flat >> (width.bit_length() - 1)
        self._view(self.data, width)[at] = _state(0xFF, width)
        self._view(self.state, width)[at] = _state(IN_FLIGHT, width)

    def fence(self) -> None:
        self.state &= np.uint8(255 - UNFENCED)


def _repeat(byte: int, width: int) -> Any:
    return _WIDE[width](int.from_bytes(bytes([byte]) * width, "little"))


def _state(byte: int, width: int) -> Any:
    return np.frombuffer(bytes([byte]) * width, _WIDE[width])[0]


_STATES = {width: _state(WRITTEN | UNFENCED, width) for width in _WIDE}
