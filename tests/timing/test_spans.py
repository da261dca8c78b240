"""Spans: what is within what, how often, and what of a span is in none of its parts."""

from __future__ import annotations

import pytest

from ghosted_fast.cli._shared.tables import profile_table
from ghosted_fast.timing import spans
from ghosted_fast.timing.spans import adding_time, own_seconds, recording, span


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock says, in its one entry; tests move it on."""
    now = [100.0]
    monkeypatch.setattr(spans.time, "perf_counter", lambda: now[0])
    return now


def work(clock: list[float]) -> None:
    with span("fit"):
        clock[0] += 1.0
        for _ in range(2):
            with span("pass"):
                clock[0] += 2.0
                with span("sums"):
                    clock[0] += 0.5
    with span("correct"):
        clock[0] += 4.0


def test_parts_and_visits(clock: list[float]) -> None:
    with recording() as found:
        work(clock)
    expected = {
        "fit": (6.0, 1),
        "fit/pass": (5.0, 2),
        "fit/pass/sums": (1.0, 2),
        "correct": (4.0, 1),
    }
    told = found.to_dict()
    assert {name: (item["seconds"], item["visits"]) for name, item in told.items()} == expected
    assert list(told) == list(expected)
    assert own_seconds(told, "fit") == 1.0 and own_seconds(told, "fit/pass") == 4.0
    assert own_seconds(told, "correct") == 4.0


def test_a_span_that_fails_is_closed(clock: list[float]) -> None:
    with recording() as found:
        with pytest.raises(KeyError), span("a"), span("b"):
            clock[0] += 1.0
            raise KeyError
        with span("c"):
            clock[0] += 1.0
    assert list(found.to_dict()) == ["a", "a/b", "c"]


def test_nothing_is_recorded_outside_and_recordings_are_apart(clock: list[float]) -> None:
    work(clock)
    with recording() as outer, span("outer"):
        with recording() as inner:
            work(clock)
        with span("later"):
            clock[0] += 1.0
    assert list(outer.to_dict()) == ["outer", "outer/later"]
    assert "fit/pass" in inner.to_dict()


def test_an_entry_gets_the_time_of_its_span(clock: list[float]) -> None:
    seconds = {"select": 1.0}
    with recording() as found, adding_time(seconds, "select"):
        clock[0] += 2.0
    assert seconds == {"select": 3.0} and found.to_dict()["select"]["seconds"] == 2.0


def test_the_table_indents_parts_and_says_what_is_left(clock: list[float]) -> None:
    with recording() as found:
        work(clock)
    table = profile_table(found.to_dict())
    assert [list(row) for row in table.rows] == [
        ["fit", "6.00", "60%", "1"],
        ["  pass", "5.00", "50%", "2"],
        ["    sums", "1.00", "10%", "2"],
        ["    (the rest)", "4.00", "40%", ""],
        ["  (the rest)", "1.00", "10%", ""],
        ["correct", "4.00", "40%", "1"],
    ]
