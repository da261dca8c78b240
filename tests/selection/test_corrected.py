"""The second look at the best candidates: what it measures, what it changes, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ghosted_fast.cli._shared.tables import score_table, set_table
from ghosted_fast.errors import ArgumentError, CalibrationError
from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.fit.ghosts import fit_on_training_folds
from ghosted_fast.improve.correction import correct_ghosts
from ghosted_fast.measure.perplexity import perplexity
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.selection.corrected import CORRECTIONS, corrected_losses
from ghosted_fast.selection.criteria import ghost, search
from ghosted_fast.selection.select import select_layers
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import random_tokens, tiny_model
from ghosted_fast.text.batches import Batch, iterate_batches
from ghosted_fast.text.folds import held_out_batches, training_batches

OPTIONS = GhostOptions()


def tokens(batches: int = 8) -> list[torch.Tensor]:
    return [random_tokens(8, 24, seed) for seed in range(batches)]


def run(again: int) -> RunOptions:
    return RunOptions(corrections=0, score_tokens=100, corrected_candidates=again)


def same_tokens(batches: Sequence[Batch], expected: Sequence[Batch]) -> bool:
    return len(batches) == len(expected) and all(
        torch.equal(one.input_ids, other.input_ids)
        for one, other in zip(batches, expected, strict=True)
    )


def test_the_best_are_judged_as_a_corrected_model_is() -> None:
    model = tiny_model("llama")
    plain, found = (select_layers(model, tokens(), 2, run=run(again)) for again in (0, 3))
    again = [item for item in found.scores if item.corrected is not None]
    lowest = sorted(plain.scores, key=lambda item: item.score)[:3]
    assert [item.start for item in again] == sorted(item.start for item in lowest)
    batches = list(iterate_batches(tokens()))
    training = training_batches(batches, OPTIONS)
    held_out = held_out_batches(batches, OPTIONS, 4 * 100)
    for item in again:
        pair = item.start, item.stop
        (statistics,) = collect_statistics(model, batches, [pair], OPTIONS)
        fitted = fit_on_training_folds(statistics, OPTIONS).to_module(torch.float32, "cpu")
        smaller = remove_layers(model, range(*pair), [fitted])
        assert math.log(perplexity(smaller, held_out).value) == pytest.approx(item.score, rel=1e-5)
        assert any(fact.accepted for fact in correct_ghosts(smaller, model, training, CORRECTIONS))
        loss = math.log(perplexity(smaller, held_out).value)
        assert item.corrected == pytest.approx(loss, rel=1e-5)
        assert abs(loss - item.score) > 1e-4 * loss
    best = min(again, key=lambda item: item.corrected or math.inf)
    assert found.removed == found.choices[2] == [best.start, best.start + 1]
    assert found.loss == best.score


@pytest.mark.parametrize("criterion", ["ghost", "ghost-search"])
def test_another_candidate_can_win(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    plain = select_layers(model, tokens(), 2, criterion, run=run(0))
    best = plain.sets[1].removed if plain.sets else None
    if best is None:
        second = sorted(plain.scores, key=lambda item: item.score)[1]
        best = [second.start, second.start + 1]
    seen: list[int] = []

    def reversed_order(_: Any, __: Any, ___: Any, candidates: Any, ____: bool) -> list[float]:
        seen.append(len(candidates))
        return [9.0 - index for index in range(len(candidates))]

    for module in (ghost, search):
        monkeypatch.setattr(module, "corrected_losses", reversed_order)
    found = select_layers(model, tokens(), 2, criterion, run=run(2))
    assert seen == [2] and found.removed == best != plain.removed
    assert found.statistics is None
    # The whole way gathers the winner's statistics anew: it is as if its layers had been given.
    smaller, report = ghost_model(model, tokens(), 2, criterion=criterion, run=run(2))
    given, _ = ghost_model(model, tokens(), removed=best, run=run(0))
    assert report.removed == best
    ghosts = [[m for m in one.modules() if isinstance(m, GhostLinear)] for one in (smaller, given)]
    for mine, theirs in zip(*ghosts, strict=True):
        assert torch.equal(mine.weight, theirs.weight)


def test_the_search_looks_at_its_finalists_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    looks: list[tuple[Any, Any, dict[tuple[int, ...], float]]] = []

    def noted(decoder: Any, training: Any, held_out: Any, candidates: Any, *rest: Any) -> Any:
        losses = corrected_losses(decoder, training, held_out, candidates, *rest)
        layers = [tuple(n for gap in one for n in range(gap.start, gap.stop)) for one in candidates]
        looks.append((training, held_out, dict(zip(layers, losses, strict=True))))
        return losses

    monkeypatch.setattr(search, "corrected_losses", noted)
    plain, found = (
        select_layers(model, tokens(), 2, "ghost-search", run=run(again)) for again in (0, 3)
    )
    corrected = [item.corrected for item in found.sets]
    assert None not in corrected[:3] and set(corrected[3:]) == {None}
    assert corrected[:3] == sorted(corrected[:3])
    assert found.removed == found.sets[0].removed
    assert {(*item.removed, item.score) for item in found.sets[:3]} == {
        (*item.removed, item.score) for item in plain.sets[:3]
    }
    ((training, held_out, losses),) = looks
    assert {tuple(item.removed): item.corrected for item in found.sets[:3]} == losses
    batches = list(iterate_batches(tokens()))
    expected = training_batches(batches, OPTIONS)[: len(training)]
    assert len(training) > 3 and same_tokens(training, expected)
    assert same_tokens(held_out, held_out_batches(batches, OPTIONS, 100))


def test_one_candidate_needs_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ghost, "corrected_losses")
    model = tiny_model("llama")
    assert select_layers(model, tokens(), 2, run=run(1)) == select_layers(
        model, tokens(), 2, run=run(0)
    )


def test_tables_tell_of_a_second_look() -> None:
    scores = [
        {"start": 1, "stop": 3, "score": 2.0, "corrected": 1.9},
        {"start": 2, "stop": 4, "score": 2.1, "corrected": 1.8},
        {"start": 3, "stop": 5, "score": 2.2, "corrected": None},
    ]
    shown = score_table(scores, [2, 3])
    assert shown.columns == ["layers", "score", "corrected", ""]
    assert shown.rows[0] == ["1-2", "2.00000", "1.90000", ""]
    assert shown.rows[1] == ["2-3", "2.10000", "1.80000", "removed"]
    assert shown.rows[2] == ["3-4", "2.20000", "-", ""]
    assert score_table([{**scores[2]}], []).columns == ["layers", "score", ""]
    sets = [{"removed": [1, 2], "score": 2.0, "corrected": 1.5}]
    assert set_table(sets).rows == [["1-2", "2.00000", "1.50000"]]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="corrected_candidates >= 0"):
        run(-1)
    for module in (ghost, search):  # before any work
        monkeypatch.delattr(module, "collect_statistics")
    for criterion in ("ghost", "ghost-search"):
        with pytest.raises(CalibrationError, match="at least 128 held-out tokens"):
            select_layers(tiny_model("llama"), tokens(2), 2, criterion, run=run(2))
