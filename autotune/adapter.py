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
    """What the user set."""

    tune: str = "cached"  # one of TUNE; "off": the cost model decides; "first", "force": the measurer may run
    stable: bool = False  # each problem keeps its order of summation whatever is tuned, so PyTorch's op never serves
    fastest: bool = True  # PyTorch's op serves if it was measured faster


CACHED = Policy()


@dataclass(frozen=True)
class Adapter:
    """What the kernels supply. Everything except ``policy`` is called only for a new problem.

    ``problem(space, features)`` and ``version(space)`` are a problem's keys in tables. ``live(gpu)``: ``gpu`` is here
    and the call is a user's program, so measuring is possible. Processes of one job agree on tables: ``agree(gpu,
    tables, reloads)`` is called before a GPU's tables are first used, ``reloads`` counts the agreed tables dropped
    before; ``joined()``: this process has joined a job since the last call.
    """

    problem: Callable[[str, Hashable], ProblemKey]
    version: Callable[[str], Version]
    policy: Callable[[], Policy] = lambda: CACHED
    live: Callable[[Gpu], bool] = lambda gpu: False
    agree: Callable[[Gpu, Tables, int], None] = lambda gpu, tables, reloads: None
    joined: Callable[[], bool] = lambda: False
