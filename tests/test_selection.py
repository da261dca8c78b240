"""Criteria, each against an independent computation on tiny models, and their refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from ghosted_fast import selection
from ghosted_fast.batches import iterate_batches
from ghosted_fast.calibration import GhostOptions, collect_statistics, interval_bytes
from ghosted_fast.errors import ArgumentError, CalibrationError
from ghosted_fast.families import decoder_layers
from ghosted_fast.fitting import FittedGhost, fit_on_training_folds
from ghosted_fast.selection import (
    held_out_batches,
    passes_within,
    score_intervals,
    select_layers,
)
from ghosted_fast.testing import random_tokens, tiny_model

OPTIONS = GhostOptions()


def tokens() -> list[torch.Tensor]:
    return [random_tokens(6, 24, seed) for seed in range(4)]


def hidden_states(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the states at all boundaries [tokens, d], from transformers' own record."""
    with torch.no_grad():
        records = [model(t, output_hidden_states=True).hidden_states for t in tokens()]
    return [torch.cat([r[b].flatten(0, 1) for r in records]).double() for b in range(6)]


def test_shortgpt_removes_the_layers_that_turn_the_state_least() -> None:
    model = tiny_model("llama")
    states = hidden_states(model)
    influence = [
        float((1 - torch.cosine_similarity(states[i], states[i + 1])).mean()) for i in range(5)
    ]
    chosen = select_layers(model, tokens(), 2, "shortgpt")
    for score, expected in zip(chosen.scores[:5], influence, strict=True):
        assert score.score == pytest.approx(expected, rel=1e-4)
    lowest = sorted(chosen.scores, key=lambda s: s.score)[:2]
    assert chosen.removed == sorted(s.start for s in lowest)
    assert len(chosen.scores) == 6


def test_streamline_compares_the_ends_of_every_interval() -> None:
    model = tiny_model("llama")
    states = hidden_states(model)
    chosen = select_layers(model, tokens(), 3, "streamline")
    assert [(s.start, s.stop) for s in chosen.scores] == [(0, 3), (1, 4), (2, 5), (3, 6)]
    for score in chosen.scores[:3]:
        cosine = torch.cosine_similarity(states[score.start], states[score.stop])
        assert score.score == pytest.approx(float((1 - cosine).mean()), rel=1e-4)
    best = min(chosen.scores, key=lambda s: s.score)
    assert chosen.removed == [best.start, best.start + 1, best.start + 2]


def test_scores_are_losses_of_the_model_with_the_ghost_in_place() -> None:
    model = tiny_model("gemma3_text")
    intervals = [(1, 3), (0, 2), (4, 6)]
    statistics = collect_statistics(model, tokens(), intervals, OPTIONS)
    fitted = [fit_on_training_folds(item, OPTIONS) for item in statistics]
    held_out = held_out_batches(list(iterate_batches(tokens())), OPTIONS, 10**6)
    scores = score_intervals(
        model, held_out, intervals, [f.to_module(torch.float32, "cpu") for f in fitted]
    )
    for (start, stop), ghost, score in zip(intervals, fitted, scores, strict=True):
        assert score == pytest.approx(loss_by_hooks(model, held_out, start, stop, ghost), rel=1e-4)


def loss_by_hooks(
    model: torch.nn.Module, batches: list[object], start: int, stop: int, ghost: FittedGhost
) -> float:
    """Run the dense model and overwrite the state that leaves the last removed layer."""
    entering: list[torch.Tensor] = []

    def remember(_: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, object]) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])  # type: ignore[arg-type]

    def overwrite(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        x = entering.pop()
        y = ghost.apply(x.flatten(0, 1)).float().view_as(x)
        if ghost.first_state is not None:
            y[:, 0] = ghost.first_state.float()
        return y

    layers = decoder_layers(model)
    handles = [
        layers[start].register_forward_pre_hook(remember, with_kwargs=True),
        layers[stop - 1].register_forward_hook(overwrite),
    ]
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            ids = batch.input_ids  # type: ignore[attr-defined]
            logits = model(ids).logits[:, :-1].flatten(0, 1)
            total += float(functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
    for handle in handles:
        handle.remove()
    return total / count


def test_clearly_worse_candidates_are_dropped_and_still_ranked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    intervals = [(0, 2), (1, 3), (2, 4), (4, 6)]
    texts = [random_tokens(8, 64, seed) for seed in range(10)]
    with (
        torch.no_grad()
    ):  # what the model itself would say, so that removing layers costs something
        for position in range(4, 64):
            for text in texts:
                text[:, position] = 1 + model(text[:, :position]).logits[:, -1, 1:].argmax(-1)
    statistics = collect_statistics(model, texts, intervals, OPTIONS)
    ghosts = [
        fit_on_training_folds(item, OPTIONS).to_module(torch.float32, "cpu") for item in statistics
    ]
    for spoilt in (0, 2):
        ghosts[spoilt].weight.copy_(torch.randn(32, 32))
    held_out = held_out_batches(list(iterate_batches(texts)), OPTIONS, 10**6)
    resumed: list[int] = []
    resume = selection.resume

    def counted(model: object, batch: object, stop: int, hidden: torch.Tensor) -> torch.Tensor:
        resumed.append(stop)
        return resume(model, batch, stop, hidden)

    monkeypatch.setattr(selection, "resume", counted)
    monkeypatch.setattr(selection, "_FEWEST_TOKENS_TO_DROP", 10**9)
    whole = score_intervals(model, held_out, intervals, ghosts)
    assert len(resumed) == len(held_out) * len(intervals)
    resumed.clear()
    monkeypatch.setattr(selection, "_FEWEST_TOKENS_TO_DROP", 256)
    raced = score_intervals(model, held_out, intervals, ghosts)
    # 252 tokens of four batches do not suffice for a verdict, 315 of five do.
    assert resumed.count(2) == resumed.count(4) == 5
    assert resumed.count(3) + resumed.count(6) > len(held_out)
    best = min(range(4), key=whole.__getitem__)
    assert min(range(4), key=raced.__getitem__) == best
    assert raced[best] == pytest.approx(whole[best], rel=1e-6)
    assert raced == pytest.approx(whole, rel=0.05)


def test_ghost_criterion_takes_the_lowest_loss_and_keeps_its_statistics() -> None:
    model = tiny_model("llama")
    chosen = select_layers(model, tokens(), 2, score_tokens=100)
    assert [(s.start, s.stop) for s in chosen.scores] == [(i, i + 2) for i in range(5)]
    best = min(chosen.scores, key=lambda s: s.score)
    assert chosen.removed == [best.start, best.start + 1]
    assert chosen.statistics is not None
    assert (chosen.statistics.start, chosen.statistics.stop) == (best.start, best.stop)


def test_several_passes_give_the_scores_of_one() -> None:
    model = tiny_model("llama")
    one = select_layers(model, tokens(), 2)
    several = select_layers(model, tokens(), 2, memory_budget=2 * interval_bytes(32, OPTIONS) + 1)
    assert several.removed == one.removed
    assert [s.score for s in several.scores] == pytest.approx([s.score for s in one.scores])


def test_budget_is_cut_into_passes_or_refused() -> None:
    intervals = [(i, i + 2) for i in range(5)]
    each = interval_bytes(32, OPTIONS)
    groups = passes_within(intervals, 32, OPTIONS, 2 * each)
    assert [len(group) for group in groups] == [2, 2, 1]
    with pytest.raises(CalibrationError, match=str(each)):
        passes_within(intervals, 32, OPTIONS, each - 1)


def test_held_out_sequences_are_those_of_the_last_fold() -> None:
    batches = list(iterate_batches(tokens()))
    rows = torch.cat([b.input_ids for b in batches])
    held_out = held_out_batches(batches, OPTIONS, 10**6)
    assert torch.equal(torch.cat([b.input_ids for b in held_out]), rows[3::4])
    assert len(held_out_batches(batches, OPTIONS, 30)) == 2
    with pytest.raises(CalibrationError, match="at least 4"):
        held_out_batches(batches[:1][0:0], OPTIONS, 100)


@pytest.mark.parametrize("count", [0, -1, 6, 100])
def test_layer_counts_out_of_range(count: int) -> None:
    with pytest.raises(ArgumentError, match=r"1\.\.5"):
        select_layers(tiny_model("llama"), tokens(), count)


def test_wrong_types_and_names() -> None:
    model = tiny_model("llama")
    with pytest.raises(TypeError, match="int"):
        select_layers(model, tokens(), 1.5)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="ghost, streamline, shortgpt"):
        select_layers(model, tokens(), 2, "cosine")
    with pytest.raises(CalibrationError, match="got none"):
        select_layers(model, [], 2, "streamline")
