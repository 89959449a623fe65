"""Views of operands that bulk copies move, and the host's cache of their descriptors."""

from collections import OrderedDict

import pytest
import torch
import triton
import triton.language as tl

from convolutions import DEVICE
from fastconv.kernels.launch import descriptor, interpreter
from fastconv.kernels.launch.descriptor import Descriptor, aligned
from fastconv.kernels.launch.launch import Launch, run
from tests.marks import runs_kernels

pytestmark = runs_kernels


@triton.jit
def copy_kernel(
    x,  # [H, W, N, C], strides of any order
    y,  # [W, N, C]
    row,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    box = x.load([row, tl.program_id(0), 0, 0]).reshape(BLOCK_N, BLOCK_C)
    y.store([tl.program_id(0), 0, 0], box.reshape(1, BLOCK_N, BLOCK_C))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", [0, 16], ids="start {}".format)
def test_a_permuted_view_is_copied_box_by_box(dtype: torch.dtype, start: int) -> None:
    n, h, w, c = 3, 4, 5, 24
    x = torch.randn(n, h, w, c).to(DEVICE, dtype)
    y = torch.full((w, n, c), torch.nan, dtype=dtype, device=DEVICE)
    view = Descriptor(dtype, (h, w, n, c - start), (w * c, c, h * w * c, 1), (1, 1, 4, 32), start)
    result = Descriptor(dtype, (w, n, c), (n * c, c, 1), (1, 4, 32))
    launch = Launch(copy_kernel, (w, 1, 1), (view, result), (2,), {"BLOCK_N": 4, "BLOCK_C": 32}, 4, 1)
    run(launch, x, y)
    expected = torch.zeros(w, n, c, dtype=dtype, device=DEVICE)
    expected[..., : c - start] = x[:, 2, :, start:].transpose(0, 1)
    assert torch.equal(y, expected)


def test_the_type_names_only_the_box() -> None:
    small = Descriptor(torch.bfloat16, (4, 64), (64, 1), (16, 32))
    large = Descriptor(torch.bfloat16, (4000, 128), (256, 1), (16, 32), 64)
    assert str(small) == str(large) == "tensordesc<bf16[16,32]>"
    launches = [Launch(copy_kernel, (1, 1, 1), (d, d), (0,), {}, 4, 1) for d in (small, large)]
    assert launches[0].compile_key == launches[1].compile_key


def test_descriptors_are_kept_by_address_and_few(monkeypatch) -> None:
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    monkeypatch.setattr(descriptor, "MAX_DESCRIPTORS", 2)
    monkeypatch.setattr(descriptor, "_descriptors", OrderedDict())
    view = Descriptor(torch.float32, (4, 4), (8, 1), (4, 4), 4)
    x = torch.zeros(64)
    kept = view.of(x)
    assert view.of(x) is kept and view.of(x.view(8, 8)) is kept
    assert kept.base.data_ptr() == x.data_ptr() + 16
    assert kept.base.dtype is torch.float32 and not isinstance(kept.base, torch.Tensor), "memory would stay allocated"
    for start in (4, 8, 12):
        assert view.of(x[start:]) is not kept
        assert view.of(x) is kept, "the one that is used again stays"
    assert len(descriptor._descriptors) == 2


def test_alignment() -> None:
    x = torch.zeros(64, dtype=torch.bfloat16)
    assert [aligned(x[i:]) for i in (0, 4, 8)] == [True, False, True]
    with pytest.raises(AssertionError):
        Descriptor(torch.bfloat16, (4, 4), (4, 1), (4, 4))
