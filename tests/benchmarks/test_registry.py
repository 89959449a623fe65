"""The registry: which cases entries have, in which order, and who runs them."""

import math
from functools import cache

import pytest
import torch

from fastconv.benchmarks import layer_lists, registry
from fastconv.benchmarks.calls import LARGE, Operator
from fastconv.benchmarks.registry import ENTRIES, TARGET
from fastconv.kernels.families.family import named_family
from fastconv.kernels.problem.conv import conv_problem


@cache
def cases() -> list[registry.Case]:
    return registry.cases(ENTRIES, layer_lists.find, torch.bfloat16)


def counted(entry: str, network: str) -> list[int]:
    """How many calls of a network an entry has, for each of its batches."""
    found = [case for case in cases() if case.entry.name == entry]
    batches = sorted({case.batch for case in found if case.networks})
    return [sum(case.networks.get(network, 0) for case in found if case.batch == batch) for batch in batches]


def test_entries_take_turns_with_the_calls_of_their_networks() -> None:
    assert [case.entry.name for case in cases()[:7]] == ["dense"] * 3 + ["pool", "depthwise", "grouped", "first-layer"]
    assert [counted("depthwise", name) for name in ENTRIES[2].lists] == [[17], [16], [18]]
    assert counted("grouped", "resnext50_32x4d") == [16]
    assert [counted("pool", name) for name in ENTRIES[1].lists] == [[2], [6], [14]]
    assert [counted("first-layer", name) for name in ENTRIES[4].lists] == [[1, 1]] * 4
    assert [counted("dense", name) for name in ENTRIES[0].lists] == [[52, 52], [12, 12], [22, 22]]
    assert all(case.operator.needs_dx == (case.entry.name != "first-layer") for case in cases())


def test_every_layer_of_the_target_is_a_case_of_one_entry() -> None:
    found = [case for case in cases() if case.networks.keys() & set(TARGET.lists) and not case.operator.pool]
    assert len(found) == len({case.operator for case in found}) == TARGET.layers("fprop") == TARGET.layers("wgrad")
    assert sum(case.operator.needs_dx for case in found) == TARGET.layers("dgrad")
    assert {case.batch for case in found} == set(TARGET.batches)


def test_each_network_of_an_entry_is_among_its_first_cases() -> None:
    first = [case for case in cases() if case.entry.name == "dense"][:6]
    assert {network for case in first for network in case.networks} == set(ENTRIES[0].lists)


def test_what_a_bandwidth_is_owed_of_is_enlarged_beyond_any_cache() -> None:
    enlarged = [case for case in cases() if not case.networks]
    assert {case.entry.name for case in enlarged} == {"pool", "depthwise"}
    for case in enlarged:
        assert LARGE <= 2 * math.prod(case.operator.input) < 2 * LARGE
        assert case.operator.streams
    assert [case.operator.input for case in enlarged if case.entry.name == "depthwise"] == [
        *((512, 96, 56, 56), (512, 144, 56, 56), (512, 32, 112, 112))
    ]


def test_operations_and_bytes_are_the_problems() -> None:
    problem = conv_problem((2, 8, 5, 5), (16, 8, 3, 3), None, (1, 1), (1,) * 4, (1, 1), 1, torch.bfloat16)
    assert problem.flops == 2 * (2 * 5 * 5 * 16) * (8 * 9)
    assert problem.bytes == 2 * (2 * 8 * 25 + 16 * 8 * 9 + 2 * 16 * 25)


def test_operators_are_chosen_by_name() -> None:
    assert [entry.name for entry in registry.entries(["pool", "dense"])] == ["dense", "pool"]
    assert registry.entries(["all"]) == registry.entries([]) == ENTRIES
    with pytest.raises(ValueError, match="'cubic' is not one of all, dense, pool, depthwise, grouped, first-layer"):
        registry.entries(["dense", "cubic"])


def test_providers_are_chosen_by_name_beside_the_yardstick() -> None:
    names = ("fastconv:gather", "compile")
    chosen = registry.providers(names)
    assert [provider.name for provider in chosen] == ["eager", *names]
    assert [provider.ours for provider in chosen] == [False, True, False]
    with chosen[1].serving():
        assert named_family() == "gather"
    with chosen[0].serving():
        assert named_family() is None
    for name in ("fastconv:cubic", "cudnn", "eager:gather", "fastconv:"):
        with pytest.raises(ValueError, match=f"'{name}' is not one of eager, fastconv, .*fastconv:gather"):
            registry.providers([name])
    with pytest.raises(ValueError, match="none of fastconv's: fastconv, fastconv-nchw"):
        registry.providers(["eager", "compile"])


def test_layouts_are_the_providers() -> None:
    image = torch.zeros(2, 3, 4, 5)
    layouts = {name: provider.layout(image) for name, provider in registry.PROVIDERS.items()}
    dense = {name for name, laid in layouts.items() if laid.is_contiguous(memory_format=torch.channels_last)}
    assert dense == {"eager", "fastconv", "compile"}
    assert all(layouts[name].is_contiguous() for name in layouts.keys() - dense)


def test_a_pool_without_a_gradient_has_no_backward() -> None:
    pool = Operator("avg_pool2d", ((1, 1, 32, 32),), (("kernel_size", 2),), needs_dx=False)
    assert pool.directions == ("forward",)
