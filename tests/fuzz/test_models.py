"""Random small models, plain beside converted, over random operations: what one shows, so does the other.

FASTCONV_FUZZ=N: that many models, other ones each time; without it, the same few. A failure ends with its number and
with lines to paste here.
"""

import os
import random
from collections import Counter
from typing import Any

import pytest

from fastconv.kernels.launch import interpreter
from plainly import fused_by_torch, fused_calls
from tests.fuzz.models import Case, case
from tests.fuzz.shrink import shrink
from tests.fuzz.worlds import Differs, check

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    *[pytest.mark.gpu] * (not interpreter.interpreting()),
]

NUMBER = int(os.environ.get("FASTCONV_FUZZ", 0))
FIRST = random.SystemRandom().randrange(10**9) if NUMBER else 0


# How it is computed, how many models.
@pytest.mark.parametrize(("real", "few"), [(False, 220), (True, 10)], ids=["by torch", "by kernels"])
def test_models(real: bool, few: int, record_property) -> None:
    def run(case: Case) -> list[str]:
        with fused_calls() if real else fused_by_torch(float64=True) as made:
            check(case.source, case.operations, real)
        return made

    counts: Counter[str] = Counter()
    for number in range(FIRST, FIRST + (max(1, NUMBER * few // 220) if NUMBER else few)):
        try:
            made = run(case(number))
        except Differs as error:
            pytest.fail(f"model {number}: {_lines(case(number), error.kind, run)}", pytrace=False)
        counts.update(models=1, fused=int(bool(made)), calls=len(made))
    text = "fuzzed models, {}: {models}, {fused} of them with {calls} fused calls"
    record_property("line", text.format("on kernels" if real else "on PyTorch's operators", **counts))
    # A few models, drawn anew each time, may have no fused call.
    assert NUMBER or counts["fused"] >= 0.4 * counts["models"]


def _lines(failing: Case, kind: str, run: Any) -> str:
    """A smaller case that fails in the same way, and how."""

    def fails(case: Case) -> bool:
        try:
            run(case)
        except Differs as error:
            return error.kind == kind
        except Exception:  # the smaller source may not even compile
            return False
        return False

    smaller = shrink(failing, fails)
    try:
        run(smaller)
    except Differs as error:
        return f"{error}\n\nwith fused_by_torch(float64=True):\n    {smaller!r}"
    raise AssertionError(f"fails only now and then:\n{failing!r}")
