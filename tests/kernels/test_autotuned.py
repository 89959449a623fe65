"""The kernels' adapter to the autotuner; an ordinary call measures nothing."""

import contextlib
import dataclasses
import importlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastconv
import fastconv.functional as F
from fastconv.autotune import Space, Store, Tuned, known
from fastconv.autotune.gpus import A100, H200
from fastconv.autotune.records import Untuned, from_line
from fastconv.autotune.table import Tables, write_table
from fastconv.kernels import dispatch
from fastconv.kernels.launch import interpreter
from fastconv.kernels.launch.device import here
from fastconv.kernels.launch.launch import record
from fastconv.kernels.ops import call
from fastconv.kernels.ops.call import Slower, prepared
from fastconv.kernels.problem.conv import DIRECTIONS, ConvProblem, conv_problem
from fastconv.kernels.problem.pool import POOL_DIRECTIONS, PoolProblem
from fastconv.kernels.tiles import autotuned, ranks
from fastconv.kernels.tiles.shapes import kernels_of
from tests.autotune import making

ROOT = Path(__file__).parents[2]
chooser = importlib.import_module("fastconv.autotune.choose")


def convolution(shape: tuple[int, ...], weight: tuple[int, ...], stride: int = 1, groups: int = 1) -> ConvProblem:
    rank = len(shape) - 2
    padding = tuple(r // 2 for r in weight[2:]) * 2
    return conv_problem(shape, weight, None, (stride,) * rank, padding, (1,) * rank, groups, torch.bfloat16)


POOL = PoolProblem(
    kind="max",
    batch=2,
    channels=24,
    input_size=(9, 12),
    output_size=(4, 6),
    window=(3, 2),
    stride=(2, 3),
    padding=(1, 0),
    dilation=(1, 2),
    dtype=torch.float16,
)
CONVOLUTIONS = {
    "dense": convolution((32, 64, 56, 56), (128, 64, 3, 3), 2),
    "one tap": convolution((32, 64, 56, 56), (128, 64, 1, 1)),
    "odd": convolution((3, 7, 11, 13), (5, 7, 3, 5)),
    "1-d": convolution((8, 64, 100), (64, 64, 3)),
    "3-d": convolution((2, 32, 8, 16, 16), (32, 32, 3, 3, 3)),
    "grouped": convolution((8, 128, 28, 28), (128, 4, 3, 3), groups=32),
    "depthwise": convolution((8, 96, 28, 28), (96, 1, 7, 7), groups=96),
    "first layer": convolution((8, 3, 224, 224), (64, 3, 7, 7), 2),
    "fp32": dataclasses.replace(convolution((8, 64, 14, 14), (64, 64, 3, 3)), dtype=torch.float32),
    "batch 1": convolution((1, 512, 7, 7), (512, 512, 3, 3)),
}
POOLS = {
    "max": POOL,
    "indexed": dataclasses.replace(POOL, index=torch.uint8),
    "average": dataclasses.replace(POOL, kind="average", divisor=5, include_padding=False, dilation=(1, 1)),
    "adaptive": dataclasses.replace(POOL, kind="average", adaptive=True, stride=(), padding=(), dilation=()),
    "lp": dataclasses.replace(POOL, kind="lp", norm=-1.5, padding=(0, 0), dilation=(1, 1)),
}


def questions(directions: Any, problem: Any) -> list[tuple[Space, Any]]:
    found: list[tuple[Space, Any]] = []

    def listen(space: Any, features: Any, work: Any, gpu: Any, choice: Any) -> Any:
        found.append((space, features))
        return choice

    with autotuned.considering(listen):
        for direction in directions:
            dispatch.plan(direction, problem, H200)
    return found


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_is_written_down_whole(name: str) -> None:
    problem = CONVOLUTIONS[name]
    asked = questions(DIRECTIONS, problem)
    assert asked
    for space, features in asked:
        written = autotuned.problem_of(space.name, features)
        # A depthwise dgrad may be asked for as the fprop that it mirrors.
        if "direction" not in dict(written.kind) or dict(written.kind)["direction"] != "fprop":
            assert ConvProblem.from_key(written) == problem
        assert autotuned.problem_of(space.name, features) == written
        record = Untuned(written, H200.name, H200.multiprocessors, dispatch.version_of(space.name), "2025-01-01")
        assert from_line(record.line.encode(), "x") == record


@pytest.mark.parametrize("name", POOLS)
def test_pool_is_written_down_whole(name: str) -> None:
    written = [autotuned.problem_of("pool", (direction, POOLS[name], True)) for direction in POOL_DIRECTIONS]
    assert [PoolProblem.from_key(each) for each in written] == [POOLS[name]] * 2
    assert written[0] != written[1] != autotuned.problem_of("pool", ("backward", POOLS[name], False))
    for each in written:
        record = Untuned(each, H200.name, H200.multiprocessors, dispatch.version_of("pool"), "2025-01-01")
        assert from_line(record.line.encode(), "x") == record


def test_everything_of_a_problem_tells_it_from_others() -> None:
    """A problem with any one field changed is another to tables."""
    changed: dict[str, Any] = {"dtype": torch.float32, "index": torch.uint8, "kind": "average", "norm": 2.0}
    for problem, space in ((CONVOLUTIONS["dense"], "conv_gather"), (POOL, "pool")):
        seen = {autotuned.problem_of(space, (problem,))}
        for index, field in enumerate(dataclasses.fields(problem)):
            value = getattr(problem, field.name)
            if field.name in changed:
                other = changed[field.name]
            elif isinstance(value, tuple):
                other = (value[0] + 1, *value[1:])
            else:
                other = not value if isinstance(value, bool) else value + 1
            seen.add(autotuned.problem_of(space, (dataclasses.replace(problem, **{field.name: other}),)))
            assert len(seen) == index + 2, field.name


@pytest.mark.parametrize("gpu", [A100, H200], ids=["A100", "H200"])
def test_only_the_tile_that_serves_is_asked_for(gpu: Any) -> None:
    """Comparing families asks for no tile: a problem would be known before a call met it."""
    asked: list[Any] = []

    def listen(space: Space, features: Any, work: Any, on: Any, choice: Any) -> Any:
        asked.append(choice)
        return choice

    few = [convolution((1, 64, size, size), (64, 64, 3, 3)) for size in (3, 7, 56)]
    families = set()
    with autotuned.considering(listen):
        for problem in (*CONVOLUTIONS.values(), *few):
            for direction in DIRECTIONS:
                plan = dispatch.plan(direction, problem, gpu)
                families.add(plan.family)
                assert [id(choice) for choice in asked] == [id(plan.choice)], (direction, problem, plan.family)
                asked.clear()
    assert gpu is A100 or {"spatial", "gather"} <= families


def test_pass_over_pixels_is_written_down() -> None:
    written = autotuned.problem_of("pass_split", (4096, 64, 2, 3))
    assert written.json["sizes"] == {"pixels": 4096} and written.json["channels"] == {"C": 64}


def test_unknown_feature_is_our_mistake() -> None:
    with pytest.raises(TypeError, match="no table knows"):
        autotuned.problem_of("conv_gather", (1.5,))


def test_every_space_has_the_source_of_its_kernels() -> None:
    versions = {space: dispatch.version_of(space) for space in dispatch.declared_spaces()}
    assert all(len(version.source) == 16 for version in versions.values())
    assert versions["conv_gather"].source == versions["conv_gather_split"].source
    assert len({versions[name].source for name in ("conv_gather", "conv_rows", "conv_depthwise", "pool", "pass")}) == 5


def test_space_of_another_release_has_a_version_of_its_own() -> None:
    versions = {dispatch.version_of(space).source for space in dispatch.declared_spaces()}
    assert dispatch.version_of("winograd").source not in versions


def test_source_is_only_the_kernels_code(tmp_path, monkeypatch) -> None:
    original = """
import triton
from {other} import stranger

@triton.jit
def helper(x):
    return x + 1

@triton.jit
def kernel(x):
    return helper(x)

def launcher(x):
    return kernel
"""
    beside = """
import triton
import triton.language as tl

TWO: tl.constexpr = tl.constexpr(2)

@triton.jit
def stranger(x):
    return x * TWO

@triton.jit
def helper(x):
    return x
"""
    monkeypatch.syspath_prepend(str(tmp_path))
    numbers = count()

    def hashed(source: str, others: str = beside) -> str:
        name = f"source_{next(numbers)}"
        (tmp_path / f"{name}_other.py").write_text(others)
        (tmp_path / f"{name}.py").write_text(source.format(other=f"{name}_other"))
        return autotuned.source_hash((importlib.import_module(name).kernel,))

    first = hashed(original)
    same = original.replace("def launcher(x):", "def launcher(x, y):").replace(
        "    return helper", '    "Doc."\n    # why\n    return helper'
    )
    assert hashed(same) == first
    assert hashed(original.replace("x + 1", "x + 2")) != first
    for old, new in (("return x\n", "return 0\n"), ("= tl.constexpr(2)", "= tl.constexpr(3)")):
        changed = beside.replace(old, new)
        assert changed != beside and hashed(original, changed) == first, "another file's function of one name"
    called = original.replace("return helper(x)", "return stranger(helper(x))")
    assert hashed(called, beside.replace("(2)", "(3)")) != hashed(called), "what another file's function names"


@pytest.mark.parametrize("gpu", [A100, H200], ids=["A100", "H200"])
def test_source_holds_every_kernel_that_is_launched(gpu: Any) -> None:
    """Reductions are split in spaces that can, so that a second launch follows."""
    spaces_of: dict[int, tuple[Any, Space]] = {}

    def split(space: Space, features: Any, work: Any, on: Any, choice: Any) -> Any:
        choice = replace(choice, config=max(space, key=lambda config: config.get("SPLITS", 1)))
        spaces_of[id(choice)] = choice, space
        return choice

    problems: list[Any] = [*CONVOLUTIONS.values(), convolution((1, 64, 56, 56), (64, 64, 3, 3))]
    questions = [(direction, problem) for problem in problems for direction in DIRECTIONS]
    questions += [
        (direction, problem) for problem in POOLS.values() if not problem.adaptive for direction in POOL_DIRECTIONS
    ]
    launched: set[tuple[str, str]] = set()
    with autotuned.considering(split):
        for direction, problem in questions:
            plan = dispatch.plan(direction, problem, gpu)
            space = spaces_of[id(plan.choice)][1]
            for launch in plan.launches:
                assert launch.kernel in kernels_of(space.name), (space.name, launch.name)
                launched.add((space.name, launch.name))
    if gpu is H200:
        finished = {space for space, name in launched if name == "conv_finish_kernel"}
        assert {"conv_gemm", "conv_spatial"} <= finished


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch) -> None:
    monkeypatch.setattr(here, "is_available", lambda: True)
    for capturing, tune in ((False, "first"), (True, "cached")):
        monkeypatch.setattr(here, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        with fastconv.settings(tune="first"):
            assert autotuned.policy().tune == tune


def test_regime_follows_settings_and_torch() -> None:
    assert autotuned.policy() == ("cached", False, True)
    with fastconv.settings(tune="off", numerics="stable", prefer="triton"):
        assert autotuned.policy() == ("off", True, False)
    torch.use_deterministic_algorithms(True)
    try:
        assert autotuned.policy() == ("cached", True, True)
    finally:
        torch.use_deterministic_algorithms(False)


def test_call_is_prepared_anew_after_a_change() -> None:
    asked: list[Any] = []

    def prepare(gpu: Any, operands: Any) -> str:
        asked.append(autotuned.policy())
        return "prepared"

    def call() -> None:
        prepared(prepare, (torch.empty(1),), ())

    with dispatch.use_target(H200):
        call(), call()
        with fastconv.settings(numerics="stable"):
            call(), call()
        call()
        assert [(it.tune, it.stable) for it in asked] == [("cached", False), ("cached", True)]
        known.forget()
        call(), call()
    assert len(asked) == 3


def test_refused_call_is_refused_again_without_being_prepared() -> None:
    asked: list[Any] = []

    def prepare(gpu: Any, operands: Any) -> str:
        asked.append(operands)
        raise Slower("measured so")

    for _ in range(3):
        with pytest.raises(Slower, match="measured so"):
            prepared(prepare, (torch.empty(1),), ())
    assert len(asked) == 1


@pytest.mark.skipif(not interpreter.interpreting(), reason="runs kernels in the interpreter")
def test_pytorchs_op_runs_if_it_was_measured_faster(monkeypatch) -> None:
    """Strict or not: it is no fallback. Fused calls, which were not measured, and ``prefer="triton"`` run ours."""
    ask = autotuned.ask
    measured = lambda *question: replace(ask(*question), pytorch_faster=autotuned.policy().fastest)  # noqa: E731
    monkeypatch.setattr(autotuned, "ask", measured)
    x, weight = torch.randn(2, 8, 5, 5), torch.randn(8, 8, 3, 3)
    monkeypatch.setattr(call, "_calls", {})
    with record() as launches, fastconv.settings(strict=True):
        y = fastconv.functional.conv2d(x, weight)
    assert torch.equal(y, torch.nn.functional.conv2d(x, weight)) and not launches
    plan = dispatch.plan("fprop", conv_problem(*_SHAPES), H200)
    assert plan.family == "pytorch" and plan.slower
    assert plan.reasons[-1][1] == "PyTorch's own op was measured faster"
    with record() as launches, fastconv.settings(prefer="triton"):
        fastconv.functional.conv2d(x, weight)
    assert launches
    norm = [torch.ones(8) for _ in range(4)]
    with record() as launches, fastconv.settings(strict=True):
        fastconv.functional.conv2d_bn_act(x, weight, None, *norm, training=False, momentum=0.1, eps=1e-5)
    assert launches


_SHAPES = (2, 8, 5, 5), (8, 8, 3, 3), None, (1, 1), (0,) * 4, (1, 1), 1, torch.float32


def test_planning_for_a_gpu_elsewhere_is_no_user_of_it() -> None:
    assert not autotuned.live(H200)


def test_a_product_of_a_known_gpu_keeps_its_name(monkeypatch) -> None:
    device = SimpleNamespace(name="NVIDIA A100-PCIE-40GB", multi_processor_count=108)
    monkeypatch.setattr(here, "get_device_properties", lambda index: device)
    monkeypatch.setattr(here, "get_device_name", lambda: device.name)
    monkeypatch.setattr(here, "is_available", lambda: True)
    monkeypatch.setattr(interpreter, "interpreting", lambda: False)
    gpu = dispatch._device_gpu.__wrapped__(0)
    assert gpu == replace(A100, name=device.name) and autotuned.live(gpu) and not autotuned.live(A100)


@pytest.mark.skipif(not interpreter.interpreting(), reason="runs kernels in the interpreter")
def test_ordinary_call_measures_nothing(monkeypatch, tmp_path) -> None:
    """Forward and backward, and the plans of a GPU: no timer, no event, no benchmark, no search, no file."""
    import time

    import triton.testing

    from fastconv.autotune import search, tune

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("something is measured")

    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path))
    known.reload()
    chooser.install_measurer(forbidden)
    try:
        with monkeypatch.context() as context:
            for module, names in (
                (time, ("perf_counter", "perf_counter_ns", "monotonic", "process_time")),
                (here, ("Event", "synchronize")),
                (triton.testing, ("do_bench", "do_bench_cudagraph")),
                (tune, ("tune", "session")),
                (search, ("Search",)),
            ):
                for name in names:
                    context.setattr(module, name, forbidden)
            x = torch.randn(2, 16, 6, 5, requires_grad=True)
            weight = torch.randn(16, 16, 3, 3, requires_grad=True)
            for _ in range(2):
                F.max_pool2d(F.conv2d(x, weight, padding=1), 2).sum().backward()
            for problem in CONVOLUTIONS.values():
                for direction in DIRECTIONS:
                    dispatch.plan(direction, problem, H200)
    finally:
        chooser.install_measurer(None)
        known.reload()
    assert not list(tmp_path.iterdir())


RANKS = """
import logging, os, sys
import torch
import torch.distributed as dist
from datetime import timedelta
from fastconv.autotune import ProblemKey, Tuned, Version
from fastconv.autotune.table import Tables
from fastconv.autotune.gpus import A100, H200
from fastconv.kernels.tiles import ranks

def entry(tile):
    problem = ProblemKey.of("gemm", {"dtype": "bfloat16"}, {"C": 64}, {"N": 32})
    one = {"TILE": tile}
    version = Version("3.7.1", "abc", True, 1)
    return Tuned(problem, H200.name, 132, version, one, 1e-5, one, 1e-5, (), None, 0.0, 1, "2025-01-01", "0.1.0")

def rank(index, size):
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=index, world_size=size)
    # Ranks 0 and 1 were tuned alike, rank 2 otherwise, rank 3 not at all.
    tables = Tables([], {0: [entry(1)], 1: [entry(1)], 2: [entry(2)], 3: []}[index], [])
    ranks.agree(H200, tables, 0)
    assert [e.config for e in tables.user.entries] == [{"TILE": 1}], tables.user.entries
    assert ranks.may_measure("first") == ranks.may_measure("force") == "cached"
    if index:
        # Of a GPU that rank 0 never asks about its own tables stay, after a while.
        ranks.WAIT = timedelta(seconds=0.2)
        mine = Tables([], [entry(9)], [])
        ranks.agree(__import__("dataclasses").replace(H200, name="NVIDIA Other"), mine, 0)
        assert [e.config for e in mine.user.entries] == [{"TILE": 9}]
    dist.barrier()
    dist.destroy_process_group()

children = []
for index in range(4):
    child = os.fork()
    if child == 0:
        try:
            rank(index, 4)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


@pytest.mark.slow
def test_ranks_take_the_tables_of_rank_0(tmp_path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", RANKS, str(tmp_path / "job")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert sorted(line[:8] for line in lines if "others than rank 0's" in line) == ["rank 2: ", "rank 3: "]
    assert sum("rank 0 has chosen nothing" in line for line in lines) == 3
    assert sum("ranks do not measure" in line for line in lines) == 4


def test_alone_there_is_nobody_to_agree_with() -> None:
    tables = Tables([], [], [])
    ranks.agree(H200, tables, 0)
    assert not ranks.joined() and ranks.world_size() == 1 and ranks.may_measure("first") == "first"


class Job:
    """Two ranks in one process: ``as_rank`` swaps what a rank has in memory, its store among it."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder, self.patch, self.size = folder, monkeypatch, 1
        self.memories: dict[int, dict[Any, Any]] = {0: {}, 1: {}}
        store = torch.distributed.HashStore()
        monkeypatch.setattr(ranks, "world_size", lambda: self.size)
        monkeypatch.setattr(ranks, "_job_store", lambda: store)
        monkeypatch.setattr(ranks, "WAIT", timedelta(seconds=0.05))

    @contextlib.contextmanager
    def as_rank(self, rank: int) -> Iterator[None]:
        memory = self.memories[rank]
        first: dict[Any, Any] = {(chooser, "_choices"): {}, (ranks, "_size"): 1, (known, "_tables"): {}}
        first |= {
            (known, "_store"): Store(self.folder / str(rank)),
            (known, "_locked"): [],
            (known, "_reloads"): Counter(),
        }
        with self.patch.context() as context:
            context.setattr(torch.distributed, "get_rank", lambda: rank)
            for (module, name), value in first.items():
                context.setattr(module, name, memory.get((module, name), value))
            yield
            memory |= {(module, name): getattr(module, name) for module, name in first}

    def tile(self) -> int:
        """The tuned problem's tile."""
        tables = [table for _, table in known.tables(H200, dispatch.ADAPTER).layers if len(table)]
        return tables[0].entries[0].config["TILE"]


def one_tile(tile: int) -> Tuned:
    version = dispatch.version_of("conv_gather")
    return making.tuned(making.problem("conv_gather"), version, config={"TILE": tile}, default={"TILE": tile})


@pytest.fixture
def job(tmp_path, monkeypatch) -> Iterator[Job]:
    yield Job(tmp_path, monkeypatch)
    known.forget()


def test_ranks_compare_tables_used_before_the_job(job: Job, caplog) -> None:
    """Calls that rank 1 had decided by its own tables are decided again, at the first that is new."""
    for rank in range(2):
        with job.as_rank(rank):
            known.store().append(one_tile(10 + rank))
            assert job.tile() == 10 + rank
    asked: list[str] = []

    def prepare(gpu: Any, operands: Any, name: str) -> str:
        asked.append(name)
        return name

    job.size = 2
    with job.as_rank(0):
        assert job.tile() == 10
    job.size = 1
    with job.as_rank(1), dispatch.use_target(H200), caplog.at_level("WARNING", "fastconv"):
        prepared(prepare, (torch.empty(1),), ("before",))
        job.size = 2
        prepared(prepare, (torch.empty(1),), ("before",))
        assert asked == ["before"], "known: nothing is looked for"
        prepared(prepare, (torch.empty(1),), ("new",))
        prepared(prepare, (torch.empty(1),), ("before",))
        assert asked == ["before", "new", "before"] and job.tile() == 10
    assert "rank 1: its tuned tables of NVIDIA H200 were others than rank 0's" in caplog.text


def test_a_lock_that_all_ranks_load_is_not_taken_for_another(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    """Rank 1 loads it first, and finds the tables that rank 0 published before its own load."""
    job.size = 2
    lock = job.folder / "lock.json"
    write_table(lock, [one_tile(77)], "abc", making.DATE)
    for rank in range(2):
        with job.as_rank(rank):
            known.store().append(one_tile(1))
            if rank == 0:
                known.load_lock(None)  # what one rank does before tables are used counts for nothing
            assert job.tile() == 1
    for rank in (1, 0):
        with job.as_rank(rank):
            known.load_lock(lock)
            assert job.tile() == 77
    assert "others than rank 0's" not in caplog.text
