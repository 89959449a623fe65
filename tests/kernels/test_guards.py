"""Every family of every direction runs in guarded and poisoned memory, and the guards see accesses out of bounds."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from convolutions import DEVICE, Case, check_exact
from fastconv.autotune import gpus
from fastconv.kernels import dispatch
from fastconv.kernels.dispatch import FAMILIES
from fastconv.kernels.families.batch_norm import Activated
from fastconv.kernels.launch import interpreter
from fastconv.kernels.ops import batch_norm, conv, pool
from fastconv.kernels.problem.conv import DIRECTIONS
from guards import guarded

pytestmark = pytest.mark.skipif(not interpreter.interpreting(), reason="guards memory in the interpreter")

# A problem that each family serves, of odd sizes.
PROBLEMS = {
    "depthwise": Case("", 2, 6, 6, (5, 3), (3, 2), (2, 1), (1, 0), groups=6),
    "grouped": Case("", 2, 6, 4, (5, 3), (3, 2), (2, 1), (1, 0), groups=2),
    "rows": Case("", 2, 3, 5, (5, 8), (3, 3), (2, 2), (1, 1)),
    "row_boxes": Case("", 17, 4, 24, (4, 6), (5, 5), (2, 2), (2, 2)),  # The interpreter takes boxes of few others.
    "gemm": Case("", 3, 24, 40, (3, 3), (1, 1)),
    "pixels": Case("", 17, 8, 24, (3, 2), (3, 2), (1, 1), (1, 1)),
    "spatial": Case("", 2, 24, 8, (5, 7), (3, 3), (1, 1), (1, 1)),
    "gather": Case("", 2, 3, 5, (5, 3), (3, 2), (2, 1), (1, 0)),
}


@pytest.mark.parametrize(
    ("direction", "family"), [(d, family.name) for d in DIRECTIONS for family in FAMILIES[d]], ids=str
)
def test_every_family_of_convolutions(direction: str, family: str) -> None:
    problem = PROBLEMS[family].problem(torch.bfloat16)
    before = sum(guarded.values())
    with dispatch.use_target(gpus.H200), dispatch.only_family(family):
        records = check_exact(problem, results=(direction,))
    assert records and sum(guarded.values()) - before == len(records)


def test_every_other_kernel() -> None:
    """Pools, batch norm's passes and sums."""
    before = guarded.copy()
    x = torch.randn(3, 5, 7, 6)
    geometry = (3, 2), (2, 1), (1, 0), (1, 1)
    y, taps = pool.max_pool(x, (4, 5), geometry, torch.uint8)
    pool.max_pool_backward(y, taps, (7, 6), geometry, False)
    pool.max_pool_gather(taps, x, geometry, False)
    pool.average_pool_backward(pool.average_pool(x, (4, 5), geometry, True, 0), (7, 6), geometry, False, True, 0)
    how, vector = Activated(1e-3, "silu"), torch.rand(5) + 0.5
    norm = (vector,) * 4
    sums = batch_norm.batch_norm_act_sums(x, x, None, norm, None, None, how)
    batch_norm.batch_norm_act_gradient(x, x, None, norm, None, x, sums, 0.1, how, True)
    batch_norm.batch_norm_act(x, norm, None, x, how)
    conv.channel_sum(x)
    conv.conv_statistics(x, torch.randn(4, 5, 3, 3), None, None, (1, 1), (1,) * 4, (1, 1), 1)
    seen = set(guarded - before)
    assert {"combine_statistics_kernel", "batch_norm_act_sums_kernel", "channel_sum_kernel"} <= seen
    assert len([name for name in seen if "pool" in name]) >= 3


@triton.jit
def copy_kernel(x_ptr, y_ptr, COUNT: tl.constexpr):
    offs = tl.arange(0, 8)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < COUNT, other=0.0), mask=offs < COUNT)


@triton.jit
def box_kernel(x, y):
    y.store([0], x.load([0]))


def test_the_guard_sees_accesses_outside_an_operand() -> None:
    x, y = torch.zeros(16), torch.zeros(16)
    copy_kernel[(1,)](x[:5], y[:5], 5)
    for source, target in ((x[:4], y[:5]), (x[:5], y[:4])):
        with pytest.raises(Exception, match="memory of no operand's"):
            copy_kernel[(1,)](source, target, 5)
    whole = TensorDescriptor(x[:5], [5], [1], [8])
    box_kernel[(1,)](whole, TensorDescriptor(y[:5], [5], [1], [8]))
    with pytest.raises(Exception, match="memory of no operand's"):
        box_kernel[(1,)](TensorDescriptor(x[:4], [5], [1], [8]), TensorDescriptor(y[:5], [5], [1], [8]))


def test_new_memory_is_poisoned() -> None:
    x = torch.ones(3, device=DEVICE)
    assert x.new_empty(2).isnan().all() and torch.empty_like(x).isnan().all()
    assert (x.new_empty_strided((2,), (1,), dtype=torch.uint8) == 251).all()
