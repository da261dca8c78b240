"""ghost_model, the whole way through on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ghosted_fast.errors import ArgumentError, CalibrationError, UnknownFamilyError
from ghosted_fast.measure.perplexity import perplexity
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.options import Count, GhostOptions, Layers, RunOptions
from ghosted_fast.pipeline import ghost_model, statistics_bytes_needed
from ghosted_fast.selection.criteria import CRITERIA
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import random_tokens, tiny_model


def tokens(count: int = 6) -> list[torch.Tensor]:
    return [random_tokens(8, 24, seed) for seed in range(count)]


def divergence(model: torch.nn.Module, other: torch.nn.Module) -> float:
    """Return the mean KL divergence of another model's predictions, on fresh tokens."""
    ids = random_tokens(8, 24, 99)
    with torch.no_grad():
        p = model(ids).logits.log_softmax(-1)
        q = other(ids).logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("input_form", ["normed", "raw"])
def test_ghosts_recover_what_was_lost(family: str, input_form: str) -> None:
    model = tiny_model(family)
    ghosted, report = ghost_model(
        model, tokens(40), removed=[2, 3], options=GhostOptions(features=input_form)
    )  # type: ignore[arg-type]
    pruned = prune_model(model, [2, 3])
    assert divergence(model, ghosted) < 0.8 * divergence(model, pruned)
    assert len(decoder_layers(model)) == 6
    assert len(decoder_layers(ghosted)) == 4
    assert report.removed == [2, 3] and report.criterion is None
    facts = report.ghosts[0]
    assert (facts.start, facts.stop, facts.features) == (2, 4, input_form)
    assert facts.fit_error < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_goes_all_the_way(criterion: str) -> None:
    ghosted, report = ghost_model(tiny_model("llama"), tokens(), 2, criterion=criterion)
    assert len(report.removed) == 2 and report.criterion == criterion and report.scores
    assert ghosted.config.num_hidden_layers == 4
    assert ghosted.config.model_type == "ghosted_llama"
    assert perplexity(ghosted, tokens(1)).value > 1.0


@pytest.mark.slow
def test_several_gaps_at_once() -> None:
    model = tiny_model("llama")
    ghosted, report = ghost_model(
        model, tokens(40), removed=[0, 2, 5], options=GhostOptions(bias=True)
    )
    assert [(g.start, g.stop) for g in report.ghosts] == [(0, 1), (2, 3), (5, 6)]
    assert divergence(model, ghosted) < divergence(model, prune_model(model, [0, 2, 5]))


@pytest.mark.slow
def test_later_ghosts_are_fitted_on_what_the_earlier_ones_give() -> None:
    model = tiny_model("llama")
    ghosted, report = ghost_model(model, iter(tokens(40)), removed=[1, 3, 5])
    apart, other = ghost_model(
        model, tokens(40), removed=[1, 3, 5], options=GhostOptions(sequential=False)
    )
    assert report.ghosts[0] == other.ghosts[0] and report.ghosts[1] != other.ghosts[1]
    assert divergence(model, ghosted) < divergence(model, apart)
    one = statistics_bytes_needed(model, Layers((0,)))
    ghost_model(
        model, tokens(), removed=[1, 3, 5], run=RunOptions(memory_budget=one)
    )  # one gap at a time


def test_in_place_and_dtype() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    ghosted, _ = ghost_model(model, tokens(), removed=[3], run=RunOptions(inplace=True))
    assert ghosted is model and len(decoder_layers(model)) == 5
    assert {p.dtype for p in ghosted.parameters()} == {torch.bfloat16}


def test_generators_of_batches_are_enough() -> None:
    ghosted, report = ghost_model(tiny_model("llama"), iter(tokens()), 2)
    assert report.num_tokens > 0 and ghosted.config.num_hidden_layers == 4


def test_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    _, report = ghost_model(tiny_model("llama"), tokens(), 2)
    path = tmp_path / "report.json"
    report.save(path)
    assert json.loads(path.read_text())["removed"] == report.removed
    with pytest.raises(ArgumentError, match="exists"):
        report.save(path)
    report.save(path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert report.seconds["select"] > 0 and report.seconds["solve"] > 0


def test_gaps_beyond_the_budget_take_several_passes() -> None:
    model = tiny_model("llama")
    one = statistics_bytes_needed(model, Layers((0,)))
    options, gone = GhostOptions(sequential=False), [0, 2, 5]
    together, report = ghost_model(model, tokens(), removed=gone, options=options)
    apart, other = ghost_model(
        model, iter(tokens()), removed=gone, options=options, run=RunOptions(memory_budget=one)
    )
    assert other.ghosts == report.ghosts
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(CalibrationError, match=str(one)):
        ghost_model(model, tokens(), removed=[0, 2], run=RunOptions(memory_budget=one - 1))


def test_refusals() -> None:
    model = tiny_model("llama")
    with pytest.raises(ArgumentError, match=r"either remove .* or removed"):
        ghost_model(model, tokens())
    with pytest.raises(ArgumentError, match=r"either remove .* or removed"):
        ghost_model(model, tokens(), 2, removed=[1])
    with pytest.raises(ArgumentError, match=r"0\.\.5"):
        ghost_model(model, tokens(), removed=[6])
    with pytest.raises(ArgumentError, match="once"):
        ghost_model(model, tokens(), removed=[2, 2])
    with pytest.raises(CalibrationError, match="at least 64"):
        ghost_model(model, [random_tokens(1, 20)], removed=[2])
    with pytest.raises((TypeError, UnknownFamilyError)):
        ghost_model(torch.nn.Linear(2, 2), tokens(), 2)
    assert len(decoder_layers(model)) == 6


def test_memory_is_announced() -> None:
    model = tiny_model("llama")
    one = statistics_bytes_needed(model, Layers((2, 3)))
    assert statistics_bytes_needed(model, Count(2)) == 5 * one
    assert statistics_bytes_needed(model, Layers((0, 2, 3))) == 2 * one
    assert statistics_bytes_needed(model, Count(2), criterion="streamline") == one
    assert statistics_bytes_needed(model, Count(2), criterion="ghost-search") == 11 * one
