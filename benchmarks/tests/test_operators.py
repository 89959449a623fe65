"""The registry under pytest-benchmark, ``pytest benchmarks/``: the most telling case of each entry, each direction.

A GPU gets the networks' sizes. Under ``TRITON_INTERPRET=1`` tiny cases run once, to show that they can be measured;
their times mean nothing. Nothing wrong is timed.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastconv.benchmarks import layer_lists, registry
from fastconv.benchmarks.measure import operator_times
from fastconv.benchmarks.measure.directions import drawn
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.device import here
from fastconv.measuring.clock import synchronize

GPU = here.is_available() and not interpreter.interpreting()
DEVICE, DTYPE = here.at() if GPU else torch.device("cpu"), torch.bfloat16
ROUNDS, WARM_UP = (50, 3) if GPU else (1, 0)
pytestmark = pytest.mark.skipif(
    not (GPU or interpreter.interpreting()), reason="no GPU that PyTorch can use, and TRITON_INTERPRET is not set"
)


def first_cases() -> list[registry.Case]:
    found = [case for case in registry.cases(registry.ENTRIES, layer_lists.find, DTYPE) if case.networks]
    if not GPU:
        found = registry.tiny(found)
    return list({case.entry.name: case for case in reversed(found)}.values())[::-1]


def calls() -> Iterator[Any]:
    for case in first_cases():
        for direction in case.operator.directions:
            for provider in registry.providers(case.entry.providers):
                yield pytest.param(case, direction, provider, id=f"{case.entry.name}-{direction}-{provider.name}")


@pytest.fixture(autouse=True)
def conditions() -> Iterator[None]:
    torch.backends.cudnn.benchmark = True
    torch._dynamo.reset()
    with operator_times.conditions(DEVICE):
        yield


@pytest.mark.parametrize(("case", "direction", "provider"), list(calls()))
def test_operator(benchmark: Any, case: registry.Case, direction: str, provider: registry.Provider) -> None:
    operator = case.operator
    operands = drawn(operator, DTYPE, DEVICE)
    ours = provider if provider.ours else registry.PROVIDERS[registry.OURS]
    row: dict[str, Any] = {"direction": direction, "status": "ok"}
    wrong = operator_times.compared(row, operator, ours, operands)
    assert row["status"] == "ok", row["reason"]
    call = operator_times.prepared(provider, operator, direction, operands)
    assert not wrong(call())
    benchmark.group = f"{case.entry.name}, {direction}: {operator.function} {'x'.join(map(str, operator.input))}"

    def finished() -> None:
        call()
        synchronize(DEVICE)

    benchmark.pedantic(finished, rounds=ROUNDS, warmup_rounds=WARM_UP)
