"""Tuning one problem and many, with a simulated GPU and clock: what is kept, what wins, what is never tried again."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from fastconv.autotune import Config, Measured, ProblemKey, Space, Store, Tuned, Work
from fastconv.autotune.choose import Question, by_cost_model
from fastconv.autotune.gpus import H200
from fastconv.autotune.records import FAILURES
from fastconv.autotune.search import key_of
from fastconv.autotune.tune import (
    PAIRED,
    Failed,
    Footprint,
    TuningState,
    TuningTask,
    expected_gain,
    noise_of,
    session,
    share_of,
    tune,
)
from tests.autotune.making import VERSION, problem
from tests.autotune.simulated import Timer
from tests.autotune.test_choose import WORK

SPACE = Space("gemm", {"M": (32, 64, 128, 256), "N": (32, 64, 128), "WARPS": (4, 8)})


def work(config: Config) -> Work:
    m, n = config["M"], config["N"]
    return dataclasses.replace(
        WORK,
        programs=(8192 // m) * (512 // n),
        step_flops=2 * m * n * 64,
        step_bytes=(m + n) * 128,
        shared_memory=3 * (m + n) * 128,
        registers=40 + m * n // (32 * config["WARPS"]),
        warps=config["WARPS"],
    )


def new_question(of: ProblemKey | None = None, scale: int = 1) -> Question:
    def scaled(config: Config) -> Work:
        made = work(config)
        return dataclasses.replace(made, programs=made.programs * scale)

    return Question(SPACE, of, scaled, H200, of or problem(), VERSION, by_cost_model(SPACE, scaled, H200))


class Runner:
    """Measures in no time; ``failures`` says what goes wrong with a config."""

    def __init__(self, question: Question, seed: int = 0, pytorch: float | Failed = 1e-3) -> None:
        self.question, self.timer, self.pytorch = question, Timer(H200, seed), pytorch
        self.failures: dict[Any, Failed] = {}
        self.spilling: set[Any] = set()
        self.run_configs: list[Config | None] = []
        self.compiled: list[Any] = []
        self.clock = 0.0
        self.truth: Callable[[Config], float] = lambda config: self.timer.truth(question.work(config), config)

    def compile(self, configs: Sequence[Config]) -> list[Footprint | Failed]:
        self.compiled += [key_of(config) for config in configs]
        return [
            Footprint(w.registers, 8 if key_of(config) in self.spilling else 0, w.shared_memory)
            for config in configs
            for w in [self.question.work(config)]
        ]

    def run(self, config: Config | None) -> float | Failed:
        self.clock += 0.1
        self.run_configs.append(config)
        if config is None:
            return self.pytorch
        failure = self.failures.get(key_of(config))
        return failure if failure is not None else self.timer(self.question.work(config), config)

    def best(self) -> float:
        return min(self.truth(config) for config in SPACE)


def kept(runner: Runner, **options: Any) -> tuple[Tuned | None, list[Any]]:
    records: list[Any] = []
    found = tune(runner.question, runner, records.append, clock=lambda: runner.clock, **options)
    return found, records


def test_winner_is_near_the_best() -> None:
    regrets = []
    for seed in range(20):
        runner = Runner(new_question(), seed)
        found, _ = kept(runner)
        assert found is not None
        assert runner.truth(found.config) <= runner.truth(found.default) * 1.02, "never worse than the default"
        regrets.append(runner.truth(found.config) / runner.best() - 1)
    assert sum(regret <= 0.05 for regret in regrets) >= 18, regrets


def test_every_measurement_is_kept_before_the_next() -> None:
    runner = Runner(new_question())
    steps: list[TuningState] = []
    found, records = kept(runner, tell=steps.append, fastconv="0.1.0")
    assert found is not None and records[-1] is found
    measured = records[:-1]
    assert [record.config for record in measured] == [c if c is None else dict(c) for c in runner.run_configs]
    search = [config for config in runner.run_configs if config is not None][:16]
    assert search[0] == runner.question.choice.config, "the default first"
    # The last run: default twice, PyTorch and at most two more, in turn.
    assert len(measured) - 16 in (PAIRED * 4, PAIRED * 5)
    assert found.pytorch == 1e-3 and found.measurements >= 14 and found.default == runner.question.choice.config
    assert all(record.version == VERSION and record.problem == problem() for record in records)
    assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].best == found.config and steps[-1].best_seconds == found.seconds


@pytest.mark.parametrize("seed", range(8))
def test_default_wins_unless_beaten_by_more_than_the_noise(seed: int) -> None:
    """Every config is as fast as any; only noise tells them apart."""
    runner = Runner(new_question(), seed)
    runner.timer.truth = lambda work, config: 1e-5  # type: ignore[method-assign]
    found, _ = kept(runner)
    assert found is not None
    gain = found.default_seconds / found.seconds - 1
    assert found.config == found.default or gain > found.noise
    assert gain < 0.03


def test_noise_is_what_two_series_of_one_thing_differ_by() -> None:
    assert noise_of([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 0
    assert noise_of([1.1, 2.2, 3.3, 4.4], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(0.1)
    quiet = noise_of([1.01, 0.99, 1.02, 1.0, 1.0], [1.0] * 5)
    assert 0 < quiet < noise_of([1.1, 0.9, 1.2, 1.0, 1.0], [1.0] * 5)
    assert noise_of([1.0, 1.0, 1.0, 1.0, 50.0], [1.0] * 5) == 0, "an outlier"


@pytest.mark.parametrize("status", FAILURES)
def test_failure_is_recorded_and_not_tried_again(status: str) -> None:
    runner = Runner(new_question())
    best = min(SPACE, key=runner.truth)
    assert best != runner.question.choice.config
    runner.failures[key_of(best)] = Failed(status, "as planted")
    found, records = kept(runner, seeds=[best])
    assert found is not None and found.config != best
    assert [r.status for r in records if r.kind == "measured" and r.config == best] == [status]
    assert sum(config == best for config in runner.run_configs) == 1
    again = Runner(new_question())
    again.failures = runner.failures
    failures = [record for record in records if record.kind == "measured" and record.seconds is None]
    found, _ = kept(again, seeds=[best], known=failures)
    assert found is not None and best not in again.run_configs and key_of(best) not in again.compiled


@pytest.mark.parametrize("status", FAILURES)
def test_another_session_tries_what_another_program_may_have_been_in_the_way_of(status: str) -> None:
    """Memory that was short; with ``again`` a GPU that was busy or broken, too."""
    question = new_question()
    best = min(SPACE, key=Runner(question).truth)
    short, records = Runner(question), list[Any]()
    short.failures[key_of(best)] = Failed(status)
    session([TuningTask(question)], lambda _: short, records.append, budget=60.0, seeds=lambda _: [best])
    untuned = [record for record in records if record.kind == "measured"]
    for known, again, retried in (
        (records, False, ()),
        (untuned, False, ("out_of_memory",)),
        (records, True, ("out_of_memory", "crashed", "hung")),
    ):
        runner = Runner(question)
        given: dict[str, Any] = {"known": list(known), "again": again, "seeds": lambda _: [best]}
        session([TuningTask(question)], lambda _, it=runner: it, lambda record: None, budget=60.0, **given)  # type: ignore[misc]
        assert (best in runner.run_configs) == (status in retried)


def test_default_that_fails_leaves_the_best_of_the_others() -> None:
    runner = Runner(new_question())
    default = runner.question.choice.config
    runner.failures[key_of(default)] = Failed("wrong")
    found, _ = kept(runner)
    assert found is not None and default not in (found.config, found.default)
    assert sum(config == default for config in runner.run_configs) == 1


def test_finalist_that_fails_in_the_last_run_is_out() -> None:
    runner = Runner(new_question())
    run, counts = runner.run, dict[Any, int]()

    def sometimes(config: Config | None) -> float | Failed:
        if config is not None and config != runner.question.choice.config:
            counts[key_of(config)] = counts.get(key_of(config), 0) + 1
            if counts[key_of(config)] > 4:
                return Failed("crashed")
        return run(config)

    runner.run = sometimes  # type: ignore[method-assign]
    found, records = kept(runner)
    assert found is not None and found.config == found.default
    assert sum(record.kind == "measured" and record.status == "crashed" for record in records) == 2


def test_nothing_that_runs_is_no_result() -> None:
    runner = Runner(new_question())
    runner.failures = {key_of(config): Failed("out_of_memory") for config in SPACE}
    found, records = kept(runner, trials=100)
    assert found is None and {record.status for record in records} == {"out_of_memory"}
    assert len(runner.run_configs) == len(set(map(key_of, runner.run_configs)))  # type: ignore[arg-type]


def test_pytorch_that_fails_is_left_out() -> None:
    found, records = kept(Runner(new_question(), pytorch=Failed("out_of_memory")))
    assert found is not None and found.pytorch is None
    assert [record.status for record in records if record.kind == "measured" and record.config is None] == [
        "out_of_memory"
    ]


def test_spilling_configs_never_reach_the_gpu() -> None:
    runner = Runner(new_question())
    default = runner.question.choice.config
    runner.spilling = {key_of(config) for config in SPACE if config["WARPS"] == 4} | {key_of(default)}
    found, records = kept(runner, trials=50)
    assert found is not None
    measured = {key_of(config) for config in runner.run_configs if config is not None}
    assert measured & runner.spilling == {key_of(default)}, "the default is what users get, so it is measured"
    out = [record for record in records if record.kind == "measured" and record.status == "spills"]
    assert {key_of(record.config) for record in out} == runner.spilling - {key_of(default)}
    assert len(runner.compiled) == len(set(runner.compiled))


def test_top_k_is_compiled_first_others_when_proposed() -> None:
    runner = Runner(new_question())
    kept(runner, top_k=3)
    ran = {key_of(config) for config in runner.run_configs if config is not None}
    assert ran <= set(runner.compiled)


def test_deadline_ends_the_search_and_not_the_last_run() -> None:
    runner = Runner(new_question())
    found, _ = kept(runner, deadline=0.05)
    assert found is not None and found.measurements == 5
    runner = Runner(new_question())
    assert kept(runner, deadline=0.0)[0] is None and not runner.run_configs


def test_killed_search_goes_on_where_it_was(tmp_path) -> None:
    store = Store(tmp_path)
    first, limit = Runner(new_question()), 7
    run = first.run

    def killed(config: Config | None) -> float | Failed:
        if len(first.run_configs) == limit:
            raise KeyboardInterrupt
        return run(config)

    first.run = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        tune(first.question, first, store.append)
    known = [record for record in Store(tmp_path).read() if isinstance(record, Measured)]
    assert [record.config for record in known] == [dict(c) for c in first.run_configs if c is not None]
    second = Runner(new_question())
    found, _ = kept(second, known=known)
    assert found is not None
    search = [key_of(config) for config in second.run_configs if config is not None][: 16 - limit - 2]
    assert not set(search) & {key_of(record.config) for record in known if record.config is not None}


def many(scales: Sequence[int] = (1, 64, 8)) -> list[TuningTask]:
    return [TuningTask(new_question(problem(N=32 << index), scale)) for index, scale in enumerate(scales)]


def test_session_goes_where_the_time_goes() -> None:
    tasks, order, clock = [*many(), TuningTask(new_question(problem(N=7)), 100)], list[ProblemKey](), [0.0]
    allowances: dict[ProblemKey, float] = {}

    def runner_of(question: Question) -> Runner:
        order.append(question.problem)
        runner = Runner(question)
        run = runner.run

        def timed(config: Config | None) -> float | Failed:
            clock[0] += 0.01
            return run(config)

        runner.run = timed  # type: ignore[method-assign]
        return runner

    def tell(step: TuningState) -> None:
        allowances.setdefault(step.question.problem, step.left)

    records: list[Any] = []
    found = session(tasks, runner_of, records.append, budget=60.0, clock=lambda: clock[0], tell=tell)
    assert len(found) == 4
    assert order == [task.question.problem for task in sorted(tasks, key=lambda task: -share_of(task))]
    assert next(iter(allowances.values())) > 20 and len(records) > 4 * 16
    again = session(tasks, runner_of, records.append, budget=60.0, known=records, clock=lambda: clock[0])
    assert again == [] and len(order) == 4, "what is tuned is left alone"
    found = session(tasks, runner_of, records.append, budget=60.0, known=records, again=True, clock=lambda: clock[0])
    assert len(found) == 4


def test_session_stops_when_its_time_is_up() -> None:
    clock = [0.0]

    def runner_of(question: Question) -> Runner:
        clock[0] += 10
        return Runner(question)

    assert len(session(many(), runner_of, lambda record: None, budget=15.0, clock=lambda: clock[0])) <= 2


def test_session_comes_back_to_what_compiling_left_no_time_for() -> None:
    clock, compiled = [0.0], set[ProblemKey]()
    tasks = many((1, 1, 1))

    def runner_of(question: Question) -> Runner:
        runner = Runner(question)
        compile_configs, run = runner.compile, runner.run

        def slowly(configs: Sequence[Config]) -> list[Footprint | Failed]:
            # Longer than a third of the budget for the first; the second time the binaries are there.
            clock[0] += 0.01 if compiled else 40.0
            compiled.add(question.problem)
            return compile_configs(configs)

        def timed(config: Config | None) -> float | Failed:
            clock[0] += 0.01
            return run(config)

        runner.compile, runner.run = slowly, timed  # type: ignore[method-assign]
        return runner

    found = session(tasks, runner_of, lambda record: None, budget=90.0, clock=lambda: clock[0])
    assert {entry.problem for entry in found} == {task.question.problem for task in tasks}


@pytest.mark.parametrize("budget", [0, -1.0])
def test_session_needs_a_budget(budget: float) -> None:
    with pytest.raises(ValueError, match="budget must be over 0"):
        session(many(), Runner, lambda record: None, budget=budget)


def test_expected_gain_is_over_the_best_predicted() -> None:
    question = new_question()
    slow = max(
        SPACE,
        key=lambda config: (
            by_cost_model(Space("one", {k: (v,) for k, v in config.items()}), question.work, H200).seconds
        ),
    )
    seconds = by_cost_model(Space("one", {k: (v,) for k, v in slow.items()}), question.work, H200).seconds
    assert (
        0
        <= expected_gain(question)
        < expected_gain(dataclasses.replace(question, choice=dataclasses.replace(question.choice, seconds=seconds)))
    )
