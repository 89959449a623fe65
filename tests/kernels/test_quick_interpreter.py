"""The quick interpreter computes from the second call on what Triton did in the first: the same types and bits."""

import operator
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from fastconv.kernels.launch import interpreter

if not interpreter.interpreting():
    pytest.skip("tests of Triton's interpreter need TRITON_INTERPRET=1", allow_module_level=True)

# No kernel has tiles of these shapes, so their first call is the first.
SHAPES: tuple[tuple[int, ...], ...] = ((), (1, 1, 512), (2, 1, 1), (2, 1, 512))
DTYPES = {tl.int32: np.int32, tl.int64: np.int64, tl.float32: np.float32, tl.float16: np.float16, tl.int1: np.bool_}
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and_", "or_")},
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "radd": lambda a, b: b + a,
    "rsub": lambda a, b: b - a,
    "where": lambda a, b: tl.where(a > 2, a, b),
    "where not": lambda a, b: tl.where(a == b, 0.0, a),
    "to": lambda a, b: a.to(b.dtype),
    "broadcast": lambda a, b: tl.broadcast(a, b)[0],
    "index": lambda a, _: a[:, None, :],
}
CONSTANTS = (0, 3, -7, 2**31, -0.0, 0.5, float("inf"), True)


def tensor(dtype: Any, shape: tuple[int, ...]) -> Any:
    data = np.random.default_rng(0).integers(-9, 9, shape or (1,)).astype(DTYPES[dtype])
    return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(shape)) if shape else dtype)


def called(function: Callable[[Any, Any], Any], *operands: Any) -> Any:
    try:
        found = function(*operands)
    except Exception as error:
        return type(error)
    return found.type, found.dtype, str(found.shape), found.handle.data.shape, found.handle.data.tobytes()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_second_call_gives_the_first_ones_result(name: str) -> None:
    tensors = [tensor(dtype, shape) for dtype, shape in product(DTYPES, SHAPES)]
    pairs = [(a, b) for a in tensors for b in (*tensors, *CONSTANTS)]
    first = [called(FUNCTIONS[name], *pair) for pair in pairs]
    assert any(type(it) is tuple for it in first)
    assert [called(FUNCTIONS[name], *pair) for pair in pairs] == first


@pytest.mark.parametrize("offset", [5, -5, tensor(tl.int32, (2, 1, 512)), tensor(tl.int64, ())], ids=str)
def test_pointers_move_by_elements(offset: Any) -> None:
    pointer = tl.tensor(
        TensorHandle(np.array([4096], dtype=np.uint64), tl.pointer_type(tl.float16)), tl.pointer_type(tl.float16)
    )
    first = called(operator.add, pointer, offset)
    assert called(operator.add, pointer, offset) == first
    assert called(operator.add, pointer, offset) == first
