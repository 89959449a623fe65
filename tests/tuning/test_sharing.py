"""A run that ranks share: who tunes what, what each gets of the others, and four of them on two machines."""

import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from fastconv.autotune import Measured, Store, Tuned
from fastconv.autotune.choose import Question, by_cost_model
from fastconv.autotune.gpus import A100, H200
from fastconv.autotune.tune import TuningTask
from fastconv.tuning import sharing
from fastconv.tuning.run import RankTasks, divide
from fastconv.tuning.sharing import Ranks, RunLost
from tests.autotune.making import VERSION, problem, tuned
from tests.autotune.test_tune import SPACE, work
from tests.measuring import pretending

ROOT = Path(__file__).parents[2]
PROBLEMS = 12


def task(index: int, count: int = 1) -> TuningTask:
    return TuningTask(
        Question(SPACE, index, work, H200, problem(N=index), VERSION, by_cost_model(SPACE, work, H200)), count
    )


@pytest.fixture
def ranks() -> Iterator[list[Ranks]]:
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)
    yield [Ranks(dist.PrefixStore("run", store.clone()), rank, (0, 1, 2)) for rank in range(3)]


def test_ranks_divide_what_none_has_tuned_by_predicted_cost(ranks: list[Ranks]) -> None:
    tasks = [task(index, count) for index, count in enumerate((1, 8, 3, 7, 2, 5, 4, 6))]
    earlier = [[tuned(tasks[0].question.problem)], [], [tuned(tasks[4].question.problem)]]
    with ThreadPoolExecutor(3) as threads:
        parts = list(threads.map(lambda each: divide(each, tasks, earlier[each.rank], H200), ranks))
        again = list(threads.map(lambda each: divide(on("again", each), tasks, earlier[each.rank], H200, True), ranks))
    assert [[each.count for each in part.tasks] for part in parts] == [[8, 5], [7, 4], [6, 3]]
    for part in parts:
        assert part.left == 6 and part.earlier == [*earlier[0], *earlier[2]]
    assert [[each.count for each in part.tasks] for part in again] == [[8, 5, 2], [7, 4, 1], [6, 3]]


def on(name: str, ranks: Ranks) -> Ranks:
    return replace(ranks, store=dist.PrefixStore(name, ranks.store))


def test_ranks_on_other_gpus_have_problems_of_their_own(ranks: list[Ranks]) -> None:
    tasks = [task(index) for index in range(4)]

    def part(each: Ranks) -> RankTasks:
        return divide(each, tasks, [tuned(tasks[0].question.problem)], A100 if each.rank == 1 else H200)

    with ThreadPoolExecutor(3) as threads:
        parts = list(threads.map(part, ranks))
    assert [len(each.tasks) for each in parts] == [2, 4, 1], "what is tuned for one GPU is not for another"


def test_who_leaves_waits_for_nobody_but_the_first_for_all(ranks: list[Ranks]) -> None:
    a, b, c = ranks
    assert b.exchange("left", None, 20.0, leave=True) == {} and not b.leads
    with pytest.raises(RunLost, match=r"other ranks are gone \(.*run again to go on"):
        a.exchange("left", None, 0.1, leave=True)
    c.exchange("left", "why", 20.0, leave=True)
    assert a.exchange("left", None, 20.0, leave=True) == {0: None, 1: None, 2: "why"}


def test_without_torchrun_nothing_is_shared(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert sharing.join().exchange("name", 1, 0.0) == {0: 1} and sharing.join().leads
    assert (sharing.local_rank(), sharing.local_world_size()) == (0, 1)


# A rank as torchrun starts it, with a worker and a compiler that pretend.
RANK = """
import sys
from pathlib import Path
from fastconv.autotune import Store, Tuned
from fastconv.autotune.tune import Footprint
from fastconv.measuring.process import Worker
from fastconv.measuring.runner import WorkerRunner
from fastconv.tuning import sharing
from fastconv.tuning.run import able, divide, run
from tests.tuning.test_sharing import PROBLEMS, task
plan, folder = sys.argv[1:]
def compiled(asked, configs):
    return [Footprint(64, 0, asked.work(config).shared_memory) for config in configs]
ranks = sharing.join()
with Worker([sys.executable, "-m", "tests.measuring.pretending", plan]) as worker:
    measuring = able(ranks, worker)
    part = divide(measuring, [task(index) for index in range(PROBLEMS)], [], worker.gpu)
    found = run(part, lambda question: WorkerRunner(question, worker, compiled), Store(Path(folder)), 60.0, measuring,
                merge=sharing.local_rank() == 0)
    print(sum(isinstance(record, Tuned) for record in found))
    ranks.exchange("left", None, 60.0, leave=True)
"""


@pytest.mark.slow
def test_four_ranks_on_two_machines(tmp_path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, plans = [], [tmp_path / f"plan{rank}" for rank in range(4)]
    for rank, plan in enumerate(plans):
        pretending.write(plan, H200, {}, {}, otherwise=1e-3, takes=0.01)
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank % 2), "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(plan), str(tmp_path / f"store{rank // 2}")],
                cwd=ROOT,
                env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0 and out.strip() == str(PROBLEMS), error
    question = Counter(key for plan in plans for key in pretending.asked(plan))
    for machine in range(2):
        records = Store(tmp_path / f"store{machine}").read()
        winners = [record for record in records if isinstance(record, Tuned)]
        assert Counter(record.problem for record in winners) == {problem(N=index): 1 for index in range(PROBLEMS)}
        kept = (record for record in records if isinstance(record, Measured))
        assert Counter(pretending.key_of(it.problem, it.config) for it in kept) == question, "each once, and all merged"
    for index in range(PROBLEMS):
        name = problem(N=index).describe() + " "
        owners = [plan for plan in plans if any(key.startswith(name) for key in pretending.asked(plan))]
        assert owners == [plans[index % 4]]
