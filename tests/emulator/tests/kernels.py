"""Small Triton kernels for the emulator's tests."""

import triton
import triton.language as tl


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask) + tl.load(y_ptr + offs, mask), mask)


@triton.jit
def integers(a_ptr, b_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x, y = tl.load(a_ptr + offs, mask, other=1), tl.load(b_ptr + offs, mask, other=1)
    bits = (x << 3) + (x >> 2) + (x & y) + (x ^ y)
    tl.store(out_ptr + offs, x // y + x % y * 7 + bits + tl.minimum(x, y) + tl.umulhi(x, y), mask)


@triton.jit
def softmax(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + offs, offs < columns, other=float("-inf"))
    e = tl.exp(x - tl.max(x))
    tl.store(out_ptr + row * columns + offs, e / tl.sum(e), offs < columns)


@triton.jit
def loop(counts_ptr, out_ptr, BLOCK: tl.constexpr):
    """CTAs leave the loop at different times."""
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for step in range(tl.load(counts_ptr + row)):
        total += step * offs
    tl.store(out_ptr + row * BLOCK + offs, total)


@triton.jit
def collatz(starts_ptr, out_ptr):
    """CTAs take different branches, each many times."""
    row = tl.program_id(0)
    value, steps = tl.load(starts_ptr + row), 0
    while value != 1:
        if value % 2 == 0:
            value = value // 2
        else:
            value = 3 * value + 1
        steps += 1
    tl.store(out_ptr + row, steps)


@triton.jit
def positive(x_ptr, BLOCK: tl.constexpr):
    tl.device_assert(tl.load(x_ptr + tl.arange(0, BLOCK)) > 0)


@triton.jit
def transpose(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """The tile goes through shared memory."""
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    tile = tl.load(x_ptr + i[:, None] * BLOCK + j[None])
    tl.store(out_ptr + i[:, None] * BLOCK + j[None], tl.trans(tile))


@triton.jit
def matmul(
    a_ptr, b_ptr, out_ptr, M, N, K, a_m, a_k, b_k, b_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Operands come by cp.async, or through registers."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + m[:, None] * a_m + k[None] * a_k, (m[:, None] < M) & (k[None] < K), other=0.0)
        b = tl.load(b_ptr + k[:, None] * b_k + n[None] * b_n, (k[:, None] < K) & (n[None] < N), other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(out_ptr + m[:, None] * N + n[None], acc, (m[:, None] < M) & (n[None] < N))


@triton.jit
def matmul_of_boxes(
    a, b, out, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    A_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr, A_IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """Operands come, and the result goes, by bulk tensor copies."""
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = a.load([k, m]).T if A_TRANSPOSED else a.load([m, k])
        y = b.load([n, k]).T if B_TRANSPOSED else b.load([k, n])
        if A_IN_REGISTERS:
            x = (x.to(tl.float32) * 2.0).to(x.dtype)
        acc = tl.dot(x, y, acc)
    out.store([m, n], acc.to(out.dtype))


@triton.jit
def copy_box(x, out, row, column):
    out.store([row, column], x.load([row, column]))


@triton.jit
def read_box(x, out_ptr, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A box comes by a bulk copy and leaves by plain loads and stores."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tl.store(out_ptr + i[:, None] * COLUMNS + j[None], x.load([row, column]))
