"""A call is prepared once, whichever operator makes it."""

from collections.abc import Callable

import pytest
import torch

from fastconv.kernels import dispatch
from fastconv.kernels.ops import call, conv, pool
from tests.marks import DEVICE, runs_kernels

pytestmark = runs_kernels
CALLS = {
    "conv": lambda x: conv.conv_fprop(x, x.new_ones(16, 8, 1, 1), None, (1, 1), (0,) * 4, (1, 1), 1),
    "pool": lambda x: pool.max_pool(x, (2, 2), ((2, 2), (2, 2), (0, 0), (1, 1)), torch.uint8),
}


@pytest.mark.parametrize("run", CALLS.values(), ids=CALLS)
def test_known_calls_are_planned_once(run: Callable[[torch.Tensor], object], monkeypatch) -> None:
    planned = []
    plan = dispatch.plan
    monkeypatch.setattr(dispatch, "plan", lambda *a: planned.append(a) or plan(*a))
    monkeypatch.setattr(call, "_calls", {})
    x = torch.ones(1, 8, 4, 4, device=DEVICE)
    for _ in range(3):
        run(x)
    assert len(planned) == 1
    monkeypatch.setattr(call, "MAX_CALLS", 1)
    run(x.new_ones(2, 8, 4, 4))
    assert len(call._calls) == 1
