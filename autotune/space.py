"""Declared search spaces: every parameter with its values, and the rules that throw combinations out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Config = Mapping[str, int]


@dataclass(frozen=True)
class Space:
    """``valid(config)`` names the reason why a combination of ``ranges`` is not to be tried, or returns None.

    ``order`` names the parameters that decide in which order sums are taken; None: any of them may. ``free`` names
    those that decide no binary, so that each problem has the best of their values.
    """

    name: str
    ranges: Mapping[str, tuple[int, ...]]
    valid: Callable[[Config], str | None] = lambda config: None
    order: tuple[str, ...] | None = None
    free: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Config]:
        for values in itertools.product(*self.ranges.values()):
            config = dict(zip(self.ranges, values, strict=True))
            if self.valid(config) is None:
                yield config

    def __contains__(self, config: Config) -> bool:
        return (
            config.keys() == self.ranges.keys()
            and all(value in self.ranges[name] for name, value in config.items())
            and self.valid(config) is None
        )

    def same_order(self, a: Config, b: Config) -> bool:
        """Whether two of its configs sum in the same order."""
        return all(a[name] == b[name] for name in (self.ranges if self.order is None else self.order))
