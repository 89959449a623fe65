"""The benchmark of the host's time: its parts are those of the whole call. No time is judged here."""

from __future__ import annotations

import pytest

from fastconv.kernels import mend


@pytest.mark.compile
@pytest.mark.skipif(mend.interpreting(), reason="one process cannot both interpret and compile")
def test_parts_are_those_of_the_whole_call(capsys: pytest.CaptureFixture[str]) -> None:
    from fastconv.benchmarks import host

    result = host.measure(calls=40)
    parts = result["parts_us"]
    names = list(parts)
    assert (names[0], names[-1], len(names)) == ("arguments", "launch, up to the driver", 6)
    assert sum(parts.values()) == pytest.approx(result["with_graph_us"])
    assert host.main(["--calls", "40"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
