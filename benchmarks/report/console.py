"""Where a command writes: a console, and one progress bar on it that leaves nothing behind."""

from __future__ import annotations

from rich import progress
from rich.console import Console

LOG_WIDTH = 200  # columns of a table in a file or a pipe, which say no width


def console() -> Console:
    """Standard output."""
    screen = Console()
    return screen if screen.is_terminal else Console(width=LOG_WIDTH)


class Progress:
    """``begin`` a stage, ``tick`` each of its steps."""

    def __init__(self, console: Console) -> None:
        columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn())
        self._bar = progress.Progress(*columns, progress.TimeElapsedColumn(), console=console, transient=True)
        self._stage = self._bar.add_task("", visible=False)
        self._name = ""

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, name: str, steps: int) -> None:
        self._name = name
        self._bar.reset(self._stage, total=steps, description=name, visible=True)

    def tick(self, step: str = "") -> None:
        self._bar.update(self._stage, advance=1, description=f"{self._name}: {step}" if step else self._name)
