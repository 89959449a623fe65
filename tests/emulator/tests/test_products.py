"""Products of tensor cores against NumPy's, of whole numbers: every sum is exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.emulator.tests import kernels
from tests.emulator.tests.helpers import blank, whole

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "tf32"])
LAYOUTS = pytest.mark.parametrize("layouts", ["nn", "nt", "tn", "tt"])  # t: the operand lies transposed


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.matmul(a.double().numpy(), b.double().numpy())).float()


def matmul(a: torch.Tensor, b: torch.Tensor, tile: tuple[int, int, int], precision: str = "tf32", **how: int):
    (m, k), (_, n) = a.shape, b.shape
    out = blank(m, n)
    block_m, block_n, block_k = tile
    kernels.matmul[(-(-m // block_m), -(-n // block_n))](
        a, b, out, m, n, k, *a.stride(), *b.stride(), block_m, block_n, block_k, precision, **how
    )
    return out


@DTYPES
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize(
    ("shape", "tile"),
    [((64, 64, 64), (64, 64, 64)), ((100, 72, 96), (64, 64, 32)), ((16, 32, 40), (16, 32, 16))],
    ids=["one tile", "edges", "mma.sync"],
)
def test_operands_by_cp_async(dtype, stages, shape, tile, asynchrony) -> None:
    m, n, k = shape
    a, b = whole(m, k, dtype=dtype), whole(k, n, dtype=dtype)
    assert torch.equal(matmul(a, b, tile, num_stages=stages), product(a, b))


@DTYPES
@LAYOUTS
def test_operands_in_every_layout(dtype, layouts) -> None:
    a, b = whole(64, 96, dtype=dtype), whole(96, 128, dtype=dtype)
    x, y = (it.T.contiguous().T if layout == "t" else it for it, layout in zip((a, b), layouts, strict=True))
    assert torch.equal(matmul(x, y, (64, 128, 32)), product(a, b))


def described(a: torch.Tensor, b: torch.Tensor, tile: tuple[int, int, int], layouts: str, in_registers: bool):
    """The product of boxes; doubled if `a` goes through registers."""
    block_m, block_n, block_k = tile
    (m, k), (_, n) = a.shape, b.shape
    out = blank(m, n, dtype=a.dtype)
    boxes = [[block_m, block_k], [block_k, block_n]]
    operands = []
    for x, box, layout in zip((a, b), boxes, layouts, strict=True):
        if layout == "t":
            x, box = x.T.contiguous(), box[::-1]
        operands.append(TensorDescriptor.from_tensor(x, box))
    operands.append(TensorDescriptor.from_tensor(out, [block_m, block_n]))
    kernels.matmul_of_boxes[(m // block_m, n // block_n)](
        *operands, k, *tile, layouts[0] == "t", layouts[1] == "t", in_registers, num_stages=2
    )
    return out


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("in_registers", [False, True], ids=["shared", "registers"])
def test_wgmma_in_every_layout(hopper, asynchrony, dtype, layouts, in_registers) -> None:
    if dtype == torch.float32 and layouts != "nt":
        pytest.skip("wgmma takes TF32 with K innermost only")
    a, b = whole(128, 192, dtype=dtype, limit=1), whole(192, 64, dtype=dtype, limit=1)
    expected = product(a, b) * (2 if in_registers else 1)
    assert torch.equal(described(a, b, (64, 64, 64), layouts, in_registers).float(), expected)


@pytest.mark.parametrize("tile", [(64, 16, 16), (64, 32, 32), (128, 256, 16), (128, 128, 64)], ids=str)
@LAYOUTS
def test_wgmma_of_every_swizzle(hopper, tile, layouts) -> None:
    """Boxes' rows of 32, 64 and 128 bytes, and boxes wider than the longest row."""
    m, n, k = tile
    a, b = whole(m, 2 * k, dtype=torch.float16), whole(2 * k, n, dtype=torch.float16)
    assert torch.equal(described(a, b, tile, layouts, False).float(), product(a, b))


@pytest.mark.parametrize("tile", [(16, 16, 16), (64, 64, 32)], ids=["mma.sync", "wgmma on Hopper"])
def test_tensor_cores_ignore_low_bits_of_tf32(tile) -> None:
    below = 1 + 2.0**-10 - 2.0**-23  # the nearest TF32 number is 1 + 2**-10
    a, b = torch.full((64, 32), below), torch.ones(32, 64)
    assert torch.equal(matmul(a, b, tile), torch.full((64, 64), 32.0))


def test_fp32_without_tensor_cores() -> None:
    a, b = torch.randn(32, 64), torch.randn(64, 32)
    torch.testing.assert_close(matmul(a, b, (32, 32, 32), "ieee"), product(a, b))
