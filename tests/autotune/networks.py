"""What three networks ask the autotuner: each distinct convolution, three directions, bf16, batch 32, on an H200."""

from __future__ import annotations

from functools import cache
from typing import Any

from convolutions import of_networks
from fastconv.autotune.choose import Asked, ask
from fastconv.autotune.gpus import H200
from fastconv.kernels import dispatch, tiles
from fastconv.kernels.problem import DIRECTIONS
from fastconv.kernels.tuned import CALLER

NETWORKS = ("resnet50", "vgg16", "efficientnet_b0")


@cache
def questions() -> tuple[Asked, ...]:
    found: dict[Any, Asked] = {}

    def listen(space: Any, features: Any, work: Any, gpu: Any, choice: Any) -> Any:
        asked = ask(space, features, work, gpu, CALLER)
        found.setdefault(asked.problem, asked)
        return choice

    with tiles.considering(listen):
        for problem in dict.fromkeys(problem for problem, _ in of_networks(NETWORKS, (32,))):
            for direction in DIRECTIONS:
                dispatch.plan(direction, problem, H200)
    return tuple(found.values())
