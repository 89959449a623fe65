"""What the emulator's tests share: operands, hand-written kernels, planted faults."""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from tests import emulator
from tests.emulator import engine, ptx


def whole(*shape: int, dtype: torch.dtype = torch.float32, limit: int = 4) -> torch.Tensor:
    """Whole numbers, whose products and sums are exact."""
    return torch.randint(-limit, limit + 1, shape).to(dtype)


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory in which an element that nothing writes shows."""
    return torch.full(shape, float("nan"), dtype=dtype)


@contextmanager
def faults(match: str, kind: type[Exception] = emulator.Fault) -> Iterator[None]:
    """What runs inside meets this fault, and the GPU goes on afterwards."""
    with pytest.raises(kind, match=match):
        yield
    emulator.current().fault = None


def without(pattern: str, which: int | None = None, by: str = "") -> Callable[[str, str], str]:
    """An edit for `patched_ptx` that takes out every match of ``pattern``, or one, or puts ``by`` in their place."""

    def edit(name: str, text: str) -> str:
        found = list(re.finditer(pattern, text))
        assert found, f"{name} has no {pattern}"
        for m in reversed(found if which is None else [found[which]]):
            text = text[: m.start()] + by + text[m.end() :]
        return text

    return edit


_KERNEL = """
.target sm_{arch}a
.extern .shared .align 1024 .b8 memory[];
.visible .entry handwritten({parameters}) .reqntid {threads} {{
.reg .pred %first; .reg .pred %lower; .reg .pred %p<9>; .reg .b32 %r<99>; .reg .b32 %f<9>; .reg .b64 %d<9>;
.reg .b32 %thread; .reg .b32 %shared; .reg .b32 %own; .reg .b32 %other; .reg .b64 %x<9>;
mov.u32 %thread, %tid.x;
setp.eq.u32 %first, %thread, 0;
setp.lt.u32 %lower, %thread, 16;
mov.b32 %shared, memory;
mad.lo.s32 %own, %thread, 16, %shared;
xor.b32 %other, %own, 512;
{loads}
{body}
ret;
}}"""


def run(
    body: str,
    *operands: torch.Tensor | bytes,
    threads: int = 32,
    shared: int = 4096,
    grid: tuple[int, int, int] = (1, 1, 1),
) -> None:
    """Run a kernel of the PTX in ``body``.

    ``%x0``, ``%x1`` ... are the addresses of ``operands``, tensors and tensor maps. ``%first`` is true in thread 0,
    ``%lower`` in the first 16. ``%shared`` is where shared memory begins, ``%own`` 16 bytes of it for each thread,
    ``%other`` those of a thread of the next warp, or the one before.
    """
    gpu = emulator.current()
    declared, loads, values = [], [], b""
    for n, operand in enumerate(operands):
        if isinstance(operand, bytes):
            declared.append(f".param .align 64 .b8 operand_{n}[128]")
            loads.append(f"mov.b64 %x{n}, operand_{n}; cvta.param.u64 %x{n}, %x{n};")
            values = values.ljust(-(-len(values) // 64) * 64, b"\0") + operand
        else:
            declared.append(f".param .u64 operand_{n}")
            loads.append(f"ld.param.b64 %x{n}, [operand_{n}];")
            values += struct.pack("<Q", operand.data_ptr())
    text = _KERNEL.format(
        arch=gpu.gpu.arch, parameters=", ".join(declared), threads=threads, loads="\n".join(loads), body=body
    )
    program = engine.Program(ptx.parse(text)["handwritten"], gpu.options)
    engine.Running(program, grid, threads, shared, values, gpu.allocations).run()


FLOAT16, FLOAT32 = 6, 7  # of CUtensorMapDataType


def tensor_map(
    x: torch.Tensor | int,
    box: Sequence[int],
    *,
    sizes: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    kind: int = FLOAT32,
    steps: Sequence[int] | None = None,
    interleave: int = 0,
    swizzle: int = 0,
    fill: int = 0,
) -> bytes:
    """A tensor map of fp32 ``x`` or of an address, as cuTensorMapEncodeTiled makes it: innermost axis first.

    Raises ValueError with the driver's reason.
    """
    gpu = emulator.current()
    if isinstance(x, torch.Tensor):
        sizes = sizes or x.shape[::-1]
        strides = strides or [4 * step for step in x.stride()[-2::-1]]
        x = x.data_ptr()
    rank = len(sizes)
    room = ctypes.create_string_buffer(192)
    out = -(-ctypes.addressof(room) // 64) * 64
    u64, u32 = ctypes.c_ulonglong * rank, ctypes.c_uint * rank
    error = gpu.library.cuTensorMapEncodeTiled(
        ctypes.c_void_p(out), kind, rank, ctypes.c_void_p(x), u64(*sizes), u64(*strides), u32(*box),
        u32(*(steps or [1] * rank)), interleave, swizzle, 0, fill,
    )  # fmt: skip
    if error:
        raise ValueError(gpu.reason())
    return ctypes.string_at(out, 128)
