"""Bad usage: what a command cannot do, said in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class BadUsage(Exception):
    """What the user asked for cannot be done; the message is one line and says what would work."""


@contextlib.contextmanager
def bad_usage() -> Iterator[None]:
    """Raise BadUsage for a ValueError of the block: benchmarks look up what the user named and refuse by ValueError."""
    try:
        yield
    except ValueError as error:
        raise BadUsage(str(error)) from error
