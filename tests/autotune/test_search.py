"""The search against simulated GPUs: near the best of the whole space in sixteen measurements."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from math import inf
from statistics import mean
from typing import Any

import pytest

from fastconv.autotune import Config, Space, Work
from fastconv.autotune.choose import Question
from fastconv.autotune.cost_model import Prediction
from fastconv.autotune.gpus import H200
from fastconv.autotune.search import Candidate, Key, Search, key_of, neighbours_of
from fastconv.autotune.tune import Failed, Footprint, _Tuning
from tests.autotune.simulated import Timer

SEEDS = 20
TRIALS = 16
SPACE = Space(
    "tied",
    {"M": (64, 128), "N": (32, 64, 128), "stages": (3, 4)},
    lambda config: None if (config["stages"] == 4) == (config["N"] == 32) else "tied to N",
)
missing = ", ".join(name for name in ("torchvision", "rich", "typer") if find_spec(name) is None)


def candidates(seconds: Any = lambda config: 1e-5, bound: str = "matrix") -> list[Candidate]:
    return [Candidate(config, Prediction(seconds(config), bound, 1)) for config in SPACE]


def first() -> dict[str, int]:
    return {"M": 64, "N": 32, "stages": 4}


def test_steps_follow_the_rules_that_tie_parameters() -> None:
    keys = [key_of(config) for config in SPACE]
    steps = [dict(key) for key in neighbours_of({"M": 64, "N": 64, "stages": 3}, keys)]
    assert {"M": 128, "N": 64, "stages": 3} in steps
    assert {"M": 64, "N": 128, "stages": 3} in steps
    assert {"M": 64, "N": 32, "stages": 4} in steps, "stages follow"
    assert {"M": 128, "N": 128, "stages": 3} not in steps


def test_default_and_seeds_come_first_and_nothing_twice() -> None:
    search = Search(
        candidates(lambda config: config["M"] * 1e-7), first(), [{"M": 128, "N": 64, "stages": 3}, {"M": 7}]
    )
    assert search.propose(2) == [first(), {"M": 128, "N": 64, "stages": 3}]
    proposed = search.propose(100)
    assert len(proposed) == len({key_of(config) for config in proposed}) == len(list(SPACE))
    for config in proposed:
        search.tell(config, 1e-5)
    assert search.propose(1) == [] and search.measured == len(proposed)


def test_unknown_default_is_refused() -> None:
    with pytest.raises(ValueError, match="not among the candidates"):
        Search(candidates(), {"M": 1, "N": 1, "stages": 1})


def test_failed_is_neither_proposed_nor_best() -> None:
    search = Search(candidates(), first())
    search.tell(first(), 1e-6)
    search.drop(first())
    assert first() not in search.propose(100) and search.best(1) == []


def test_outlier_is_corrected_by_a_second_time() -> None:
    search = Search(candidates(), first())
    search.tell(first(), 5e-5)
    search.tell({"M": 128, "N": 32, "stages": 4}, 2e-5)
    search.tell(first(), 1e-5)
    search.tell(first(), 3e-5)
    assert search.best(2) == [(first(), 1e-5), ({"M": 128, "N": 32, "stages": 4}, 2e-5)]
    assert search.time(first()) == 1e-5


def test_what_is_measured_corrects_what_is_alike() -> None:
    """The cost model takes narrow tiles for the fastest; two measurements of narrow ones say otherwise."""
    search = Search(candidates(lambda config: config["N"] * 1e-7), first())
    search.tell(first(), 9e-5)
    search.tell({"M": 128, "N": 32, "stages": 4}, 9e-5)
    search.tell({"M": 64, "N": 128, "stages": 3}, 9e-6)
    assert all(config["N"] > 32 for config in search.propose(2))


class Simulated:
    """A `tune.Runner` whose compiler says what was estimated, and whose GPU is a timer."""

    def __init__(self, timer: Timer, works: dict[Key, Work]) -> None:
        self.timer, self.works, self.taken = timer, works, 0

    def compile(self, configs: Sequence[Config]) -> list[Footprint | Failed]:
        works = [self.works[key_of(config)] for config in configs]
        return [Footprint(it.registers, 0, it.shared_memory) for it in works]

    def run(self, config: Config | None) -> float:
        assert config is not None
        self.taken += 1
        return self.timer(self.works[key_of(config)], config)


def search_for(timer: Timer, question: Question, works: dict[Key, Work]) -> tuple[float, float, int, int]:
    """Regret of what the rounds of `tune` find and of the default, the measurements they took, and how many
    configs there are."""
    runner = Simulated(timer, works)
    tuning = _Tuning(question, runner, lambda record: None, (), (), inf, lambda: 0.0, lambda step: None)
    tuning.look(TRIALS, TRIALS)
    truth = {key: timer.truth(works[key], dict(key)) for key in tuning.predictions}
    best, (found, _) = min(truth.values()), tuning.search.best(1)[0]
    default = truth[key_of(question.choice.config)]
    return truth[key_of(found)] / best - 1, default / best - 1, runner.taken, len(truth)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")
def test_sixteen_measurements_come_within_5_percent_of_the_best(record_property) -> None:
    from tests.autotune.networks import questions

    problems = []
    for question in questions():
        # The space's rules and its configs' work are the same for all simulated GPUs.
        configs: Any = tuple(question.space)
        works = {key_of(config): question.work(config) for config in configs}
        problems.append(
            (replace(question, space=configs, work=lambda config, works=works: works[key_of(config)]), works)
        )
    found = []
    for seed in range(SEEDS):
        timer = Timer(H200, seed)
        found += [search_for(timer, question, works) for question, works in problems]
    assert max(taken for *_, taken, _ in found) <= TRIALS
    near = sum(regret <= 0.05 for regret, *_ in found) / len(found)
    defaults = [regret for _, regret, *_ in found]
    line = (
        f"search: {near:.1%} of {len(problems)} problems x {SEEDS} simulated GPUs within 5% of the exhaustive best in "
        f"{TRIALS} measurements (mean regret {mean(r for r, *_ in found):.1%}; of the cost model's choice "
        f"{mean(defaults):.1%}, {sum(r <= 0.05 for r in defaults) / len(found):.1%} within 5%)"
    )
    record_property("line", line)
    large = [regret for regret, *_, configs in found if configs > TRIALS]
    record_property(
        "line", f"search: {sum(r <= 0.05 for r in large) / len(large):.1%} where a space holds over {TRIALS} configs"
    )
    assert near >= 0.9, line
