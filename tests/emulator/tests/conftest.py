"""The emulator's own tests need a process on an emulated GPU: FASTCONV_DEVICE=tests.emulator:H200, or A100."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastconv.kernels.launch.device import here
from tests import emulator
from tests.emulator.device import Emulated


def pytest_runtest_setup(item: pytest.Item) -> None:
    if not isinstance(here, Emulated):
        pytest.skip("the emulator's own tests: need FASTCONV_DEVICE=tests.emulator:H200")


@pytest.fixture(params=["late", "early"])
def asynchrony(request: pytest.FixtureRequest) -> Iterator[str]:
    """When asynchronous copies and products happen: at the wait that covers them, or at once."""
    with emulator.options(late=request.param == "late"):
        yield request.param


@pytest.fixture
def hopper() -> None:
    if emulator.current().gpu.arch < 90:
        pytest.skip("instructions of sm_90")
