"""Write what the cost model predicts for each convolution of ResNet-50 on an H200 into `benchmarks/results/OPEN.md`:
``python -m fastconv.benchmarks.write_predictions``. No time in it was measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from fastconv.autotune import Gpu
from fastconv.autotune.gpus import H200
from fastconv.benchmarks.layer_lists import find
from fastconv.kernels import dispatch
from fastconv.kernels.problem.conv import DIRECTIONS

NETWORK, BATCH, GPU = "resnet50", 256, H200
OPEN = Path(__file__).parent / "results" / "OPEN.md"


def table(network: str, batch: int, gpu: Gpu) -> Iterator[str]:
    """Lines of markdown: each direction's family, predicted microseconds and their bound, beside the roofline: the
    problem's FLOPs, or its bytes with each operand moved once, at the GPU's peak rates."""
    yield "| layer | count | roofline, us | " + " | ".join(DIRECTIONS) + " |"
    yield "|---" * (3 + len(DIRECTIONS)) + "|"
    for call, count in find(network).calls.items():
        if call.pool or call.transposed:
            continue
        problem = call.with_batch(batch).problem(torch.bfloat16)
        roofline = 1e6 * max(problem.flops / gpu.matrix_rate, problem.bytes / gpu.bandwidth)
        cells = [problem.describe().removesuffix(" bfloat16"), str(count), f"{roofline:.0f}"]
        for direction in DIRECTIONS:
            plan = dispatch.plan(direction, problem, gpu)
            if direction == "dgrad" and not call.needs_dx:
                cells.append("not asked for")
            elif plan.choice is None:
                cells.append("PyTorch's")
            else:
                cells.append(f"{plan.family} {1e6 * plan.choice.seconds:.0f} ({plan.choice.bound})")
        yield f"| {' | '.join(cells)} |"


def written(text: str) -> str:
    """``text`` with the table that the cost model predicts now."""
    header, *lines = table(NETWORK, BATCH, GPU)
    before, _, after = text.partition(header)
    return "\n".join((before + header, *lines)) + re.sub(r"\A(\n\|.*)*", "", after)


if __name__ == "__main__":
    OPEN.write_text(written(OPEN.read_text()))
