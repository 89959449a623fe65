"""Where a choice comes from: lock file, own measurements, shipped table, nearest problem, cost model; who measures."""

import dataclasses
import importlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastconv.autotune import Adapter, Choice, Policy, SchemaError, Space, Store, Tuned, Work, choose, known
from fastconv.autotune.gpus import A100, H200, INTERPRETER
from fastconv.autotune.table import Tables, write_table
from tests.autotune.making import DATE, VERSION, problem, tuned
from tests.autotune.test_choose import WORK

chooser = importlib.import_module("fastconv.autotune.choose")  # the package names its function so

# The first is what the cost model takes: within its resolution of the best. Tile 9 does not fit.
SPACE = Space("gemm", {"TILE": (0, 1, 2, 3, 4, 9), "ORDER": (1, 2)}, order=("ORDER",))
DEFAULT = {"TILE": 0, "ORDER": 1}


def config(tile: int, order: int = 1) -> dict[str, int]:
    return {"TILE": tile, "ORDER": order}


def work(config: Any) -> Work:
    memory = 1 << 30 if config["TILE"] == 9 else 96 << 10
    return dataclasses.replace(WORK, steps=400 if config["TILE"] == 4 else 10, shared_memory=memory, dram_bytes=0)


class Asker:
    """A program that asks, and what it set."""

    def __init__(self) -> None:
        self.policy = Policy()
        self.live = False
        self.agreed: list[Any] = []
        self.caller = Adapter(
            lambda space, features: features,
            lambda space: VERSION,
            lambda: self.policy,
            lambda gpu: self.live,
            lambda gpu, tables, reloads: self.agreed.append(tables.digest()),
        )

    def __call__(self, gpu: Any = H200, **sizes: Any) -> Choice:
        return choose(SPACE, problem(**sizes), work, gpu, self.caller)


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asker]:
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTCONV_LOCK", raising=False)
    monkeypatch.setattr(known, "shipped", lambda gpu: [])
    monkeypatch.setattr(known, "_told", set())
    known.reload()
    yield Asker()
    chooser.install_measurer(None)
    known.reload()


def ship(monkeypatch: pytest.MonkeyPatch, *entries: Tuned) -> None:
    monkeypatch.setattr(known, "shipped", lambda gpu: [entry for entry in entries if entry.of_gpu(gpu)])
    known.reload()


def entry(tile: int, order: int = 1, **changes: Any) -> Tuned:
    return tuned(**{"config": config(tile, order), "default": DEFAULT, **changes})


def test_sources_in_their_order(ask: Asker, tmp_path, monkeypatch) -> None:
    def asked() -> tuple[str, dict[str, int]]:
        choice = ask()
        return choice.source, dict(choice.config)

    assert asked() == ("cost model", DEFAULT)
    near = entry(1, of=problem(N=128))
    ship(monkeypatch, near)
    assert asked() == ("nearest problem", config(1))
    ship(monkeypatch, near, entry(2))
    assert asked() == ("table", config(2))
    known.learn(entry(3))
    assert asked() == ("measured here", config(3))
    lock = tmp_path / "lock.json"
    write_table(lock, [entry(1)], "abc", DATE, model="net")
    known.load_lock(lock)
    assert asked() == ("lock file", config(1))
    ask.policy = Policy("off")
    assert asked() == ("cost model", DEFAULT)
    ask.policy = Policy()
    known.load_lock(None)
    assert asked() == ("measured here", config(3))
    known.reload()
    assert asked() == ("measured here", config(3)), "it was stored"


def test_lock_file_by_the_environment(ask: Asker, tmp_path, monkeypatch) -> None:
    lock = tmp_path / "lock.json"
    write_table(lock, [entry(1)], "abc", DATE)
    monkeypatch.setenv("FASTCONV_LOCK", str(lock))
    assert ask().source == "lock file"
    lock.write_text("{}")
    known.reload()
    with pytest.raises(SchemaError, match=r"lock\.json"):
        ask()
    lock.unlink()
    with pytest.raises(FileNotFoundError, match=r"FASTCONV_LOCK: No such file.*lock\.json"):
        ask()


def test_lock_of_another_gpu_is_left_out_and_said_once(ask: Asker, tmp_path, caplog) -> None:
    write_table(tmp_path / "l", [entry(1, gpu=A100)], "abc", DATE)
    known.load_lock(tmp_path / "l")
    with caplog.at_level(logging.WARNING, "fastconv"):
        assert ask().source == "cost model" == ask(N=4).source and ask(A100).source == "lock file"
    assert [record.message for record in caplog.records] == [
        "lock file: of the NVIDIA A100 with 108 multiprocessors, left out on the NVIDIA H200 with 132"
    ]


def test_lock_of_another_version_is_left_out_and_said_once(ask: Asker, tmp_path, caplog) -> None:
    write_table(tmp_path / "l", [entry(1, version=dataclasses.replace(VERSION, triton="3.6.0"))], "abc", DATE)
    known.load_lock(tmp_path / "l")
    assert ask().source == ask(N=33).source == "cost model"
    assert len(caplog.records) == 1 and "triton 3.6.0 is now 3.7.1" in caplog.text


def test_choice_says_what_was_measured(ask: Asker) -> None:
    known.learn(entry(1, seconds=1e-5, pytorch=0.9e-5, noise=0.2))
    exact = ask()
    assert exact.measured == 1e-5 and exact.of is None and not exact.pytorch_faster
    bucket = ask(N=30)
    assert (bucket.source, bucket.measured) == ("measured here", 1e-5) and "N=32" in str(bucket.of)
    known.learn(entry(1, seconds=1e-5, pytorch=0.9e-5, noise=0.01))
    assert ask().pytorch_faster
    for policy in (Policy(fastest=False), Policy(stable=True)):
        ask.policy = policy
        assert not ask().pytorch_faster
    ask.policy = Policy()
    near = ask(N=128)
    assert near.source == "nearest problem" and near.measured is None and not near.pytorch_faster


@pytest.mark.parametrize("source", ["triton", "source", "fp_fusion", "policy"])
def test_stale_entry_never_serves(ask: Asker, source: str) -> None:
    other = {"triton": "3.6.0", "source": "ffff", "fp_fusion": False, "policy": 2}
    known.learn(entry(1, version=dataclasses.replace(VERSION, **{source: other[source]})))
    assert ask().source == "cost model"


@pytest.mark.parametrize("gpu", [A100, dataclasses.replace(H200, multiprocessors=16)], ids=["A100", "MIG"])
def test_other_gpus_entry_never_serves(ask: Asker, gpu: Any) -> None:
    known.learn(entry(1, gpu=gpu))
    known.reload()
    assert ask().source == "cost model" and ask(gpu).source == "measured here"


@pytest.mark.parametrize("bad", [{"TILE": 7, "ORDER": 1}, {"TILE": 1}, config(9)], ids=["range", "names", "too large"])
def test_config_that_is_not_valid_never_serves(ask: Asker, bad: Any) -> None:
    known.learn(entry(1, of=problem(N=30)))
    known.learn(tuned(config=bad, default=DEFAULT))
    assert ask().source == "nearest problem" and ask().config == config(1)


def test_nearest_is_not_trusted_where_it_is_predicted_slow(ask: Asker) -> None:
    known.learn(entry(4, of=problem(N=256)))
    assert ask().source == "cost model"
    known.learn(entry(2, of=problem(N=512)))
    assert ask().config == config(2)


def test_stable_numerics_keep_the_order_of_the_default(ask: Asker) -> None:
    also = ((config(2, 2), 1.1e-5), (config(3), 1.2e-5), (config(1), 1.3e-5))
    known.learn(entry(1, 2, also=also))
    assert ask().config == config(1, 2)
    ask.policy = Policy(stable=True)
    stable = ask()
    assert (stable.config, stable.measured) == (config(3), 1.2e-5)
    known.learn(entry(1, 2))
    assert ask().config == DEFAULT and ask(N=256).config == DEFAULT
    undeclared = dataclasses.replace(SPACE, order=None)
    assert undeclared.same_order(DEFAULT, DEFAULT) and not undeclared.same_order(DEFAULT, config(3))


def test_ordinary_call_measures_nothing_and_writes_what_it_met(ask: Asker) -> None:
    chooser.install_measurer(lambda question: pytest.fail("measured"))
    ask.live = True
    for _ in range(2):
        ask()
        ask(N=128)
    ask.policy = Policy("off")
    ask(N=3)
    assert {dict(record.problem.sizes)["N"] for record in Store().read()} == {32, 128}
    assert len(Store().read(("met",))) == 2
    ask.policy = Policy()
    known.reload()
    ask()
    assert len(Store().read()) == 2, "nor again in the next process"


def test_first_measures_what_is_unknown_once(ask: Asker, caplog) -> None:
    measured: list[Any] = []

    def measurer(question: Any) -> Tuned:
        measured.append(question)
        choose(SPACE, problem(N=77), work, H200, ask.caller)  # it may choose itself
        return entry(2, of=question.problem)

    ask.policy = Policy("first")
    ask.live = True
    ask(N=1)
    assert "none is installed" in caplog.text
    chooser.install_measurer(measurer)
    for _ in range(2):
        assert (ask().source, ask().config) == ("measured here", config(2))
    assert [dict(question.problem.sizes)["N"] for question in measured] == [32]
    assert measured[0].choice.config == DEFAULT
    known.reload()
    ask()
    assert len(measured) == 1
    for policy in (Policy("force"), Policy("force", stable=True)):
        ask.policy = policy
        ask()
        known.forget()
        ask()
    assert len(measured) == 2, "once a process"


@pytest.mark.parametrize("tune", ["first", "force"])
def test_threads_that_meet_a_problem_measure_it_once(ask: Asker, tune: str) -> None:
    measured: list[Any] = []

    def measurer(question: Any) -> Tuned:
        measured.append(question)
        time.sleep(0.1)
        # As what compiles beside it asks: only to look.
        ask.live = False
        beside = threading.Thread(target=ask)
        beside.start()
        beside.join()
        ask.live = True
        return entry(2, of=question.problem)

    chooser.install_measurer(measurer)
    ask.policy, ask.live = Policy(tune), True
    threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(measured) == 1 and ask().config == config(2)


@pytest.mark.parametrize("tune", ["first", "force"])
def test_what_is_chosen_while_looking_is_measured_when_it_is_met(ask: Asker, tune: str) -> None:
    chooser.install_measurer(lambda question: entry(2, of=question.problem))
    ask.policy = Policy(tune)
    assert ask().source == "cost model"
    ask.live = True
    assert ask().config == config(2)


def test_measurer_that_fails_costs_a_warning(ask: Asker, caplog) -> None:
    def measurer(question: Any) -> Tuned:
        raise RuntimeError("no GPU left")

    chooser.install_measurer(measurer)
    ask.policy, ask.live = Policy("first"), True
    with caplog.at_level(logging.WARNING, "fastconv"):
        assert ask().source == "cost model"
    assert "RuntimeError: no GPU left" in caplog.text


def test_interpreter_and_callers_without_tables_read_nothing(ask: Asker, monkeypatch) -> None:
    monkeypatch.setattr(known, "tables", lambda *_: pytest.fail("read"))
    assert ask(INTERPRETER).source == "cost model"
    assert choose(SPACE, problem(), work, H200).source == "cost model"


def test_tables_are_read_once_and_agreed_on_before_use(ask: Asker) -> None:
    ask(), ask(N=4), ask(A100)
    assert len(ask.agreed) == 2


def test_tables_travel(ask: Asker) -> None:
    mine, theirs = Tables([], [entry(1)], []), Tables([entry(2)], [], [entry(3, of=problem(N=2))])
    assert mine.digest() != theirs.digest()
    mine.replace(theirs.dump())
    assert mine.digest() == theirs.digest()
    assert [table.entries for _, table in mine.layers] == [table.entries for _, table in theirs.layers]
    for damaged in ("", "x", theirs.dump()[:-6]):
        with pytest.raises(SchemaError, match="another process's tables"):
            mine.replace(damaged)
    assert mine.digest() == theirs.digest()


def test_fixed_config_must_be_the_spaces() -> None:
    assert chooser.fixed(SPACE, config(3), work, H200).config == config(3)
    with pytest.raises(ValueError, match="has no config"):
        chooser.fixed(SPACE, {"TILE": 7, "ORDER": 1}, work, H200)
    with pytest.raises(ValueError, match="does not fit"):
        chooser.fixed(SPACE, config(9), work, H200)
