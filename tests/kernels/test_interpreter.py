"""The mended interpreter against PyTorch: casts bit by bit, products on integers, and the rest that kernels need."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastconv.kernels.launch import interpreter

if not interpreter.interpreting():
    pytest.skip("tests of Triton's interpreter need TRITON_INTERPRET=1", allow_module_level=True)

interpreter.apply()

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EVERY_BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def name(value: object) -> str:
    return str(value).removeprefix("torch.")


def launch(kernel, *arguments, grid=(1,), **constants) -> None:
    with interpreter.LOCK:
        kernel[grid](*arguments, **constants)


def integers(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tricky_fp32() -> torch.Tensor:
    """2^18 fp32 numbers: random bits (every exponent, NaNs too), all ties between bf16 neighbours and their own
    neighbours, denormals, the numbers around overflow, infinities, and NaNs of both kinds and signs."""
    generator = torch.Generator().manual_seed(0)
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    some = upper[torch.randperm(2**16, generator=generator)[: 2**15]]
    denormal = torch.randint(0, 2**23, (2**14,), generator=generator)
    special = torch.tensor(
        [0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001, 1]
    )
    bits = torch.cat([upper | 0x8000, some | 0x7FFF, some | 0x8001, denormal, special])
    random = torch.randint(0, 2**32, (2**18 - bits.numel(),), generator=generator)
    bits = torch.cat([bits, random])
    return torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32).view(torch.float32)


@triton.jit
def cast_kernel(x_ptr, y_ptr, EXPLICIT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    if EXPLICIT:
        x = x.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs, x)


def interpreted_cast(x: torch.Tensor, dtype: torch.dtype, explicit: bool = True) -> torch.Tensor:
    y = torch.full(x.shape, 77, dtype=dtype)
    launch(cast_kernel, x, y, EXPLICIT=explicit, BLOCK=x.numel())
    return y


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bitwise, signed zeros included; any NaN equals another, because PyTorch and GPUs write different ones."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    different = (actual.view(bits) != expected.view(bits)) & ~(actual.isnan() & expected.isnan())
    assert not different.any(), f"{different.sum()} differ, first {actual[different][0]} for {expected[different][0]}"


@pytest.mark.parametrize("explicit", [True, False], ids=["to", "store"])
def test_fp32_to_bf16_rounds_to_nearest_even(explicit):
    x = tricky_fp32()
    assert_same_bits(interpreted_cast(x, torch.bfloat16, explicit), x.to(torch.bfloat16))


# fp16 has no room for most bf16 numbers: infinity is the right answer, and NumPy warns of it and of signalling NaNs.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=name)
def test_every_bf16_to(dtype):
    assert_same_bits(interpreted_cast(EVERY_BF16, dtype), EVERY_BF16.to(dtype))


def test_every_fp16_to_bf16():
    x = EVERY_BF16.view(torch.float16)
    assert_same_bits(interpreted_cast(x, torch.bfloat16), x.to(torch.bfloat16))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in cast:RuntimeWarning")
def test_fp64_to_bf16():
    x = torch.cat([tricky_fp32().double(), torch.linspace(-3, 3, 2**18 - 2, dtype=torch.float64)])
    x = torch.cat([x, torch.tensor([1e300, -1e300], dtype=torch.float64)])
    assert_same_bits(interpreted_cast(x, torch.bfloat16), x.to(torch.bfloat16))


def test_integers_to_bf16_and_back():
    x = torch.arange(-(2**14), 2**14, dtype=torch.int32)
    y = interpreted_cast(x, torch.bfloat16)
    assert_same_bits(y, x.to(torch.bfloat16))
    assert torch.equal(interpreted_cast(y, torch.int32), y.to(torch.int32))


@pytest.mark.parametrize("source", DTYPES[:2], ids=name)
def test_fp_to_fp_rounds_to_nearest_even(source):
    """By the builder's method itself: ``tl`` calls it only from Triton 3.9 on, and only for fp16."""
    from triton.runtime import interpreter as tritons

    x = tricky_fp32() if source == torch.float32 else EVERY_BF16.view(torch.float16)
    handle = tritons.TensorHandle(x.numpy(), getattr(tl, name(source)))
    to_nearest = tritons._ir.ROUNDING_MODE.RTNE
    y = tritons.interpreter_builder.create_fp_to_fp(handle, tl.bfloat16, to_nearest)
    assert_same_bits(torch.from_numpy(y.data).view(torch.bfloat16), x.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=name)
def test_other_casts_stay(dtype):
    x = torch.linspace(-60000, 60000, 2**12)
    assert_same_bits(interpreted_cast(x, dtype), x.to(dtype))


@triton.jit
def dot_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [N, K]
    y_ptr,  # [M, N]
    steps,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs_m, offs_n, offs_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((M, N), dtype=tl.float32)
    if steps > 0:
        for i in range(steps):
            k = i * BLOCK_K + offs_k
            a = tl.load(a_ptr + offs_m[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
            b = tl.load(b_ptr + offs_n[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
            if i % 2 == 0:
                acc = tl.dot(a, tl.trans(b), acc=acc, input_precision=PRECISION)
            else:
                acc += tl.dot(a, b.T, input_precision=PRECISION, out_dtype=tl.float32)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=name)
def test_dot_of_integers_is_exact(dtype, precision, out):
    a, b = integers(32, 40, dtype=dtype), integers(16, 40, dtype=dtype, seed=1)
    y = torch.full((32, 16), float("nan"), dtype=out)
    launch(dot_kernel, a, b, y, 3, PRECISION=precision, M=32, N=16, K=40, BLOCK_K=16)
    assert torch.equal(y, (a.double() @ b.double().T).to(out))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_dot_passes_nan_on(dtype):
    a, b = integers(16, 16, dtype=dtype), integers(16, 16, dtype=dtype, seed=1)
    a[3, 5] = float("nan")
    y = torch.zeros(16, 16)
    launch(dot_kernel, a, b, y, 1, PRECISION="ieee", M=16, N=16, K=16, BLOCK_K=16)
    assert y[3].isnan().all() and y.isnan().sum() == 16


@triton.jit
def maximum_kernel(x_ptr, z_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, z = tl.load(x_ptr + offs).to(tl.float32), tl.load(z_ptr + offs).to(tl.float32)
    y = tl.maximum(x, z, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty))
    y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + BLOCK + offs, y.to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_maximum_propagates_nan_from_both_sides(dtype):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, 1, nan, -2, inf, nan, -inf, -0.5], dtype=dtype)
    z = torch.tensor([1, nan, nan, -3, nan, -inf, 0.25, 8], dtype=dtype)
    y = torch.empty(16, dtype=dtype)
    launch(maximum_kernel, x, z, y, BLOCK=8)
    assert_same_bits(y, torch.cat([torch.maximum(x, z), torch.relu(x)]))


@triton.jit
def reduce_kernel(x_ptr, sum_ptr, max_ptr, AXIS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]).to(tl.float32)
    x = tl.reshape(x, (M // 2, 2, N))
    offs = tl.arange(0, M * N // (N if AXIS == 2 else M // 2))
    tl.store(sum_ptr + offs, tl.sum(x, axis=AXIS).reshape(offs.shape))
    tl.store(max_ptr + offs, tl.max(x, axis=AXIS).reshape(offs.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("axis", [0, 2])
def test_reductions_over_an_axis(dtype, axis):
    x = integers(16, 32, dtype=dtype)
    total, largest = torch.full((2, 16 if axis == 2 else 64), float("nan"))
    launch(reduce_kernel, x, total, largest, AXIS=axis, M=16, N=32)
    expected = x.float().view(8, 2, 32)
    assert torch.equal(total, expected.sum(axis).flatten())
    assert torch.equal(largest, expected.amax(axis).flatten())


@triton.jit
def select_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    y = tl.where(offs % 3 == 0, 0.0, tl.where(offs % 3 == 1, x, (-x.to(tl.float32)).to(x.dtype)))
    tl.store(y_ptr + offs, y, mask=offs < n + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_masked_load_select_and_store(dtype):
    x = torch.linspace(-3, 3, 40).to(dtype)
    y = torch.full((40,), float("nan"), dtype=dtype)
    launch(select_kernel, x, y, 37, grid=(3,), BLOCK=16)
    which = torch.arange(37) % 3
    assert torch.equal(y[:37], torch.where(which == 0, 0, torch.where(which == 1, x[:37], -x[:37])))
    assert y[37] == 0 and y[38:].isnan().all()


@triton.jit
def descriptor_kernel(x_desc, y_desc, M: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0) * M
    x = x_desc.load([1, row, 0]).reshape(M, N)
    y_desc.store([row, 0], (x.to(tl.float32) * 2).to(y_desc.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_descriptors_fill_and_clip(dtype):
    x = integers(2, 12, 16, dtype=dtype)
    y = torch.full((13, 16), float("nan"), dtype=dtype)
    boxes = TensorDescriptor.from_tensor(x, [1, 8, 16]), TensorDescriptor.from_tensor(y, [8, 16])
    launch(descriptor_kernel, *boxes, grid=(2,), M=8, N=16)
    assert torch.equal(y, torch.cat([x[1] * 2, torch.zeros(1, 16, dtype=dtype)]))


@triton.jit
def double(x, amount):
    return x * amount


@triton.jit(do_not_specialize=["n", "width"])
def arguments_kernel(
    pointers,  # two inputs [n]
    strides,
    bias_ptr,  # [width] or None
    y_ptr,  # [n]
    n,
    width,
    far,
    EPILOGUE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = start + tl.arange(0, BLOCK)
    row, column = offs // width, offs % width
    # Past 2^31 elements and back: unless offsets are 64 bits wide the load is out of bounds.
    away = offs + far
    x = tl.load(pointers[0] + away * strides[0] - far, mask=offs < n, other=0.0).to(tl.float32)
    for i in range(width // 2, width):
        x += i % 3
    if width > 100:
        x = x * float("nan")
    z = tl.load(pointers[1] + (row * width + column) * strides[1], mask=offs < n, other=0.0).to(tl.float32)
    y = EPILOGUE(x + z, 2)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column).to(tl.float32)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "none"])
def test_kinds_of_arguments(dtype, with_bias):
    n, width = 35, 7
    x, z, bias = (integers(size, dtype=dtype, seed=size) for size in (n, 2 * n, width))
    y = torch.full((n,), float("nan"), dtype=dtype)
    arguments = (x, z), (1, 2), bias if with_bias else None, y, n, width, 2**33
    launch(arguments_kernel, *arguments, grid=(3,), EPILOGUE=double, BLOCK=16)
    expected = 2 * (x.float() + sum(i % 3 for i in range(3, 7)) + z[::2].float())
    if with_bias:
        expected += bias.float().repeat(n // width)
    assert torch.equal(y, expected.to(dtype))


def test_launches_from_four_threads():
    def product(seed: int) -> bool:
        a, b = integers(16, 32, dtype=torch.bfloat16, seed=seed), integers(16, 32, dtype=torch.bfloat16, seed=-seed)
        y = torch.full((16, 16), float("nan"))
        launch(dot_kernel, a, b, y, 2, PRECISION="ieee", M=16, N=16, K=32, BLOCK_K=16)
        return torch.equal(y, a.float() @ b.float().T)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # launches then meet without the lock; at Python's 5 ms they seldom do
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(product, range(40)))
    finally:
        sys.setswitchinterval(interval)


def test_the_lock_is_reentrant():
    with interpreter.LOCK:
        assert_same_bits(interpreted_cast(EVERY_BF16, torch.float32), EVERY_BF16.float())


def test_applying_again_changes_nothing():
    from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

    before = dict(vars(InterpreterBuilder)), interpreter_builder.options
    interpreter.apply()
    assert (dict(vars(InterpreterBuilder)), interpreter_builder.options) == before


def test_interpreting_is_as_triton_saw_it():
    code = (
        "import os; from fastconv.kernels.launch.interpreter import interpreting; "
        "os.environ['TRITON_INTERPRET'] = '1'; print(interpreting())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    seen = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "False"
