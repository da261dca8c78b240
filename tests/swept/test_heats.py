"""Candidates of a sweep race in heats: what the way in memory finds, with less to compute."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support.spoken_text import spoken_with_gaps
from support.swept_models import ghosts_of, killed_at_write, read_by_layer, saved, small_heats

import ghosted_fast as gf
from ghosted_fast.fit.sweep.climb import HEAT
from ghosted_fast.fit.sweep.riders import Riders
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.options import Count
from ghosted_fast.surgery.folder import FolderCut
from ghosted_fast.swept.asked import Asked
from ghosted_fast.text.batches import iterate_batches

RUN = gf.RunOptions(corrections=0, score_tokens=70)
BOUND = gf.PerplexityBound(1.1)


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """A model, which is saved too, and a text whose held-out sequences make four heats.

    Nobody is dropped.
    """
    small_heats(monkeypatch, drop_above=1e9)
    model = saved(tmp_path / "dense", "llama")
    return model, spoken_with_gaps(model)


def assert_same_scores(found: gf.GhostReport, expected: gf.GhostReport) -> None:
    assert found.removed == expected.removed
    for one, other in zip(found.scores, expected.scores, strict=True):
        assert (one.start, one.stop) == (other.start, other.stop)
        assert one.score == pytest.approx(other.score, rel=1e-5)


@pytest.mark.parametrize("remove", [1, 2, BOUND])
def test_scores_are_those_of_the_way_in_memory(
    tmp_path: Path,
    given: tuple[Any, list[Any]],
    remove: int | gf.PerplexityBound,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of candidates that were dropped too, which stand for what memory's race saw of them."""
    model, text = given
    small_heats(monkeypatch, drop_above=1.0)
    judged: list[Counter[int]] = []
    states = Riders.states

    def noted(riders: Riders, pair: Any, boundary: int) -> Any:
        if pair is not None:
            if not judged or riders.heat < max(judged[-1]):
                judged.append(Counter())
            judged[-1][riders.heat] += 1
        return states(riders, pair, boundary)

    monkeypatch.setattr(Riders, "states", noted)
    _, found = gf.ghost_model(open_unloaded(tmp_path / "dense"), text, remove, run=RUN)
    assert_same_scores(found, gf.ghost_model(model, text, remove, run=RUN)[1])
    counts = [1, 2, 4, 3] if remove == BOUND else [remove]
    assert [race[0] for race in judged] == [7 - count for count in counts]
    for race in judged:
        assert sorted(race) == [0, 1, 2, 3]
        assert race[0] >= race[1] >= race[2] >= race[3] >= 1
    assert any(race[0] > race[1] > race[3] for race in judged)


@pytest.mark.parametrize("remove", [1, BOUND])
def test_a_run_that_is_stopped_in_a_heat_ends_with_the_same_bits(
    tmp_path: Path, given: tuple[Any, list[Any]], remove: int | gf.PerplexityBound
) -> None:
    _, text = given
    run = gf.RunOptions(corrections=0, score_tokens=70, state=tmp_path / "state")

    def ghosted(asked: gf.RunOptions) -> tuple[FolderCut, gf.GhostReport]:
        return gf.ghost_model(open_unloaded(tmp_path / "dense"), text, remove, run=asked)

    stops, killed, heats = random.Random(1), 0, set()
    for _ in range(30):
        with killed_at_write(stops.randrange(1, 60)) as met:
            ghosted(run)
        killed += len(met)
        record = tmp_path / "state" / "sweep.json"
        if record.exists():
            heats.add(bool(json.loads(record.read_text())["facts"].get(HEAT)))
    assert killed > 10
    assert heats == {False, True}
    (mine, found), (plain, expected) = ghosted(run), ghosted(RUN)
    assert found.scores == expected.scores
    assert mine.removed == plain.removed
    (ghost,), (other,) = ghosts_of(mine), ghosts_of(plain)
    assert torch.equal(ghost, other)


@pytest.mark.parametrize("remove", [1, BOUND])
def test_no_more_is_read_than_was_planned(
    tmp_path: Path,
    given: tuple[Any, list[Any]],
    remove: int | gf.PerplexityBound,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, text = given
    unloaded = open_unloaded(tmp_path / "dense")
    wanted = Count(remove) if isinstance(remove, int) else remove
    asked = Asked(wanted, "ghost", "ghost", gf.GhostOptions(), RUN)
    planned = asked.plan(unloaded, list(iterate_batches(text))).read_bytes
    layers, read = read_by_layer(monkeypatch)
    gf.ghost_model(unloaded, text, remove, run=RUN)
    assert 0.9 * planned < sum(read) <= planned
    if remove == 1:
        assert layers.count(0) == 1, "the lowest is below all candidates"
        assert layers.count(5) == 4, "once for each heat"
