"""Each family in each direction twice: a launch that compiles and loads, and one that is made again by what was kept.

With tests/api/test_twice.py, what is to be run first on a GPU that nobody tried before.
"""

import pytest
import torch

from convolutions import DEVICE, check_exact
from fastconv.kernels import dispatch
from fastconv.kernels.dispatch import FAMILIES
from fastconv.kernels.problem.conv import DIRECTIONS
from tests.kernels.test_guards import PROBLEMS
from tests.marks import runs_kernels

pytestmark = runs_kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("direction", "family"), [(d, family.name) for d in DIRECTIONS for family in FAMILIES[d]], ids=str
)
def test_each_family(direction: str, family: str, dtype: torch.dtype, record_property) -> None:
    problem = PROBLEMS[family].problem(dtype)
    with dispatch.only_family(family):
        plan = dispatch.plan(direction, problem, dispatch.target(torch.device(DEVICE)))
        if plan.family == "pytorch":
            pytest.skip(f"{family}: {dict(plan.reasons).get(family)}")
        first, again = (check_exact(problem, results=(direction,)) for _ in range(2))
    assert [it.launch for it in first] == [it.launch for it in again] and first
    record_property("problem", (family, direction, f"{dtype}"))
