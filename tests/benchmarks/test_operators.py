"""Operators one by one: compared, timed, and what the times mean; tiny, with clocks that are made up or say nothing."""

import dataclasses
import io
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

import fastconv.functional
from fastconv.autotune import gpus
from fastconv.benchmarks import layer_lists, models, registry
from fastconv.benchmarks.measure import ceilings, operator_times, operators
from fastconv.benchmarks.measure.directions import drawn, exact
from fastconv.benchmarks.registry import COMPILED, EAGER, EAGER_NCHW, ENTRIES, OURS, TARGET
from fastconv.benchmarks.report import tables, targets
from fastconv.benchmarks.report.console import Progress
from fastconv.benchmarks.report.results import Part, check_part
from fastconv.kernels import dispatch
from fastconv.kernels.launch import launch
from fastconv.measuring.clock import HostClock, Rounds, Sample, interleave
from tests.marks import interpreted

pytestmark = interpreted
CPU = torch.device("cpu")
SETUP = operator_times.Setup(torch.bfloat16, CPU, HostClock())
LIMITS = ceilings.Ceilings(bandwidth=4e12, matrix=8e14)


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is interpreted: rounds themselves are tested with clocks that are made up."""

    def once(candidates: Any, sample: Any, *, deadline: float, **rounds: int) -> Rounds:
        return interleave(candidates, sample, deadline=deadline, least=1, most=1)

    monkeypatch.setattr(operator_times, "interleave", once)
    monkeypatch.setattr(operator_times, "WARM_UP", 0)


@pytest.fixture
def progress() -> Progress:
    return Progress(Console(file=io.StringIO()))


def races(*names: str, providers: tuple[str, ...] = ()) -> list[operators.Race]:
    """One operator of each entry that a small network has."""
    layers = layer_lists.of(models.load("tests.cli.tiny:every_kind", 2, 9))
    entries = [dataclasses.replace(entry, lists=("tiny",), batches=(1,)) for entry in registry.entries(names)]
    found = registry.cases(entries, lambda name: layers, torch.bfloat16)
    return [operators.Race(case, registry.providers(providers or case.entry.providers)) for case in found]


def measured(chosen: list[operators.Race], progress: Progress, deadline: float = math.inf) -> dict[str, Part]:
    saved: list[Part] = []
    parts = operators.measure(chosen, SETUP, deadline, progress, saved.append)
    assert len(saved) == len(chosen)
    for part in parts:
        check_part(part)
    return {part["id"].removeprefix("operators-"): part for part in parts}


DIRECTIONS = {
    **{key: {"fprop", "dgrad", "wgrad", "together"} for key in ("dense", "depthwise", "grouped")},
    "pool": {"forward", "forward, training", "backward", "together"},
    "first-layer": {"fprop", "wgrad", "together"},
}
FAMILIES = {"depthwise": "depthwise", "grouped": "grouped", "pool": "pool"}


def test_every_entry_is_measured_here() -> None:
    assert DIRECTIONS.keys() == {entry.name for entry in ENTRIES}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_each_direction_is_compared_then_timed(name: str, progress: Progress) -> None:
    (part,) = measured(races(name), progress).values()
    assert (part["id"], part["verdict"]) == (f"operators-{name}", "right"), part["reason"]
    assert part["copy_bandwidth"] > 0 and part["matrix_rate"] > 0
    rows = {row["direction"]: row for row in part["rows"]}
    assert rows.keys() == DIRECTIONS[name]
    for row in part["rows"]:
        assert row["status"] == "ok" and row["launches"] and row["bytes"] and row["noise"] >= 0
        assert (row["tile"] is None) == (row["direction"] == "together")
        assert (row["flops"] > 0) == (name != "pool")
        assert row["family"] == FAMILIES.get(name, row["family"])
        assert [provider["provider"] for provider in row["providers"]] == list(registry.PROVIDERS)
        for provider in row["providers"]:
            assert provider["status"] == "ok", row
            assert provider["ms"]["median"] > 0 and provider["alone_ms"]["median"] > 0
    speeds = [row["speed"] for row in part["rows"]]
    assert speeds == sorted(speeds)
    assert {mean["network"] for mean in part["means"]} == {"tests.cli.tiny:every_kind", "all"}
    directions = len(rows) - 1  # without all together
    assert sum(sum(counts.values()) for counts in part["families"].values()) == directions
    if name == "pool":
        # What is kept has a byte for each maximum.
        assert rows["forward"]["bytes"] < rows["forward, training"]["bytes"] == rows["backward"]["bytes"]
    else:
        apart = sum(rows[direction]["flops"] for direction in ("fprop", "dgrad", "wgrad") if direction in rows)
        assert rows["together"]["flops"] == apart


def test_what_is_launched_is_found_without_data() -> None:
    chosen = races()
    with launch.record() as records:
        operators.plan_each(chosen, SETUP)
    found = {record.launch.compile_key for record in records}
    for race in chosen:
        for row in race.rows:
            assert row["status"] == "ok", row["reason"]
            with operator_times.conditions(CPU), launch.record() as records:
                operands = drawn(race.case.operator, torch.bfloat16, CPU)
                operator_times.compared(row, race.case.operator, registry.PROVIDERS[row["ours"]], operands)
            assert {record.launch.compile_key for record in records} <= found


def test_rows_without_time_and_wrong_ones_say_so(progress: Progress, monkeypatch) -> None:
    (part,) = measured(races("depthwise"), progress, 0.0).values()
    assert {(row["status"], row["reason"]) for row in part["rows"]} == {("skipped", "no time left")}
    assert (part["verdict"], part["means"], part["families"]) == ("skipped", [], {})
    again, right = races("depthwise"), fastconv.functional.conv2d
    monkeypatch.setattr(fastconv.functional, "conv2d", lambda *args, **kwargs: right(*args, **kwargs) * 1.1)
    (part,) = measured(again, progress).values()
    assert {row["status"] for row in part["rows"]} == {"wrong"}
    assert part["verdict"] == "wrong"
    assert all(row["providers"] == [] and "speed" not in row for row in part["rows"])


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[[Any], Any]) -> None:
    provider = dataclasses.replace(registry.PROVIDERS[name], function=function)
    monkeypatch.setitem(registry.PROVIDERS, name, provider)


def test_another_sides_failure_or_wrong_result_is_its_entry_and_the_rest_goes_on(
    progress: Progress, monkeypatch
) -> None:
    def out_of_memory(*operands: Any, **keywords: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    replaced(monkeypatch, EAGER_NCHW, lambda operator: out_of_memory)
    replaced(monkeypatch, COMPILED, lambda operator: lambda *given, **keywords: 2 * torch.conv2d(*given, **keywords))
    (part,) = measured(races("dense"), progress).values()
    assert part["verdict"] == "right"
    for row in part["rows"]:
        entries = {entry["provider"]: entry for entry in row["providers"]}
        assert (entries[OURS]["status"], entries[EAGER]["status"], row["status"]) == ("ok", "ok", "ok")
        assert entries[EAGER_NCHW]["reason"] == "OutOfMemoryError: tried to allocate 2 GiB"
        assert (entries[EAGER_NCHW]["status"], entries[COMPILED]["status"]) == ("failed", "wrong")
        assert "ms" not in entries[EAGER_NCHW] and "ms" not in entries[COMPILED]
        assert row["speed"] == row["speed_over_eager"]


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (1.1, "wrong")])
def test_where_the_yardstick_fails_ours_is_held_to_a_fixed_tolerance(
    factor: float, status: str, progress: Progress, monkeypatch
) -> None:
    chosen, ours, theirs = races("grouped", providers=(OURS, EAGER_NCHW)), fastconv.functional.conv2d, F.conv2d

    def no_workspace(x: torch.Tensor, *operands: Any, **keywords: Any) -> torch.Tensor:
        if x.dtype is torch.bfloat16:  # the reference is of a wider type
            raise torch.OutOfMemoryError("no workspace")
        return theirs(x, *operands, **keywords)

    monkeypatch.setattr(F, "conv2d", no_workspace)
    monkeypatch.setattr(fastconv.functional, "conv2d", lambda *args, **kwargs: ours(*args, **kwargs) * factor)
    (part,) = measured(chosen, progress).values()
    for row in part["rows"]:
        assert (row["status"], row["eager_error"]) == (status, None)
        entries = {entry["provider"]: entry for entry in row["providers"]}
        if status == "ok":
            assert entries[EAGER]["reason"] == entries[EAGER_NCHW]["reason"] == "OutOfMemoryError: no workspace"
            assert (entries[EAGER]["status"], row["speed"]) == ("failed", None) and "ms" in entries[OURS]


def test_our_own_failure_is_the_rows(progress: Progress, monkeypatch) -> None:
    chosen = races("pool")

    def fails(*operands: Any, **keywords: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(fastconv.functional, "max_pool2d", fails)
    (part,) = measured(chosen, progress).values()
    assert {(row["status"], row["reason"]) for row in part["rows"]} == {("failed", "RuntimeError: CUDA error")}
    assert part["verdict"] == "wrong"


@pytest.mark.parametrize(("name", "served"), [("dense", "skipped"), ("depthwise", "ok")])
def test_one_family_alone_is_a_provider_of_its_own(name: str, served: str, progress: Progress) -> None:
    names = ("fastconv:gather", "fastconv:depthwise")
    (part,) = measured(races(name, providers=names), progress).values()
    assert part["verdict"] == "right"
    for row in part["rows"]:
        assert row["ours"] == "fastconv:gather"
        entries = {entry["provider"]: entry for entry in row["providers"]}
        assert row["family"] == "gather"
        assert entries.keys() == {"eager", *names}
        assert entries["fastconv:depthwise"]["status"] == served
        assert not [record for record in row["launches"] if record.startswith("conv_depthwise")]


def test_a_family_that_serves_nothing_of_an_entry_is_skipped(progress: Progress) -> None:
    (part,) = measured(races("dense", providers=("fastconv:depthwise",)), progress).values()
    assert part["verdict"] == "skipped" and "8 input channels a group" in part["reason"]


def test_a_row_is_of_the_first_provider_of_ours_that_serves_it(progress: Progress) -> None:
    names = ("fastconv:depthwise", OURS, "fastconv:gather")
    (part,) = measured(races("grouped", providers=names), progress).values()
    assert part["verdict"] == "right"
    for row in part["rows"]:
        entries = {entry["provider"]: entry for entry in row["providers"]}
        assert (row["ours"], entries["fastconv:depthwise"]["status"]) == (OURS, "skipped")
        assert row["gb_per_s"] == row["bytes"] / entries[OURS]["ms"]["median"] / 1e6


@pytest.mark.parametrize(("family", "width"), [("pixels", 2), ("gemm", 1)])
def test_families_of_bulk_copies_are_measured(family: str, width: int, progress: Progress, monkeypatch) -> None:
    """As on a GPU that has them, which the interpreter's has not: planned, compared, timed, and all that again."""
    monkeypatch.setattr(operator_times, "DOUBTED", 0.0)
    (race,) = races("dense", providers=(f"fastconv:{family}",))
    shapes = (16, 16, 1, width), (16, 16, 1, width), None
    race.case = dataclasses.replace(race.case, operator=dataclasses.replace(race.case.operator, shapes=shapes))
    with dispatch.use_target(gpus.H200):
        (part,) = measured([race], progress).values()
    assert part["verdict"] == "right", part["reason"]
    for row in part["rows"]:
        assert (row["family"], row["again"]["status"]) == (family, "ok")
        assert all(name.startswith(f"conv_{family}") for name in row["launches"])
    assert {row["direction"] for row in part["rows"]} == DIRECTIONS["dense"]


def test_plain_fastconv_that_cannot_be_planned_is_a_failure(monkeypatch) -> None:
    plans = operators._plans

    def raising(provider: registry.Provider, *given: Any) -> Any:
        if provider.name == OURS:
            raise RuntimeError("no plan")
        return plans(provider, *given)

    monkeypatch.setattr(operators, "_plans", raising)
    for names, status in (((OURS, "fastconv:gather"), "failed"), (("fastconv:gather", OURS), "ok")):
        (race,) = races("grouped", providers=names)
        operators.plan_each([race], SETUP)
        for row in race.rows:
            assert row["status"] == status
            assert {entry["provider"]: entry["status"] for entry in row["providers"]} == {OURS: "failed"}


def test_torch_compile_gets_time_where_it_is_a_rival_first(progress: Progress, monkeypatch) -> None:
    monkeypatch.setattr(operators, "ROW_SECONDS", 0.0)
    monkeypatch.setattr(operators, "COMPILE_SECONDS", 1000.0)
    monkeypatch.setattr(operator_times, "COMPILE_SECONDS", 1000.0)
    parts = measured(races("dense", "pool"), progress, time.monotonic() + 4500)
    statuses = {
        name: {entry["status"] for row in part["rows"] for entry in row["providers"] if entry["provider"] == COMPILED}
        for name, part in parts.items()
    }
    assert statuses == {"dense": {"skipped"}, "pool": {"ok"}}


def test_torch_compile_has_its_share_where_not_every_row_can_be_measured(progress: Progress, monkeypatch) -> None:
    granted: list[float] = []
    monkeypatch.setattr(operators, "ROW_SECONDS", 600.0)
    monkeypatch.setattr(operators, "_typical", lambda seconds, guess: guess)
    monkeypatch.setattr(operators, "_measure_race", lambda *given: granted.append(given[-1] - time.monotonic()))
    # For 3 rows, in which case half of the time is for pools and for each entry's first case.
    measured(races("pool", "depthwise") + races("pool", "depthwise"), progress, time.monotonic() + 2000)
    assert granted == pytest.approx([1000, 1000, 1000, 0], abs=5)


def test_torch_compile_is_first_planned_where_it_is_owed() -> None:
    dense, pool, again = races("dense") + races("pool") + races("dense")
    for race in (dense, pool, again):
        race.rows = [{"providers": []} for _ in range(4)]
    pace = operators.Pace(share=20.0, rows=[1.0] * 6, compiled=[3.0] * 6)
    assert pace.for_compiling([dense, pool, again], True, 100.0) == 100 - 12 - 12  # there is time for all
    assert pace.for_compiling([pool, again], True, 100.0) == 100 - 8
    assert pace.for_compiling([dense, pool, again], True, 23.0) == 20 - 12  # of the share what pools leave
    assert pace.for_compiling([pool, dense, again], False, 11.0) == 11  # no more than there is
    assert pace.for_compiling([again, pool], False, 7.0) == 0
    assert pace.for_compiling([again, pool], True, 7.0) == 7  # a pool that is not reached is owed nothing
    pool.rows[0]["providers"] = [{"seconds": 5.0}, {}]
    pace.note(pool, 13.0)
    assert (pace.share, pace.rows[-1], pace.compiled[-1]) == (15.0, 2.0, 5.0)


def test_what_is_much_faster_than_eager_is_measured_in_another_way(progress: Progress, monkeypatch) -> None:
    monkeypatch.setattr(operator_times, "DOUBTED", 0.0)
    (part,) = measured(races("first-layer", providers=(OURS,)), progress).values()
    for row in part["rows"]:
        times = {entry["provider"]: entry["ms"]["median"] for entry in row["providers"]}
        assert row["again"]["status"] == "ok" and row["again"]["copies"] == 2
        assert row["speed_over_eager"] == pytest.approx(
            min(times[EAGER] / times[OURS], row["again"]["speed_over_eager"])
        )


def test_a_clock_alone_has_the_hosts_time_in_it(monkeypatch) -> None:
    asked: Counter[bool] = Counter()

    def clock(call: Any, repeats: int = 1, *, cold: bool = False, alone: bool = False) -> Sample:
        call()
        asked[alone] += cold
        return Sample(7.0 if alone else 3.0, 0.1)

    (race,) = races("pool", providers=(OURS,))
    operators.plan_each([race], SETUP)
    with operator_times.conditions(CPU):
        setup = dataclasses.replace(SETUP, clock=clock)
        operator_times.measure_row(race.rows[0], race.case.operator, race.providers, setup, math.inf, math.inf)
    for entry in race.rows[0]["providers"]:
        assert (entry["ms"]["median"], entry["alone_ms"]["median"]) == (3.0, 7.0)
    assert asked == {False: 3, True: 2}  # the yardstick's once more


def timed(**medians: float) -> list[dict[str, Any]]:
    return [{"provider": name.replace("_", "-"), "ms": {"median": median}} for name, median in medians.items()]


def test_what_times_mean_and_what_is_owed() -> None:
    pool, dense = ENTRIES[1], ENTRIES[0]
    row: dict[str, Any] = {"status": "ok", "ours": OURS, "bytes": 3_000_000_000, "flops": 0, "large": True}
    row["providers"] = timed(eager=3.0, fastconv=1.0, fastconv_nchw=1.25, eager_nchw=2.0, compile=0.9)
    targets.complete(row, pool, LIMITS)
    assert (row["speed"], row["gb_per_s"], row["share"], row["tflops"]) == (0.9, 3000.0, 0.75, None)
    assert (row["layout_ms"], row["ceiling"], row["missed"]) == (0.25, 0.75, ["speed", "bandwidth"])
    row |= {"large": False, "flops": 400_000_000_000}
    targets.complete(row, dense, LIMITS)
    assert (row["speed"], row["speed_over_rivals"], row["speed_over_eager"], row["missed"]) == (0.9, 3.0, 3.0, [])
    assert (row["tflops"], row["matrix_share"], row["ceiling"]) == (400.0, 0.5, 0.75)
    # The other way says less: all speeds are less.
    row["again"] = {"speed_over_eager": 1.5}
    targets.complete(row, dense, LIMITS)
    assert (row["speed"], row["speed_over_rivals"], row["speed_over_eager"]) == (0.45, 1.5, 1.5)
    row["again"] = {"speed_over_eager": 3.5}
    targets.complete(row, dense, LIMITS)
    assert (row["speed_over_eager"], row["unconfirmed"]) == (3.0, None)


def test_what_is_not_confirmed_is_no_win() -> None:
    row = stood(None, {"resnet50": 1}, bytes=3_000_000_000, flops=0, large=False, reason=None, ours=OURS)
    row["providers"] = timed(eager=3.0, fastconv=1.0)
    row["again"] = {"status": "failed", "reason": "OutOfMemoryError: tried to allocate 2 GiB", "copies": 2}
    targets.complete(row, ENTRIES[1], LIMITS)
    assert (row["speed"], row["speed_over_rivals"], row["speed_over_eager"]) == (None, None, None)
    assert (row["unconfirmed"], row["gb_per_s"], row["missed"]) == (3.0, 3000.0, [])
    assert (targets.means([row]), targets.families([row])) == ([], {})
    part = targets.targets([{"kind": "operators", "rows": [row]}], dataclasses.replace(TARGET, means={"fprop": 0.9}))
    assert part is not None
    (target,) = part["rows"]
    assert (target["measured"], target["mean"], target["met"]) == (0, None, None)


def test_without_eagers_time_no_win_is_believed() -> None:
    row: dict[str, Any] = {"status": "ok", "ours": OURS, "bytes": 10**9, "flops": 0, "large": False}
    row["providers"] = timed(fastconv=1.0, eager_nchw=3.0)
    targets.complete(row, ENTRIES[3], LIMITS)
    assert (row["speed"], row["speed_over_rivals"], row["speed_over_eager"]) == (None, None, None)
    assert (row["unconfirmed"], row["missed"]) == (3.0, [])
    (remark,) = tables._remarks(row | {"reason": None})
    assert remark == "3.00 of the fastest's, UNCONFIRMED: eager has no time"
    # A loss is: nobody has to doubt it.
    row = row | {"providers": timed(fastconv=1.0, eager_nchw=3.0, compile=0.5), "unconfirmed": None}
    targets.complete(row, ENTRIES[3], LIMITS)
    assert (row["speed"], row["speed_over_rivals"], row["unconfirmed"]) == (0.5, None, None)


def stood(speed: float | None, networks: dict[str, int], **others: Any) -> dict[str, Any]:
    row = {"direction": "fprop", "batch": 64, "family": "gather", "operator": f"{speed}", "status": "ok"}
    return row | {"networks": networks, "speed_over_eager": speed} | others


def test_means_are_geometric_and_weighted_by_occurrence() -> None:
    rows = [
        stood(2.0, {"a": 3, "b": 1}),
        stood(0.5, {"a": 1}, family="rows"),
        stood(8.0, {"b": 1}, direction="together", family="gather, rows"),
        stood(9.0, {}, family="rows"),
        stood(None, {"a": 1}),
    ]
    means = {(it["network"], it["direction"]): it["speed"] for it in targets.means(rows)}
    assert means == pytest.approx(
        {
            ("a", "fprop"): 2.0 ** (2 / 4),
            ("b", "fprop"): 2.0,
            ("b", "together"): 8.0,
            ("all", "fprop"): 2.0 ** (3 / 5),
            ("all", "together"): 8.0,
        }
    )
    assert list(means)[-1] == ("all", "together")
    assert targets.families(rows) == {"gather": {"wins": 1, "losses": 0}, "rows": {"wins": 1, "losses": 1}}


@pytest.mark.parametrize(
    ("speeds", "of", "met"),
    [((0.9, 0.9), 2, True), ((0.9, 0.9), 3, None), ((0.5, 2.0), 3, False), ((0.7, 0.8), 2, False), ((), 2, None)],
)
def test_a_target_is_met_where_every_layer_was_measured_and_none_is_slow(
    speeds: tuple[float, ...], of: int, met: bool | None, monkeypatch
) -> None:
    monkeypatch.setattr(registry.Target, "layers", lambda target, direction: of)
    target = registry.Target(("a", "b"), (64,), {"fprop": 0.85, "dgrad": 0.9}, least=0.6)
    rows = [stood(speed, {"a": 1, "other": 9}) for speed in speeds] or [stood(None, {"b": 1})]
    rows += [stood(0.1, {"other": 1}), stood(0.1, {"a": 1}, batch=8), stood(0.1, {"a": 1}, direction="wgrad")]
    part = targets.targets([{"kind": "operators", "rows": rows}], target)
    assert part is not None
    check_part(part)
    (row,) = part["rows"]
    assert (row["met"], row["measured"], row["of"]) == (met, len(speeds), of)
    assert row["mean"] == (pytest.approx(math.prod(speeds) ** (1 / len(speeds))) if speeds else None)
    assert part["verdict"] == ("right" if speeds else "skipped")
    assert targets.targets([{"kind": "operators", "rows": rows[-3:-2]}], target) is None


@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad", "together"])
def test_a_direction_gives_what_it_is_named_for(direction: str) -> None:
    (race,) = races("grouped")
    operands = drawn(race.case.operator, torch.float32, CPU)
    expected = {
        "fprop": ["output"],
        "dgrad": ["input"],
        "wgrad": ["weight"],
        "together": ["output", "input", "weight", "bias"],
    }
    found = exact(race.case.operator, direction, operands)
    assert list(found) == expected[direction]
    shapes = {"output": race.case.operator.output, "input": race.case.operator.input}
    shapes |= dict(zip(("weight", "bias"), race.case.operator.shapes[1:], strict=True))
    for name, tensor in found.items():
        assert tensor.dtype == torch.float64 and tuple(tensor.shape) == shapes[name] and not tensor.requires_grad


def test_ceilings_are_rates_of_what_the_clock_says() -> None:
    limits = ceilings.measure(CPU, lambda call, repeats=1, *, cold=False, alone=False: Sample(2.0, 2.0))
    assert limits == ceilings.Ceilings(bandwidth=2 * 2**20 / 2e-3, matrix=2 * 64**3 / 2e-3)
    assert LIMITS.floor_ms(4_000_000_000, 0) == 1.0
    assert LIMITS.floor_ms(4_000_000_000, 1_600_000_000_000) == 2.0


def test_layers_of_a_network_that_does_not_run_without_data_are_refused() -> None:
    loaded = models.load("tests.cli.tiny:large", 1, 4)
    with pytest.raises(ValueError, match=r"layers of tests.cli.tiny:large cannot be listed without data"):
        layer_lists.of(loaded)
