"""Declared search spaces: every parameter with its values, and the rules that throw combinations out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Config = Mapping[str, int]


@dataclass(frozen=True)
class Space:
    """``valid(config)`` names the reason why a combination of ``ranges`` is not to be tried, or returns None."""

    name: str
    ranges: Mapping[str, tuple[int, ...]]
    valid: Callable[[Config], str | None] = lambda config: None

    def __iter__(self) -> Iterator[Config]:
        for values in itertools.product(*self.ranges.values()):
            config = dict(zip(self.ranges, values, strict=True))
            if self.valid(config) is None:
                yield config
