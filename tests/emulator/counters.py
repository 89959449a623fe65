"""What a launch did: instructions, memory requests, bank conflicts, products.

Global memory moves in sectors of 32 bytes; the least a request of a warp can move is its distinct bytes, rounded up to
sectors. Shared memory moves in wavefronts, each at most one word of 4 bytes from each of 32 banks: a warp's access of 4
bytes a thread takes one, of 8 bytes two, one for each half of the warp, of 16 bytes four. Threads that read one word
share it; words of one bank conflict. Instructions are PTX's, of which ptxas makes fewer or more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from fastconv.autotune.gpus import Gpu

if TYPE_CHECKING:
    from tests.emulator.engine import Cohort, Mask
    from tests.emulator.ptx import Instruction, Kernel

WARP = 32
SECTOR = 32
CLOCK = 1.7e9
LAUNCH_SECONDS = 3e-6
PAGE = 20  # of the map of bytes that were touched: its size's logarithm
NONE = np.uint64(2**64 - 1)


@dataclass(slots=True)
class Access:
    """What one instruction did, of all warps."""

    executed: int = 0
    requests: int = 0  # of global memory
    sectors: int = 0
    least_sectors: int = 0
    bytes: int = 0  # that the threads asked for
    box_bytes: int = 0  # of bulk copies, with what lies outside the tensor
    inside_bytes: int = 0  # without
    box_sectors: int = 0
    least_box_sectors: int = 0
    wavefronts: int = 0  # of shared memory
    least_wavefronts: int = 0

    def add(self, other: Access) -> None:
        for name in FIELDS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


FIELDS = [field.name for field in fields(Access)]


class Touched:
    """Which bytes of memory were met, one byte of a map for each."""

    def __init__(self) -> None:
        self.pages: dict[int, np.ndarray] = {}

    def add(self, addresses: np.ndarray, width: int) -> None:
        """``width`` bytes at each of the addresses, which are multiples of it."""
        if width > 8:
            addresses, width = np.concatenate([addresses + np.uint64(8 * n) for n in range(width // 8)]), 8
        numbers = addresses >> np.uint64(PAGE)
        for number in np.unique(numbers).tolist():
            page = self.pages.setdefault(number, np.zeros(1 << PAGE, np.uint8)).view(f"u{width}")
            inside = (addresses[numbers == number] & np.uint64((1 << PAGE) - 1)) // np.uint64(width)
            page[inside.astype(np.int64)] = np.array(2 ** (8 * width) - 1, page.dtype)

    def bytes(self) -> int:
        return sum(int(np.count_nonzero(page)) for page in self.pages.values())


def sectors_of(addresses: np.ndarray, chosen: np.ndarray, width: int) -> tuple[int, int]:
    """(sectors, the least for as many distinct bytes) that the requests, which are rows, move."""

    def distinct(values: np.ndarray) -> np.ndarray:
        ordered = np.sort(np.where(chosen, values, NONE), axis=1)
        new = ordered != NONE
        new[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
        return new.sum(1)

    sectors = distinct(addresses >> np.uint64(5)) * max(1, width // SECTOR)
    return int(sectors.sum()), int((-(-distinct(addresses) * width // SECTOR)).sum())


class Counters:
    def __init__(self) -> None:
        self.by_instruction: dict[int, tuple[Instruction, Access]] = {}
        self.kernel: Kernel | None = None
        self.ctas = 0
        self.warps_per_cta = 1
        self.barriers = 0
        self.tensor_flops = 0
        self.touched = {"load": Touched(), "store": Touched()}

    def access(self, ins: Instruction | None) -> Access:
        assert ins is not None
        return self.by_instruction.setdefault(id(ins), (ins, Access()))[1]

    def warps(self, co: Cohort, mask: Mask) -> int:
        if mask is None:
            return co.C * co.W
        by_warp = np.broadcast_to(co.by_warp(mask), (co.C, co.W, WARP))
        return int(by_warp.any(2).sum())

    def instruction(self, co: Cohort, ins: Instruction, mask: Mask) -> None:
        if self.kernel is None:
            self.kernel, self.warps_per_cta = co.program.kernel, co.W
        if ins is self.kernel.instructions[0]:
            self.ctas += co.C
        self.access(ins).executed += self.warps(co, mask)

    def flops(self, co: Cohort, flops: int, mask: Mask) -> None:
        self.tensor_flops += flops * co.C

    def glob(self, co: Cohort, address: np.ndarray, width: int, mask: Mask, store: bool) -> None:
        chosen = np.broadcast_to(True if mask is None else mask, (co.C, co.T)).reshape(-1, WARP)
        at = np.broadcast_to(address, (co.C, co.T)).reshape(-1, WARP)
        found = self.access(co.instruction)
        sectors, least = sectors_of(at, chosen, width)
        found.sectors += sectors
        found.least_sectors += least
        found.requests += int(chosen.any(1).sum())
        found.bytes += int(chosen.sum()) * width
        self.touched["store" if store else "load"].add(at[chosen], width)

    def shared(self, co: Cohort, address: np.ndarray, width: int, mask: Mask, store: bool) -> None:
        """Wavefronts: a quarter, a half or a whole warp at a time."""
        part = WARP // max(1, width // 4)
        chosen = np.broadcast_to(True if mask is None else mask, (co.C, co.T)).reshape(-1, part)
        at = np.broadcast_to(address, (co.C, co.T)).reshape(-1, part).astype(np.int64) >> 2
        words = np.concatenate([at + n for n in range(max(1, width // 4))], 1)
        self._wavefronts(co, words, np.concatenate([chosen] * max(1, width // 4), 1))

    def matrix(self, co: Cohort, rows: np.ndarray, chosen: np.ndarray | None) -> None:
        at = rows.reshape(-1, 8).astype(np.int64) >> 2
        words = np.concatenate([at + n for n in range(4)], 1)
        used = np.ones(words.shape, bool) if chosen is None else np.concatenate([chosen.reshape(-1, 8)] * 4, 1)
        self._wavefronts(co, words, used)

    def _wavefronts(self, co: Cohort, words: np.ndarray, used: np.ndarray) -> None:
        order = np.sort(np.where(used, words, -1), axis=1)
        new = order >= 0
        new[:, 1:] &= order[:, 1:] != order[:, :-1]
        rows = np.broadcast_to(np.arange(len(words))[:, None], order.shape)
        banks = np.bincount(rows[new] * WARP + order[new] % WARP, minlength=len(words) * WARP)
        worst = banks.reshape(-1, WARP).max(1)
        found = self.access(co.instruction)
        found.wavefronts += int(worst.sum())
        found.least_wavefronts += int((worst > 0).sum())

    def bulk(self, co: Cohort, address: np.ndarray, inside: np.ndarray, unit: int, box: int, store: bool) -> None:
        """``address`` of each element of ``unit`` bytes in the boxes, which are the first axis."""
        address, inside = address.reshape(len(address), -1).astype(np.uint64), inside.reshape(len(inside), -1)
        found = self.access(co.instruction)
        found.box_bytes += len(address) * box
        found.inside_bytes += int(inside.sum()) * unit
        sectors, least = sectors_of(address, inside, unit)
        found.box_sectors += sectors
        found.least_box_sectors += least
        self.touched["store" if store else "load"].add(address[inside], unit)

    # What is told of it.

    def total(self, kind: str, inside: range | None = None) -> Access:
        """Of the instructions whose opcode begins with ``kind``, of all or of those in a loop."""
        assert self.kernel is not None
        found = Access()
        for index, ins in enumerate(self.kernel.instructions):
            if (inside is None or index in inside) and kind_of(ins).startswith(kind) and id(ins) in self.by_instruction:
                found.add(self.by_instruction[id(ins)][1])
        return found

    def main_loop(self) -> tuple[range, int] | None:
        """(indices of instructions, how often a warp runs them) of the innermost loop that takes the most.

        A loop that only waits at an mbarrier is none. A loop may be unrolled in part: a step is one turn.
        """
        kernel = self.kernel
        assert kernel is not None
        loops = []
        for end, ins in enumerate(kernel.instructions):
            if ins.opcode == "bra" and id(ins) in self.by_instruction:
                start = kernel.labels[ins.operands[0].name]
                body = kernel.instructions[start : end + 1]
                if start <= end and not (len(body) < 9 and any(i.opcode == "mbarrier" for i in body)):
                    loops.append(range(start, end + 1))
        innermost = [a for a in loops if not any(b is not a and b.start >= a.start and b.stop <= a.stop for b in loops)]
        if not innermost:
            return None
        worst = max(innermost, key=lambda loop: self.total("", loop).executed)
        return worst, self.by_instruction[id(kernel.instructions[worst.stop - 1])][1].executed

    def result(self) -> dict[str, Any]:
        """In total, and by warp and turn in the main loop."""
        if self.kernel is None:
            return {}
        loads, stores = self.total("load"), self.total("store")
        parts = {name: self.total(f"{name} shared") for name in ("load", "store", "matrix", "copy")}
        opcodes: Counter[str] = Counter()
        for ins, access in self.by_instruction.values():
            opcodes[ins.opcode] += access.executed
        return {
            "programs": self.ctas,
            "warps": self.warps_per_cta,  # of a program
            "warp_instructions": dict(opcodes),
            "barriers": self.barriers,
            "tensor_flops": self.tensor_flops,
            "global": {
                how: {
                    "requests": of.requests,
                    "sectors": of.sectors,
                    "least_sectors": of.least_sectors,
                    "bytes": of.bytes,
                    "efficiency": of.least_sectors / of.sectors if of.sectors else None,
                }
                for how, of in (("load", self._plus(loads, "copy")), ("store", stores))
            },
            "bulk": {
                how: {
                    "box_bytes": of.box_bytes,
                    "inside_bytes": of.inside_bytes,
                    "sectors": of.box_sectors,
                    "least_sectors": of.least_box_sectors,
                }
                for how, of in (("load", self.total("bulk load")), ("store", self.total("bulk store")))
            },
            "unique_bytes": {how: touched.bytes() for how, touched in self.touched.items()},
            "shared_wavefronts": {name: of.wavefronts for name, of in parts.items()},
            "shared_wavefronts_without_conflicts": {name: of.least_wavefronts for name, of in parts.items()},
            "main_loop": self._loop(),
            "wasteful": self._wasteful(),
        }

    def _plus(self, one: Access, kind: str, inside: range | None = None) -> Access:
        one.add(self.total(kind, inside))
        return one

    def _loop(self) -> dict[str, Any] | None:
        found = self.main_loop()
        if found is None:
            return None
        loop, turns = found
        loads, everything = self._plus(self.total("load", loop), "copy", loop), self.total("", loop)
        bulk = self.total("bulk load", loop)
        return {
            "steps": turns / (self.ctas * self.warps_per_cta),  # of a program
            "instructions": everything.executed / turns,  # of a warp and step
            "requests": loads.requests,
            "sectors": loads.sectors,
            "least_sectors": loads.least_sectors,
            "bulk_sectors": bulk.box_sectors,
            "least_bulk_sectors": bulk.least_box_sectors,
            "wavefronts": everything.wavefronts,
            "least_wavefronts": everything.least_wavefronts,
        }

    def _wasteful(self) -> list[dict[str, Any]]:
        """The instructions that move over 1/0.9 times the least sectors or take over 1.2 times the least wavefronts."""
        assert self.kernel is not None
        loop = self.main_loop()
        found = []
        for index, ins in enumerate(self.kernel.instructions):
            access = self.by_instruction.get(id(ins), (ins, Access()))[1]
            sectors = access.sectors + access.box_sectors
            least = access.least_sectors + access.least_box_sectors
            if 0.9 * sectors > least or access.wavefronts > 1.2 * access.least_wavefronts:
                row = {"instruction": ins.text, "source": ins.source, "in_main_loop": bool(loop and index in loop[0])}
                row |= {"sectors": sectors, "least_sectors": least}
                row |= {"wavefronts": access.wavefronts, "least_wavefronts": access.least_wavefronts}
                found.append(row)
        return found

    def seconds(self, gpu: Gpu) -> float:
        """A launch's time, were one resource alone to bind it: memory, shared memory, tensor cores or the issue of
        instructions."""
        everything = Access()
        for _, access in self.by_instruction.values():
            everything.add(access)
        moved = SECTOR * everything.sectors + everything.inside_bytes
        cycles = max(everything.executed / 4, everything.wavefronts) / gpu.multiprocessors
        return LAUNCH_SECONDS + max(moved / gpu.bandwidth, self.tensor_flops / gpu.matrix_rate, cycles / CLOCK)


def kind_of(ins: Instruction) -> str:
    """What `Counters.total` asks for: "load" and "store" are global memory's, "copy shared" is cp.async."""
    modifiers = ins.modifiers
    if ins.opcode in ("ld", "st"):
        how = "load" if ins.opcode == "ld" else "store"
        return how if "global" in modifiers else f"{how} shared"
    if ins.opcode in ("ldmatrix", "stmatrix"):
        return "matrix shared"
    if ins.opcode == "cp":
        if modifiers[1] != "bulk":
            return "copy shared"
        return "bulk store" if "bulk_group" in modifiers else "bulk load"
    return ""
