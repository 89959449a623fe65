"""Matrix units: ldmatrix, stmatrix, mma.sync of Ampere, wgmma of Hopper.

Products are exact and summed in fp32, in no particular order. A wgmma's accumulator stays a matrix for as long as only
products touch it; a register of it is a `Fragment`, which may be renamed but not read before a wait covers it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.emulator.alu import bf16_to_f32
from tests.emulator.memory import SHARED_BASE, Fault
from tests.emulator.ptx import Imm, Instruction, PtxError, Reg

if TYPE_CHECKING:
    from tests.emulator.engine import Cohort, Compiler, Mask, Op

WARP = 32


# Shared memory to registers and back.


def _matrix_rows(co: Cohort, address: np.ndarray, count: int, mask: Mask) -> tuple[np.ndarray, np.ndarray, Any]:
    """Flat indices of the rows of ``count`` matrices, of warps that take part: [C, W, 8 * count]."""
    co.whole_warps(mask)
    by_warp = np.broadcast_to(co.by_warp(co.full(address)), (co.C, co.W, WARP))[:, :, : 8 * count]
    rows = np.ascontiguousarray(by_warp).reshape(co.C, -1)
    chosen = None
    if mask is not None:
        chosen = np.broadcast_to(
            np.broadcast_to(co.by_warp(mask), (co.C, co.W, WARP))[:, :, : 8 * count], by_warp.shape
        ).reshape(co.C, -1)
    flat = co.shared.offsets(rows, 16, chosen)
    warps = np.broadcast_to(np.arange(co.W, dtype=np.uint32)[None, :, None], by_warp.shape).reshape(co.C, -1)
    if co.launch.counters is not None:
        co.launch.counters.matrix(co, rows, chosen)
    return flat, warps if chosen is None else warps[chosen], chosen


def compile_ldmatrix(compiler: Compiler, ins: Instruction) -> Op:
    count, trans = _matrix_form(ins)
    locate = compiler.location(ins.operands[1], 32)
    writes = [compiler.writer(r, 32) for r in ins.operands[0].items]
    masked = compiler.masked(ins)

    def run(co: Cohort, mask: Mask) -> None:
        mask = masked(co, mask)
        flat, warps, chosen = _matrix_rows(co, locate(co), count, mask)
        data = co.shared.load(flat, 16, warps)
        if chosen is not None:
            whole = np.zeros(chosen.shape, data.dtype)
            whole[chosen] = data
            data = whole
        tiles = data.view(np.uint16).reshape(co.C, co.W, count, 8, 8)
        if trans:
            tiles = np.ascontiguousarray(tiles.swapaxes(3, 4))
        words = tiles.view(np.uint32).reshape(co.C, co.W, count, WARP)
        for n, write in enumerate(writes):
            write(co, np.ascontiguousarray(words[:, :, n]).reshape(co.C, co.T), mask)

    return run


def compile_stmatrix(compiler: Compiler, ins: Instruction) -> Op:
    count, trans = _matrix_form(ins)
    locate = compiler.location(ins.operands[0], 32)
    reads = [compiler.reader(r, 32) for r in ins.operands[1].items]
    masked = compiler.masked(ins)

    def run(co: Cohort, mask: Mask) -> None:
        mask = masked(co, mask)
        flat, warps, chosen = _matrix_rows(co, locate(co), count, mask)
        words = np.empty((co.C, co.W, count, WARP), np.uint32)
        for n, read in enumerate(reads):
            words[:, :, n] = co.by_warp(read(co))
        tiles = words.view(np.uint16).reshape(co.C, co.W, count, 8, 8)
        if trans:
            tiles = np.ascontiguousarray(tiles.swapaxes(3, 4))
        data = tiles.reshape(co.C, -1, 8).view(np.complex128)[..., 0]
        co.products.untouched(flat)
        co.shared.store(flat, 16, data if chosen is None else data[chosen], warps)

    return run


def _matrix_form(ins: Instruction) -> tuple[int, bool]:
    known = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta", "b16"}
    if not set(ins.modifiers) <= known or "m8n8" not in ins.modifiers or "b16" not in ins.modifiers:
        raise PtxError("unknown matrix access")
    return next(int(m[1]) for m in ins.modifiers if m in ("x1", "x2", "x4")), "trans" in ins.modifiers


# Products.


def widen(bits: np.ndarray, kind: str) -> np.ndarray:
    """Elements of a product's operand to fp32."""
    if kind == "bf16":
        return bf16_to_f32(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def fragment_a(regs: list[np.ndarray], kind: str) -> np.ndarray:
    """Four registers [C, W, 32] of a 16 x (16 or 8) operand to [C, W, 16, k]."""
    words = np.stack(np.broadcast_arrays(*regs), -1)  # [C, W, 32, 4]
    c, w = words.shape[:2]
    words = words.reshape(c, w, 8, 4, 2, 2)  # row, column pair, half of columns, half of rows
    if kind == "tf32":
        return widen(np.ascontiguousarray(words.transpose(0, 1, 5, 2, 4, 3)), kind).reshape(c, w, 16, 8)
    pairs = np.ascontiguousarray(words.transpose(0, 1, 5, 2, 4, 3)).view(np.uint16)  # [c, w, 2, 8, 2, 8]
    return widen(pairs, kind).reshape(c, w, 16, 16)


def fragment_b(regs: list[np.ndarray], kind: str) -> np.ndarray:
    """Two registers of an 8-column operand to [C, W, k, 8]."""
    words = np.stack(np.broadcast_arrays(*regs), -1)
    c, w = words.shape[:2]
    words = words.reshape(c, w, 8, 4, 2)  # column n, k pair, half of k
    columns = np.ascontiguousarray(words.transpose(0, 1, 2, 4, 3))
    if kind == "tf32":
        return widen(columns, kind).reshape(c, w, 8, 8).swapaxes(2, 3)
    return widen(columns.view(np.uint16), kind).reshape(c, w, 8, 16).swapaxes(2, 3)


def compile_mma(compiler: Compiler, ins: Instruction) -> Op:
    form = re.match(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(\w+)\.(\w+)\.f32$", ins.name)
    if form is None or form[2] != form[3] or (form[2], form[1]) not in (("bf16", "16"), ("f16", "16"), ("tf32", "8")):
        raise PtxError("unknown product")
    kind = form[2]
    d, a, b, c = ins.operands
    if (len(d.items), len(a.items), len(b.items), len(c.items)) != (4, 4, 2, 4):
        raise PtxError("unknown product")
    writes = [compiler.writer(r, 32) for r in d.items]
    reads_a, reads_b, reads_c = ([compiler.reader(r, 32) for r in v.items] for v in (a, b, c))
    masked = compiler.masked(ins)
    # Operands met before, by the registers' values: a tile's rows meet several columns.
    flops = 2 * 16 * 8 * int(form[1])

    def run(co: Cohort, mask: Mask) -> None:
        mask = masked(co, mask)
        co.whole_warps(mask)
        left = co.products.cached("a", [r(co) for r in reads_a], kind)
        right = co.products.cached("b", [r(co) for r in reads_b], kind)
        product = np.matmul(left, right)  # [C, W, 16, 8]
        if product.shape[0] != co.C:
            product = np.broadcast_to(product, (co.C, *product.shape[1:]))
        # c0, c1: row g, columns 2t and 2t + 1; c2, c3: row g + 8.
        pieces = product.reshape(co.C, co.W, 2, 8, 4, 2)
        for n, (write, read) in enumerate(zip(writes, reads_c, strict=True)):
            piece = pieces[:, :, n // 2, :, :, n % 2].reshape(co.C, co.T)
            write(co, (piece + read(co).view(np.float32)).view(np.uint32), mask)
        if co.launch.counters is not None:
            co.launch.counters.flops(co, flops * co.W, mask)

    return run


# wgmma.


class Accumulator:
    """A product's result [C, warpgroups, 64, N], known once a wait covers it."""

    def __init__(self, state: State, columns: int) -> None:
        self.state, self.columns = state, columns
        self.matrix: np.ndarray | None = None
        self.complete = False  # a wait covered it
        self._registers: np.ndarray | None = None

    def register(self, n: int) -> np.ndarray:
        if not self.complete:
            raise Fault("a register that a product still writes is read: no wgmma.wait_group covers it")
        if self._registers is None:
            co = self.state.cohort
            m = self.matrix
            # Rows: warp, half, g. Columns: block, t, pair. Register: 4 block + 2 half + pair.
            m = m.reshape(co.C, -1, 4, 2, 8, self.columns // 8, 4, 2)
            m = m.transpose(5, 3, 7, 0, 1, 2, 4, 6)
            self._registers = np.ascontiguousarray(m).reshape(self.columns // 2, co.C, co.T).view(np.uint32)
        return self._registers[n]


@dataclass(frozen=True)
class Fragment:
    accumulator: Accumulator
    n: int

    def value(self) -> np.ndarray:
        return self.accumulator.register(self.n)


class State:
    """Products under way of one cohort."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self.open: list[tuple[Accumulator, Callable[[], None], np.ndarray]] = []
        self.groups: list[list[tuple[Accumulator, Callable[[], None], np.ndarray]]] = []
        self._which: Any = None
        self._moved: dict[int, Accumulator] = {}
        self._cache: dict[str, list[tuple[list[np.ndarray], np.ndarray]]] = {"a": [], "b": []}

    def cached(self, side: str, values: list[np.ndarray], kind: str) -> np.ndarray:
        for known, found in self._cache[side]:
            if all(x is y for x, y in zip(known, values, strict=False)):
                return found
        made = (fragment_a if side == "a" else fragment_b)([self.cohort.by_warp(v) for v in values], kind)
        kept = self._cache[side]
        kept.append((values, made))
        if len(kept) > 16:
            kept.pop(0)
        return made

    def part(self, cohort: Cohort, which: np.ndarray) -> State:
        """(What is under way is computed now: that nothing overwrites its operands is checked all the same.)"""
        it = State(cohort)
        it._which = which
        for group in (*self.groups, self.open):
            for accumulator, compute, _ in group:
                if accumulator.matrix is None:
                    compute()

        def moved(group: list[Any]) -> list[Any]:
            return [(it.own(accumulator), compute, read[which]) for accumulator, compute, read in group]

        it.groups, it.open = [moved(group) for group in self.groups], moved(self.open)
        return it

    def own(self, accumulator: Accumulator) -> Accumulator:
        """Of the cohort that this one is a part of, the same accumulator here."""
        found = self._moved.get(id(accumulator))
        if found is None:
            found = Accumulator(self, accumulator.columns)
            found.matrix, found.complete = accumulator.matrix[self._which], accumulator.complete
            found.origin = accumulator  # (so that its id stays its own)
            self._moved[id(accumulator)] = found
        return found

    def moved(self, fragment: Fragment) -> Fragment:
        return Fragment(self.own(fragment.accumulator), fragment.n)

    def untouched(self, flat: np.ndarray) -> None:
        """What is written may not be read by a product, or a copy out, that is under way."""
        if not self.open and not self.groups and not self.cohort.tma.reading():
            return
        for group in (self.open, *self.groups):
            for _, _, read in group:
                if overlap(flat, read, self.cohort.shared.pitch):
                    raise Fault("shared memory is overwritten while a wgmma that nothing waited for reads it")
        for read in self.cohort.tma.reading():
            if overlap(flat, read, self.cohort.shared.pitch):
                raise Fault("shared memory is overwritten while a bulk copy that nothing waited for reads it")

    def issue(self, accumulator: Accumulator, compute: Callable[[], None], read: np.ndarray) -> None:
        if not self.cohort.launch.options.late:
            compute()
        self.open.append((accumulator, compute, read))

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait(self, keep: int) -> None:
        while len(self.groups) > keep:
            for accumulator, compute, _ in self.groups.pop(0):
                if accumulator.matrix is None:
                    compute()
                accumulator.complete = True

    def finish(self) -> None:
        if self.open or self.groups:
            raise Fault("the kernel ends with wgmma under way")


def overlap(flat: np.ndarray, read: np.ndarray, pitch: int) -> bool:
    """Whether flat byte indices meet ranges [CTA, (low, high)] of a CTA's bytes."""
    flat = flat.reshape(-1)
    if flat.size == 0:
        return False
    cta, at = np.divmod(flat, pitch)
    low, high = read[:, 0], read[:, 1]
    return bool(((at >= low[cta]) & (at < high[cta])).any())


SWIZZLES = {0: (0, 16), 1: (3, 128), 2: (2, 64), 3: (1, 32)}  # of the descriptor: bits, bytes of a row


def operand_offsets(rows: int, depth_bytes: int, mode: int, leading: int, stride: int, major_mn: bool) -> np.ndarray:
    """Byte offsets of an operand's 16-byte pieces before the swizzle: K-major [rows, pieces of K], MN-major
    [K, pieces of rows]."""
    _, pitch = SWIZZLES[mode]
    if not major_mn:
        row, piece = np.arange(rows)[:, None], np.arange(depth_bytes // 16)[None]
        if mode == 0:
            return row // 8 * stride + row % 8 * 16 + piece * leading
        if depth_bytes > pitch:
            raise PtxError("a step of K wider than the swizzle")
        return row // 8 * stride + row % 8 * pitch + piece * 16
    k, piece = np.arange(depth_bytes // 2)[:, None], np.arange(rows // 8)[None]
    if mode == 0:
        return piece * stride + k % 8 * 16 + k // 8 * leading
    per = pitch // 16
    return piece // per * leading + piece % per * 16 + k % 8 * pitch + k // 8 * stride


def swizzled(address: np.ndarray, mode: int) -> np.ndarray:
    bits, _ = SWIZZLES[mode]
    return address ^ (((address >> 7) & ((1 << bits) - 1)) << 4)


def read_operand(
    co: Cohort, descriptor: np.ndarray, rows: int, depth: int, kind: str, major_mn: bool
) -> tuple[Any, np.ndarray]:
    """What reads the operand of descriptors [C or 1, groups], fp32 [C, groups or 1, rows, depth]; and its bytes of each
    CTA, [C, 2]."""
    unit = 4 if kind == "tf32" else 2
    first = int(descriptor.flat[0])
    layout = first >> 16
    if ((descriptor >> np.uint64(16)) != np.uint64(layout)).any():
        raise PtxError("descriptors of one product that differ in their layout")
    if (first >> 49) & 7:
        raise PtxError("a base offset is not modelled")
    if (first >> 14) & 3 or (first >> 30) & 3 or (first >> 46) & 7 or (first >> 52) & 0x3FF:
        raise Fault(f"wgmma: reserved bits of the descriptor 0x{first:x} are set")
    leading, stride, mode = ((first >> 16) & 0x3FFF) << 4, ((first >> 32) & 0x3FFF) << 4, first >> 62
    if major_mn and unit != 2:
        raise Fault("wgmma: only operands of 16 bits may be transposed")
    offsets = operand_offsets(rows, depth * unit, mode, leading, stride, major_mn)
    starts = ((descriptor & np.uint64(0x3FFF)).astype(np.int64)) << 4
    if (starts == starts[:, :1]).all():
        starts = starts[:, :1]
    # (Where an operand lies is not known to 18 bits alone; shared memory ends before.)
    where = swizzled(starts[:, :, None] + offsets.reshape(1, 1, -1), mode)
    where = np.broadcast_to(where, (co.C, *where.shape[1:]))
    shape = where.shape
    flat = co.shared.offsets(where.reshape(co.C, -1), 16, None)
    at = where.reshape(co.C, -1) - SHARED_BASE
    ranges = np.stack((at.min(1), at.max(1) + 16), 1)
    if co.shared.unsynchronised(flat, None, True, False):
        raise Fault("wgmma reads shared memory that was written since the last barrier")

    def read() -> np.ndarray:
        data = co.shared.bulk_load(flat, "wgmma")
        if kind == "tf32":
            return widen(data.view(np.uint32), kind).reshape(co.C, shape[1], rows, depth)
        values = widen(data.view(np.uint16), kind)
        if major_mn:
            return values.reshape(co.C, shape[1], depth, rows).swapaxes(2, 3)
        return values.reshape(co.C, shape[1], rows, depth)

    return read, ranges


def compile_wgmma(compiler: Compiler, ins: Instruction) -> Op:
    what = ins.modifiers[0]
    if what == "fence":
        return lambda co, mask: None
    if what == "commit_group":
        return lambda co, mask: co.products.commit()
    if what == "wait_group":
        keep = ins.operands[0].value
        return lambda co, mask: co.products.wait(keep)
    form = re.match(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(\w+)\.(\w+)$", ins.name)
    if form is None or form[3] != form[4] or form[3] not in ("bf16", "f16", "tf32"):
        raise PtxError("unknown product")
    columns, depth, kind = int(form[1]), int(form[2]), form[3]
    if columns % 8 or not 8 <= columns <= 256 or depth != (8 if kind == "tf32" else 16):
        raise PtxError("unknown shape")
    d, a, b, scale, *rest = ins.operands
    rest = [o.value for o in rest]
    if len(d.items) != columns // 2 or rest[:2] != [1, 1]:
        raise PtxError("negated operands are not modelled")
    from_registers = not isinstance(a, Reg)
    transposes = [0, *rest[2:]] if from_registers else rest[2:]
    transposes += [0] * (2 - len(transposes))
    indices = [r.index for r in d.items]
    reads_d = [compiler.reader(r, 32) for r in d.items]
    reads_a = [compiler.reader(r, 32) for r in a.items] if from_registers else [compiler.reader(a, 64)]
    read_b = compiler.reader(b, 64)
    adds = compiler.reader(scale, 1) if not isinstance(scale, Imm) else (lambda co: np.array([[scale.value != 0]]))
    flops = 2 * 64 * columns * depth

    def run(co: Cohort, mask: Mask) -> None:
        if mask is not None:
            raise PtxError("wgmma of a part of a CTA is not modelled")
        state, groups = co.products, co.T // 128
        if co.T % 128:
            raise Fault("wgmma in a CTA that is no multiple of 128 threads")
        base = _accumulator(co, indices, columns)
        added = adds(co)
        added = added[:, :: co.T // groups] if added.shape[1] > 1 else added  # [C or 1, groups or 1]
        per_group = lambda v: v[:, ::128] if v.shape[1] > 1 else v  # noqa: E731
        rights, read_range = read_operand(co, per_group(read_b(co)), columns, depth, kind, bool(transposes[1]))
        ranges = read_range
        if from_registers:
            registers = [co.by_warp(r(co)) for r in reads_a]
            lefts = lambda: fragment_a(registers, kind)  # noqa: E731
        else:
            lefts, other = read_operand(co, per_group(reads_a[0](co)), 64, depth, kind, bool(transposes[0]))
            ranges = np.concatenate((ranges, other))
        result = Accumulator(state, columns)

        def compute() -> None:
            left = lefts()
            if from_registers:
                left = left.reshape(left.shape[0], groups, 64, depth)
            product = np.matmul(left, rights().swapaxes(2, 3))
            product = np.broadcast_to(product, (co.C, groups, 64, columns))
            if added.all():
                product = product + base()
            elif added.any():
                product = product + np.where(added[:, :, None, None], base(), np.float32(0))
            result.matrix = product

        both = np.stack((ranges.reshape(-1, co.C, 2)[:, :, 0].min(0), ranges.reshape(-1, co.C, 2)[:, :, 1].max(0)), 1)
        # (Between two operands may lie what is not read: each has a record of its own.)
        if from_registers:
            state.issue(result, compute, both)
        else:
            state.issue(result, compute, ranges[: co.C])
            state.open.append((result, compute, ranges[co.C :]))
        for n, index in enumerate(indices):
            co.R[index] = Fragment(result, n)
        if co.launch.counters is not None:
            co.launch.counters.flops(co, flops * groups, mask)

    def _accumulator(co: Cohort, indices: list[int], columns: int) -> Callable[[], np.ndarray]:
        """What gives the matrix that is added to."""
        held = [co.R[index] for index in indices]
        if all(isinstance(v, Fragment) for v in held):
            first = held[0].accumulator
            if first.columns == columns and all(v.accumulator is first and v.n == n for n, v in enumerate(held)):
                return lambda: first.matrix

        def gathered() -> np.ndarray:
            words = np.empty((columns // 2, co.C, co.T), np.uint32)
            for n, value in enumerate(values):
                words[n] = value
            m = words.view(np.float32).reshape(columns // 8, 2, 2, co.C, co.T // 128, 4, 8, 4)
            return np.ascontiguousarray(m.transpose(3, 4, 5, 1, 6, 0, 7, 2)).reshape(co.C, co.T // 128, 64, columns)

        zero = np.zeros((1, 1), np.uint32)
        values = [zero if v is None else read(co) for v, read in zip(held, reads_d, strict=True)]
        return gathered

    return run
