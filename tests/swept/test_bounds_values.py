"""What a bound in a sweep is judged by, against the same computed in memory."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.spoken_text import spoken_with_gaps
from support.swept_models import Killed, saved, sweep_of

import ghosted_fast as gf
from ghosted_fast.fit.collect import TrainingListener, collect_statistics
from ghosted_fast.fit.ghosts import fit_on_training_folds
from ghosted_fast.fit.sweep.climb import climb, show_stored
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.options import GhostOptions
from ghosted_fast.selection import swept_how_many
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import relative_rms
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.text.folds import held_out_batches, training_batches

PAIR = (1, 3)


@pytest.mark.parametrize("folds", [3, 4])
def test_sequences_that_are_learned_from_are_numbered_as_if_there_were_no_others(
    tmp_path: Path, folds: int
) -> None:
    model, options = saved(tmp_path, "llama"), GhostOptions(folds=folds)
    text = spoken_with_gaps(model)
    sweep = sweep_of(tmp_path, text)
    listener = TrainingListener(sweep.source.decoder, PAIR, options)
    climb(sweep, PAIR[1], lambda _: None)
    show_stored(sweep, [listener])
    training = training_batches(list(iterate_batches(text)), options)
    (expected,) = collect_statistics(model, training, [PAIR], options)
    for number in range(folds):
        mine, theirs = (item.gram.fold(number) for item in (listener.statistics, expected))
        assert mine.num_tokens == theirs.num_tokens > 0
        assert relative_rms(mine.gram, theirs.gram) < 1e-5
        assert relative_rms(mine.cross, theirs.cross) < 1e-5
    first, other = listener.statistics.first, expected.first
    assert first is not None and other is not None and first.count == other.count > 0
    for one, two in zip(first.rows(), other.rows(), strict=True):
        assert relative_rms(one, two) < 1e-5


def test_losses_are_those_of_the_models_on_four_times_the_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense model's, and that of each number's best candidate, with its ghost in place."""
    model, options = saved(tmp_path, "llama"), GhostOptions()
    text = spoken_with_gaps(model)
    batches = list(iterate_batches(text))
    held_out = held_out_batches(batches, options, 4 * 32)
    found: list[dict[Any, float]] = []
    race_to_the_top = swept_how_many.race_to_the_top

    def noted(sweep: Any, riders: Any, candidates: Any) -> list[float]:
        losses = race_to_the_top(sweep, riders, candidates)
        found.append(dict(zip(candidates, losses, strict=True)))
        return losses

    def loss_of(judged: torch.nn.Module) -> float:
        return math.log(gf.perplexity(judged, held_out).value)

    monkeypatch.setattr(swept_how_many, "race_to_the_top", noted)
    run = gf.RunOptions(corrections=0, score_tokens=32)
    bound = gf.PerplexityBound(1e9)
    _, report = gf.ghost_model(open_unloaded(tmp_path), text, bound, run=run)
    assert report.budget is not None
    assert [trial.remove for trial in report.budget.tried] == [1, 2, 4, 5]
    dense = loss_of(model)
    assert found[0] == {None: pytest.approx(dense, rel=1e-5)}
    fewer = held_out_batches(batches, options, 32)
    assert len(fewer) < len(held_out)
    assert abs(math.log(gf.perplexity(model, fewer).value) - dense) > 1e-3 * dense
    for trial, losses in zip(report.budget.tried, found[1:], strict=True):
        pair, loss = min(losses.items(), key=lambda item: item[1])
        assert pair[1] - pair[0] == trial.remove
        (statistics,) = collect_statistics(model, batches, [pair], options)
        ghost = fit_on_training_folds(statistics, options).to_module(torch.float32, "cpu")
        expected = loss_of(remove_layers(model, range(*pair), [ghost]))
        assert loss == pytest.approx(expected, rel=1e-5)
        assert trial.value == pytest.approx(math.expm1(expected - dense), rel=1e-4, abs=1e-5)
    assert report.removed == list(range(*pair))
    assert {(item.start, item.stop): item.score for item in report.scores} == losses


def test_scores_that_were_kept_are_those_of_their_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped when all numbers were tried: each score of the choice is one that was kept."""
    text = spoken_with_gaps(saved(tmp_path / "dense", "llama"))
    bound = gf.PerplexityBound(1.1)
    plain = gf.RunOptions(corrections=0, score_tokens=32)
    run = replace(plain, state=tmp_path / "state")

    def stopped(*_: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(swept_how_many, "chosen_statistics", stopped)
        gf.ghost_model(open_unloaded(tmp_path / "dense"), text, bound, run=run)
    with monkeypatch.context() as patch:
        patch.setattr(swept_how_many, "race_to_the_top", stopped)  # nothing is found anew
        _, found = gf.ghost_model(open_unloaded(tmp_path / "dense"), text, bound, run=run)
    _, expected = gf.ghost_model(open_unloaded(tmp_path / "dense"), text, bound, run=plain)
    assert len({item.score for item in found.scores}) > 2
    assert found.scores == expected.scores and found.budget == expected.budget
