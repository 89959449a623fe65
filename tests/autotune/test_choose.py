"""The tile function: declared spaces, a cost model that knows the GPU, one answer per problem."""

import dataclasses
from typing import Any

import pytest

from fastconv.autotune import Space, Work, choose, gpu_named, known_gpus, predict
from fastconv.autotune.choose import RESOLUTION
from fastconv.autotune.cost_model import occupancy_of
from fastconv.autotune.gpus import A100, B200, H100, H200, INTERPRETER, L4, L40S, describe
from tests.autotune.making import tuned

WORK = Work(
    programs=1000,
    steps=10,
    step_flops=2 * 128 * 128 * 64,
    step_elements=256 * 64,
    step_bytes=256 * 64 * 2,
    dram_bytes=10**8,
    shared_memory=96 << 10,
    registers=128,
    warps=8,
    stages=3,
    matrix_share=1.0,
)


def seconds(gpu: Any = H200, **changes: Any) -> float:
    prediction = predict(dataclasses.replace(WORK, **changes), gpu)
    assert prediction is not None
    return prediction.seconds


def test_space_holds_what_is_valid() -> None:
    space = Space("s", {"A": (1, 2), "B": (3, 4)}, lambda config: "no" if config["A"] + config["B"] == 5 else None)
    assert list(space) == [{"A": 1, "B": 3}, {"A": 2, "B": 4}]


def test_narrowing_a_space() -> None:
    space = Space("s", {"A": (1, 2, 4), "B": (64, 128, 256)})
    assert space.narrowed(only={"A": (4, 8)}).ranges == {"A": (4, 8), "B": (64, 128, 256)}
    assert space.narrowed(at_least={"A": 3, "B": 10}).ranges == {"A": (4,), "B": (64,)}
    assert space.narrowed(at_most={"A": 3, "B": 10}).ranges == {"A": (1, 2), "B": (64,)}


@pytest.mark.parametrize(
    ("changes", "worse"),
    [
        ({}, {"programs": 2000}),
        ({}, {"steps": 20}),
        ({"step_bytes": 1024}, {"matrix_share": 0.5}),
        ({"step_bytes": 1024, "matrix_share": 0.5}, {"matrix_share": 0.0}),
        ({}, {"dram_bytes": 10**10}),
        ({}, {"step_bytes": 2**20}),
        ({}, {"extra_bytes": 10**8}),
        ({"programs": 264, "dram_bytes": 0}, {"programs": 265}),
    ],
    ids=str,
)
def test_more_work_takes_longer(changes: dict[str, Any], worse: dict[str, Any]) -> None:
    assert seconds(**changes) < seconds(**{**changes, **worse})


def test_bounds_are_named() -> None:
    def bound(**changes: Any) -> str:
        prediction = predict(dataclasses.replace(WORK, **changes), H200)
        assert prediction is not None
        return prediction.bound

    assert bound(dram_bytes=10**11) == "DRAM"
    assert bound(step_bytes=2**24) == "L2"
    assert bound(step_flops=2**32) == "matrix"
    assert bound(programs=1, steps=1, dram_bytes=0) == "latency"


def test_what_does_not_fit_is_not_predicted() -> None:
    assert predict(dataclasses.replace(WORK, shared_memory=228 << 10), H200) is None


def test_spilling_is_the_last_resort() -> None:
    assert seconds(registers=256) > 50 * seconds(registers=255)
    assert seconds(registers=400) > seconds(registers=300)
    assert occupancy_of(dataclasses.replace(WORK, registers=400), H200) == occupancy_of(
        dataclasses.replace(WORK, registers=255), H200
    )


@pytest.mark.parametrize(
    ("changes", "programs"),
    [({}, 2), ({"registers": 255}, 1), ({"shared_memory": 32 << 10, "registers": 64}, 4), ({"warps": 16}, 1)],
    ids=str,
)
def test_occupancy(changes: dict[str, int], programs: int) -> None:
    assert occupancy_of(dataclasses.replace(WORK, **changes), H200) == programs


def test_faster_gpus_are_predicted_faster() -> None:
    assert seconds(B200) < seconds(H200) <= seconds(H100)


def test_choose_takes_the_first_within_the_models_resolution_and_asks_once() -> None:
    question: list[int] = []
    space = Space("first within", {"STEPS": (100, 10, 11)})

    def work(config: Any) -> Work:
        question.append(config["STEPS"])
        return dataclasses.replace(WORK, steps=config["STEPS"], dram_bytes=0)

    assert seconds(steps=11, dram_bytes=0) < (1 + RESOLUTION) * seconds(steps=10, dram_bytes=0)
    for _ in range(2):
        choice = choose(space, "a problem", work, H200)
        assert choice.config == {"STEPS": 10} and choice.source == "cost model"
    assert question == [100, 10, 11]
    choose(space, "another problem", work, H200)
    choose(space, "a problem", work, H100)
    assert len(question) == 9


def test_choose_says_when_nothing_fits() -> None:
    space = Space("too large", {"A": (1,)})
    with pytest.raises(ValueError, match="'too large' fits the NVIDIA H200"):
        choose(space, "a problem", lambda config: dataclasses.replace(WORK, shared_memory=1 << 30), H200)


def test_interpreter_counts_programs_and_steps() -> None:
    assert seconds(INTERPRETER, programs=1, steps=1) < seconds(INTERPRETER, programs=2, steps=1)
    assert seconds(INTERPRETER, programs=1, steps=1) < seconds(INTERPRETER, programs=1, steps=2)


def test_gpus_by_name() -> None:
    found = gpu_named("NVIDIA H100 80GB HBM3")
    assert found is not None and found == dataclasses.replace(H100, name="NVIDIA H100 80GB HBM3")
    assert gpu_named("NVIDIA L40S") is L40S and gpu_named("NVIDIA L4") is L4 and gpu_named("NVIDIA L40") is None
    products = [gpu_named(f"NVIDIA A100-{product}", A100.multiprocessors) for product in ("SXM4-80GB", "PCIE-40GB")]
    assert [product and product.name for product in products] == ["NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB"]
    assert [tuned(gpu=products[0]).of_gpu(product) for product in products if product] == [True, False]
    assert gpu_named("NVIDIA GeForce RTX 3090 Ti", 84) is None and gpu_named("NVIDIA H200 MIG 1g.18gb", 16) is None
    assert gpu_named("NVIDIA H200", 132) is H200


def test_gpus_are_those_promised_each_with_its_source() -> None:
    known = known_gpus()
    names = "A100, H100, H200, B200, L4, L40S, GeForce RTX 3090, GeForce RTX 4090, GeForce RTX 5090"
    assert ", ".join(gpu.name.removeprefix("NVIDIA ") for gpu in known) == names
    for gpu in known:
        assert gpu.source and gpu.l2_bandwidth > gpu.bandwidth and gpu.matrix_rate > gpu.vector_rate, gpu.name
        # What CUDA leaves a program of the multiprocessor's shared memory.
        assert gpu.shared_memory == {80: 163, 90: 227, 100: 227}.get(gpu.arch, 99) << 10, gpu.name
        assert gpu.threads == (2048 if gpu.arch in (80, 90, 100) else 1536), gpu.name


def test_unknown_gpu_is_scaled_from_the_nearest_architecture() -> None:
    gpu = describe("a half", 90, 66, 200 << 10, 25 << 20, None)
    assert gpu.matrix_rate == H100.matrix_rate / 2 and gpu.shared_memory == 200 << 10
    assert gpu.wgmma and gpu.bulk and not gpu.tcgen05
    assert "multiprocessors" in gpu.source
