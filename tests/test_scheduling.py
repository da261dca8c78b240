"""Tests that share what takes long to make go to one worker of pytest-xdist."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("xdist")

from support.scheduling import TOGETHER

ROOT = Path(__file__).parents[1]
APART = [f"tests/text/test_files.py::test_reading[a::b-{index}]" for index in range(40)]


class Worker:
    """Stands in for a worker: keeps what it is sent."""

    shutting_down = False

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.waiting: list[int] = []
        self.run: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.waiting += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def scheduler(config: pytest.Config, dist: str) -> Any:
    values = {"dist": dist, "tx": ["popen", "popen"]}
    given = SimpleNamespace(
        getvalue=values.__getitem__, option=SimpleNamespace(loadscopereorder=True)
    )
    return config.hook.pytest_xdist_make_scheduler(config=given, log=None)


def test_two_workers_share_the_tests_and_no_unit(pytestconfig: pytest.Config) -> None:
    shared = {
        f"{place}{'' if place.endswith('.py') else f'/test_{number}.py'}::test_{number}": place
        for place in TOGETHER
        for number in range(5)
    }
    collected = [*APART[:20], *shared, *APART[20:]]
    scheduling, workers = scheduler(pytestconfig, "loadgroup"), [Worker("a"), Worker("b")]
    for worker in workers:
        scheduling.add_node(worker)
        scheduling.add_node_collection(worker, collected)
    scheduling.schedule()
    while any(worker.waiting for worker in workers):
        for worker in (worker for worker in workers if worker.waiting):
            worker.run.append(worker.waiting.pop(0))
            scheduling.mark_test_complete(worker, worker.run[-1])
    assert sorted(workers[0].run + workers[1].run) == list(range(len(collected)))
    places = [{shared.get(collected[index]) for index in worker.run} - {None} for worker in workers]
    assert all(places) and places[0] | places[1] == set(TOGETHER)
    assert not places[0] & places[1], "one worker alone runs what stays together"
    for worker in workers:
        alone = [collected[index] not in shared for index in worker.run]
        assert alone == sorted(alone) and alone[-1], "single tests come last, and go to both"


def test_other_ways_of_sharing_out_are_left_to_xdist(pytestconfig: pytest.Config) -> None:
    assert scheduler(pytestconfig, "load") is None


def test_what_stays_together_is_there_and_nothing_relies_on_marks() -> None:
    for place in TOGETHER:
        assert (ROOT / place).exists(), place
    mark = "xdist" + "_group"
    marked = [path for path in (ROOT / "tests").rglob("*.py") if f"mark.{mark}" in path.read_text()]
    assert not marked, "the mark has no effect: name the folder or file in support/scheduling.py"
