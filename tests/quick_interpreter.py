"""Triton's interpreter with less to do for the same bits: most of a test's time was its type promotion.

An operator of Triton finds out from its operands' types what to cast, to broadcast and to return, for each of the some
hundred scalars and tiles of a kernel's step. Here it does so once for each pair of types, and from then on NumPy
computes with the data.
"""

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.core import constexpr, tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

_INTEGERS = (tl.int32, tl.int64)
_FLOATS = (tl.float16, tl.bfloat16, tl.float32)
_NUMBERS = (*_INTEGERS, tl.float32)
_BITS = (*_INTEGERS, tl.int1)
# What NumPy computes, for operands of which scalar types.
_OPERATORS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "add": (np.add, _NUMBERS),
    "sub": (np.subtract, _NUMBERS),
    "mul": (np.multiply, _NUMBERS),
    "truediv": (np.divide, (tl.float32,)),
    "floordiv": (lambda a, b: (a - np.fmod(a, b)) // b, _INTEGERS),
    "mod": (np.fmod, _INTEGERS),
    "lt": (np.less, _NUMBERS),
    "le": (np.less_equal, _NUMBERS),
    "gt": (np.greater, _NUMBERS),
    "ge": (np.greater_equal, _NUMBERS),
    "eq": (np.equal, _NUMBERS),
    "ne": (np.not_equal, _NUMBERS),
    "and": (np.bitwise_and, _BITS),
    "or": (np.bitwise_or, _BITS),
    "radd": (lambda a, b: np.add(b, a), _NUMBERS),
    "rsub": (lambda a, b: np.subtract(b, a), _NUMBERS),
    "rmul": (lambda a, b: np.multiply(b, a), _NUMBERS),
}
_CHECKED = tl.core.load.__code__  # of what checks that a language function is given a semantic


def quicken() -> None:
    """Speed up the interpreter of this process, for good: language functions stay patched between launches."""
    _intern(tl.dtype, {(it.name,): it for it in vars(tl.core).values() if type(it) is tl.dtype})
    _intern(tl.pointer_type, {})
    _intern(tl.block_type, {})
    tl.dtype.__eq__ = lambda self, other: self is _value(other)
    interpreter._get_np_dtype = functools.cache(interpreter._get_np_dtype)
    interpreter._validate_np_data_size = lambda array, dtype: array.itemsize <= _most_bytes(dtype)
    interpreter._patch_attr = _patch_attr
    interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    unpatched = interpreter._LangPatchScope()
    interpreter._patch_lang = lambda function: unpatched
    tensor.__init__ = _init
    tensor.__getitem__ = _index(tensor.__getitem__)
    for name, (compute, dtypes) in _OPERATORS.items():
        setattr(tensor, f"__{name}__", _operator(getattr(tensor, f"__{name}__"), compute, dtypes))
    tl.where = tl.core.where = _where(tl.where)
    semantic = interpreter.interpreter_semantic
    semantic.to_tensor = _to_tensor(semantic.to_tensor)
    semantic.cast = _cast(semantic.cast)
    semantic.broadcast_impl_value = _broadcast(semantic.broadcast_impl_value)


def _intern(kind: Any, known: dict[Any, Any]) -> None:
    """Make equal instances of a class of types one and the same."""
    init = kind.__init__

    def new(cls: Any, *given: Any, **named: Any) -> Any:
        values = [tuple(map(_value, it)) if isinstance(it, list | tuple | tl.tuple) else _value(it) for it in given]
        key = (*values, *named.items())
        if key not in known:
            known[key] = object.__new__(cls)
            init(known[key], *given, **named)
        return known[key]

    kind.__new__ = new
    kind.__init__ = lambda *_, **__: None
    kind.__hash__ = object.__hash__


def _value(it: Any) -> Any:
    return it.value if type(it) is constexpr else it


def _key(constant: Any) -> tuple[type, Any]:
    return type(constant), constant or repr(constant)  # 0.0 is not -0.0 to each Triton


@functools.cache
def _most_bytes(dtype: Any) -> float:
    return math.inf if isinstance(dtype, tl.pointer_type) else max(8, dtype.primitive_bitwidth) / 8


def _patch_attr(owner: Any, name: str, member: Any, _: Any, scope: Any) -> None:
    inner = member.__wrapped__ if member.__code__ is _CHECKED else member

    def call(*arguments: Any, **named: Any) -> Any:
        named["_semantic"] = interpreter.interpreter_semantic
        return inner(*arguments, **named)

    scope.set_attr(owner, name, call)


def _init(self: Any, handle: Any, kind: Any) -> None:
    if not hasattr(kind, "facts"):
        kind.sizes = tuple(kind.shape) if kind.is_block() else ()
        kind.facts = tl.tuple([constexpr(it) for it in kind.sizes]), constexpr(math.prod(kind.sizes)), kind.scalar
    self.handle, self.type = handle, kind
    self.shape, self.numel, self.dtype = kind.facts


def _made(data: np.ndarray, dtype: Any, kind: Any) -> Any:
    made, handle = object.__new__(tensor), object.__new__(TensorHandle)
    handle.data, handle.dtype, handle.attr = data, dtype, {}
    made.handle, made.type = handle, kind
    made.shape, made.numel, made.dtype = kind.facts
    return made


def _index(slow: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def index(self: Any, slices: Any) -> Any:
        if type(slices) is not tuple or not self.type.is_block():
            return slow(self, slices)
        key = (self.type, *[it is None for it in slices])
        if key in known:
            return _made(self.handle.data[slices], self.handle.dtype.scalar, known[key])
        result = slow(self, slices)  # which refuses all but None and the whole of a dimension
        known[key] = result.type
        return result

    return index


def _operator(slow: Callable[..., Any], compute: Callable[..., Any], dtypes: tuple[Any, ...]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def operator(self: Any, other: Any) -> Any:
        if type(other) is tensor:
            key, data = (self.type, other.type), other.handle.data
        else:
            other = _value(other)
            key, data = (self.type, *_key(other)), None
        if key not in known:
            result = slow(self, other)
            how = _how(self.dtype, other, compute, dtypes)
            known[key] = how and (*how, result.handle.dtype, result.type)
            return result
        found = known[key]
        if found is None:
            return slow(self, other)
        function, constant, dtype, kind = found
        return _made(function(self.handle.data, constant if data is None else data), dtype, kind)

    return operator


def _how(mine: Any, other: Any, compute: Callable[..., Any], dtypes: tuple[Any, ...]) -> Any:
    """What computes with the data of a tensor of scalar type ``mine`` and those of ``other``, and a constant's data;
    None if Triton casts."""
    small = type(other) is int and -(2**31) <= other < 2**31
    if mine.is_ptr():
        width = np.uint64(max(1, mine.element_ty.primitive_bitwidth // 8))
        if compute is np.add and small:
            return np.add, np.array([other]).astype(np.uint64) * width
        if compute is np.add and type(other) is tensor and other.dtype in _INTEGERS:
            return (lambda pointers, offsets: pointers + width * offsets.astype(np.uint64)), None
    elif mine in dtypes and type(other) is tensor:
        if other.dtype is mine or (mine in _INTEGERS and other.dtype in _INTEGERS):
            return compute, None
    elif mine in dtypes and mine in _NUMBERS and (small or (type(other) is float and mine is tl.float32)):
        return compute, interpreter.interpreter_semantic.scalar_constant(other, mine).handle.data
    return None


def _where(slow: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def where(condition: Any, x: Any, y: Any, _semantic: Any = None) -> Any:
        if type(condition) is not tensor or type(x) is not tensor:
            return slow(condition, x, y)
        if type(y) is tensor:
            key, data = (condition.type, x.type, y.type), y.handle.data
        else:
            y = _value(y)
            key, data = (condition.type, x.type, *_key(y)), None
        if key not in known:
            result = slow(condition, x, y)
            how = _how(x.dtype, y, np.where, _NUMBERS) if condition.dtype is tl.int1 else None
            known[key] = how and (how[1], result.type)
            return result
        found = known[key]
        if found is None:
            return slow(condition, x, y)
        constant, kind = found
        return _made(
            np.where(condition.handle.data, x.handle.data, constant if data is None else data), kind.scalar, kind
        )

    return where


def _to_tensor(slow: Callable[..., Any]) -> Callable[..., Any]:
    constants: dict[Any, Any] = {}

    def to_tensor(x: Any, check_type: bool = True) -> Any:
        if type(x) is tensor:
            return x
        x = _value(x)
        if type(x) is not int and type(x) is not float:
            return slow(x, check_type)
        key = _key(x)
        if key not in constants:
            constants[key] = slow(x, check_type)
        return constants[key]

    return to_tensor


def _cast(slow: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def cast(x: Any, to: Any, *rest: Any) -> Any:
        key = x.type, to
        if rest not in ((), (None,)) or x.dtype is to.scalar or key not in known:
            result = slow(x, to, *rest)
            at_once = x.dtype in _INTEGERS or x.dtype is tl.float32 or to.scalar is tl.float32
            if rest in ((), (None,)) and at_once and {x.dtype, to.scalar} <= {*_INTEGERS, *_FLOATS}:
                known[key] = result.type
            return result
        kind = known[key]
        return tensor(interpreter.interpreter_builder.cast_impl(x.handle, kind), kind)

    return cast


def _broadcast(slow: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def broadcast(x: Any, y: Any) -> Any:
        key = x.type, y.type
        if key not in known:
            result = slow(x, y)
            known[key] = result[0].type, result[1].type
            return result
        kinds = known[key]
        return _spread(x, kinds[0]), _spread(y, kinds[1])

    return broadcast


def _spread(x: Any, kind: Any) -> Any:
    if x.type is kind:
        return x
    data, dtype = x.handle.data, x.handle.dtype
    if x.type.is_block():
        data = np.broadcast_to(data, kind.sizes)
    else:
        data = np.full(kind.sizes, data, dtype=interpreter._get_np_dtype(dtype))
    return _made(data, dtype.scalar, kind)
