"""Bulk tensor copies: tensor maps, loads that an mbarrier counts, stores in bulk groups; and mbarriers.

A load lands when a wait on its barrier needs it, a store reads shared memory when a wait covers its group; both at once
where asynchrony is early.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.emulator import alu, memory
from tests.emulator.memory import PARAM_BASE, SHARED_BASE, Fault
from tests.emulator.ptx import Instruction, Memory, PtxError, Sink

if TYPE_CHECKING:
    from tests.emulator.engine import Cohort, Compiler, Mask, Op, Running

MAGIC = 0x50414D5452464C45
# As driver.c lays a map out: magic, a word of nothing, address, rank, element bytes, swizzle, fill, whether TF32;
# sizes, strides in bytes, a box's sides.
_FORMAT = struct.Struct("<Q 8x Q 5B 3x 5Q 4Q 5H 6x")
SWIZZLE_BITS = {0: 0, 1: 1, 2: 2, 3: 3}  # of the host's enumeration: none, 32, 64 and 128 bytes


class Map:
    def __init__(self, raw: bytes) -> None:
        magic, self.address, self.rank, self.unit, self.swizzle, self.fill, self.tf32, *rest = _FORMAT.unpack(
            raw[: _FORMAT.size]
        )
        if magic != MAGIC:
            raise Fault("what a bulk copy takes for a tensor map is none")
        rank = self.rank
        self.sizes, self.strides, self.box = rest[:rank], [self.unit, *rest[5 : 5 + rank - 1]], rest[9 : 9 + rank]
        self.bytes = int(np.prod(self.box)) * self.unit
        # Of a box's 16-byte pieces: their place along each axis (the innermost first) and in shared memory.
        row = self.box[0] * self.unit
        pieces = row // 16
        grid = np.meshgrid(*(np.arange(n) for n in reversed(self.box[1:])), np.arange(pieces), indexing="ij")
        grid = [g.reshape(-1) for g in reversed(grid)]
        self.piece, self.steps = grid[0], grid[1:]
        self.place = np.arange(len(self.piece), dtype=np.int64) * 16

    def swizzled(self, address: np.ndarray) -> np.ndarray:
        bits = SWIZZLE_BITS[self.swizzle]
        return address ^ (((address >> 7) & ((1 << bits) - 1)) << 4)


class Maps:
    """The tensor maps among a launch's parameters."""

    def __init__(self, running: Running) -> None:
        self._maps: dict[int, Map] = {}
        for parameter in running.program.kernel.parameters:
            if parameter.size == 128:
                raw = running.parameters[parameter.offset : parameter.offset + 128].tobytes()
                if struct.unpack_from("<Q", raw)[0] == MAGIC:
                    self._maps[parameter.offset] = Map(raw)

    def addresses(self) -> Iterator[int]:
        return (m.address for m in self._maps.values())

    def at(self, address: np.ndarray) -> Map:
        first = int(address.flat[0])
        if (address != np.uint64(first)).any():
            raise PtxError("one copy of several tensor maps is not modelled")
        if first - PARAM_BASE not in self._maps:
            raise Fault(f"no tensor map at 0x{first:x}")
        return self._maps[first - PARAM_BASE]


class Barrier:
    """An mbarrier at one offset, of each CTA of a cohort."""

    def __init__(self, ctas: int) -> None:
        self.count = np.zeros(ctas, np.int64)  # 0: not initialised
        self.pending = np.zeros(ctas, np.int64)
        self.bytes = np.zeros(ctas, np.int64)  # still expected in this phase
        self.phase = np.zeros(ctas, np.int64)

    def part(self, which: np.ndarray) -> Barrier:
        it = Barrier(0)
        for name in ("count", "pending", "bytes", "phase"):
            setattr(it, name, getattr(self, name)[which])
        return it

    def turn(self) -> None:
        done = (self.count > 0) & (self.pending == 0) & (self.bytes == 0)
        self.phase += done
        self.pending = np.where(done, self.count, self.pending)


class State:
    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self.barriers: dict[int, Barrier] = {}
        self.loads: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.groups: list[list[dict[str, Any]]] = []

    def part(self, cohort: Cohort, which: np.ndarray) -> State:
        it = State(cohort)
        it.barriers = {at: barrier.part(which) for at, barrier in self.barriers.items()}
        place = np.full(self.cohort.C, -1)
        place[which] = np.arange(len(which))

        def moved(entry: dict[str, Any]) -> dict[str, Any]:
            keep = place[entry["ctas"]] >= 0
            new = place[entry["ctas"][keep]]
            shift = (new - entry["ctas"][keep]) * self.cohort.shared.pitch
            result = {**entry, "ctas": new, "flat": entry["flat"][keep] + shift[:, None]}
            for name in ("data", "read"):
                if name in entry:
                    result[name] = entry[name][keep]
            if "range" in entry:
                result["range"] = entry["range"][which]
            if "source" in entry:
                result["source"] = [s[keep] for s in entry["source"]]
            return result

        it.loads = [m for m in map(moved, self.loads) if len(m["ctas"])]
        it.open = [moved(e) for e in self.open]
        it.groups = [[moved(e) for e in group] for group in self.groups]
        return it

    def reading(self) -> list[np.ndarray]:
        """Ranges of bytes [C, 2] that copies out still read."""
        return [e["range"] for group in (self.open, *self.groups) for e in group if not e["done"]]

    # Barriers.

    def barrier(self, at: int, ctas: np.ndarray) -> Barrier:
        found = self.barriers.get(at)
        if found is None or (found.count[ctas] == 0).any():
            raise Fault(f"mbarrier at offset {at - SHARED_BASE} is not initialised")
        return found

    def initialise(self, at: int, ctas: np.ndarray, count: np.ndarray) -> None:
        found = self.barriers.setdefault(at, Barrier(self.cohort.C))
        if (found.count[ctas] > 0).any():
            raise Fault(f"mbarrier at offset {at - SHARED_BASE} is initialised twice")
        found.count[ctas] = found.pending[ctas] = count
        found.bytes[ctas] = found.phase[ctas] = 0

    def invalidate(self, at: int, ctas: np.ndarray) -> None:
        found = self.barrier(at, ctas)
        if any(load["barrier"] == at and np.isin(load["ctas"], ctas).any() for load in self.loads):
            raise Fault("an mbarrier is invalidated while a copy is under way")
        found.count[ctas] = 0

    def arrive(self, at: int, ctas: np.ndarray, arrivals: int, expected: np.ndarray | int) -> None:
        found = self.barrier(at, ctas)
        found.bytes[ctas] += expected
        found.pending[ctas] -= arrivals
        if (found.pending[ctas] < 0).any():
            raise Fault(f"mbarrier at offset {at - SHARED_BASE}: more arrivals than it counts")
        found.turn()

    def passed(self, at: int, ctas: np.ndarray, parity: np.ndarray) -> bool:
        """Whether the phase of this parity is over in these CTAs; it is made so where only copies are missing."""
        found = self.barrier(at, ctas)
        if (found.phase[ctas] & 1 != parity).all():
            return True
        if (found.pending[ctas] == 0).any():
            for load in [load for load in self.loads if load["barrier"] == at]:
                self.loads[:] = [other for other in self.loads if other is not load]  # (== would compare arrays)
                self._land(load)
        return bool((found.phase[ctas] & 1 != parity).all())

    # Copies.

    def load(self, entry: dict[str, Any]) -> None:
        if self.cohort.launch.options.late:
            self.cohort.shared.poison(entry["flat"], 16)
            self.loads.append(entry)
        else:
            self._land(entry)

    def _land(self, entry: dict[str, Any]) -> None:
        self.cohort.shared.put(entry["flat"], 16, entry["data"])
        found = self.barrier(entry["barrier"], entry["ctas"])
        np.subtract.at(found.bytes, entry["ctas"], entry["bytes"])
        if (found.bytes[entry["ctas"]] < 0).any():
            raise Fault(f"mbarrier at offset {entry['barrier'] - SHARED_BASE}: more bytes than it expects")
        found.turn()

    def store(self, entry: dict[str, Any]) -> None:
        if not self.cohort.launch.options.late:
            self._carry_out(entry)
        self.open.append(entry)

    def _carry_out(self, entry: dict[str, Any]) -> None:
        data = self.cohort.shared.bulk_load(entry["flat"], "a bulk copy")
        units = data.view(entry["dtype"]).reshape(*data.shape, -1)
        inside, addresses = entry["source"]
        memory.store(addresses[inside], entry["dtype"]().itemsize, units[inside])
        entry["done"] = True

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, keep: int) -> None:
        while len(self.groups) > keep:
            for entry in self.groups.pop(0):
                if not entry["done"]:
                    self._carry_out(entry)

    def finish(self) -> None:
        """At a kernel's end stores are complete; their shared memory must have been waited for."""
        if any(not e["done"] for group in (self.open, *self.groups) for e in group):
            raise Fault("the kernel ends while a bulk copy out still reads shared memory")
        if self.loads:
            raise Fault("the kernel ends while a bulk copy in is under way")


def _threads(co: Cohort, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """The threads that run an instruction: their CTAs, and their numbers in these."""
    ctas, threads = np.nonzero(np.broadcast_to(True if mask is None else mask, (co.C, co.T)))
    return ctas, threads


def _synchronised(co: Cohort, flat: np.ndarray, threads: np.ndarray, reads: bool, what: str) -> None:
    for warp in np.unique(threads // 32):
        if co.shared.unsynchronised(flat[threads // 32 == warp], int(warp), True, reads):
            raise Fault(f"shared memory: a race: {what} since the last barrier")


def _of(co: Cohort, value: np.ndarray, ctas: np.ndarray, threads: np.ndarray) -> np.ndarray:
    return np.broadcast_to(value, (co.C, co.T))[ctas, threads]


def _groups(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Distinct values with where they are."""
    if values.size and (values == values[0]).all():
        yield int(values[0]), np.arange(len(values))
        return
    for value in np.unique(values):
        yield int(value), np.flatnonzero(values == value)


def compile_mbarrier(compiler: Compiler, ins: Instruction) -> Op:
    what = ins.modifiers[0]
    known = {"init", "inval", "arrive", "expect_tx", "shared", "shared::cta", "b64", "release", "cta", "relaxed"}
    if not set(ins.modifiers) <= known:
        raise PtxError("unknown mbarrier operation")
    masked = compiler.masked(ins)
    places = [o for o in ins.operands if isinstance(o, Memory)]
    locate = compiler.location(places[0], 32)
    others = [o for o in ins.operands if not isinstance(o, (Memory, Sink))]
    if what == "arrive" and not any(isinstance(o, Sink) for o in ins.operands):
        raise PtxError("an arrival whose state is kept is not modelled")
    value = compiler.reader(others[0], 32) if others else (lambda co: np.ones((1, 1), np.uint32))

    def run(co: Cohort, mask: Mask) -> None:
        mask = masked(co, mask)
        ctas, threads = _threads(co, mask)
        if what != "arrive" and len(np.unique(ctas)) < len(ctas):
            raise Fault("an mbarrier's operation by more than one thread")
        at, operand = _of(co, locate(co), ctas, threads), _of(co, value(co), ctas, threads).astype(np.int64)
        for place, here in _groups(at):
            if place % 8 or not 0 <= place - SHARED_BASE <= co.shared.size - 8:
                raise Fault(f"mbarrier at offset {place - SHARED_BASE} of {co.shared.size}")
            if what == "init":
                co.tma.initialise(place, ctas[here], operand[here])
            elif what == "inval":
                co.tma.invalidate(place, ctas[here])
            elif "expect_tx" in ins.modifiers:
                if len(np.unique(ctas[here])) < len(here):
                    raise PtxError("bytes that several threads expect are not modelled")
                co.tma.arrive(place, ctas[here], int(what == "arrive"), operand[here])
            else:
                for cta in np.unique(ctas[here]):
                    total = int(operand[here][ctas[here] == cta].sum())
                    co.tma.arrive(place, np.array([cta]), total, 0)

    return run


def compile_wait(compiler: Compiler, ins: Instruction) -> Callable[[Cohort, Mask], bool]:
    known = {"try_wait", "test_wait", "parity", "shared", "shared::cta", "b64", "acquire", "cta"}
    if not set(ins.modifiers) <= known or "parity" not in ins.modifiers:
        raise PtxError("unknown mbarrier wait")
    write, masked = compiler.writer(ins.operands[0], 1), compiler.masked(ins)
    locate, parity = compiler.location(ins.operands[1], 32), compiler.reader(ins.operands[2], 32)

    def ready(co: Cohort, mask: Mask) -> bool:
        mask = masked(co, mask)
        chosen = np.broadcast_to(True if mask is None else mask, (co.C, co.T))
        ctas = np.flatnonzero(chosen.any(1))
        first = chosen.argmax(1)[ctas]
        at, phase = _of(co, locate(co), ctas, first), _of(co, parity(co), ctas, first).astype(np.int64)
        for place, here in _groups(at):
            if not co.tma.passed(place, ctas[here], phase[here] & 1):
                return False
        write(co, np.ones((1, 1), bool), mask)
        return True

    return ready


def compile(compiler: Compiler, ins: Instruction) -> Op:
    """cp.async.bulk."""
    parts = ins.modifiers[2:]
    if parts[0] == "commit_group":
        return lambda co, mask: co.tma.commit()
    if parts[0] == "wait_group":
        keep = ins.operands[0].value
        return lambda co, mask: co.tma.wait(keep)
    if parts[0] != "tensor":
        raise PtxError("bulk copies without a tensor map are not modelled")
    rank = int(parts[1][0])
    form = [p for p in parts[2:] if not p.startswith("L2::")]
    form = [p for p in form if p != "tile"]
    if form in ([to, "global", "mbarrier::complete_tx::bytes"] for to in ("shared::cluster", "shared::cta")):
        return _compile_load(compiler, ins, rank)
    if form == ["global", "shared::cta", "bulk_group"]:
        return _compile_store(compiler, ins, rank)
    raise PtxError("unknown bulk copy")


def _coordinates(compiler: Compiler, operand: Memory, rank: int) -> tuple[Any, list[Any]]:
    (vector,) = operand.extra
    if len(vector.items) != rank:
        raise PtxError("as many coordinates as the rank")
    return compiler.location(Memory(operand.base, operand.offset), 64), [compiler.reader(c, 32) for c in vector.items]


def _reach(
    co: Cohort, tensor: Map, starts: list[np.ndarray], place: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat indices of a box's 16-byte pieces [CTAs, pieces], which of their elements lie inside, and the addresses of
    these."""
    where = place[:, None] + tensor.place[None]
    per = 16 // tensor.unit
    inner = starts[0][:, None, None] + tensor.piece[None, :, None] * per + np.arange(per)[None, None]
    inside = (inner >= 0) & (inner < tensor.sizes[0])
    address = tensor.address + inner * tensor.unit
    for start, step, size, stride in zip(starts[1:], tensor.steps, tensor.sizes[1:], tensor.strides[1:], strict=True):
        at = (start[:, None] + step[None])[:, :, None]
        inside = inside & (at >= 0) & (at < size)
        address = address + at * stride
    return tensor.swizzled(where), inside, address


def _checked(co: Cohort, where: np.ndarray, ctas: np.ndarray) -> np.ndarray:
    offsets = where - SHARED_BASE
    if offsets.size and (offsets.min() < 0 or offsets.max() + 16 > co.shared.size):
        raise Fault(
            f"a bulk copy beyond shared memory: offsets {offsets.min()} to {offsets.max() + 16} of {co.shared.size}"
        )
    return offsets + ctas[:, None] * co.shared.pitch


def _alignment(tensor: Map, place: np.ndarray) -> None:
    if (place % 128).any():
        raise Fault(f"a bulk copy's shared memory at {int(place[place % 128 != 0][0])}, which is no multiple of 128")
    if tensor.swizzle and (place % (128 << tensor.swizzle)).any():
        # The pattern repeats every 256, 512 or 1024 bytes; anything else is another layout than its reader's.
        raise Fault(
            f"a bulk copy's swizzled shared memory at {int(place[0])}, which is no multiple of the pattern's length"
        )


def _compile_load(compiler: Compiler, ins: Instruction, rank: int) -> Op:
    to, of, barrier = ins.operands[:3]
    map_at, coordinates = _coordinates(compiler, of, rank)
    locate, locate_barrier, masked = compiler.location(to, 32), compiler.location(barrier, 32), compiler.masked(ins)

    def run(co: Cohort, mask: Mask) -> None:
        mask = masked(co, mask)
        ctas, threads = _threads(co, mask)
        if not len(ctas):
            return
        tensor = co.launch.maps.at(map_at(co))
        if tensor.rank != rank:
            raise Fault(f"a copy of {rank} axes by a map of {tensor.rank}")
        place = _of(co, locate(co), ctas, threads).astype(np.int64)
        _alignment(tensor, place)
        starts = [_of(co, c(co), ctas, threads).view(np.int32).astype(np.int64) for c in coordinates]
        where, inside, address = _reach(co, tensor, starts, place)
        flat = _checked(co, where, ctas)
        co.products.untouched(flat)
        _synchronised(co, flat, threads, True, "a bulk copy overwrites what a warp used")
        dtype = memory._WIDE[tensor.unit]
        data = np.zeros(inside.shape, dtype)
        chosen = address[inside].astype(np.uint64)
        if chosen.size:
            _inside_memory(co, chosen, tensor, "a bulk copy in")
            data[inside] = memory.load(chosen, tensor.unit)
            if tensor.tf32:
                data = alu.f32_to_tf32(data, "rn")
        if tensor.fill:
            raise PtxError("NaN as filling is not modelled")
        pieces = data.reshape(*data.shape[:2], -1).view(np.complex128)[..., 0]
        if co.launch.counters is not None:
            co.launch.counters.bulk(co, address, inside, tensor.unit, tensor.bytes, False)
        at = _of(co, locate_barrier(co), ctas, threads)
        for barrier_at, here in _groups(at):
            co.tma.barrier(barrier_at, ctas[here])
            co.tma.load(
                {
                    "ctas": ctas[here],
                    "flat": flat[here],
                    "data": pieces[here],
                    "barrier": barrier_at,
                    "bytes": tensor.bytes,
                }
            )

    return run


def _inside_memory(co: Cohort, addresses: np.ndarray, tensor: Map, what: str) -> None:
    bad = co.launch.memory.outside(addresses, tensor.unit)
    if bad is not None:
        at = int(addresses[bad][0])
        raise Fault(
            f"{what}: {co.launch.memory.describe(at, tensor.unit)}; "
            f"map {tensor.sizes} by {tensor.strides} of 0x{tensor.address:x}"
        )


def _compile_store(compiler: Compiler, ins: Instruction, rank: int) -> Op:
    to, of = ins.operands[:2]
    map_at, coordinates = _coordinates(compiler, to, rank)
    locate, masked = compiler.location(of, 32), compiler.masked(ins)

    def run(co: Cohort, mask: Mask) -> None:
        mask = masked(co, mask)
        ctas, threads = _threads(co, mask)
        if not len(ctas):
            return
        tensor = co.launch.maps.at(map_at(co))
        if tensor.rank != rank:
            raise Fault(f"a copy of {rank} axes by a map of {tensor.rank}")
        place = _of(co, locate(co), ctas, threads).astype(np.int64)
        _alignment(tensor, place)
        starts = [_of(co, c(co), ctas, threads).view(np.int32).astype(np.int64) for c in coordinates]
        where, inside, address = _reach(co, tensor, starts, place)
        flat = _checked(co, where, ctas)
        _synchronised(co, flat, threads, False, "a bulk copy reads what another warp wrote")
        address = address.astype(np.uint64)
        if inside.any():
            _inside_memory(co, address[inside], tensor, "a bulk copy out")
        at = where - SHARED_BASE
        ranges = np.stack((np.full(co.C, co.shared.size), np.zeros(co.C, np.int64)), 1)
        np.minimum.at(ranges[:, 0], ctas, at.min(1))
        np.maximum.at(ranges[:, 1], ctas, at.max(1) + 16)
        if co.launch.counters is not None:
            co.launch.counters.bulk(co, address, inside, tensor.unit, tensor.bytes, True)
        co.tma.store(
            {
                "ctas": ctas,
                "flat": flat,
                "source": [inside, address],
                "range": ranges,
                "done": False,
                "dtype": memory._WIDE[tensor.unit],
            }
        )

    return run
