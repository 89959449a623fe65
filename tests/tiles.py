"""Tiles that a test names, whatever would be chosen."""

from collections.abc import Callable
from typing import Any

import pytest

from fastconv.autotune import Choice, Config
from fastconv.kernels.ops import call
from fastconv.kernels.tiles import autotuned


def take_tile(
    monkeypatch: pytest.MonkeyPatch, tile: Config | Callable[[Any], Config], spaces: tuple[str, ...] = ("conv",)
) -> None:
    """Let problems of the spaces that begin so have ``tile``, or what it says of a problem's features."""

    def taken(space: Any, features: Any, work: Any, gpu: Any, choice: Choice) -> Choice:
        if not space.name.startswith(spaces):
            return choice
        named = tile(features) if callable(tile) else tile
        return Choice({"num_warps": 4, "num_stages": 1, **named}, "this test", 0.0, "nothing")

    monkeypatch.setattr(autotuned, "_considering", [*autotuned._considering, taken])
    monkeypatch.setattr(call, "_calls", {})
