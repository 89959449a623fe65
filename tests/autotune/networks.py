"""What three networks ask the autotuner: each distinct convolution, three directions, bf16, batch 32, on an H200."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from fastconv.autotune.choose import Asked, ask
from fastconv.autotune.gpus import H200
from fastconv.kernels import dispatch, tiles
from fastconv.kernels.problem import DIRECTIONS
from fastconv.kernels.tuned import CALLER

NETWORKS = ("resnet50", "vgg16", "efficientnet_b0")


@cache
def questions() -> tuple[Asked, ...]:
    from fastconv.cli import models
    from fastconv.cli.measure.layers import distinct_layers

    found: dict[Any, Asked] = {}

    def listen(space: Any, features: Any, work: Any, gpu: Any, choice: Any) -> Any:
        asked = ask(space, features, work, gpu, CALLER)
        found.setdefault(asked.problem, asked)
        return choice

    with torch.device("meta"):
        subjects = [models.load(name, 32, 224) for name in NETWORKS]
        problems = [layer.problem for subject in subjects for layer in distinct_layers(subject, torch.bfloat16)]
    with tiles.considering(listen):
        for problem in problems:
            for direction in DIRECTIONS:
                dispatch.plan(direction, problem, H200)
    return tuple(found.values())
