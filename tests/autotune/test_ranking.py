"""Statistics of the cost model: by hand on small numbers."""

import pytest

from fastconv.autotune.ranking import fits, rank_correlation, ranks, regret, summary
from tests.autotune.making import measured, problem


def test_equal_values_share_a_rank() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]


@pytest.mark.parametrize(
    ("predicted", "correlation"), [([1, 2, 3, 4], 1.0), ([4, 3, 2, 1], -1.0), ([2, 1, 4, 3], 0.6), ([1, 1, 1, 1], 0.0)]
)
def test_rank_correlation(predicted: list[float], correlation: float) -> None:
    assert rank_correlation(predicted, [10, 20, 30, 40]) == pytest.approx(correlation)


def test_regret_is_of_the_best_among_the_first() -> None:
    predicted, times = [1.0, 2.0, 3.0], [4.0, 3.0, 2.0]
    assert [regret(predicted, times, first) for first in (1, 2, 3)] == pytest.approx([1.0, 0.5, 0.0])


def test_fits_are_of_problems_with_three_configs_at_their_best_times() -> None:
    records = [measured(index, seconds=seconds, predicted=index + 1.0) for index, seconds in enumerate((4.0, 3.0, 2.0))]
    records += [measured(0, seconds=9.0, predicted=1.0), measured(7, "hung"), measured(8, config=None)]
    records += [measured(index, of=problem(N=1)) for index in range(2)]
    (fit,) = fits(records)
    assert (fit.configs, fit.correlation, fit.top1, fit.top5) == (3, -1.0, 1.0, 0.0)
    total = summary([fit, fit])
    assert total is not None and (total.problems, total.correlation, total.top1) == (2, -1.0, 1.0)
    assert summary([]) is None
