"""The one place that answers: which tile for this problem on this GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from fastconv.autotune.cost_model import Work, predict
from fastconv.autotune.gpus import Gpu
from fastconv.autotune.space import Config, Space

# What the cost model cannot tell apart: within it the space's earlier config wins, so that problems share binaries.
RESOLUTION = 0.35


@dataclass(frozen=True)
class Choice:
    config: Config
    source: str  # where the config came from
    seconds: float  # predicted
    bound: str  # what the prediction says limits it


_choices: dict[tuple[str, Hashable, Gpu], Choice] = {}


def choose(space: Space, features: Hashable, work: Callable[[Config], Work], gpu: Gpu) -> Choice:
    """The config of ``space`` for the problem that ``features`` identifies; a known problem is one dictionary hit.

    ``work(config)`` says what a config makes of the problem. Never measures. Raises ValueError where nothing fits.
    """
    key = (space.name, features, gpu)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = _by_cost_model(space, work, gpu)
    return choice


def _by_cost_model(space: Space, work: Callable[[Config], Work], gpu: Gpu) -> Choice:
    predictions = [(config, predict(work(config), gpu)) for config in space]
    fitting = [(config, prediction) for config, prediction in predictions if prediction is not None]
    if not fitting:
        raise ValueError(f"no config of the space {space.name!r} fits the {gpu.name}")
    limit = (1 + RESOLUTION) * min(prediction.seconds for _, prediction in fitting)
    config, prediction = next((c, p) for c, p in fitting if p.seconds <= limit)
    return Choice(config, "cost model", prediction.seconds, prediction.bound)
