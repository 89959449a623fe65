"""Memory formats are PyTorch's, over generated shapes and strides."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._prims_common import suggest_memory_format

from fastconv.kernels.problem.layout import (
    contiguous_channels,
    dense_copy,
    is_channels_last,
    load_width,
    needs_int64,
    pixel_strides,
    strides_like,
)

SHAPES = st.lists(st.integers(1, 4), min_size=3, max_size=5).map(tuple)


@given(SHAPES, st.data())
def test_channels_last_is_pytorchs_rule(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Every order of axes in memory, with gaps; rank 1 counts as rank 2 of height one."""
    order = data.draw(st.permutations(range(len(shape))))
    gaps = data.draw(st.lists(st.integers(0, 2), min_size=len(shape), max_size=len(shape)))
    strides, step = [0] * len(shape), 1
    for axis, gap in zip(order, gaps, strict=True):
        strides[axis] = step + gap
        step = strides[axis] * shape[axis]
    tensor = torch.empty_strided(shape, strides)
    judged = tensor.unsqueeze(2) if tensor.dim() == 3 else tensor
    assert is_channels_last(shape, strides) == (suggest_memory_format(judged) != torch.contiguous_format)


@given(SHAPES)
def test_strides_like(shape: tuple[int, ...]) -> None:
    assert strides_like(shape, False) == torch.empty(shape).stride()
    if len(shape) > 3:
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        assert strides_like(shape, True) == torch.empty(shape, memory_format=memory_format).stride()
    assert all(dense_copy(shape, strides_like(shape, last), last) is None for last in (False, True))


def test_copies_only_if_needed() -> None:
    nhwc = torch.empty(2, 8, 5, 4, memory_format=torch.channels_last)
    assert contiguous_channels(nhwc.shape, nhwc.stride()) is None
    narrowed = nhwc[:, 2:6, ::2, 1:]
    assert contiguous_channels(narrowed.shape, narrowed.stride()) is None
    assert dense_copy(narrowed.shape, narrowed.stride(), True) == (36, 1, 12, 4)
    nchw = torch.empty(2, 8, 5, 4)
    assert contiguous_channels(nchw.shape, nchw.stride()) == nhwc.stride()
    single = torch.empty(2, 1, 5, 4)
    assert contiguous_channels(single.shape, single.stride()) is None
    assert dense_copy((4,), (2,)) == dense_copy((4,), (0,)) == (1,)
    assert dense_copy((1,), (7,)) is None


def test_axes_of_size_one_have_no_stride() -> None:
    assert pixel_strides((2, 8, 1, 4), (77, 1, 33, 8)) == (77, 0, 0, 8)
    assert pixel_strides((2, 8, 5), (40, 1, 8)) == (40, 0, 0, 8)
    assert pixel_strides((1, 8, 2, 3, 4), (192, 1, 96, 32, 8)) == (0, 96, 32, 8)


def test_vector_is_sixteen_bytes_or_nothing() -> None:
    assert load_width(torch.bfloat16, 24, 48, 0) == 8
    assert load_width(torch.bfloat16, 24, 44) == 1
    assert load_width(torch.float32, 12, 36) == 4
    assert load_width(torch.float32, 3, 36) == 1


def test_wide_counts_the_last_element() -> None:
    assert not needs_int64(((2, 64, 1, 4096, 4096), (2**30, 2**30, 2**18, 64)))
    assert needs_int64(((2, 65, 1, 4096, 4096), (2**30, 2**30, 2**18, 64)))
