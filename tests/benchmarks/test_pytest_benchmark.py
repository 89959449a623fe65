"""The registry under pytest-benchmark: one operator of it, so that ``pytest benchmarks/`` works."""

from pathlib import Path

import pytest

from tests.marks import interpreted

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Outcomes:
    """A plugin that keeps how each test ended."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.found[report.nodeid.partition("[")[2]] = report.outcome


@interpreted
def test_each_side_of_one_operator_is_run() -> None:
    outcomes = Outcomes()
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "--benchmark-disable", "-k", "pool-backward and not compile")
    assert pytest.main([str(BENCHMARKS), "-q", *options], plugins=[outcomes]) == pytest.ExitCode.OK
    names = ("eager", "fastconv", "fastconv-nchw", "eager-nchw")
    assert outcomes.found == {f"pool-backward-{name}]": "passed" for name in names}
