"""The SIMT engine: PTX as numpy operations on all threads of many CTAs at once.

A register is an array of raw bits that broadcasts to [CTAs, threads]: [1, 1], [C, 1], [1, T] or [C, T], so what is the
same for all threads, or all CTAs, is computed once. A `Cohort` is a set of CTAs that took every branch alike so far.
Where CTAs part, the cohort is split and each part goes its own way to the end; where threads of a CTA part, they become
groups with a mask each, of which the one with the lowest program counter runs.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.emulator import alu, memory, tensorcore, tma
from tests.emulator.memory import PARAM_BASE, SHARED_BASE, Allocations, Fault, Global, Shared
from tests.emulator.ptx import (
    BITS,
    Imm,
    Instruction,
    Kernel,
    Memory,
    Not,
    Pair,
    PtxError,
    Reg,
    Sink,
    Special,
    Symbol,
    Vector,
)

UINT = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
POISON = {bits: np.full((1, 1), True if bits == 1 else (1 << bits) - 1, dtype) for bits, dtype in UINT.items()}
WARP = 32
ATOMICS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "max": max,
    "min": min,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "exch": lambda old, new: new,
}
Mask = Any  # None: every thread
Op = Callable[["Cohort", Mask], None]


@dataclass
class Options:
    """``late``: what is asynchronous happens at the wait that covers it, else at once.

    ``sample``: how many CTAs of a grid run, for counters; 0: all. They are spread by the golden ratio, so that they
    fall in step with no axis of the grid, and edges have about their share. Programs of a kernel differ in edges only,
    so their mean is the layer's; results are not.
    """

    late: bool = True
    races: bool = True
    counters: bool = False
    sample: int = 0
    lanes: int = 1 << 15  # threads that run side by side
    shared_bytes: int = 64 << 20
    steps: int = 50_000_000  # blocks of instructions that one cohort may run


@dataclass
class Block:
    ops: list[tuple[Op, Instruction]] = field(default_factory=list)
    last: Instruction | None = None  # a branch, return, barrier or wait
    target: int = -1
    guard: Callable[[Cohort], np.ndarray] | None = None
    wait: Callable[[Cohort, Mask], bool] | None = None


class Program:
    """A kernel's blocks, made once for each way of running it."""

    def __init__(self, kernel: Kernel, options: Options) -> None:
        self.kernel, self.options = kernel, options
        self.blocks: list[Block] = []
        self.symbols = {}
        offset = 0
        # The dynamic part begins behind the static one.
        for name, (align, size) in sorted(kernel.shared.items(), key=lambda item: item[1][1] == 0):
            offset = -(-offset // align) * align
            self.symbols[name] = SHARED_BASE + offset
            offset += size
        self.static_shared = offset
        self.parameters = {p.name: p for p in kernel.parameters}
        self.written = {reg.index for ins in kernel.instructions for reg in results(ins)}
        self._build()

    def _build(self) -> None:
        kernel = self.kernel
        starts = {0, *kernel.labels.values()}
        ends = {"bra", "ret", "exit", "trap"}
        for i, ins in enumerate(kernel.instructions):
            if ins.opcode in ends or is_barrier(ins):
                starts.add(i + 1)
            if is_wait(ins):
                starts |= {i, i + 1}
        order = sorted(s for s in starts if s < len(kernel.instructions))
        number = {start: n for n, start in enumerate(order)}
        compiler = Compiler(self)
        for n, start in enumerate(order):
            end = order[n + 1] if n + 1 < len(order) else len(kernel.instructions)
            block = Block()
            for ins in kernel.instructions[start:end]:
                try:
                    if ins.opcode in ends or is_barrier(ins) or is_wait(ins):
                        block.last = ins
                        block.guard = compiler.guard(ins)
                        if ins.opcode == "bra":
                            block.target = number[kernel.labels[ins.operands[0].name]]
                        elif is_wait(ins):
                            block.wait = compiler.wait(ins)
                    elif ins.opcode == "call":
                        block.ops.append((compiler.call(ins), ins))
                    else:
                        block.ops.append((compiler.compile(ins), ins))
                except PtxError as error:
                    raise PtxError(f"{kernel.name}, {ins}: {error}") from None
            self.blocks.append(block)


def results(ins: Instruction) -> list[Reg]:
    """The registers that an instruction writes, as far as its first operand tells."""
    first = ins.operands[0] if ins.operands and ins.opcode not in ("st", "stmatrix", "red", "bra", "bar") else None
    found = [first]
    if isinstance(first, Vector):
        found = list(first.items)
    elif isinstance(first, Pair):
        found = [first.first, first.second]
    return [operand for operand in found if isinstance(operand, Reg)]


def is_barrier(ins: Instruction) -> bool:
    return ins.opcode in ("bar", "barrier") and ins.modifiers[0] != "warp"


def is_wait(ins: Instruction) -> bool:
    return ins.opcode == "mbarrier" and ins.modifiers[0] in ("try_wait", "test_wait")


class Cohort:
    """CTAs that run in step."""

    def __init__(self, launch: Running, ctas: np.ndarray) -> None:
        self.launch, self.program = launch, launch.program
        self.C, self.T = len(ctas), launch.threads
        self.W = -(-self.T // WARP)
        gx, gy, _ = launch.grid
        self.ctas = ctas
        self.special = dict(launch.special)
        column = ctas.astype(np.uint32)[:, None]
        self.special["%ctaid.x"] = column % gx
        self.special["%ctaid.y"] = column // gx % gy
        self.special["%ctaid.z"] = column // (gx * gy)
        self.R: list[Any] = [None] * len(self.program.kernel.registers)
        self.shared = Shared(self.C, launch.shared_bytes, launch.options.races)
        self.local = np.zeros((self.C, self.T, max(16, self.program.kernel.local_size)), np.uint8)
        self.tma = tma.State(self)
        self.copies = Copies(self)
        self.products = tensorcore.State(self)
        self.groups: dict[int, Mask] = {0: None}
        self.blocked: dict[int, Mask] = {}  # at an mbarrier
        self.arrived: dict[int, Mask] = {}  # block -> threads at its barrier
        self.instruction: Instruction | None = None
        self.steps = 0

    def part(self, which: np.ndarray) -> Cohort:
        """The same state of some of the CTAs."""
        it = Cohort.__new__(Cohort)
        it.__dict__.update(self.__dict__)
        it.ctas, it.C = self.ctas[which], len(which)

        def taken(value: Any) -> Any:
            return value[which] if isinstance(value, np.ndarray) and value.shape[0] == self.C and self.C > 1 else value

        it.special = {name: taken(value) for name, value in self.special.items()}
        it.products = self.products.part(it, which)
        it.R = [it.products.moved(v) if isinstance(v, tensorcore.Fragment) else taken(v) for v in self.R]
        it.shared = self.shared.take(which)
        it.local = self.local[which]
        it.tma = self.tma.part(it, which)
        it.copies = self.copies.part(it, which)
        for name in ("groups", "blocked", "arrived"):
            setattr(it, name, {at: taken(mask) for at, mask in getattr(self, name).items()})
        return it

    # Registers.

    def settle(self, index: int) -> np.ndarray:
        """The value of a register that is no array."""
        value = self.R[index]
        if value is None:
            register = self.program.kernel.registers[index]
            if index in self.program.written:
                raise Fault(f"{register.name} is read and was not written before")
            # What LLVM leaves undefined is in registers that nothing writes.
            value = self.R[index] = POISON[register.bits]
            return value
        value = self.R[index] = value.value()
        return value

    def write(self, index: int, value: np.ndarray, mask: Mask) -> None:
        if mask is None:
            self.R[index] = value
            return
        old = self.R[index]
        if old is None:
            old = POISON[value.dtype.itemsize * 8 if value.dtype != np.bool_ else 1]
        elif type(old) is not np.ndarray:
            old = self.settle(index)
        self.R[index] = np.where(mask, value, old)

    def full(self, value: np.ndarray) -> np.ndarray:
        return value if value.shape == (self.C, self.T) else np.broadcast_to(value, (self.C, self.T))

    def by_warp(self, value: np.ndarray) -> np.ndarray:
        """[C or 1, W, 32]"""
        return np.broadcast_to(value, (value.shape[0], self.T)).reshape(value.shape[0], self.W, WARP)

    def warps(self, mask: Mask) -> np.ndarray:
        numbers = np.broadcast_to(self.launch.warp_numbers, (self.C, self.T))
        return numbers if mask is None else numbers[np.broadcast_to(mask, numbers.shape)]

    def whole_warps(self, mask: Mask) -> None:
        """An operation of whole warps is met by whole warps."""
        if mask is not None:
            by_warp = self.by_warp(mask)
            if (by_warp.any(2) != by_warp.all(2)).any():
                raise Fault("an operation of whole warps reached by a part of one")

    # Running.

    def run(self) -> list[Cohort]:
        """To the end, or until the CTAs part: then the parts."""
        blocks = self.program.blocks
        limit = self.launch.options.steps
        while True:
            if not self.groups:
                if not self._unblock():
                    return []
                continue
            at = min(self.groups)
            mask = self.groups.pop(at)
            self.steps += 1
            if self.steps > limit:
                raise Fault(f"more than {limit} blocks of instructions: an endless loop?")
            block = blocks[at]
            counters = self.launch.counters
            for op, ins in block.ops:
                self.instruction = ins
                if counters is not None:
                    counters.instruction(self, ins, mask)
                op(self, mask)
            last = self.instruction = block.last or self.instruction
            if block.last is None:
                self._go(at + 1, mask)
                continue
            if counters is not None:
                counters.instruction(self, last, mask)
            kind = last.opcode
            if kind == "bra":
                if block.guard is None:
                    self._go(block.target, mask)
                    continue
                taken = block.guard(self)
                parts = self._branch(at, taken, mask, block.target)
                if parts is not None:
                    return parts
            elif kind in ("ret", "exit"):
                if block.guard is not None:
                    self._rest(at + 1, block.guard(self), mask)
            elif kind == "trap":
                if block.guard is None or self.some(block.guard(self), mask):
                    raise Fault("trap")
                self._go(at + 1, mask)
            elif is_barrier(last):
                self._barrier(at, last, mask)
            else:  # a wait
                if block.wait(self, mask):
                    self._go(at + 1, mask)
                else:
                    self._add(self.blocked, at, mask)

    def some(self, guard: np.ndarray, mask: Mask) -> bool:
        return bool((guard if mask is None else guard & mask).any())

    def _branch(self, at: int, taken: np.ndarray, mask: Mask, target: int) -> list[Cohort] | None:
        active = taken if mask is None else taken & mask
        away = ~taken if mask is None else ~taken & mask
        if not away.any():
            self._go(target, mask)
        elif not active.any():
            self._go(at + 1, mask)
        elif active.shape[0] == self.C > 1 and not (active.any(1) & away.any(1)).all():
            # CTAs part.
            kind = active.any(1).astype(int) * 2 + away.any(1)
            self.groups[at] = mask  # (to be taken out in each part)
            parts = []
            for value in (3, 2, 1, 0):
                which = np.flatnonzero(kind == value)
                if len(which):
                    part = self.part(which)
                    own = part.groups.pop(at)
                    part_taken = taken[which] if taken.shape[0] == self.C else taken
                    part._branch(at, part_taken, own, target)
                    parts.append(part)
            del self.groups[at]
            return parts
        else:
            self._go(target, active)
            self._go(at + 1, away)
        return None

    def _rest(self, at: int, gone: np.ndarray, mask: Mask) -> None:
        rest = ~gone if mask is None else ~gone & mask
        if rest.all():
            self._go(at, mask)
        elif rest.any():
            raise PtxError("a return of some threads is not modelled")

    def _go(self, at: int, mask: Mask) -> None:
        self._add(self.groups, at, mask)

    def _add(self, groups: dict[int, Mask], at: int, mask: Mask) -> None:
        if at in groups and groups[at] is not None:
            mask = None if mask is None else groups[at] | mask
            if mask is not None and mask.all():
                mask = None
        elif at in groups:
            mask = None
        groups[at] = mask

    def _barrier(self, at: int, ins: Instruction, mask: Mask) -> None:
        if mask is None and len(ins.operands) == 1:
            self._passed()
            self._go(at + 1, None)
            return
        self._add(self.arrived, at, mask)
        self._release(at, ins)

    def _release(self, at: int, ins: Instruction) -> None:
        operands = [o for o in ins.operands if not isinstance(o, Sink)]
        wanted = self.T
        if len(operands) > 1:
            if not isinstance(operands[1], Imm):
                raise PtxError("a barrier whose number of threads is in a register is not modelled")
            wanted = operands[1].value
        # The same barrier may be met at several places.
        same = [b for b in self.arrived if self.program.blocks[b].last.operands[:1] == ins.operands[:1]]
        together: Any = None
        for b in same:
            one = self.arrived[b]
            together = one if together is None else (None if one is None or together is None else together | one)
        count = self.T if together is None else int(np.broadcast_to(together, (together.shape[0], self.T)).sum(1).min())
        if count >= wanted:
            self._passed()
            for b in same:
                self._go(b + 1, self.arrived.pop(b))

    def _passed(self) -> None:
        self.shared.epoch += 1
        if self.launch.counters is not None:
            self.launch.counters.barriers += self.C

    def _unblock(self) -> bool:
        """Let waits succeed that now can. False at the end; a deadlock is a fault."""
        for at in sorted(self.blocked):
            mask = self.blocked.pop(at)
            self.instruction = self.program.blocks[at].last
            if self.program.blocks[at].wait(self, mask):
                self._go(at + 1, mask)
                return True
            self._add(self.blocked, at, mask)
        if self.blocked or self.arrived:
            at = min((*self.blocked, *self.arrived))
            self.instruction = self.program.blocks[at].last
            raise Fault("deadlock: threads wait for what nothing will bring")
        self.products.finish()
        self.tma.finish()
        return False


class Copies:
    """cp.async: groups of copies of single threads."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self.count = np.zeros((1, 1), np.int64)  # groups committed, by thread
        self.pending: list[list[np.ndarray]] = []  # [cta, thread, flat, width, values, group]

    def part(self, cohort: Cohort, which: np.ndarray) -> Copies:
        it = Copies(cohort)
        it.count = self.count[which] if self.count.shape[0] > 1 else self.count
        place = np.full(self.cohort.C, -1)
        place[which] = np.arange(len(which))
        for cta, thread, flat, width, values, group in self.pending:
            keep = place[cta] >= 0
            moved = flat[keep] + (place[cta[keep]] - cta[keep]) * self.cohort.shared.pitch
            it.pending.append([place[cta[keep]], thread[keep], moved, width, values[keep], group[keep]])
        return it

    def issue(
        self, mask: Mask, addresses: np.ndarray, flat: np.ndarray, width: int, values: np.ndarray, warps: Any
    ) -> None:
        co = self.cohort
        shared = co.shared
        # What is written is checked as a store is.
        if co.launch.options.races and flat.size:
            words, numbers = shared._words(flat, width, warps)
            shared._overwrites(words, np.uint32(shared.epoch << 8) | numbers)
        co.products.untouched(flat)
        if not co.launch.options.late:
            shared.put(flat, width, values)
            return
        chosen = np.broadcast_to(True if mask is None else mask, (co.C, co.T))
        cta, thread = np.nonzero(chosen)
        group = np.broadcast_to(self.count, (co.C, co.T))[cta, thread]
        shared.poison(flat, width)
        self.pending.append([cta, thread, flat, width, values, group])

    def commit(self, mask: Mask) -> None:
        self.count = self.count + (1 if mask is None else np.asarray(mask).astype(np.int64))

    def wait(self, keep: int | None, mask: Mask) -> None:
        """Until at most ``keep`` of the latest groups are under way; None: nothing is, committed or not."""
        co = self.cohort
        left = []
        for entry in self.pending:
            cta, thread, flat, width, values, group = entry
            if keep is None:
                done = np.ones(len(cta), bool)
            else:
                done = group < np.broadcast_to(self.count, (co.C, co.T))[cta, thread] - keep
            if mask is not None:
                done &= np.broadcast_to(mask, (co.C, co.T))[cta, thread]
            if done.all():
                co.shared.put(flat, width, values)
            elif done.any():
                co.shared.put(flat[done], width, values[done])
                left.append([cta[~done], thread[~done], flat[~done], width, values[~done], group[~done]])
            else:
                left.append(entry)
        self.pending = left


class Running:
    """One launch."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        threads: int,
        dynamic_shared: int,
        parameters: bytes,
        allocations: Allocations,
        counters: Any = None,
    ) -> None:
        self.program, self.grid, self.threads, self.options = program, grid, threads, program.options
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.counters = counters
        self.shared_bytes = program.static_shared + dynamic_shared
        kernel = program.kernel
        if kernel.threads is not None and threads != kernel.threads:
            raise Fault(f"{threads} threads a CTA, compiled for {kernel.threads}")
        if threads % WARP:
            raise PtxError("parts of warps are not modelled")
        self.maps = tma.Maps(self)
        self.memory = Global(self._reachable(allocations))
        lane = np.arange(threads, dtype=np.uint32)[None]
        one = np.ones((1, 1), np.uint32)
        self.warp_numbers = (lane // WARP).astype(np.uint32)
        self.special = {
            "%tid.x": lane, "%tid.y": one * 0, "%tid.z": one * 0, "%laneid": lane % WARP, "%warpid": lane // WARP,
            "%ntid.x": one * threads, "%ntid.y": one, "%ntid.z": one,
            "%cluster_ctarank": one * 0, "%cluster_nctarank": one, "%clusterid.x": one * 0,
            "%dynamic_smem_size": one * dynamic_shared, "%nwarpid": one * (threads // WARP),
            **{f"%nctaid.{axis}": one * count for axis, count in zip("xyz", grid, strict=True)},
            **{f"%cluster_ctaid.{axis}": one * 0 for axis in "xyz"},
            **{f"%cluster_nctaid.{axis}": one for axis in "xyz"},
            "%lanemask_lt": (np.uint32(1) << (lane % WARP)) - np.uint32(1), "%smid": one * 0, "%nsmid": one,
        }  # fmt: skip

    def _reachable(self, allocations: Allocations) -> list[memory.Range]:
        """The allocations that a parameter points into, or a tensor map."""
        found: dict[int, memory.Range] = {}
        addresses = list(self.maps.addresses())
        for parameter in self.program.kernel.parameters:
            if parameter.size == 8:
                addresses.append(int(self.parameters[parameter.offset :][:8].view(np.uint64)[0]))
        ranges = allocations.ranges()
        for address in addresses:
            for r in ranges:
                if r.start <= address < r.end:
                    found[r.start] = r
        return list(found.values())

    def run(self) -> None:
        count = math.prod(self.grid)
        ctas = np.arange(count)
        if 0 < self.options.sample < count:
            ctas = np.unique((np.arange(1, self.options.sample + 1) * 0.6180339887 % 1 * count).astype(np.int64))
        shared = max(16, self.shared_bytes)
        side = max(1, min(self.options.lanes // self.threads, self.options.shared_bytes // shared))
        with np.errstate(all="ignore"):
            for start in range(0, len(ctas), side):
                self._run(Cohort(self, ctas[start : start + side]))

    def _run(self, first: Cohort) -> None:
        waiting = [first]
        while waiting:
            cohort = waiting.pop()
            try:
                waiting += cohort.run()
            except Fault as fault:
                if getattr(fault, "told", False):
                    raise
                gx, gy, _ = self.grid
                ctas = cohort.ctas
                if getattr(fault, "cta", None) is not None:
                    ctas = ctas[[fault.cta]]
                names = ", ".join(str((c % gx, c // gx % gy, c // (gx * gy))) for c in map(int, ctas[:4]))
                where = f"thread {fault.thread} of " if getattr(fault, "thread", None) is not None else ""
                told = Fault(
                    f"{self.program.kernel.name}: {fault}\n  at {cohort.instruction}\n"
                    f"  {where}CTA {names}{' ...' if len(ctas) > 4 else ''} of grid {self.grid}, {self.threads} threads"
                )
                told.told = True
                raise told from fault
            except PtxError as error:
                raise PtxError(f"{self.program.kernel.name}: {error}\n  at {cohort.instruction}") from error


class Compiler:
    """An instruction to a function of (cohort, mask)."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.options = program.options

    # Operands.

    def reader(self, operand: Any, bits: int) -> Callable[[Cohort], np.ndarray]:
        """What gives an operand's bits as an unsigned array."""
        dtype = UINT[bits]
        if isinstance(operand, Reg):
            index = operand.index
            if operand.bits == bits:

                def read(co: Cohort) -> np.ndarray:
                    value = co.R[index]
                    return value if type(value) is np.ndarray else co.settle(index)

                return read
            if operand.bits > bits:
                plain = self.reader(operand, operand.bits)
                return lambda co: plain(co).astype(dtype)
            raise PtxError(f"{operand.name} has {operand.bits} bits, not {bits}")
        if isinstance(operand, Imm):
            if bits == 1:
                constant = np.array([[operand.value != 0]])
            else:
                constant = np.array([[operand.value & ((1 << bits) - 1)]], dtype)
            return lambda co: constant
        if isinstance(operand, Special):
            name = operand.name
            if name == "%clock64" or name == "%globaltimer":
                return lambda co: np.full((1, 1), co.steps, np.uint64)
            if name == "%clock":
                return lambda co: np.full((1, 1), co.steps, np.uint32)

            def special(co: Cohort) -> np.ndarray:
                if name not in co.special:
                    raise PtxError(f"{name} is not modelled")
                return co.special[name].astype(dtype)

            return special
        if isinstance(operand, Symbol):
            constant = np.array([[self.address(operand)]], dtype)
            return lambda co: constant
        if isinstance(operand, Not):
            plain = self.reader(operand.operand, 1)
            return lambda co: ~plain(co)
        if isinstance(operand, Vector):
            part = bits // len(operand.items)
            reads = [self.reader(item, part) for item in operand.items]

            def packed(co: Cohort) -> np.ndarray:
                value: Any = reads[0](co).astype(dtype)
                for n, read in enumerate(reads[1:], 1):
                    value = value | (read(co).astype(dtype) << dtype(n * part))
                return value

            return packed
        raise PtxError(f"operand {operand}")

    def address(self, symbol: Symbol) -> int:
        program = self.program
        if symbol.name in program.symbols:
            return program.symbols[symbol.name]
        if symbol.name in program.parameters:
            return program.parameters[
                symbol.name
            ].offset  # in the space of parameters, of which cvta makes generic ones
        if symbol.name in program.kernel.locals:
            return program.kernel.locals[symbol.name]
        raise PtxError(f"unknown symbol {symbol.name}")

    def guard(self, ins: Instruction) -> Callable[[Cohort], np.ndarray] | None:
        if ins.guard is None:
            return None
        read = self.reader(ins.guard, 1)
        return (lambda co: ~read(co)) if ins.negated else read

    def masked(self, ins: Instruction) -> Callable[[Cohort, Mask], Mask]:
        """The mask under which a guarded instruction runs."""
        guard = self.guard(ins)
        if guard is None:
            return lambda co, mask: mask

        def found(co: Cohort, mask: Mask) -> Mask:
            value = guard(co)
            if mask is not None:
                value = value & mask
            elif value.size == 1 and value.flat[0]:
                return None
            return value

        return found

    def writer(self, operand: Any, bits: int) -> Callable[[Cohort, np.ndarray, Mask], None]:
        """What takes the unsigned array of a result."""
        if isinstance(operand, Reg):
            index = operand.index
            if operand.bits == bits:
                return lambda co, value, mask: co.write(index, value, mask)
            if operand.bits > bits > 1:
                wider = UINT[operand.bits]
                return lambda co, value, mask: co.write(index, value.astype(wider), mask)
            raise PtxError(f"{operand.name} has {operand.bits} bits, not {bits}")
        if isinstance(operand, Sink):
            return lambda co, value, mask: None
        if isinstance(operand, Vector):
            part = bits // len(operand.items)
            writes = [self.writer(item, part) for item in operand.items]
            dtype = UINT[part]

            def spread(co: Cohort, value: np.ndarray, mask: Mask) -> None:
                for n, write in enumerate(writes):
                    write(co, (value >> value.dtype.type(n * part)).astype(dtype), mask)

            return spread
        raise PtxError(f"result {operand}")

    # Instructions.

    def compile(self, ins: Instruction) -> Op:
        method = getattr(self, f"op_{ins.opcode}", None)
        if method is not None:
            return method(ins)
        return self.arithmetic(ins)

    def arithmetic(self, ins: Instruction) -> Op:
        function, sources, result = alu.function(ins)
        operands = ins.operands
        if len(operands) != len(sources) + 1:
            raise PtxError(f"{len(operands)} operands")
        reads = [self.reader(o, bits) for o, bits in zip(operands[1:], sources, strict=True)]
        masked = self.masked(ins)
        if isinstance(operands[0], Pair):
            first, second = self.writer(operands[0].first, result), self.writer(operands[0].second, result)
            packed = ins.modifiers[-1].endswith("x2")

            def both(co: Cohort, mask: Mask) -> None:
                mask = masked(co, mask)
                value = function(*[read(co) for read in reads])
                # Of packed operands a predicate for each half, low first; of others the negated one too.
                first(co, value[..., 0] if packed else value, mask)
                second(co, value[..., 1] if packed else ~value, mask)

            return both
        write = self.writer(operands[0], result)
        if ins.guard is None and isinstance(operands[0], Reg) and operands[0].bits == result:
            index = operands[0].index
            if len(reads) == 2:
                a, b = reads

                def two(co: Cohort, mask: Mask) -> None:
                    value = function(a(co), b(co))
                    if mask is None:
                        co.R[index] = value
                    else:
                        co.write(index, value, mask)

                return two

        def run(co: Cohort, mask: Mask) -> None:
            write(co, function(*[read(co) for read in reads]), masked(co, mask))

        return run

    def op_mov(self, ins: Instruction) -> Op:
        bits = BITS[ins.modifiers[0]]
        target, source = ins.operands
        masked = self.masked(ins)
        if isinstance(target, Reg) and isinstance(source, Reg) and target.bits == source.bits:
            to, of, read = target.index, source.index, self.reader(source, source.bits)

            def move(co: Cohort, mask: Mask) -> None:
                mask = masked(co, mask)
                # What a product under way will write may be renamed.
                if mask is None:
                    value = co.R[of]
                    co.R[to] = value if value is not None else co.settle(of)
                else:
                    co.write(to, read(co), mask)

            return move
        read, write = self.reader(source, bits), self.writer(target, bits)
        return lambda co, mask: write(co, read(co), masked(co, mask))

    def op_cvta(self, ins: Instruction) -> Op:
        to = "to" in ins.modifiers
        space = next(m for m in ins.modifiers if m in ("global", "shared", "param", "local", "const"))
        read, write, masked = self.reader(ins.operands[1], 64), self.writer(ins.operands[0], 64), self.masked(ins)
        bases = {"shared": memory.SHARED_GENERIC, "param": PARAM_BASE, "local": memory.LOCAL_BASE}
        shift = np.uint64(bases.get(space, 0))
        if to:
            return lambda co, mask: write(co, read(co) - shift, masked(co, mask))
        return lambda co, mask: write(co, read(co) + shift, masked(co, mask))

    def op_bar(self, ins: Instruction) -> Op:
        if ins.modifiers != ("warp", "sync"):
            raise PtxError("unknown barrier")
        return lambda co, mask: co.whole_warps(mask)

    def op_nop(self, ins: Instruction) -> Op:
        return lambda co, mask: None

    def op_fence(self, ins: Instruction) -> Op:
        known = {"proxy", "async", "shared::cta", "shared::cluster", "acq_rel", "sc", "gpu", "cta", "cluster", "sys"}
        known |= {"global", "mbarrier_init", "release", "acquire"}
        if not set(ins.modifiers) <= known:
            raise PtxError("unknown fence")
        if "proxy" in ins.modifiers:
            return lambda co, mask: co.shared.fence()
        return lambda co, mask: None

    def op_membar(self, ins: Instruction) -> Op:
        return lambda co, mask: None

    def op_griddepcontrol(self, ins: Instruction) -> Op:
        return lambda co, mask: None

    def op_nanosleep(self, ins: Instruction) -> Op:
        return lambda co, mask: None

    def op_discard(self, ins: Instruction) -> Op:
        raise PtxError("not modelled")

    def op_prefetch(self, ins: Instruction) -> Op:
        return lambda co, mask: None

    def op_setmaxnreg(self, ins: Instruction) -> Op:
        return lambda co, mask: None

    def op_createpolicy(self, ins: Instruction) -> Op:
        write, masked = self.writer(ins.operands[0], 64), self.masked(ins)
        return lambda co, mask: write(co, np.zeros((1, 1), np.uint64), masked(co, mask))

    def call(self, ins: Instruction) -> Op:
        masked = self.masked(ins)
        if "__assertfail" not in ins.text:
            raise PtxError("calls are not modelled")

        def assertion(co: Cohort, mask: Mask) -> None:
            mask = masked(co, mask)
            if mask is None or mask.any():
                raise Fault("a device-side assertion failed")

        return assertion

    # Warps.

    def op_shfl(self, ins: Instruction) -> Op:
        sync, mode, kind = ins.modifiers
        if sync != "sync" or BITS[kind] != 32:
            raise PtxError("unknown shuffle")
        target = ins.operands[0]
        inside = None
        if isinstance(target, Pair):
            target, inside = target.first, self.writer(target.second, 1)
        a, b, c = (self.reader(o, 32) for o in ins.operands[1:4])
        write, masked = self.writer(target, 32), self.masked(ins)
        lane = np.arange(WARP, dtype=np.int64)

        def run(co: Cohort, mask: Mask) -> None:
            mask = masked(co, mask)
            co.whole_warps(mask)
            value, step, clamp = (
                co.by_warp(a(co)),
                co.by_warp(b(co)).astype(np.int64),
                co.by_warp(c(co)).astype(np.int64),
            )
            segment, clamp = (clamp >> 8) & 31, clamp & 31
            step = step & 31
            highest = (lane & segment) | (clamp & ~segment)
            if mode == "bfly":
                source = lane ^ step
                valid = source <= highest
            elif mode == "idx":
                source = (lane & segment) | (step & ~segment & 31)
                valid = source <= highest
            elif mode == "up":
                source = lane - step
                valid = source >= highest
            elif mode == "down":
                source = lane + step
                valid = source <= highest
            else:
                raise PtxError(f"shuffle {mode}")
            source = np.where(valid, source, lane)
            first = source[:1, :1]
            if (source == first).all():
                result = value[:, :, first[0, 0]]
                shape = value.shape
            else:
                shape = np.broadcast_shapes(value.shape, source.shape)
                result = np.take_along_axis(np.broadcast_to(value, shape), np.broadcast_to(source, shape), 2)
            write(co, result.reshape(shape[0], co.T), mask)
            if inside is not None:
                inside(co, np.broadcast_to(valid, shape).reshape(shape[0], co.T), mask)

        return run

    def op_redux(self, ins: Instruction) -> Op:
        _, how, kind = ins.modifiers
        read, write, masked = self.reader(ins.operands[1], 32), self.writer(ins.operands[0], 32), self.masked(ins)
        dtype = {"s32": np.int32, "u32": np.uint32, "b32": np.uint32}[kind]
        reduce = {
            "max": np.maximum,
            "min": np.minimum,
            "add": np.add,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[how]

        def run(co: Cohort, mask: Mask) -> None:
            mask = masked(co, mask)
            co.whole_warps(mask)
            value = co.by_warp(read(co)).view(dtype)
            result = reduce.reduce(value, axis=2, dtype=dtype, keepdims=True).view(np.uint32)
            write(co, np.broadcast_to(result, value.shape).reshape(-1, co.T), mask)

        return run

    def op_vote(self, ins: Instruction) -> Op:
        _, how, _ = ins.modifiers
        read, masked = self.reader(ins.operands[1], 1), self.masked(ins)
        write = self.writer(ins.operands[0], 32 if how == "ballot" else 1)

        def run(co: Cohort, mask: Mask) -> None:
            mask = masked(co, mask)
            co.whole_warps(mask)
            value = co.by_warp(read(co))
            if how == "ballot":
                bits = np.uint32(1) << np.arange(WARP, dtype=np.uint32)
                result = (value * bits).sum(2, dtype=np.uint32, keepdims=True)
            else:
                result = {"any": value.any, "all": value.all}[how](2, keepdims=True)
            write(co, np.broadcast_to(result, value.shape).reshape(-1, co.T), mask)

        return run

    def op_elect(self, ins: Instruction) -> Op:
        pair, masked = ins.operands[0], self.masked(ins)
        leader, chosen = self.writer(pair.first, 32), self.writer(pair.second, 1)

        def run(co: Cohort, mask: Mask) -> None:
            mask = masked(co, mask)
            co.whole_warps(mask)
            leader(co, np.zeros((1, 1), np.uint32), mask)
            chosen(co, co.launch.special["%laneid"] == 0, mask)

        return run

    # Memory.

    def location(self, operand: Memory, bits: int) -> Callable[[Cohort], np.ndarray]:
        base = self.reader(operand.base, bits)
        if operand.offset == 0:
            return base
        step = UINT[bits](operand.offset & ((1 << bits) - 1))
        return lambda co: base(co) + step

    def _access(self, ins: Instruction) -> tuple[str, int, int]:
        """The space, how many elements, and their bits."""
        known = {
            "ca",
            "cg",
            "cs",
            "cv",
            "wb",
            "wt",
            "lu",
            "nc",
            "relaxed",
            "acquire",
            "release",
            "volatile",
            "weak",
            "gpu",
            "sys",
            "cta",
            "cluster",
        }
        space, count, kind = "generic", 1, None
        for m in ins.modifiers:
            if m in ("global", "shared", "param", "local", "const"):
                space = m
            elif m in ("shared::cta",):
                space = "shared"
            elif m in ("v2", "v4", "v8"):
                count = int(m[1:])
            elif m in BITS:
                kind = m
            elif not (m in known or m.startswith(("L1::", "L2::", "evict"))):
                raise PtxError(f"unknown modifier {m}")
        if kind is None or space in ("generic", "const"):
            raise PtxError(f"{space} memory")
        return space, count, kind

    def op_ld(self, ins: Instruction) -> Op:
        space, count, kind = self._access(ins)
        bits = BITS[kind]
        target, where = ins.operands[:2]
        targets = target.items if isinstance(target, Vector) else (target,)
        # (LLVM gives 8-bit values registers of 16 bits.)
        if kind in ("s8", "s16", "s32"):
            signed = {8: np.int8, 16: np.int16, 32: np.int32}[bits]
            wide = {16: np.int16, 32: np.int32, 64: np.int64}[targets[0].bits]
            writes = [self.writer(t, t.bits) for t in targets]
            finish = lambda v: v.view(signed).astype(wide).view(UINT[targets[0].bits])  # noqa: E731
        else:
            writes = [self.writer(t, bits) for t in targets]
            finish = lambda v: v  # noqa: E731
        masked = self.masked(ins)
        if space == "param":
            return self._load_parameter(where, bits, writes, masked, finish)
        width, dtype = bits // 8 * count, UINT[bits]
        locate = self.location(where, 64 if space == "global" else 32)
        if space == "global":

            def run(co: Cohort, mask: Mask) -> None:
                mask = masked(co, mask)
                address = locate(co)
                data, mask = load_global(co, address, width, mask)
                if data is None:
                    for write in writes:
                        write(co, POISON[bits], mask)
                    return
                data = np.ascontiguousarray(data).view(dtype).reshape(*data.shape, count)
                for n, write in enumerate(writes):
                    write(co, finish(np.ascontiguousarray(data[..., n])), mask)

            return run

        def run_shared(co: Cohort, mask: Mask) -> None:
            mask = masked(co, mask)
            address = locate(co)
            if address.shape[1] != co.T:
                address = np.broadcast_to(address, (address.shape[0], co.T))
            flat = co.shared.offsets(address, width, mask)
            if co.launch.counters is not None:
                co.launch.counters.shared(co, address, width, mask, False)
            data = co.shared.load(flat, width, co.warps(mask))
            if mask is not None:
                data = scatter(np.broadcast_to(mask, (co.C, co.T)), data)
            data = data.view(dtype).reshape(co.C, co.T, count)
            for n, write in enumerate(writes):
                write(co, finish(np.ascontiguousarray(data[..., n])), mask)

        return run_shared

    def _load_parameter(self, where: Memory, bits: int, writes: Sequence[Any], masked: Any, finish: Any) -> Op:
        if not isinstance(where.base, Symbol):
            raise PtxError("parameters at computed addresses")
        at, size = self.program.parameters[where.base.name].offset + where.offset, bits // 8

        def run(co: Cohort, mask: Mask) -> None:
            mask = masked(co, mask)
            for n, write in enumerate(writes):
                piece = co.launch.parameters[at + n * size : at + (n + 1) * size]
                write(co, finish(np.ascontiguousarray(piece).view(UINT[bits]).reshape(1, 1)), mask)

        return run

    def op_st(self, ins: Instruction) -> Op:
        space, count, kind = self._access(ins)
        bits = BITS[kind]
        where, source = ins.operands[:2]
        sources = source.items if isinstance(source, Vector) else (source,)
        reads = [self.reader(s, bits) for s in sources]
        masked = self.masked(ins)
        width, dtype = bits // 8 * count, UINT[bits]
        locate = self.location(where, 64 if space == "global" else 32)
        wide = memory._WIDE[width]
        if space == "global":

            def run(co: Cohort, mask: Mask) -> None:
                mask = masked(co, mask)
                address = co.full(locate(co))
                values = pack(co, reads, dtype, wide, mask)
                store_global(co, address, width, values, mask)

            return run
        if space != "shared":
            raise PtxError(f"stores to {space} memory are not modelled")

        def run_shared(co: Cohort, mask: Mask) -> None:
            mask = masked(co, mask)
            address = co.full(locate(co))
            flat = co.shared.offsets(address, width, mask)
            if co.launch.counters is not None:
                co.launch.counters.shared(co, address, width, mask, True)
            co.products.untouched(flat)
            co.shared.store(flat, width, pack(co, reads, dtype, wide, mask), co.warps(mask))

        return run_shared

    def op_atom(self, ins: Instruction) -> Op:
        space = "global" if "global" in ins.modifiers else None
        if space is None:
            raise PtxError("atomics outside global memory are not modelled")
        kind = ins.modifiers[-1] if ins.modifiers[-1] in BITS else None
        how = next((m for m in ins.modifiers if m == "cas" or m in ATOMICS), None)
        if kind is None or how is None or kind not in ("f32", "u32", "s32", "b32", "u64", "s64", "b64"):
            raise PtxError("unknown atomic")
        bits = BITS[kind]
        red = ins.opcode == "red"
        operands = ins.operands if red else ins.operands[1:]
        target = None if red else ins.operands[0]
        if isinstance(target, Vector):
            (target,) = target.items
        write = None if target is None else self.writer(target, bits)
        locate, masked = self.location(operands[0], 64), self.masked(ins)
        reads = [self.reader(o.items[0] if isinstance(o, Vector) else o, bits) for o in operands[1:]]
        dtype = {"f": np.float32, "s": np.int32 if bits == 32 else np.int64}.get(kind[0], UINT[bits])

        def run(co: Cohort, mask: Mask) -> None:
            mask = masked(co, mask)
            address = co.full(locate(co))
            chosen = np.broadcast_to(True if mask is None else mask, address.shape)
            values = [np.broadcast_to(read(co), address.shape)[chosen].view(dtype) for read in reads]
            at = address[chosen]
            check_global(co, at, bits // 8, chosen, "an atomic")
            place = ((at - np.uint64(memory._PAGE)) >> np.uint64(bits // 32 + 1)).astype(np.int64)
            host = memory.HOST[bits // 8]
            old = np.empty(len(at), dtype)
            for n, p in enumerate(place):
                before = host[p : p + 1].view(dtype)[0]
                old[n] = before
                v = values[0][n]
                if how == "cas":
                    after = values[1][n] if before == v else before
                else:
                    after = ATOMICS[how](before, v)
                host[p : p + 1].view(dtype)[0] = after
            if write is not None:
                write(co, scatter(chosen, old.view(UINT[bits])), mask)

        return run

    op_red = op_atom

    def op_cp(self, ins: Instruction) -> Op:
        if ins.modifiers[0] != "async":
            raise PtxError("unknown copy")
        rest = ins.modifiers[1:]
        if rest[0] == "bulk":
            return tma.compile(self, ins)
        if rest[0] == "commit_group":
            return lambda co, mask: co.copies.commit(mask)
        if rest[0] == "wait_group":
            keep = ins.operands[0].value
            return lambda co, mask: co.copies.wait(keep, mask)
        if rest[0] == "wait_all":
            return lambda co, mask: co.copies.wait(None, mask)
        if rest[0] not in ("ca", "cg"):
            raise PtxError("unknown copy")
        for m in rest[1:]:
            if m not in ("shared", "shared::cta", "global") and not m.startswith("L2::"):
                raise PtxError(f"unknown modifier {m}")
        to, of, size = ins.operands[:3]
        width = size.value
        if (rest[0] == "cg" and width != 16) or width not in (4, 8, 16):
            raise PtxError(f"a copy of {width} bytes by cp.async.{rest[0]}")
        locate_to, locate_of, masked = self.location(to, 32), self.location(of, 64), self.masked(ins)
        taken = self.reader(ins.operands[3], 32) if len(ins.operands) > 3 else None

        def run(co: Cohort, mask: Mask) -> None:
            mask = masked(co, mask)
            shared_at, address = co.full(locate_to(co)), co.full(locate_of(co))
            chosen = np.broadcast_to(True if mask is None else mask, (co.C, co.T))
            data = np.zeros((co.C, co.T), memory._WIDE[width])
            flat = co.shared.offsets(shared_at, width, mask)
            if co.launch.counters is not None:
                co.launch.counters.shared(co, shared_at, width, mask, True)
            present = chosen
            if taken is not None:
                count = taken(co)
                if not ((count == 0) | (count == width)).all():
                    raise PtxError("a copy of a part of its bytes is not modelled")
                present = chosen & (count == width)
            if present.any():
                at = address[present]
                check_global(co, at, width, present, "cp.async")
                data[present] = memory.load(at, width)
                if co.launch.counters is not None:
                    co.launch.counters.glob(co, address, width, present, False)
            values = data.reshape(-1) if mask is None else data[chosen]
            if mask is None:
                flat = flat.reshape(-1)
            co.copies.issue(mask, shared_at, flat, width, values, co.warps(mask).reshape(-1))

        return run

    def op_ldmatrix(self, ins: Instruction) -> Op:
        return tensorcore.compile_ldmatrix(self, ins)

    def op_stmatrix(self, ins: Instruction) -> Op:
        return tensorcore.compile_stmatrix(self, ins)

    def op_mma(self, ins: Instruction) -> Op:
        return tensorcore.compile_mma(self, ins)

    def op_wgmma(self, ins: Instruction) -> Op:
        return tensorcore.compile_wgmma(self, ins)

    def op_mbarrier(self, ins: Instruction) -> Op:
        return tma.compile_mbarrier(self, ins)

    def wait(self, ins: Instruction) -> Callable[[Cohort, Mask], bool]:
        return tma.compile_wait(self, ins)


def scatter(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values back to where ``mask`` is set; elsewhere poison."""
    result = np.empty(mask.shape, values.dtype)
    result.view(np.uint8).fill(0xFF)
    result[mask] = values
    return result


def pack(co: Cohort, reads: Sequence[Any], dtype: Any, wide: Any, mask: Mask) -> np.ndarray:
    """The values of a vector store, one wide element a thread, those that ``mask`` names."""
    if len(reads) == 1:
        value = co.full(reads[0](co))
        return np.ascontiguousarray(value if mask is None else value[np.broadcast_to(mask, value.shape)]).view(wide)
    result = np.empty((co.C, co.T, len(reads)), dtype)
    for n, read in enumerate(reads):
        result[..., n] = read(co)
    result = result.view(wide)[..., 0]
    return result if mask is None else result[np.broadcast_to(mask, result.shape)]


def check_global(co: Cohort, addresses: np.ndarray, size: int, chosen: np.ndarray | None, what: str) -> None:
    """``addresses``: those of the threads that ``chosen`` [C or 1, T] names; None: of all, [C or 1, T or 1]."""
    bad = co.launch.memory.outside(addresses, size)
    if bad is None:
        return
    first = int(np.flatnonzero(bad.ravel())[0])
    fault = Fault(f"{what} of {size} bytes outside: {co.launch.memory.describe(int(addresses.ravel()[first]), size)}")
    if addresses.ndim == 2:
        where = (first // addresses.shape[1], first % addresses.shape[1])
    else:
        where = tuple(int(axis[first]) for axis in np.nonzero(chosen))
    fault.cta, fault.thread = where
    raise fault


def load_global(co: Cohort, address: np.ndarray, width: int, mask: Mask) -> tuple[np.ndarray | None, Mask]:
    if co.launch.counters is not None:
        co.launch.counters.glob(co, address, width, mask, False)
    if mask is None:
        check_global(co, address, width, None, "a load")
        return memory.load(address, width), None
    shape = np.broadcast_shapes(address.shape, mask.shape)
    chosen = np.broadcast_to(mask, shape)
    at = np.broadcast_to(address, shape)[chosen]
    if at.size == 0:
        return None, mask
    check_global(co, at, width, chosen, "a load")
    return scatter(chosen, memory.load(at, width)), mask


def store_global(co: Cohort, address: np.ndarray, width: int, values: np.ndarray, mask: Mask) -> None:
    if co.launch.counters is not None:
        co.launch.counters.glob(co, address, width, mask, True)
    if mask is None:
        check_global(co, address, width, None, "a store")
        memory.store(address, width, values)
        return
    chosen = np.broadcast_to(mask, address.shape)
    at = address[chosen]
    if at.size:
        check_global(co, at, width, chosen, "a store")
        memory.store(at, width, values)
