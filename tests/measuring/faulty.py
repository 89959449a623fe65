"""A worker on a GPU whose configs do harm: ``python -m tests.measuring.faulty HOW DESCRIPTOR``; PyTorch does none."""

import sys
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from fastconv.autotune import Config, Gpu, ProblemKey
from fastconv.kernels.launch.device import here
from fastconv.measuring import worker
from fastconv.measuring.process import Measure, serve
from fastconv.measuring.worker import Measuring, on_device


@triton.jit
def harmful_kernel(flag_ptr, address, ENDLESS: tl.constexpr):
    """Wait for what nobody does, or write to memory that nobody has."""
    if ENDLESS:
        flag = tl.load(flag_ptr, volatile=True)
        while flag == 0:
            flag = tl.load(flag_ptr, volatile=True)
    else:
        tl.store(address.to(tl.pointer_type(tl.int32)), 1)


def start(how: str) -> tuple[Gpu, Measure]:
    gpu, measure = on_device(0)
    assert isinstance(measure, Measuring)
    if how == "wrong":
        plain = worker.to_run

        def spoiled(*arguments: Any) -> Any:
            it, question = plain(*arguments)
            return replace(it, ours=lambda *given: lambda: it.ours(*given)() + 1), question

        worker.to_run = spoiled
        return gpu, measure

    def harm(problem: ProblemKey, config: Config | None) -> float:
        if config is not None:
            # As a config's own kernel would, inside of what tells a dead GPU from a mere error.
            measure._current = _Harm(how)  # type: ignore[assignment]
            measure._current.problem.key = problem  # type: ignore[misc]
        return measure(problem, config)

    return gpu, harm


class _Harm:
    def __init__(self, how: str) -> None:
        self.how = how
        self.problem = type("Problem", (), {"key": None})()

    def seconds(self, config: Config | None) -> float:
        size = 1
        if self.how == "out of memory":
            size = here.get_device_properties(here.current_device()).total_memory // 2  # in int32, twice as much
        flag = torch.empty(size, dtype=torch.int32, device=here.at())
        flag[:1] = 0
        harmful_kernel[(1,)](flag, 1 << 52, self.how == "hang")
        here.synchronize()
        return 1.0


if __name__ == "__main__":
    serve(int(sys.argv[2]), lambda: start(sys.argv[1]))
