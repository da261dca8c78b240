"""Marks and samples: what is called, not how long it takes."""

from __future__ import annotations

import itertools

import pytest
import torch

from ghosted_fast.timing import stopwatch
from ghosted_fast.timing.stopwatch import Stopwatch, calls_per_sample, warm_sample

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(ticks) * 1e-3)


@pytest.mark.usefixtures("clock")
def test_seconds_lie_between_marks() -> None:
    watch = Stopwatch(CPU)
    assert watch.seconds() == []
    for _ in range(3):
        watch.mark()
    assert watch.seconds() == pytest.approx([1e-3, 1e-3])


@pytest.mark.usefixtures("clock")
def test_a_sample_is_the_mean_of_calls_after_untimed_ones() -> None:
    calls = itertools.count(1)
    assert warm_sample(lambda: next(calls), CPU, 4) == pytest.approx(1e-3 / 4)
    assert next(calls) - 1 == 2 + 4  # two milliseconds of this clock, then four timed
    calls = itertools.count(1)
    warm_sample(lambda: next(calls), CPU, 4, warm_up=False)
    assert next(calls) - 1 == 4


class FakeEvent:
    """An event of a CUDA stream whose time is the number of its record."""

    recorded = 0
    waited = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0

    def record(self, _: object) -> None:
        FakeEvent.recorded += 1
        self.at = FakeEvent.recorded

    def synchronize(self) -> None:
        FakeEvent.waited += 1

    def elapsed_time(self, other: FakeEvent) -> float:
        return 2.0 * (other.at - self.at)


def test_a_cuda_device_is_timed_by_events_and_waited_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    watch = Stopwatch(torch.device("cuda", 0))
    for _ in range(4):
        watch.mark()
    assert FakeEvent.waited == 0
    assert watch.seconds() == pytest.approx([2e-3] * 3)
    assert FakeEvent.waited == 1


def test_short_calls_are_gathered() -> None:
    assert calls_per_sample(1.0) == 1
    assert calls_per_sample(1e-3) == 5
    assert calls_per_sample(0.0) >= 1
