"""What three networks ask the autotuner on an H200: bf16, batch 32; each distinct convolution in three directions, each
pool in two, and the sums over pixels that the gradients of a bias and of batch norm are."""

from functools import cache
from typing import Any

import torch

from convolutions import of_networks
from fastconv.autotune.choose import Question, ask
from fastconv.autotune.gpus import H200
from fastconv.benchmarks import layer_lists
from fastconv.kernels import dispatch
from fastconv.kernels.dispatch import ADAPTER
from fastconv.kernels.families import batch_norm
from fastconv.kernels.problem.conv import DIRECTIONS
from fastconv.kernels.tiles import autotuned
from fastconv.tuning import problems

NETWORKS = ("resnet50", "vgg16", "efficientnet_b0")
BATCH = 32


@cache
def questions() -> tuple[Question, ...]:
    """Those that have more than one config to choose from."""
    found: dict[Any, Question] = {}

    def listen(space: Any, features: Any, work: Any, gpu: Any, choice: Any) -> Any:
        question = ask(space, features, work, gpu, ADAPTER)
        found.setdefault(question.problem, question)
        return choice

    with autotuned.considering(listen):
        for problem, bias in of_networks(NETWORKS, (BATCH,)):
            for direction in DIRECTIONS:
                dispatch.plan(direction, problem, H200)
            # Batch norm's are of its gradient, its input and, for the activation between, its output.
            moved = 1 if bias else 3
            batch_norm.pass_tile(problem.output_pixels, problem.out_channels, problem.dtype.itemsize, moved, True, H200)
        for name in NETWORKS:
            pools = {call: count for call, count in layer_lists.find(name).calls.items() if call.pool}
            problems.of_layers(pools, BATCH, torch.bfloat16, True, H200)
    return tuple(question for question in found.values() if len(question.fitting()) > 1)
