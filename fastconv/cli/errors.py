"""Bad usage: a command says in one line what it cannot do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class BadUsage(Exception):
    """The user asks for what cannot be done. The message is one line and says what would work."""


@contextlib.contextmanager
def bad_usage() -> Iterator[None]:
    """Raise BadUsage for a ValueError of the block, by which benchmarks refuse what the user names."""
    try:
        yield
    except ValueError as error:
        raise BadUsage(str(error)) from error
