"""Tensor maps and the copies they describe: boxes, edges, swizzles, rounding, and the limits of a map."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.emulator.tests import kernels
from tests.emulator.tests.helpers import FLOAT16, blank, tensor_map, whole

pytestmark = pytest.mark.usefixtures("hopper")
PLACES = pytest.mark.parametrize("place", [(0, 0), (-3, 0), (0, -32), (5, 16), (-8, 64), (7, 96)], ids=str)


@PLACES
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32], ids=str)
def test_boxes_over_the_edges(asynchrony, dtype, place) -> None:
    x, out = whole(11, 80, dtype=dtype, limit=100), torch.full((11, 80), 77, dtype=dtype)
    kernels.copy_box[(1,)](*(TensorDescriptor.from_tensor(it, [8, 32]) for it in (x, out)), *place)
    expected = torch.full((11, 80), 77, dtype=dtype)
    rows, columns = (slice(max(0, at), max(0, at + size)) for at, size in zip(place, (8, 32), strict=True))
    expected[rows, columns] = x[rows, columns]
    assert torch.equal(out, expected)


def test_zeros_outside(asynchrony) -> None:
    x, out = whole(20, 40, dtype=torch.float16), blank(16, 64, dtype=torch.float16)
    kernels.read_box[(1,)](TensorDescriptor.from_tensor(x, [16, 64]), out, -3, -6, 16, 64)
    expected = torch.zeros(16, 64, dtype=torch.float16)
    expected[3:, 6:46] = x[:13]
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("columns", "swizzle"), [(16, 1), (32, 2), (64, 3)])
def test_plain_loads_read_swizzled_boxes(columns: int, swizzle: int) -> None:
    x, out = whole(32, columns, dtype=torch.float16, limit=1000), blank(32, columns, dtype=torch.float16)
    binary = kernels.read_box[(1,)](TensorDescriptor.from_tensor(x, [32, columns]), out, 0, 0, 32, columns)
    assert binary.metadata.tensordesc_meta[0]["swizzle"] == swizzle
    assert torch.equal(out, x)


@pytest.mark.skipif(
    "round_f32_to_tf32" not in inspect.signature(TensorDescriptor).parameters, reason="Triton's maps cannot round"
)
def test_a_map_of_tf32_rounds_to_nearest() -> None:
    x, out = torch.randn(32, 32), blank(32, 32)
    described = TensorDescriptor.from_tensor(x, [32, 32], round_f32_to_tf32=True)
    kernels.read_box[(1,)](described, out, 0, 0, 32, 32)
    mantissa, exponent = np.frexp(x.double().numpy())
    expected = np.ldexp(np.rint(mantissa * 2.0**11) / 2.0**11, exponent)
    assert torch.equal(out, torch.from_numpy(expected).float())


LIMITS = {
    "address": ({"offset": 4}, "globalAddress is no multiple of 16"),
    "size 0": ({"sizes": [32, 0]}, "globalDim is not 1 to 2"),
    "stride": ({"strides": [132]}, "globalStrides is no multiple of 16"),
    "box 0": ({"box": [0, 8]}, "boxDim is not 1 to 256"),
    "box 257": ({"box": [8, 257]}, "boxDim is not 1 to 256"),
    "row of 8 bytes": ({"box": [2, 8]}, "inner side of the box is no multiple of 16 bytes"),
    "row of 256 bytes": ({"box": [64, 8], "sizes": [64, 16], "swizzle": 3}, "side of the box exceeds the swizzle"),
    "rank": ({"box": [4] * 6, "sizes": [4] * 6, "strides": [16] * 6}, "rank is not 1 to 5"),
    "type": ({"kind": 99}, "a data type that is not modelled"),
    "steps": ({"steps": [9, 1]}, "elementStrides is not 1 to 8"),
    "swizzle": ({"swizzle": 9}, "an unknown swizzle"),
    "NaN in integers": ({"kind": 3, "fill": 1}, "NaN as filling of integers"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_map_beyond_its_limits_is_refused(name: str) -> None:
    given, reason = LIMITS[name]
    x = torch.zeros(32, 32)
    usual = {"box": [8, 8], "sizes": [32, 32], "strides": [128], "offset": 0}
    tensor_map(x.data_ptr(), **{key: value for key, value in usual.items() if key != "offset"})
    changed = usual | given
    with pytest.raises(ValueError, match=reason):
        tensor_map(x.data_ptr() + changed.pop("offset"), **changed)


def test_triton_tells_the_reason() -> None:
    x, out = torch.zeros(8, 64, dtype=torch.float16), torch.zeros(8, 64, dtype=torch.float16)
    described = TensorDescriptor.from_tensor(x, [8, 64])
    described.strides = [65, 1]
    with pytest.raises(RuntimeError, match="globalStrides is no multiple of 16"):
        kernels.copy_box[(1,)](described, TensorDescriptor.from_tensor(out, [8, 64]), 0, 0)


def test_units_of_a_map() -> None:
    """The same box is wide enough in fp32, and too narrow in fp16."""
    x = torch.zeros(32, 32)
    tensor_map(x, [4, 8])
    with pytest.raises(ValueError, match="no multiple of 16 bytes"):
        tensor_map(x, [4, 8], kind=FLOAT16)
