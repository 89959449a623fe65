"""What the kernels supply to the autotuner, and what the user set."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

from fastconv.autotune.gpus import Gpu
from fastconv.autotune.records import ProblemKey, Version
from fastconv.autotune.table import Tables

TUNE = ("off", "cached", "first", "force")
MEASURING = TUNE[2:]


class Policy(NamedTuple):
    """What the user set. ``stable``: one order of summation for each problem, whatever is tuned, so never PyTorch's."""

    tune: str = "cached"  # one of TUNE: "off" the cost model alone; "first", "force": the measurer may run
    stable: bool = False
    fastest: bool = True  # PyTorch's own op where it was measured faster


CACHED = Policy()


@dataclass(frozen=True)
class Adapter:
    """What whoever chooses says of itself and its problems; asked on a problem's first call only, but for ``policy``.

    ``problem(space, features)``: as tables know it. ``version(space name)``: under which code it would be measured.
    ``live(gpu)``: whether ``gpu`` is here and the call is a user's program. ``agree(gpu, tables, reloads)``: told
    before a GPU's tables are first used, where processes must agree on them; ``reloads``: how often they were agreed on
    already, and dropped. ``joined()``: whether processes that must agree have appeared since it was asked last.
    """

    problem: Callable[[str, Hashable], ProblemKey]
    version: Callable[[str], Version]
    policy: Callable[[], Policy] = lambda: CACHED
    live: Callable[[Gpu], bool] = lambda gpu: False
    agree: Callable[[Gpu, Tables, int], None] = lambda gpu, tables, reloads: None
    joined: Callable[[], bool] = lambda: False
