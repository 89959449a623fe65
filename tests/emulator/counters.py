"""What a launch did: instructions, memory requests, bank conflicts, products."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.autotune.gpus import Gpu

if TYPE_CHECKING:
    from tests.emulator.engine import Cohort, Mask
    from tests.emulator.ptx import Instruction

WARP = 32
CLOCK = 1.7e9
LAUNCH_SECONDS = 3e-6


class Counters:
    def __init__(self) -> None:
        self.instructions: Counter[str] = Counter()  # by opcode, each warp's
        self.barriers = 0
        self.tensor_flops = 0
        self.requests = {"load": 0, "store": 0}  # of global memory, by warps
        self.sectors = {"load": 0, "store": 0}  # of 32 bytes
        self.useful = {"load": 0, "store": 0}  # bytes
        self.bulk_bytes = {"load": 0, "store": 0}  # of boxes
        self.bulk_inside = {"load": 0, "store": 0}
        self.wavefronts = {"load": 0, "store": 0, "matrix": 0}  # of shared memory
        self.least_wavefronts = {"load": 0, "store": 0, "matrix": 0}

    def warps(self, co: Cohort, mask: Mask) -> int:
        if mask is None:
            return co.C * co.W
        by_warp = np.broadcast_to(co.by_warp(mask), (co.C, co.W, WARP))
        return int(by_warp.any(2).sum())

    def instruction(self, co: Cohort, ins: Instruction, mask: Mask) -> None:
        self.instructions[ins.opcode] += self.warps(co, mask)

    def flops(self, co: Cohort, flops: int, mask: Mask) -> None:
        self.tensor_flops += flops * co.C

    def glob(self, co: Cohort, address: np.ndarray, width: int, mask: Mask, store: bool) -> None:
        how = "store" if store else "load"
        chosen = np.broadcast_to(True if mask is None else mask, (co.C, co.T)).reshape(co.C * co.W, WARP)
        at = np.broadcast_to(address, (co.C, co.T)).reshape(co.C * co.W, WARP)
        first = np.where(chosen, at >> np.uint64(5), np.uint64(2**64 - 1))
        ordered = np.sort(first, axis=1)
        new = np.ones(ordered.shape, bool)
        new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        self.sectors[how] += int((new & (ordered != np.uint64(2**64 - 1))).sum())
        self.requests[how] += int(chosen.any(1).sum())
        self.useful[how] += int(chosen.sum()) * width

    def shared(self, co: Cohort, address: np.ndarray, width: int, mask: Mask, store: bool) -> None:
        """Wavefronts: a quarter, a half or a whole warp at a time; threads that read one word share it."""
        how = "store" if store else "load"
        part = WARP // max(1, width // 4)
        chosen = np.broadcast_to(True if mask is None else mask, (co.C, co.T)).reshape(-1, part)
        at = np.broadcast_to(address, (co.C, co.T)).reshape(-1, part).astype(np.int64) >> 2
        words = np.concatenate([at + n for n in range(max(1, width // 4))], 1)
        self._wavefronts(how, words, np.concatenate([chosen] * max(1, width // 4), 1))

    def matrix(self, co: Cohort, rows: np.ndarray, chosen: np.ndarray | None) -> None:
        at = rows.reshape(-1, 8).astype(np.int64) >> 2
        words = np.concatenate([at + n for n in range(4)], 1)
        used = np.ones(words.shape, bool) if chosen is None else np.concatenate([chosen.reshape(-1, 8)] * 4, 1)
        self._wavefronts("matrix", words, used)

    def _wavefronts(self, how: str, words: np.ndarray, used: np.ndarray) -> None:
        order = np.sort(np.where(used, words, -1), axis=1)
        new = order >= 0
        new[:, 1:] &= order[:, 1:] != order[:, :-1]
        banks = np.zeros((len(words), WARP), np.int64)
        rows = np.broadcast_to(np.arange(len(words))[:, None], order.shape)
        np.add.at(banks, (rows[new], order[new] % WARP), 1)
        worst = banks.max(1)
        self.wavefronts[how] += int(worst.sum())
        self.least_wavefronts[how] += int((worst > 0).sum())

    def bulk(self, bytes: int, inside: int, store: bool) -> None:
        how = "store" if store else "load"
        self.bulk_bytes[how] += bytes
        self.bulk_inside[how] += inside

    def seconds(self, gpu: Gpu) -> float:
        """A launch's time, were one resource alone to bind it: memory, shared memory, tensor cores or the issue of
        instructions."""
        moved = 32 * sum(self.sectors.values()) + sum(self.bulk_inside.values())
        cycles = max(sum(self.instructions.values()) / 4, sum(self.wavefronts.values())) / gpu.multiprocessors
        return LAUNCH_SECONDS + max(moved / gpu.bandwidth, self.tensor_flops / gpu.matrix_rate, cycles / CLOCK)

    def result(self) -> dict[str, Any]:
        return {
            "warp_instructions": dict(self.instructions),
            "barriers": self.barriers,
            "tensor_flops": self.tensor_flops,
            "global": {
                how: {
                    "requests": self.requests[how],
                    "sectors": self.sectors[how],
                    "bytes": self.useful[how],
                    "efficiency": self.useful[how] / (32 * self.sectors[how]) if self.sectors[how] else None,
                }
                for how in ("load", "store")
            },
            "bulk_bytes": self.bulk_bytes,
            "bulk_bytes_inside": self.bulk_inside,
            "shared_wavefronts": self.wavefronts,
            "shared_wavefronts_without_conflicts": self.least_wavefronts,
        }
