"""The benchmark of the host's time. No time is judged here."""

import json

import pytest

from fastconv.benchmarks import host
from fastconv.kernels import dispatch
from tests.marks import compiling


@pytest.mark.compile
@compiling
def test_every_kind_of_call_has_a_time(capsys, monkeypatch) -> None:
    monkeypatch.setattr(host, "ROUNDS", 1)
    monkeypatch.setattr(host, "CALLS", 2)
    assert host.main(["--only", "gemm", "--only", "max_pool", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["us"]
    assert list(rows) == ["gemm", "max_pool"]
    for times in rows.values():
        assert list(times) == ["forward", "with a graph", "backward"] and min(times.values()) > 0


def test_every_family_has_a_problem() -> None:
    served = {family for family, *_ in host.PROBLEMS.values()}
    assert served == {family.name for families in dispatch.FAMILIES.values() for family in families}
