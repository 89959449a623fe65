"""Measuring one problem in one process: clocks, captures, a problem as something to run, the process that times it."""


def reason(error: BaseException) -> str:
    """An exception as one line of a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
