"""Arithmetic, control flow and launches, against PyTorch and Python's own numbers."""

from __future__ import annotations

import struct

import pytest
import torch

from tests import emulator
from tests.emulator.tests import kernels
from tests.emulator.tests.helpers import blank, run, whole


def test_a_masked_sum() -> None:
    x, y, out = torch.randn(1001), torch.randn(1001), blank(1001)
    kernels.add[(8,)](x, y, out, 1001, BLOCK=128)
    assert torch.equal(out, x + y)


def test_softmax() -> None:
    x, out = torch.randn(9, 200), blank(9, 200)
    kernels.softmax[(9,)](x, out, 200, BLOCK=256)
    torch.testing.assert_close(out, x.softmax(1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_integers(dtype: torch.dtype) -> None:
    a, b = torch.randint(-(10**6), 10**6, (500,), dtype=dtype), torch.randint(1, 1000, (500,), dtype=dtype)
    out = torch.zeros(500, dtype=dtype)
    kernels.integers[(4,)](a, b, out, 500, BLOCK=128)
    bits = 8 * dtype.itemsize
    for x, y, found in zip(a.tolist(), b.tolist(), out.tolist(), strict=True):
        quotient = abs(x) // y * (1 if x >= 0 else -1)
        high = (x % 2**bits * y) >> bits
        expected = quotient + (x - quotient * y) * 7 + (x << 3) + (x >> 2) + (x & y) + (x ^ y) + min(x, y) + high
        assert (found - expected) % 2**bits == 0, (x, y)


def test_ctas_leave_a_loop_at_different_times() -> None:
    counts, out = torch.arange(11, -1, -1, dtype=torch.int32), whole(12, 64, dtype=torch.int32)
    kernels.loop[(12,)](counts, out, BLOCK=64)
    sums = torch.tensor([sum(range(count)) for count in counts.tolist()], dtype=torch.int32)
    assert torch.equal(out, sums[:, None] * torch.arange(64, dtype=torch.int32))


def test_ctas_take_different_branches() -> None:
    starts, out = torch.arange(1, 30, dtype=torch.int32), torch.zeros(29, dtype=torch.int32)
    kernels.collatz[(29,)](starts, out)

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert out.tolist() == [steps(n) for n in range(1, 30)]


def test_threads_of_a_warp_part_and_meet_again() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    run(
        """
        mul.wide.u32 %d0, %thread, 4;
        add.s64 %d0, %x0, %d0;
        mov.b32 %r1, 1;
        @%lower bra $SMALL;
        mov.b32 %r1, 2;
        bra $MEET;
        $SMALL:
        add.s32 %r1, %r1, 9;
        $MEET:
        shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;
        st.global.b32 [%d0], %r2;
        """,
        out,
    )
    assert out.tolist() == [2] * 16 + [10] * 16


def test_a_parameter_is_widened_as_it_is_loaded() -> None:
    """As Triton 3.7 does with a descriptor's place, for GPUs that have no tensor maps."""
    out = torch.zeros(2, dtype=torch.int64)
    run(
        """
        ld.param.s32 %d1, [operand_1];
        ld.param.u32 %d2, [operand_1];
        st.global.b64 [%x0], %d1;
        st.global.b64 [%x0+8], %d2;
        """,
        out,
        struct.pack("<i", -3).ljust(128),
    )
    assert out.tolist() == [-3, 2**32 - 3]


def test_grids_larger_than_what_runs_side_by_side() -> None:
    x, y, out = torch.randn(4096), torch.randn(4096), blank(4096)
    with emulator.options(lanes=256):
        kernels.add[(64,)](x, y, out, 4096, BLOCK=64, num_warps=1)
    assert torch.equal(out, x + y)


def test_a_binary_is_launched_again() -> None:
    x, y, out, other = torch.randn(128), torch.randn(128), blank(128), blank(128)
    binary = kernels.add[(1,)](x, y, out, 128, BLOCK=128)
    before = len(emulator.launches())
    binary.run(1, 1, 1, 0, binary.function, binary.packed_metadata, None, None, None, x, y, other, 128, 128)
    assert torch.equal(other, x + y)
    (launched,) = emulator.launches()[before:]
    assert (launched.name, launched.grid, launched.threads) == ("add", (1, 1, 1), 128)
