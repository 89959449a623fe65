"""The benchmark of the host's time: its parts are those of the whole call. No time is judged here."""

from __future__ import annotations

import json

import pytest

from fastconv.benchmarks import host
from fastconv.kernels import dispatch, mend


@pytest.mark.compile
@pytest.mark.skipif(mend.interpreting(), reason="one process cannot both interpret and compile")
def test_parts_are_those_of_the_whole_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert host.main(["--calls", "20", "--family", "spatial", "--family", "pool", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = printed["rows"]
    assert 0 < printed["choose_hit_us"] < printed["choose_us"]
    assert [(row["family"], row["gradient"]) for row in rows] == [
        *(("spatial", True), ("spatial", False), ("pool", True), ("pool", False))
    ]
    for row in rows:
        parts = row["parts_us"]
        assert list(parts) == list(host.PARTS) and sum(parts.values()) == pytest.approx(row["us"])
        assert parts["key"] > 0 and parts["hit"] > 0


def test_a_table_has_a_line_for_each_family_with_and_without_a_gradient(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mend, "interpreting", lambda: False)
    parts = dict.fromkeys(host.PARTS, 3.21)
    monkeypatch.setattr(host, "measure", lambda family, gradient, calls: {
        "family": family, "gradient": gradient, "us": float(calls), "parts_us": parts,
    })  # fmt: skip
    assert host.main(["--calls", "77"]) == 0
    printed = capsys.readouterr().out
    for line in (f"{family}, {how} gradient" for family in host.PROBLEMS for how in ("with", "no")):
        assert line in printed
    assert all(word in printed for word in (*host.PARTS, "77.0", "3.2", "the hit 1", "of a known problem: "))


def test_the_autotuners_own_hit_is_timed_and_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    host.choosing(20)
    monkeypatch.setattr(host.chooser, "_decide", lambda *_: pytest.fail("not known"))
    whole, hit = host.choosing(20)
    assert 0 < hit < whole


@pytest.mark.parametrize("given", [["--family", "cubic"], ["--calls", "1"]])
def test_bad_usage_is_refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        host.main(given)
    assert given[1] in capsys.readouterr().err


def test_every_family_has_a_problem() -> None:
    assert host.PROBLEMS.keys() == {family.name for families in dispatch.FAMILIES.values() for family in families}
