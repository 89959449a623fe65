"""Read the compiler's result for a launch and a GPU, which need not be here: compile, disassemble, count.

Registers and spills do not show whether a kernel is good, so the instructions are read too: which tensor cores it uses
and where their operands come from, whether every wgmma is waited for (ptxas does that silently in a loop that may not
run), how wide loads are, whether they are asynchronous and how many are under way, how many instructions one step
takes. ``fastconv inspect`` shows this, the tuner prunes by it, tests hold it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from math import prod
from struct import unpack_from
from typing import Any

import triton

from fastconv.autotune import Gpu
from fastconv.autotune.gpus import A100, B200, H200
from fastconv.kernels.compile.ahead import Binaries, Binary, compile_each
from fastconv.kernels.launch.launch import Launch

GPUS = (A100, H200, B200)
# A multiprocessor's registers and columns of tensor memory, and the shared memory reserved for each of its programs.
REGISTERS, TENSOR_COLUMNS, RESERVED_SHARED = 65536, 512, 1024
# Compute capability -> (threads, programs) of a multiprocessor, by the CUDA C++ Programming Guide's table.
MULTIPROCESSOR = {
    80: (2048, 32), 86: (1536, 16), 89: (1536, 24), 90: (2048, 32), 100: (2048, 32), 103: (2048, 32), 120: (1536, 24),
}  # fmt: skip
# Kinds of tensor cores, by their SASS instructions.
TENSOR_CORES = {"mma": r"[HIQ]MMA", "wgmma": r"[HIQ]GMMA", "tcgen05": r"UTC\w*MMA"}
# Kinds of instructions, by opcode without modifiers; all others are control.
KINDS = {
    "tensor cores": r"[HIQ]MMA|[HIQ]GMMA|UTC\w*MMA",
    "bulk copies in": r"UTMALDG|UBLKCP",
    "bulk copies out": r"UTMASTG|UTMAREDG",
    "asynchronous loads": r"LDGSTS",
    "loads": r"LDG|LD",
    "stores": r"STG|ST",
    "atomics": r"ATOMG?|ATOMS|REDG?",
    "shared memory": r"LDSM?|STSM?|LDTM|STTM",
    "spills": r"LDL|STL",
    "arithmetic": r"[FH](?:FMA|ADD|MUL|MNMX|SETP?|SEL|CHK)\d*|MUFU|F2FP?|F2F",
    "waiting": r"BAR|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|SYNCS|MEMBAR|FENCE|UTCBAR|UTMACMDFLUSH|UTMACCTL|NANOSLEEP",
    "integers": r"U?(?:I\w+|LOP\d?|LEA|SHF|SEL|PRMT|MOV|PLOP3|VIADD\w*|VIMNMX\w*|P2R|R2P)|R2UR|S2U?R|CS2R",
}
# A memory instruction's modifier -> bytes a thread; an instruction without one moves 4.
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
ELEMENTS = {"f32": 4, "f16": 2, "bf16": 2}
Code = list[tuple[int, str, str]]  # (address, opcode, operands)
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
# An operand's buffers in shared memory, (steps x sides, type), as Triton's pipeline allocates them.
BUFFERS = re.compile(r"ttg\.local_alloc\s*:\s*\(\)\s*->\s*!ttg\.memdesc<(\d+(?:x\d+){2,})x(\w+),")


@dataclass(frozen=True)
class Compiled:
    """One binary. Opcodes keep their modifiers: ``LDGSTS.E.BYPASS.128``."""

    arch: int
    warps: int
    registers: int  # a thread
    stack: int  # bytes a thread
    spills: int  # instructions that move registers to and from the stack
    shared_memory: int  # bytes a program
    tensor_columns: int  # tensor memory's, a program
    opcodes: Mapping[str, int]
    tensor_cores: str | None  # "mma", "wgmma", "tcgen05"
    serialised: bool  # every wgmma is waited for before the next one
    step: int | None  # instructions of the loop around the tensor cores
    operands: Mapping[str, int] = field(default_factory=dict)  # see `first_operands`
    waits: tuple[int, ...] = ()  # how many wgmma groups may go on at each wait of that loop
    step_opcodes: Mapping[str, int] = field(default_factory=dict)
    copies: int = 0  # steps whose operands are on their way to shared memory while one is computed
    copy_bytes: int = 0  # bytes of those steps, a program
    listings: Mapping[str, str] = field(default_factory=dict)  # those of "sass", "ptx", "ttgir" that were asked for

    def global_accesses(self, opcode: str) -> dict[int, int]:
        """Bytes a thread moves -> how many instructions do. ``opcode``: LDG, LDGSTS (asynchronous) or STG."""
        widths: Counter[int] = Counter()
        for name, count in self.opcodes.items():
            whole, *modifiers = name.split(".")
            if whole == opcode:
                widths[next((WIDTHS[word] for word in modifiers if word in WIDTHS), 4)] += count
        return dict(sorted(widths.items()))

    @property
    def load_bytes(self) -> dict[int, int]:
        """Bytes a thread -> loads from global memory, asynchronous ones included."""
        return dict(sorted((Counter(self.global_accesses("LDG")) + Counter(self.global_accesses("LDGSTS"))).items()))

    def occupancy(self, gpu: Gpu) -> tuple[int, str]:
        """Programs that a multiprocessor of ``gpu`` holds at once, and what limits them."""
        threads = 32 * self.warps
        most_threads, programs = MULTIPROCESSOR[max(arch for arch in MULTIPROCESSOR if arch <= max(gpu.arch, 80))]
        limits = {
            "registers": REGISTERS // (-(-self.registers // 8) * 8 * threads),
            "shared memory": (gpu.shared_memory + RESERVED_SHARED) // (self.shared_memory + RESERVED_SHARED),
            "warps": most_threads // threads,
            "programs": programs,
        }
        if self.tensor_columns:
            limits["tensor memory"] = TENSOR_COLUMNS // self.tensor_columns
        limit = min(limits, key=lambda name: limits[name])
        return limits[limit], limit


def mix(opcodes: Mapping[str, int]) -> dict[str, int]:
    """Counts of instructions by `KINDS`, in their order; "other" last."""
    found: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        whole = opcode.split(".")[0]
        found[next((kind for kind, form in KINDS.items() if re.fullmatch(form, whole)), "other")] += count
    return {kind: found[kind] for kind in (*KINDS, "other") if found[kind]}


def compile_all(
    wanted: Iterable[tuple[Launch, Gpu]],
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    listings: Sequence[str] = (),
) -> dict[tuple[Any, int], Compiled]:
    """Compile and read each distinct binary once: (launch.compile_key, gpu.arch) -> Compiled, with the ``listings``.

    ``jobs`` and ``progress`` as in `compile_each`. Raises RuntimeError that names the launch if one does not compile,
    or under TRITON_INTERPRET.
    """
    compiled = read_each(wanted, jobs, progress, listings)
    for failure in compiled.failures.values():
        raise RuntimeError(failure)
    return compiled.results


def read_each(
    wanted: Iterable[tuple[Launch, Gpu]],
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    listings: Sequence[str] = (),
) -> Binaries[Compiled]:
    """`compile_all`, which tells failures instead of raising them."""
    made = compile_each(wanted, partial(_facts, listings=listings), jobs, progress)
    found: Binaries[Compiled] = Binaries({}, made.failures)
    for arch in sorted({arch for _, arch in made.results}):
        keys = [key for key in made.results if key[1] == arch]
        for key, code in zip(keys, _disassembled([made.results[key][1] for key in keys], arch), strict=True):
            found.results[key] = Compiled(**made.results[key][0], **_read(code))
    return found


def _facts(binary: Binary, listings: Sequence[str]) -> tuple[dict[str, Any], bytes]:
    """(the fields of `Compiled` that the compiler says, the machine code that says the others)."""
    asm, metadata = binary.kernel.asm, binary.kernel.metadata
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text = _said_by("cuobjdump", "-res-usage", *["-sass"] * ("sass" in listings), file.name)
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    copies, copy_bytes = in_flight(asm["ttgir"])
    facts = {
        "arch": binary.arch,
        "warps": metadata.num_warps,
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared_memory": metadata.shared,
        "tensor_columns": getattr(metadata, "tmem_size", None) or 0,
        "copies": copies,
        "copy_bytes": copy_bytes,
        "listings": {name: text if name == "sass" else asm[name] for name in listings},
    }
    return facts, _code(asm["cubin"])


def _said_by(tool: str, *arguments: str) -> str:
    command = [getattr(triton.knobs.nvidia, tool).path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _code(cubin: bytes) -> bytes:
    """The instructions of an ELF file: the sections whose names begin with ``.text.``."""
    (table,), (size, count, names) = unpack_from("<Q", cubin, 40), unpack_from("<HHH", cubin, 58)
    sections = [unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(count)]
    names = sections[names][4]
    found = [it for it in sections if cubin.startswith(b".text.", names + it[0])]
    return b"".join(cubin[start : start + length] for *_, start, length in found)


def _disassembled(codes: Sequence[bytes], arch: int) -> Iterator[Code]:
    """Each binary's instructions, from one process for all, because nvdisasm takes half a second to begin."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        code = parse(_said_by("nvdisasm", "-b", f"SM{arch}{'a' * (arch >= 90)}", file.name))
    ends = [bisect_left(code, (end,)) for end in accumulate(map(len, codes), initial=0)]
    return (code[start:end] for start, end in pairwise(ends))


def _read(code: Code) -> dict[str, Any]:
    """The fields of `Compiled` that the instructions say."""
    opcodes = Counter(opcode for _, opcode, _ in code)
    whole = Counter(opcode.split(".")[0] for _, opcode, _ in code)
    cores = next((name for name, form in TENSOR_CORES.items() if any(re.fullmatch(form, op) for op in whole)), None)
    loop = None if cores is None else step_of(code, TENSOR_CORES[cores])
    return {
        "spills": whole["LDL"] + whole["STL"],
        "opcodes": opcodes,
        "tensor_cores": cores,
        "serialised": cores == "wgmma" and serialised(code),
        "step": None if loop is None else len(loop),
        "operands": first_operands(code),
        "waits": wgmma_waits(loop or code) if cores == "wgmma" else (),
        "step_opcodes": Counter(opcode for _, opcode, _ in loop or ()),
    }


def parse(sass: str) -> Code:
    """The instructions of a listing by cuobjdump or nvdisasm, without predicates."""
    return [(int(address, 16), opcode, operands.strip()) for address, opcode, operands in INSTRUCTION.findall(sass)]


def serialised(code: Code) -> bool:
    """Whether every wgmma is followed by a wait for all of them, before the next one and inside the same loop."""
    products = waits = 0
    for index, (_, opcode, _) in enumerate(code):
        if opcode.split(".")[0].endswith("GMMA"):
            products += 1
            after = (step for step in code[index + 1 :] if re.match(r"\w?GMMA|BRA|WARPGROUP\.DEPBAR", step[1]))
            _, follower, operands = next(after, (0, "", ""))
            waits += follower.startswith("WARPGROUP") and operands.split() == ["gsb0,", "0x0"]
    return products > 0 and waits == products


def first_operands(code: Code) -> dict[str, int]:
    """Place of wgmma's or tcgen05's first operand -> how many; the second is always in shared memory."""
    # HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 has both there, HGMMA... R24, R4, gdesc[UR8], R24 one in registers;
    # UTCHMMA gdesc[UR16], gdesc[UR20], tmem[UR22]... has both there, UTCHMMA tmem[UR4], gdesc[UR20]... one.
    found: Counter[str] = Counter()
    for _, opcode, operands in code:
        whole, named = opcode.split(".")[0], [operand.strip() for operand in operands.split(",")]
        if re.fullmatch(TENSOR_CORES["wgmma"], whole):
            found["shared memory" if named[1].startswith("gdesc") else "registers"] += 1
        elif re.fullmatch(TENSOR_CORES["tcgen05"], whole):
            found["shared memory" if named[0].startswith("gdesc") else "tensor memory"] += 1
    return dict(found)


def wgmma_waits(code: Code) -> tuple[int, ...]:
    """How many groups of wgmma may go on at each wait, in order."""
    waits = (operands.split(",") for _, opcode, operands in code if opcode.startswith("WARPGROUP.DEPBAR"))
    return tuple(int(most.strip(), 16) for _, most in waits)


def in_flight(ttgir: str) -> tuple[int, int]:
    """(steps whose operands are on their way while one is computed, their bytes), from the pipeline's buffers."""
    buffers = [(*map(int, sizes.split("x")), type_) for sizes, type_ in BUFFERS.findall(ttgir)]
    steps = [(sizes[0] - 1, prod(sizes[1:]) * ELEMENTS[type_]) for *sizes, type_ in buffers if type_ in ELEMENTS]
    return max((count for count, _ in steps), default=0), sum(count * size for count, size in steps)


def step_of(code: Code, product: str) -> Code | None:
    """The shortest loop around a tensor-core instruction; None if there is none."""
    products = [index for index, (_, opcode, _) in enumerate(code) if re.fullmatch(product, opcode.split(".")[0])]
    index_of = {address: index for index, (address, _, _) in enumerate(code)}
    loops = []
    for end, (_, opcode, operands) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.startswith("BRA") else None
        start = index_of.get(int(target[1], 16), end) if target else end
        if any(start <= index < end for index in products):
            loops.append(code[start : end + 1])
    return min(loops, key=len, default=None)
