"""Bounds on quality and speed: the number of layers they lead to, and those that cannot be kept."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support.spoken_text import spoken

from ghosted_fast.errors import ArgumentError, BudgetError
from ghosted_fast.measure.perplexity import perplexity
from ghosted_fast.measure.speed import Run
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.families import num_layers
from ghosted_fast.options import GhostOptions, PerplexityBound, RunOptions, SpeedBound
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.selection import how_many
from ghosted_fast.selection.criteria import CRITERIA
from ghosted_fast.selection.how_many import (
    _largest,
    estimated_speedup,
    fewest_layers_for,
    most_layers_within,
    numbers_tried,
)
from ghosted_fast.selection.select import select_layers
from ghosted_fast.testing import random_tokens, tiny_model
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.text.folds import held_out_batches, training_batches

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("most", [1, 2, 5, 8, 29])
def test_largest_is_found_in_few_steps(most: int) -> None:
    for answer in range(most + 1):
        asked: list[int] = []

        def holds(number: int, answer: int = answer, asked: list[int] = asked) -> bool:
            asked.append(number)
            return number <= answer

        assert _largest(most, holds) == answer
        assert len(asked) == len(set(asked)) <= 2 * math.log2(most + 1) + 1
        assert all(1 <= number <= most for number in asked)


def independent_increase(
    model: torch.nn.Module, texts: list[torch.Tensor], criterion: str, count: int
) -> float:
    """Return the perplexity increase of a ghosted model that never saw the held-out sequences."""
    options = GhostOptions()
    batches = list(iterate_batches(texts))
    removed = select_layers(
        model, batches, count, criterion, run=RunOptions(score_tokens=10**6)
    ).removed
    ghosted, _ = ghost_model(model, training_batches(batches, options), removed=removed)
    held_out = held_out_batches(batches, options, 10**6)
    return perplexity(ghosted, held_out).value / perplexity(model, held_out).value - 1


@pytest.mark.parametrize("criterion", ["shortgpt", "ghost", "ghost-search"])
def test_as_many_layers_as_the_quality_allows(criterion: str) -> None:
    model = tiny_model("llama")
    texts = spoken(model)
    increases = [independent_increase(model, texts, criterion, n) for n in (1, 2, 3)]
    bound = (increases[1] + increases[2]) / 2
    ghosted, report = ghost_model(
        model,
        texts,
        remove=PerplexityBound(bound),
        criterion=criterion,
        run=RunOptions(score_tokens=10**6),
    )
    budget = report.budget
    assert budget is not None and budget.kind == "max_perplexity_increase"
    assert budget.remove == len(report.removed) == 6 - num_layers(ghosted) == 2
    assert budget.reached <= bound == budget.asked
    rough = 1e-3 if criterion == "shortgpt" else 0.1  # another split chose the damping
    assert budget.reached == pytest.approx(increases[1], rel=rough)
    assert [trial.remove for trial in budget.tried] == [1, 2, 3, 4][: len(budget.tried)]
    assert report.to_dict()["budget"]["remove"] == 2


def test_a_quality_that_cannot_be_had() -> None:
    model = tiny_model("llama")
    texts = spoken(model)
    with pytest.raises(BudgetError, match=r"within a perplexity 0\.1% above .* is \d+\.\d% above"):
        ghost_model(model, texts, remove=PerplexityBound(0.001))
    for bound in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ArgumentError, match="max_increase above 0"):
            most_layers_within(model, texts, PerplexityBound(bound))


def test_a_bound_allows_no_more_than_the_criterion_can_choose() -> None:
    model = tiny_model("llama")
    wide = PerplexityBound(1e9)
    selection, budget = most_layers_within(model, spoken(model), wide, "lorp")
    assert budget.remove == len(selection.removed) == 4  # of 6: the first and the last stay
    assert {0, 5}.isdisjoint(selection.removed)
    with pytest.raises(ArgumentError, match="keeps the first and the last of 2 layers"):
        most_layers_within(tiny_model("llama", 2), spoken(model), wide, "lorp")


def test_both_models_are_judged_by_the_same_text() -> None:
    """Candidates race over four times `score_tokens`; so the dense model's loss is over as many."""
    model = tiny_model("llama")
    texts = spoken(model)
    run, options = RunOptions(score_tokens=160, corrections=0), GhostOptions()
    selection, budget = most_layers_within(model, texts, PerplexityBound(1e9), run=run)
    held_out = held_out_batches(list(iterate_batches(texts)), options, 4 * 160)
    assert sum(batch.num_tokens for batch in held_out) == 640, "all that is held out"
    dense = perplexity(model, held_out).value
    assert selection.loss is not None
    assert budget.reached == pytest.approx(math.exp(selection.loss) / dense - 1, rel=1e-4)
    first = held_out_batches(list(iterate_batches(texts)), options, 160)
    assert perplexity(model, first).value != pytest.approx(dense, rel=1e-2)


def test_the_numbers_that_are_tried_are_known_beforehand() -> None:
    assert numbers_tried(6, 0) == [1]
    assert numbers_tried(6, 1) == [1, 2]
    assert numbers_tried(6, 3) == [1, 2, 4, 3]
    assert numbers_tried(30, 8) == [1, 2, 4, 8, 16, 12, 10, 9]


def test_a_criterion_keeps_what_it_says() -> None:
    """What it cannot choose is one layer more than what it can."""
    decoder = Decoder.of(tiny_model("llama"))
    for criterion in CRITERIA.values():
        most = decoder.num_layers - criterion.keeps
        criterion.check(decoder, most)
        with pytest.raises(ArgumentError):
            select_layers(decoder.model, [], most + 1, criterion.name)


def test_bounds_are_kept_with_ghosts_only() -> None:
    for bound in (PerplexityBound(0.1), SpeedBound(1.3)):
        with pytest.raises(ArgumentError, match="layers or removed with recovery 'replaceme'"):
            ghost_model(tiny_model("llama"), [], bound, recovery="replaceme")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let decoding take 2 units of time plus 1 for each layer, and list what is measured."""
    measured: list[int] = []

    def speedup(dense: torch.nn.Module, smaller: torch.nn.Module) -> float:
        measured.append(num_layers(smaller))
        return (2 + num_layers(dense)) / (2 + num_layers(smaller))

    monkeypatch.setattr(how_many, "decode_speedup", speedup)
    return measured


@pytest.mark.parametrize(("factor", "count"), [(1.1, 1), (1.3, 2), (1.6, 3), (2.6, 5)])
def test_as_few_layers_as_the_speed_needs(pretended: list[int], factor: float, count: int) -> None:
    budget = fewest_layers_for(tiny_model("llama"), SpeedBound(factor))
    assert budget.remove == count
    assert budget.reached == 8 / (8 - count) >= factor > 8 / (9 - count)
    assert len(pretended) == len(set(pretended)) == len(budget.tried)


def test_the_finished_model_is_measured_again(
    pretended: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    texts = [random_tokens(8, 24, seed) for seed in range(4)]
    ghosted, report = ghost_model(
        model,
        texts,
        remove=SpeedBound(1.3),
        criterion="shortgpt",
        run=RunOptions(corrections=0, inplace=True),
    )
    assert ghosted is model and num_layers(model) == 4
    assert report.budget is not None and report.budget.reached == 8 / 6 and not caplog.records
    speeds = iter([1.4, 1.2, 1.25])  # two layers are enough, one is not; the finished model
    monkeypatch.setattr(how_many, "decode_speedup", lambda dense, smaller: next(speeds))
    _, report = ghost_model(
        tiny_model("llama"), texts, remove=SpeedBound(1.3), run=RunOptions(corrections=0)
    )
    assert report.budget is not None and report.budget.reached == 1.25
    assert "1.25 times as fast" in caplog.text


def test_a_speed_that_cannot_be_had(pretended: list[int]) -> None:
    with pytest.raises(BudgetError, match=r"without 5 of the 6 layers it is 2\.67 times"):
        fewest_layers_for(tiny_model("llama"), SpeedBound(3.0))
    for factor in (1.0, 0.5, math.nan, math.inf):
        with pytest.raises(ArgumentError, match="min_speedup above 1"):
            fewest_layers_for(tiny_model("llama"), SpeedBound(factor))


@pytest.mark.parametrize("tied", [False, True])
def test_the_estimate_counts_the_bytes_of_a_step(tied: bool) -> None:
    model = tiny_model("llama")
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    rest = model.lm_head.weight.nbytes + model.model.norm.weight.nbytes
    expected = (6 * layer + rest) / (4 * layer + rest + 32 * 32 * 4)
    assert estimated_speedup(model, 2) == pytest.approx(expected)


def test_the_speed_of_a_real_run_is_a_ratio() -> None:
    model = tiny_model("llama")
    assert how_many.decode_speedup(model, model) == pytest.approx(1.0, abs=0.9)


def test_ctrl_c_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of a speed by then decides nothing."""
    calls = itertools.count()

    def interrupted(self: Run, steps: int) -> float:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(Run, "decode", interrupted)
    model = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt):
        how_many.decode_speedup(model, model)
