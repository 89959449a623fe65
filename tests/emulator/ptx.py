"""PTX text, as LLVM and Triton's inline assembly write it, to a list of instructions. Anything unknown is an error."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from typing import Any

BITS = {"b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32}
BITS |= {"s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "tf32": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64}
BITS |= {"pred": 1, "b128": 128}


class PtxError(Exception):
    """What the emulator does not know, or PTX that is wrong."""


@dataclass(frozen=True, slots=True)
class Reg:
    index: int
    bits: int  # 1 for predicates
    name: str


@dataclass(frozen=True, slots=True)
class Imm:
    value: int  # bits; negative integers stay negative
    is_float: bool = False


@dataclass(frozen=True, slots=True)
class Special:
    name: str  # "%tid.x"


@dataclass(frozen=True, slots=True)
class Symbol:
    name: str


@dataclass(frozen=True, slots=True)
class Vector:
    items: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    base: Any  # Reg, Symbol, Imm
    offset: int
    extra: tuple[Any, ...] = ()  # what follows the address inside the brackets: coordinates


@dataclass(frozen=True, slots=True)
class Not:
    operand: Reg


@dataclass(frozen=True, slots=True)
class Pair:
    first: Any
    second: Any


@dataclass(frozen=True, slots=True)
class Sink:
    pass


@dataclass(slots=True)
class Instruction:
    opcode: str  # "ld"
    modifiers: tuple[str, ...]  # ("global", "v4", "b32")
    operands: tuple[Any, ...]
    guard: Reg | None
    negated: bool
    line: int  # of the PTX
    source: str  # "file.py:12" of Python
    text: str

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))

    def __str__(self) -> str:
        return f"PTX line {self.line} ({self.source}): {self.text}"


@dataclass
class Parameter:
    name: str
    size: int
    align: int
    offset: int = 0


@dataclass
class Kernel:
    name: str
    target: int  # 80, 90
    parameters: list[Parameter]
    instructions: list[Instruction]
    labels: dict[str, int]  # index of the instruction that follows
    registers: list[Reg]
    shared: dict[str, tuple[int, int]]  # symbol -> (alignment, size; 0 for extern)
    globals: dict[str, bytes]
    threads: int | None
    local_size: int = 0
    locals: dict[str, int] = field(default_factory=dict)
    text: str = ""


_TOKEN_REG = re.compile(r"[%$]?[A-Za-z_$][\w$]*(\.[xyzw])?$|%[\w$.]+$")
_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid|clusterid|nclusterid|cluster_ctaid|cluster_nctaid)\.[xyz]$|"
    r"%(laneid|warpid|nwarpid|smid|nsmid|clock|clock64|globaltimer|globaltimer_lo|cluster_ctarank|cluster_nctarank|"
    r"lanemask_\w+|gridid|dynamic_smem_size|total_smem_size|is_explicit_cluster)$"
)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')


def strip_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def parse(text: str) -> dict[str, Kernel]:
    """Every entry of a PTX module by its name."""
    original = text
    files = {int(m[1]): (m[3] or m[2]).rsplit("/", 1)[-1] for m in _FILE.finditer(text)}
    text = strip_comments(text)
    # Debug sections lie at the end and hold no code.
    cut = re.search(r"^\s*\.section\b", text, re.M)
    if cut:
        text = text[: cut.start()]
    text = _FILE.sub("", text)
    target = re.search(r"\.target\s+sm_(\d+)", text)
    if target is None:
        raise PtxError("no .target")
    shared: dict[str, tuple[int, int]] = {}
    for m in re.finditer(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", text):
        shared[m[2]] = int(m[1]), int(m[3] or 0)
    global_data: dict[str, bytes] = {}
    for m in re.finditer(
        r"\.(?:global|const)\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\]\s*(?:=\s*\{([^}]*)\})?\s*;", text
    ):
        data = bytes(int(v) & 0xFF for v in m[3].split(",")) if m[3] else b""
        global_data[m[1]] = data.ljust(int(m[2]), b"\0")
    kernels = {}
    for m in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{;]*)\{", text):
        parameters = _parameters(m[2])
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", m[3])
        start = m.end()
        line = text.count("\n", 0, start) + 1
        body = _Body(text, start, line, files)
        kernels[m[1]] = Kernel(
            m[1], int(target[1]), parameters, body.instructions, body.labels, body.registers, shared, global_data,
            int(threads[1]) if threads else None, body.local_size, body.locals, original,
        )  # fmt: skip
    if not kernels:
        raise PtxError("no .entry")
    return kernels


def _parameters(text: str) -> list[Parameter]:
    found, offset = [], 0
    for part in filter(None, (p.strip() for p in text.split(","))):
        array = re.match(r"\.param\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]$", part)
        plain = re.match(r"\.param\s+\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)*(?:\s+\.align\s+\d+)?)?\s+([\w$]+)$", part)
        if array:
            parameter = Parameter(array[2], int(array[3]), int(array[1]))
        elif plain and plain[1] in BITS:
            size = max(1, BITS[plain[1]] // 8)
            parameter = Parameter(plain[2], size, size)
        else:
            raise PtxError(f"unknown parameter {part!r}")
        offset = -(-offset // parameter.align) * parameter.align
        parameter.offset = offset
        offset += parameter.size
        found.append(parameter)
    return found


class _Body:
    """The statements of one function; scopes of inline assembly have registers and labels of their own."""

    def __init__(self, text: str, start: int, line: int, files: dict[int, str]) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.registers: list[Reg] = []
        self.locals: dict[str, int] = {}
        self.local_size = 0
        self._files = files
        self._source = "?"
        self._scopes: list[dict[str, Any]] = [{}]
        self._families: list[dict[str, tuple[int, int]]] = [{}]
        self._scope_ids, self._next_scope = [0], 1
        self._label_uses: list[tuple[int, list[int]]] = []
        self._scan(text, start, line)

    def _scan(self, text: str, at: int, line: int) -> None:
        depth, n = 1, len(text)
        while at < n:
            # Skip blanks.
            while at < n and text[at] in " \t\r\n;":
                line += text[at] == "\n"
                at += 1
            if at >= n:
                break
            char = text[at]
            if char == "{":
                depth += 1
                self._scopes.append({})
                self._families.append({})
                self._scope_ids.append(self._next_scope)
                self._next_scope += 1
                at += 1
                continue
            if char == "}":
                depth -= 1
                at += 1
                if depth == 0:
                    return
                self._scopes.pop()
                self._families.pop()
                self._scope_ids.pop()
                continue
            if text.startswith((".loc", ".file"), at):
                end = text.find("\n", at)
                self._locate(text[at:end])
                at = end
                continue
            label = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)").match(text, at)
            if label:
                self._label(label[1])
                at = label.end()
                continue
            end, braces = at, 0
            while text[end] != ";" or braces:
                braces += (text[end] == "{") - (text[end] == "}")
                end += 1
            self._statement(" ".join(text[at:end].split()), line)
            line += text.count("\n", at, end)
            at = end + 1
        raise PtxError("a function without an end")

    def _locate(self, text: str) -> None:
        m = _LOC.match(text)
        if m and int(m[2]):
            self._source = f"{self._files.get(int(m[1]), '?')}:{m[2]}"

    def _label(self, name: str) -> None:
        key = name if name.startswith("$L") else f"{self._scope_ids[-1]}.{name}"
        if key in self.labels:
            raise PtxError(f"label {name} twice")
        self.labels[key] = len(self.instructions)

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text).groups()
            for name in names.split(","):
                name = name.strip()
                family = re.match(r"(%?[\w$]+)<(\d+)>$", name)
                if family:
                    self._families[-1][family[1]] = (int(family[2]), BITS[kind])
                else:
                    self._declare(name, BITS[kind])
            return
        if text.startswith(".pragma"):
            return
        if text.startswith(".local"):
            m = re.match(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]$", text)
            self.local_size = -(-self.local_size // int(m[1])) * int(m[1])
            self.locals[m[2]] = self.local_size
            self.local_size += int(m[3])
            return
        if text.startswith(".param"):
            return  # of a call, which is not executed
        if text.startswith("."):
            raise PtxError(f"PTX line {line}: unknown directive {text!r}")
        guard, negated, rest = None, False, text
        if text.startswith("@"):
            m = re.match(r"@\s*(!?)\s*([%\w$]+)\s+(.*)$", text)
            negated, guard, rest = bool(m[1]), self._register(m[2]), m[3]
        opcode, _, operands = rest.partition(" ")
        name, *modifiers = opcode.replace("::", "__").split(".")
        modifiers = tuple(m.replace("__", "::") for m in modifiers)
        parsed = () if name == "call" else tuple(self._operand(p, name) for p in _split(operands))
        self.instructions.append(Instruction(name, modifiers, parsed, guard, negated, line, self._source, text))

    def _declare(self, name: str, bits: int) -> Reg:
        reg = Reg(len(self.registers), bits, name)
        self.registers.append(reg)
        self._scopes[-1][name] = reg
        return reg

    def _register(self, name: str) -> Reg:
        for scope, families in zip(reversed(self._scopes), reversed(self._families), strict=True):
            if name in scope:
                return scope[name]
            m = re.match(r"(%?[A-Za-z_$]+)(\d+)$", name)
            if m and m[1] in families and int(m[2]) < families[m[1]][0]:
                reg = Reg(len(self.registers), families[m[1]][1], name)
                self.registers.append(reg)
                scope[name] = reg
                return reg
        raise PtxError(f"unknown register {name}")

    def _is_register(self, name: str) -> bool:
        try:
            self._register(name)
        except PtxError:
            return False
        return True

    def _operand(self, text: str, opcode: str) -> Any:
        text = text.strip()
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self._operand(part, opcode) for part in _split(text[1:-1])))
        if text.startswith("["):
            first, *rest = _split(text[1:-1])
            base, offset = first.strip(), 0
            m = re.match(r"(.+?)\s*\+\s*(-?\w+)$", base)
            if m:
                base, offset = m[1], int(m[2], 0)
            return Memory(self._operand(base, opcode), offset, tuple(self._operand(part, opcode) for part in rest))
        if text.startswith("!"):
            return Not(self._register(text[1:].strip()))
        if "|" in text:
            return Pair(*(self._operand(part, opcode) for part in text.split("|")))
        if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
            return Imm(int(text[2:], 16), True)
        if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
            return Imm(int(text[2:], 16), True)
        if re.match(r"-?\d+\.\d*$", text):
            return Imm(struct.unpack("<I", struct.pack("<f", float(text)))[0], True)
        if re.match(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$", text):
            return Imm(int(text.rstrip("U"), 0))
        if opcode == "bra":
            return Symbol(self._resolve_label(text))
        if _SPECIAL.match(text):
            return Special(text)
        if self._is_register(text):
            return self._register(text)
        if re.match(r"[\w$]+$", text):
            return Symbol(text)
        raise PtxError(f"unknown operand {text!r}")

    def _resolve_label(self, name: str) -> str:
        return name if name.startswith("$L") else f"{self._scope_ids[-1]}.{name}"


def _split(text: str) -> list[str]:
    """At commas outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{(") - (char in "]})")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    if text[start:].strip():
        parts.append(text[start:])
    return parts
