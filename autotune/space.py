"""Declared search spaces: every parameter with its values, and the rules that throw combinations out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

Config = Mapping[str, int]
SpaceType = TypeVar("SpaceType", bound="Space")


@dataclass(frozen=True)
class Space:
    """``valid(config)`` says why a combination of ``ranges`` is not tried, or None.

    ``order`` names the parameters that decide in which order sums are taken; None: any of them may. ``free`` names
    those that decide no binary: each problem has the best of their values.
    """

    name: str
    ranges: Mapping[str, tuple[int, ...]]
    valid: Callable[[Config], str | None] = lambda config: None
    order: tuple[str, ...] | None = None
    free: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Config]:
        return (config for config in self.combinations() if self.valid(config) is None)

    def combinations(self) -> Iterator[Config]:
        """Every combination of the values, valid or not."""
        for values in itertools.product(*self.ranges.values()):
            yield dict(zip(self.ranges, values, strict=True))

    def __contains__(self, config: Config) -> bool:
        return (
            config.keys() == self.ranges.keys()
            and all(value in self.ranges[name] for name, value in config.items())
            and self.valid(config) is None
        )

    def narrowed(
        self: SpaceType,
        only: Mapping[str, Iterable[int]] = {},
        at_least: Mapping[str, int] = {},
        at_most: Mapping[str, int] = {},
    ) -> SpaceType:
        """The space with other values of the parameters named: ``only`` those given, the smallest that is ``at_least``
        the number, all that are ``at_most`` the number (the smallest stays in any case)."""
        ranges = {**self.ranges, **{name: tuple(values) for name, values in only.items()}}
        for name, most in at_most.items():
            ranges[name] = tuple(value for value in ranges[name] if value <= max(most, min(ranges[name])))
        for name, least in at_least.items():
            ranges[name] = (min(value for value in ranges[name] if value >= least),)
        return replace(self, ranges=ranges)

    def same_order(self, a: Config, b: Config) -> bool:
        """Whether two of its configs sum in the same order."""
        return all(a[name] == b[name] for name in (self.ranges if self.order is None else self.order))
