"""Fused calls noted."""

from collections.abc import Iterator
from typing import Any

import pytest

from fusing import how
from plainly import fused_by_torch


@pytest.fixture
def calls() -> Iterator[list[Any]]:
    """The fused calls made."""
    with fused_by_torch(how) as made:
        yield made
