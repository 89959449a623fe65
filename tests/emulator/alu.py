"""What arithmetic, logic and conversion instructions compute: functions of unsigned arrays of raw bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from tests.emulator.ptx import BITS, Imm, Instruction, PtxError

UINT = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
INT = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
Function = Callable[..., np.ndarray]


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if mode == "rz":
        rounded = bits >> np.uint32(16)
    else:
        rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f32_to_f16(x: np.ndarray, mode: str = "rn") -> np.ndarray:
    if mode == "rz":
        half = x.astype(np.float16)
        over = np.abs(half.astype(np.float32)) > np.abs(x)
        bits = half.view(np.uint16)
        return np.where(over, bits - np.uint16(1), bits)
    return x.astype(np.float16).view(np.uint16)


def f32_to_tf32(bits: np.ndarray, mode: str) -> np.ndarray:
    """Nearest, ties away from zero (rna) or to even (rn)."""
    if mode == "rna":
        rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    else:
        rounded = (bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.where(finite, rounded, bits)


def flushed(bits: np.ndarray) -> np.ndarray:
    """fp32 denormals to zeros of their sign."""
    return np.where(bits & np.uint32(0x7F800000), bits, bits & np.uint32(0x80000000))


def function(ins: Instruction) -> tuple[Function, list[int], int]:
    """What computes it, the bits of its sources and of its result."""
    maker = globals().get(f"_{ins.opcode}")
    if maker is None or ins.opcode.startswith("_"):
        raise PtxError("not modelled")
    if "ftz" not in ins.modifiers:
        return maker(ins)
    if not {"f32"} <= set(ins.modifiers):
        raise PtxError("ftz of another type than f32 is not modelled")
    plain, sources, result = maker(replace(ins, modifiers=tuple(m for m in ins.modifiers if m != "ftz")))

    def run(*values: np.ndarray) -> np.ndarray:
        value = plain(*(flushed(v) if bits == 32 else v for v, bits in zip(values, sources, strict=True)))
        return flushed(value) if result == 32 and ins.modifiers[-1] == "f32" else value

    return run, sources, result


def _type(ins: Instruction, allowed: tuple[str, ...] = ()) -> str:
    """The type, where nothing but ``allowed`` stands beside it."""
    *others, kind = ins.modifiers
    unknown = set(others) - set(allowed)
    if kind not in BITS or unknown:
        raise PtxError(f"unknown modifier {unknown or kind}")
    return kind


def _unsigned(kind: str) -> tuple[Any, int]:
    return UINT[BITS[kind]], BITS[kind]


def _as_float(kind: str) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    """From bits to floats that hold them exactly, and back with rounding to nearest. Packed pairs get an axis."""
    if kind == "f32":
        return (lambda a: a.view(np.float32)), (lambda x: x.view(np.uint32))
    if kind == "f64":
        return (lambda a: a.view(np.float64)), (lambda x: x.view(np.uint64))
    if kind == "f16":
        return (lambda a: a.view(np.float16).astype(np.float64)), (lambda x: x.astype(np.float16).view(np.uint16))
    if kind == "bf16":
        return bf16_to_f32, (lambda x: f32_to_bf16(x.astype(np.float32)))

    def halves(a: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(a)[..., None].view(np.uint16)

    def joined(bits: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(bits).view(np.uint32)[..., 0]

    if kind == "f16x2":
        return (
            lambda a: halves(a).view(np.float16).astype(np.float64),
            lambda x: joined(x.astype(np.float16).view(np.uint16)),
        )
    if kind == "bf16x2":
        return (lambda a: bf16_to_f32(halves(a))), (lambda x: joined(f32_to_bf16(x.astype(np.float32))))
    raise PtxError(f"no arithmetic on {kind}")


FLOATS = ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")


def _binary(ins: Instruction, integer: Function, floating: Function) -> tuple[Function, list[int], int]:
    kind = _type(ins, ("rn", "lo") if ins.modifiers[-1] in FLOATS else ("lo",))
    bits = BITS[kind]
    if kind in FLOATS:
        of, to = _as_float(kind)
        return (lambda a, b: to(floating(of(a), of(b)))), [bits, bits], bits
    return integer, [bits, bits], bits


def _add(ins: Instruction) -> Any:
    return _binary(ins, np.add, np.add)


def _sub(ins: Instruction) -> Any:
    return _binary(ins, np.subtract, np.subtract)


def _mul(ins: Instruction) -> Any:
    kind = ins.modifiers[-1]
    bits = BITS[kind]
    if kind in FLOATS or "lo" in ins.modifiers:
        return _binary(ins, np.multiply, np.multiply)
    return _wide_product(kind, bits, ins.modifiers[0])


def _wide_product(kind: str, bits: int, part: str) -> Any:
    view = INT[bits] if kind[0] == "s" else UINT[bits]
    if part == "wide":
        wide, unsigned = (INT if kind[0] == "s" else UINT)[bits * 2], UINT[bits * 2]
        return (
            (lambda a, b: (a.view(view).astype(wide) * b.view(view).astype(wide)).view(unsigned)),
            [bits, bits],
            bits * 2,
        )
    if part != "hi":
        raise PtxError(f"unknown product {part}")
    if bits == 32:
        wide = np.int64 if kind[0] == "s" else np.uint64
        return (
            lambda a, b: ((a.view(view).astype(wide) * b.view(view).astype(wide)) >> wide(32)).astype(np.uint32)
        ), [32, 32], 32  # fmt: skip

    def high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        product = a.view(view).astype(object) * b.view(view).astype(object)
        return ((product >> 64) & (2**64 - 1)).astype(np.uint64)

    return high, [64, 64], 64


def _mad(ins: Instruction) -> Any:
    part, kind = ins.modifiers[0], ins.modifiers[-1]
    bits = BITS[kind]
    if part == "lo":
        return (lambda a, b, c: a * b + c), [bits] * 3, bits
    product, _, result = _wide_product(kind, bits, part)
    return (lambda a, b, c: product(a, b) + c), [bits, bits, result], result


def _fma(ins: Instruction) -> Any:
    kind = _type(ins, ("rn", "relu"))
    if "relu" in ins.modifiers:
        raise PtxError("relu is not modelled")
    bits = BITS[kind]
    if kind == "f32":
        # A product of two fp32 numbers is exact in fp64; its sum is rounded twice, wrongly in one case of 2^29.
        def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            x = a.view(np.float32).astype(np.float64) * b.view(np.float32) + c.view(np.float32)
            return x.astype(np.float32).view(np.uint32)

        return fused, [32] * 3, 32
    if kind == "f64":
        raise PtxError("fused fp64 is not modelled")
    of, to = _as_float(kind)
    wide = np.float64
    return (lambda a, b, c: to(of(a).astype(wide) * of(b).astype(wide) + of(c).astype(wide))), [bits] * 3, bits


def _neg(ins: Instruction) -> Any:
    kind = _type(ins)
    bits = BITS[kind]
    if kind in FLOATS:
        sign = UINT[bits](0x80008000 if kind.endswith("x2") else 1 << (bits - 1))
        return (lambda a: a ^ sign), [bits], bits
    return (lambda a: UINT[bits](0) - a), [bits], bits


def _abs(ins: Instruction) -> Any:
    kind = _type(ins)
    bits = BITS[kind]
    if kind in FLOATS:
        keep = UINT[bits](0x7FFF7FFF if kind.endswith("x2") else (1 << (bits - 1)) - 1)
        return (lambda a: a & keep), [bits], bits
    return (lambda a: np.abs(a.view(INT[bits])).view(UINT[bits])), [bits], bits


def _not(ins: Instruction) -> Any:
    _, bits = _unsigned(_type(ins))
    return (lambda a: ~a), [bits], bits


def _logic(operation: Function) -> Any:
    def make(ins: Instruction) -> Any:
        _, bits = _unsigned(_type(ins))
        return operation, [bits, bits], bits

    return make


_and, _or, _xor = _logic(np.bitwise_and), _logic(np.bitwise_or), _logic(np.bitwise_xor)


def _shift(ins: Instruction, left: bool) -> Any:
    kind = _type(ins)
    bits = BITS[kind]
    dtype = INT[bits] if kind[0] == "s" else UINT[bits]
    operation = np.left_shift if left else np.right_shift
    amount = ins.operands[2]
    if isinstance(amount, Imm) and amount.value < bits:
        by = dtype(amount.value)
        return (lambda a, _: operation(a.view(dtype), by).view(UINT[bits])), [bits, 32], bits

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a = a.view(dtype)
        inside = operation(a, np.minimum(b, bits - 1).astype(dtype))
        beyond = a >> dtype(bits - 1) if kind[0] == "s" and not left else dtype(0)
        return np.where(b < bits, inside, beyond).view(UINT[bits])

    return run, [bits, 32], bits


def _shl(ins: Instruction) -> Any:
    return _shift(ins, True)


def _shr(ins: Instruction) -> Any:
    return _shift(ins, False)


def _shf(ins: Instruction) -> Any:
    side, how, _ = ins.modifiers

    def run(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        by = (c & np.uint32(31)) if how == "wrap" else np.minimum(c, np.uint32(32))
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        if side == "l":
            return ((both << by.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
        return (both >> by.astype(np.uint64)).astype(np.uint32)

    return run, [32] * 3, 32


def _bfe(ins: Instruction) -> Any:
    kind = _type(ins)
    bits = BITS[kind]
    signed = kind[0] == "s"

    def run(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        position, length = (b & 255).astype(np.int64), (c & 255).astype(np.int64)
        wide = a.view(INT[bits]).astype(np.int64) if signed or bits == 64 else a.astype(np.int64)
        if bits == 64:
            raise PtxError("64-bit fields are not modelled")
        length = np.minimum(length, 64 - 1)
        field = wide >> np.minimum(position, 63)
        field = field & ((np.int64(1) << length) - 1)
        if signed:
            top = np.minimum(position + length - 1, bits - 1)
            sign = (wide >> top) & 1
            width = np.maximum(np.minimum(length, bits - position), 0)
            field = np.where((sign != 0) & (length > 0), field | (np.int64(-1) << width), field)
        return field.astype(UINT[bits])

    return run, [bits, 32, 32], bits


def _bfi(ins: Instruction) -> Any:
    _, bits = _unsigned(_type(ins))
    if bits != 32:
        raise PtxError("64-bit fields are not modelled")

    def run(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        position, length = (c & 255).astype(np.uint64), np.minimum(d & 255, 32).astype(np.uint64)
        mask = (((np.uint64(1) << length) - np.uint64(1)) << np.minimum(position, 32)).astype(np.uint32)
        return (b & ~mask) | ((a.astype(np.uint64) << np.minimum(position, 32)).astype(np.uint32) & mask)

    return run, [32] * 4, 32


def _prmt(ins: Instruction) -> Any:
    if ins.modifiers != ("b32",):
        raise PtxError("unknown permutation")
    selector = ins.operands[3]
    if isinstance(selector, Imm) and not any(selector.value >> (4 * n) & 8 for n in range(4)):
        picks = [(selector.value >> (4 * n)) & 7 for n in range(4)]

        def fixed(a: np.ndarray, b: np.ndarray, _: np.ndarray) -> np.ndarray:
            result: Any = np.uint32(0)
            for n, pick in enumerate(picks):
                source = a if pick < 4 else b
                result = result | (((source >> np.uint32(8 * (pick & 3))) & np.uint32(255)) << np.uint32(8 * n))
            return result

        return fixed, [32] * 3, 32

    def run(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result: Any = np.uint32(0)
        for n in range(4):
            pick = (c >> np.uint32(4 * n)) & np.uint32(15)
            byte = ((both >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(
                np.uint32
            )
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result = result | (np.where(pick & np.uint32(8), sign, byte) << np.uint32(8 * n))
        return result.astype(np.uint32)

    return run, [32] * 3, 32


def _lop3(ins: Instruction) -> Any:
    table = ins.operands[4].value

    def run(a: np.ndarray, b: np.ndarray, c: np.ndarray, _: np.ndarray) -> np.ndarray:
        result: Any = np.uint32(0)
        for n in range(8):
            if table >> n & 1:
                result = result | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
        return result

    return run, [32] * 4, 32


def _popc(ins: Instruction) -> Any:
    bits = BITS[_type(ins)]
    return (lambda a: np.bitwise_count(a).astype(np.uint32)), [bits], 32


def _clz(ins: Instruction) -> Any:
    bits = BITS[_type(ins)]
    if bits != 32:
        raise PtxError("not modelled")
    return (
        (lambda a: np.where(a == 0, 32, 31 - np.floor(np.log2(np.maximum(a, 1).astype(np.float64)))).astype(np.uint32)),
        [32],
        32,
    )


def _brev(ins: Instruction) -> Any:
    def run(a: np.ndarray) -> np.ndarray:
        result = np.zeros_like(a)
        for n in range(32):
            result |= ((a >> np.uint32(n)) & np.uint32(1)) << np.uint32(31 - n)
        return result

    return run, [32], 32


def _quotient(ins: Instruction, remainder: bool) -> Any:
    kind = ins.modifiers[-1]
    bits = BITS[kind]
    if kind in FLOATS:
        if remainder or kind not in ("f32", "f64"):
            raise PtxError("not modelled")
        dtype = FLOAT[bits]
        return (lambda a, b: (a.view(dtype) / b.view(dtype)).view(UINT[bits])), [bits, bits], bits
    dtype = INT[bits] if kind[0] == "s" else UINT[bits]

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        x, y = a.view(dtype), b.view(dtype)
        # Division by zero gives all ones, as compiled code happens to; it is unspecified.
        safe = np.where(y == 0, dtype(1), y)
        if bits <= 32:
            q = np.trunc(x / safe.astype(np.float64)).astype(np.int64)
        elif kind[0] == "u":
            q = x // safe
        else:
            q = (np.abs(x) // np.abs(safe)) * (np.sign(x) * np.sign(safe))
        result = x.astype(q.dtype) - q * safe.astype(q.dtype) if remainder else q
        return np.where(y == 0, dtype(-1) if kind[0] == "s" else np.iinfo(dtype).max, result.astype(dtype)).view(
            UINT[bits]
        )

    return run, [bits, bits], bits


def _div(ins: Instruction) -> Any:
    if not set(ins.modifiers[:-1]) <= {"full", "rn", "approx"}:
        raise PtxError("unknown division")
    return _quotient(ins, False)


def _rem(ins: Instruction) -> Any:
    return _quotient(ins, True)


def _extremum(ins: Instruction, smallest: bool) -> Any:
    kind = _type(ins, ("NaN",))
    bits = BITS[kind]
    if kind in FLOATS:
        of, to = _as_float(kind)
        if "NaN" in ins.modifiers:
            operation = np.minimum if smallest else np.maximum
        else:
            operation = np.fmin if smallest else np.fmax
        return (lambda a, b: to(operation(of(a), of(b)))), [bits, bits], bits
    dtype = INT[bits] if kind[0] == "s" else UINT[bits]
    operation = np.minimum if smallest else np.maximum
    return (lambda a, b: operation(a.view(dtype), b.view(dtype)).view(UINT[bits])), [bits, bits], bits


def _min(ins: Instruction) -> Any:
    return _extremum(ins, True)


def _max(ins: Instruction) -> Any:
    return _extremum(ins, False)


_ORDER = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
_ORDER |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def _setp(ins: Instruction) -> Any:
    how, *rest, kind = ins.modifiers
    bits = BITS[kind]
    if kind in FLOATS:
        of, _ = _as_float(kind)
        if how in ("num", "nan"):
            compare: Function = lambda x, y: (np.isnan(x) | np.isnan(y)) == (how == "nan")  # noqa: E731
        elif how == "ne":
            compare = lambda x, y: (x < y) | (x > y)  # noqa: E731
        elif how in _ORDER:
            compare = _ORDER[how]
        elif how[-1] == "u" and how[:-1] in _ORDER:
            plain = _ORDER[how[:-1]]
            compare = lambda x, y: plain(x, y) | np.isnan(x) | np.isnan(y)  # noqa: E731
        else:
            raise PtxError(f"unknown comparison {how}")
        base: Function = lambda a, b: compare(of(a), of(b))  # noqa: E731
    else:
        dtype = INT[bits] if kind[0] == "s" else UINT[bits]
        operation = _ORDER[how]
        base = lambda a, b: operation(a.view(dtype), b.view(dtype))  # noqa: E731
    if not rest:
        return base, [bits, bits], 1
    (joined,) = rest
    join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[joined]
    if kind.endswith("x2"):
        return (lambda a, b, c: join(base(a, b), c[..., None])), [bits, bits, 1], 1
    return (lambda a, b, c: join(base(a, b), c)), [bits, bits, 1], 1


def _selp(ins: Instruction) -> Any:
    bits = BITS[_type(ins)]
    return (lambda a, b, p: np.where(p, a, b)), [bits, bits, 1], bits


def _slct(ins: Instruction) -> Any:
    kind, by = ins.modifiers
    bits = BITS[kind]
    dtype = np.int32 if by == "s32" else np.float32
    return (lambda a, b, c: np.where(c.view(dtype) >= 0, a, b)), [bits, bits, 32], bits


def _approximation(operation: Function, rounded: tuple[str, ...] = ("approx", "rn", "full")) -> Any:
    def make(ins: Instruction) -> Any:
        kind = _type(ins, rounded)
        bits = BITS[kind]
        of, to = _as_float(kind)
        if kind == "f32":
            return (lambda a: operation(of(a).astype(np.float64)).astype(np.float32).view(np.uint32)), [32], 32
        return (lambda a: to(operation(of(a)))), [bits], bits

    return make


_ex2, _lg2, _sqrt = _approximation(np.exp2), _approximation(np.log2), _approximation(np.sqrt)
_rcp, _rsqrt = _approximation(lambda x: 1 / x), _approximation(lambda x: 1 / np.sqrt(x))
_sin, _cos, _tanh = _approximation(np.sin), _approximation(np.cos), _approximation(np.tanh)


def _copysign(ins: Instruction) -> Any:
    bits = BITS[_type(ins)]
    sign = UINT[bits](1 << (bits - 1))
    return (lambda a, b: (b & ~sign) | (a & sign)), [bits, bits], bits


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _cvt(ins: Instruction) -> Any:
    *how, to, of = ins.modifiers
    unknown = set(how) - {"rn", "rz", "rna", "sat", "satfinite", *_ROUND}
    if unknown:
        raise PtxError(f"unknown conversion {unknown}")
    mode = next((m for m in how if m in ("rn", "rz", "rna")), "rn")
    source, result = BITS[of], BITS[to]
    if "sat" in how or "satfinite" in how:
        raise PtxError("saturation is not modelled")
    if to in ("bf16x2", "f16x2"):
        narrow = f32_to_bf16 if to == "bf16x2" else f32_to_f16

        def pair(high: np.ndarray, low: np.ndarray) -> np.ndarray:
            a, b = narrow(high.view(np.float32), mode), narrow(low.view(np.float32), mode)
            return (a.astype(np.uint32) << np.uint32(16)) | b

        return pair, [32, 32], 32
    if to == "tf32":
        return (lambda a: f32_to_tf32(a, mode)), [32], 32
    if of in FLOATS and to in FLOATS:
        widen, _ = _as_float(of)
        rounding = next((m for m in how if m in _ROUND), None)
        if rounding is not None:
            if to != of:
                raise PtxError("unknown conversion")
            _, narrow_same = _as_float(to)
            return (lambda a: narrow_same(_ROUND[rounding](widen(a)))), [source], result
        if mode == "rz" and to in ("bf16", "f16"):
            by_zero = f32_to_bf16 if to == "bf16" else f32_to_f16
            return (lambda a: by_zero(widen(a).astype(np.float32), "rz")), [source], result
        if mode == "rz":
            raise PtxError("unknown conversion")
        if to == "f16":
            return (lambda a: widen(a).astype(np.float16).view(np.uint16)), [source], result
        if to == "bf16":
            return (lambda a: f32_to_bf16(widen(a).astype(np.float32))), [source], result
        dtype = FLOAT[result]
        return (lambda a: widen(a).astype(dtype).view(UINT[result])), [source], result
    if of in FLOATS:
        rounding = next((m for m in how if m in _ROUND), None)
        if rounding is None:
            raise PtxError("a conversion to an integer without rounding")
        widen, _ = _as_float(of)
        limits = np.iinfo(INT[result] if to[0] == "s" else UINT[result])

        def integer(a: np.ndarray) -> np.ndarray:
            x = _ROUND[rounding](widen(a).astype(np.float64))
            x = np.where(np.isnan(x), 0, x)
            inside = np.clip(x, float(limits.min), float(limits.max))
            value = inside.astype(np.int64 if limits.min < 0 else np.uint64)
            value = np.where(x >= float(limits.max), limits.max, value)
            return value.astype(INT[result] if to[0] == "s" else UINT[result]).view(UINT[result])

        return integer, [source], result
    read = INT[source] if of[0] == "s" else UINT[source]
    if to in FLOATS:
        if mode == "rz":
            raise PtxError("unknown conversion")
        if to == "bf16":
            return (lambda a: f32_to_bf16(a.view(read).astype(np.float32))), [source], result
        dtype = FLOAT[result]
        return (lambda a: a.view(read).astype(dtype).view(UINT[result])), [source], result
    return (lambda a: a.view(read).astype(UINT[result])), [source], result
