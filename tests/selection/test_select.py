"""Criteria, each against an independent computation on tiny models, and their refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from ghosted_fast.errors import ArgumentError, CalibrationError
from ghosted_fast.fit.candidates import score_intervals
from ghosted_fast.measure.perplexity import perplexity
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.selection.criteria import CRITERIA, ghost
from ghosted_fast.selection.select import select_layers
from ghosted_fast.statistics.interval import interval_bytes
from ghosted_fast.surgery.cut import prune_model
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
    assert chosen.choices[2] == chosen.removed and len(chosen.choices) == 5
    assert chosen.choices[3] == select_layers(model, tokens(), 3, "shortgpt").removed


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


def test_angular_compares_the_last_attended_tokens() -> None:
    model = tiny_model("llama")
    ids = random_tokens(6, 24)
    mask = torch.ones_like(ids)
    mask[2, 20:] = 0  # padding behind the text
    mask[4, :5] = 0  # and before it
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    chosen = select_layers(model, [batch], 2, "angular")
    for score in chosen.scores[:4]:
        x, y = (
            torch.stack([states[b][row, 19 if row == 2 else 23] for row in range(6)]).double()
            for b in (score.start, score.stop)
        )
        cosine = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
        assert score.score == pytest.approx(float(cosine.acos().mean()) / math.pi, rel=1e-5)
    best = min(chosen.scores, key=lambda s: s.score)
    assert chosen.removed == [best.start, best.start + 1] and chosen.choices == {2: chosen.removed}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_taylor_sums_weight_times_gradient(family: str) -> None:
    model = tiny_model(family, 9).requires_grad_(False)
    ids = [random_tokens(1, 24, seed) for seed in range(12)]
    chosen = select_layers(model, ids, 4, "taylor", run=RunOptions(score_tokens=48))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())

    model.requires_grad_(True)
    held_out = torch.cat([ids[3], ids[7]])
    logits = model(held_out).logits[:, :-1].flatten(0, 1)
    functional.cross_entropy(logits, held_out[:, 1:].flatten()).backward()
    importance = [0.0] * 9
    for index, layer in enumerate(decoder_layers(model)):
        for name, parameter in layer.named_parameters():
            if "bias" not in name and parameter.grad is not None:
                importance[index] += float((parameter.detach() * parameter.grad).abs().sum())
    assert [s.score for s in chosen.scores] == pytest.approx(importance, rel=1e-4)
    # The first four and the last two of the nine come after the three between them.
    assert chosen.choices[3] == [4, 5, 6]
    others = min((0, 1, 2, 3, 7, 8), key=importance.__getitem__)
    assert chosen.removed == sorted([4, 5, 6, others])


@pytest.mark.parametrize("criterion", ["streamline", "angular"])
def test_several_numbers_of_layers_take_one_pass(criterion: str) -> None:
    model = tiny_model("llama")
    lengths: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *io: lengths.append(io[2].shape[1]))
    chosen = select_layers(model, tokens(), 3, criterion, also=[1, 2])
    assert lengths.count(tokens()[0].shape[1]) == len(tokens())
    assert sorted(chosen.choices) == [1, 2, 3] and chosen.removed == chosen.choices[3]
    for count in (1, 2, 3):
        alone = select_layers(model, tokens(), count, criterion)
        assert alone.removed == chosen.choices[count]
        assert [s for s in chosen.scores if s.stop - s.start == count] == alone.scores
    with pytest.raises(ArgumentError, match=r"remove in 1\.\.5"):
        select_layers(model, tokens(), 3, criterion, also=[6])


@pytest.mark.slow
def test_sleb_removes_greedily_and_its_choices_are_nested() -> None:
    model = tiny_model("llama")
    texts = [random_tokens(8, 32, seed) for seed in range(6)]
    chosen = select_layers(model, texts, 3, "sleb", run=RunOptions(score_tokens=10**6))
    held_out = [t[3::4] for t in texts]
    removed: list[int] = []
    for turn in range(1, 4):
        losses = {
            layer: math.log(perplexity(prune_model(model, [*removed, layer]), held_out).value)
            for layer in range(6)
            if layer not in removed
        }
        removed.append(min(losses, key=losses.__getitem__))
        assert chosen.choices[turn] == sorted(removed)
        assert chosen.scores[removed[-1]].score == pytest.approx(losses[removed[-1]], rel=1e-5)
    assert chosen.removed == sorted(removed)
    assert len(chosen.choices) == 3 and len(chosen.scores) == 6
    assert len(decoder_layers(model)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_choice_is_repeatable_and_leaves_the_model_alone(criterion: str) -> None:
    # A norm stands behind what Gemma's layers add, which `prunecomp` cannot serve.
    model = tiny_model("llama" if criterion == "prunecomp" else "gemma3_text")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (select_layers(model, tokens(), 2, criterion) for _ in range(2))
    assert first == second and first.criterion == criterion
    assert len(first.removed) == 2 and first.choices[2] == first.removed
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [p for p in model.parameters() if not p.requires_grad] == []


def test_ghost_criterion_takes_the_lowest_loss_and_keeps_its_statistics() -> None:
    model = tiny_model("llama")
    chosen = select_layers(model, tokens(), 2, run=RunOptions(score_tokens=100))
    assert [(s.start, s.stop) for s in chosen.scores] == [(i, i + 2) for i in range(5)]
    best = min(chosen.scores, key=lambda s: s.score)
    assert chosen.removed == [best.start, best.start + 1]
    assert chosen.statistics is not None
    assert (chosen.statistics.start, chosen.statistics.stop) == (best.start, best.stop)


def test_ghost_criterion_sees_four_times_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(model: Any, batches: Any, *rest: Any) -> list[float]:
        seen.append(sum(batch.num_tokens for batch in batches))
        return score_intervals(model, batches, *rest)

    monkeypatch.setattr(ghost, "score_intervals", counted)
    select_layers(
        tiny_model("llama"), tokens(), 2, run=RunOptions(score_tokens=30)
    )  # sequences of 24 tokens
    assert seen == [5 * 24]


def test_several_passes_give_the_scores_of_one() -> None:
    model = tiny_model("llama")
    one = select_layers(model, tokens(), 2)
    several = select_layers(
        model, tokens(), 2, run=RunOptions(memory_budget=2 * interval_bytes(32, OPTIONS) + 1)
    )
    assert several.removed == one.removed
    assert [s.score for s in several.scores] == pytest.approx([s.score for s in one.scores])


@pytest.mark.parametrize("count", [0, -1, 6, 100])
def test_layer_counts_out_of_range(count: int) -> None:
    with pytest.raises(ArgumentError, match=r"1\.\.5"):
        select_layers(tiny_model("llama"), tokens(), count)


def test_wrong_types_and_names() -> None:
    model = tiny_model("llama")
    with pytest.raises(TypeError, match="int"):
        select_layers(model, tokens(), 1.5)  # type: ignore[arg-type]
    with pytest.raises(
        ArgumentError, match="ghost, ghost-search, streamline, shortgpt, sleb, taylor, angular"
    ):
        select_layers(model, tokens(), 2, "cosine")
    with pytest.raises(CalibrationError, match="got 0"):
        select_layers(model, [], 2, "streamline")
