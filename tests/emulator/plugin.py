"""What a test run on an emulated GPU ends with, and what each of its tests must leave behind: no fault.

The GPU itself comes by ``FASTCONV_DEVICE``; see tests/conftest.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests import emulator


@pytest.fixture(autouse=True)
def _no_fault_is_swallowed() -> Iterator[None]:
    """A launch that fails may be served by PyTorch, and its test pass."""
    it = emulator.current()
    it.fault = None
    yield
    fault, it.fault = it.fault, None
    if fault is not None:
        pytest.fail(f"an emulated launch failed:\n{fault}", pytrace=False)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    # Seconds by kernel, so that they reach the process that reports.
    if call.when == "setup":
        item.stash[_SEEN] = len(emulator.launches())
    elif call.when == "call":
        for launch in emulator.launches()[item.stash.get(_SEEN, 0) :]:
            item.user_properties.append(("emulated", (launch.name, launch.seconds)))
    yield


_SEEN = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    count: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "emulated" and report.when == "call":
                    count[value[0]] += 1
                    seconds[value[0]] += value[1]
    terminalreporter.section("launches on an emulated GPU")
    for name, number in sorted(count.items()):
        terminalreporter.write_line(f"{name:40} {number:6} {seconds[name]:8.1f} s")
