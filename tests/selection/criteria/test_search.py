"""The search over sets of layers: sums by brute force, losses by surgery, and its edges."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ghosted_fast.errors import ArgumentError
from ghosted_fast.fit.candidates import dense_loss
from ghosted_fast.fit.ghosts import fit_in_sequence
from ghosted_fast.measure.perplexity import perplexity
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.selection.criteria import search
from ghosted_fast.selection.criteria.request import Request
from ghosted_fast.selection.criteria.search import lowest_sums, search_sets
from ghosted_fast.selection.select import select_layers
from ghosted_fast.statistics.interval import interval_bytes
from ghosted_fast.surgery.cut import remove_layers, removed_intervals
from ghosted_fast.testing import random_tokens, tiny_model
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.text.calibration_text import CalibrationText
from ghosted_fast.text.folds import held_out_batches, training_batches

OPTIONS = GhostOptions()


def spoken(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return text that the model itself would write, so that removing layers costs something."""
    texts = [random_tokens(8, 40, seed) for seed in range(8)]
    with torch.no_grad():
        for position in range(4, 40):
            for text in texts:
                text[:, position] = 1 + model(text[:, :position]).logits[:, -1, 1:].argmax(-1)
    return texts


@pytest.mark.parametrize(
    ("count", "pieces"), [(1, 1), (1, 3), (3, 1), (3, 2), (3, 3), (4, 2), (6, 2)]
)
def test_lowest_sums_are_those_of_all_sets(count: int, pieces: int) -> None:
    layers = 7
    generator = torch.Generator().manual_seed(count)
    every = [(i, j) for i in range(layers) for j in range(i + 1, layers + 1) if j - i <= count]
    costs = dict(zip(every, torch.randn(len(every), generator=generator).tolist(), strict=True))
    del costs[2, 3]
    sums = {}
    for chosen in itertools.combinations(range(layers), count):
        pairs = tuple(removed_intervals(chosen, layers))
        if len(pairs) == pieces and all(pair in costs for pair in pairs):
            sums[pairs] = sum(costs[pair] for pair in pairs)
    expected = sorted(sums, key=sums.__getitem__)
    assert lowest_sums(costs, count, layers, 5, pieces) == expected[:5]
    assert lowest_sums(costs, count, layers, 10**6, pieces) == expected


@pytest.mark.slow
def test_the_winner_has_the_loss_that_is_claimed_and_every_set_was_comparable() -> None:
    model = tiny_model("llama")
    texts = spoken(model)
    chosen = select_layers(
        model, texts, 3, "ghost-search", run=RunOptions(score_tokens=10**6, beam=30)
    )
    batches = list(iterate_batches(texts))
    held_out = held_out_batches(batches, OPTIONS, 10**6)
    intervals = removed_intervals(chosen.removed, 6)
    fits = fit_in_sequence(model, training_batches(batches, OPTIONS), intervals, OPTIONS)
    ghosts = [fitted.to_module(torch.float32, "cpu") for fitted, _ in fits]
    smaller = remove_layers(model, chosen.removed, ghosts)
    loss = math.log(perplexity(smaller, held_out).value)
    # The first gap's damping is chosen on another split than here.
    assert chosen.sets[0].score == pytest.approx(loss, rel=2e-2)
    assert chosen.sets[0].removed == chosen.removed == chosen.choices[3]
    assert [item.score for item in chosen.sets[:4]] == sorted(s.score for s in chosen.sets[:4])
    assert all(len(item.removed) == 3 for item in chosen.sets)
    assert [0, 1, 2] in [item.removed for item in chosen.sets]  # the ends are candidates
    assert [3, 4, 5] in [item.removed for item in chosen.sets]
    assert {(s.start, s.stop) for s in chosen.scores} == {
        (i, i + n) for n in (1, 2, 3) for i in range(7 - n)
    }


@pytest.mark.slow
def test_a_set_in_pieces_wins_where_it_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for index in (1, 4):  # layers that do next to nothing
            layer = decoder_layers(model)[index]
            layer.self_attn.o_proj.weight *= 0.01
            layer.mlp.down_proj.weight *= 0.01
    texts = spoken(model)
    chosen = select_layers(model, texts, 2, "ghost-search", run=RunOptions(beam=20))
    interval = select_layers(model, texts, 2, "ghost")
    assert chosen.removed == [1, 4]
    assert chosen.sets[0].score < min(item.score for item in interval.scores)
    monkeypatch.setattr(search, "MOST_GAPS", 1)
    single = select_layers(model, texts, 2, "ghost-search", run=RunOptions(beam=20))
    assert single.removed == interval.removed


@pytest.mark.slow
def test_several_sizes_share_the_scores_and_memory_is_kept_to() -> None:
    model = tiny_model("gemma3_text")
    texts = [random_tokens(8, 24, seed) for seed in range(6)]
    request = Request(
        Decoder.of(model), CalibrationText(texts), 4, OPTIONS, RunOptions(score_tokens=100)
    )
    both = search_sets(request, [2, 4])
    alone = select_layers(model, texts, 2, "ghost-search", run=RunOptions(score_tokens=100))
    assert both[2] == alone
    budget = 3 * interval_bytes(32, OPTIONS)
    assert (
        select_layers(
            model, texts, 2, "ghost-search", run=RunOptions(score_tokens=100, memory_budget=budget)
        ).removed
        == alone.removed
    )


def test_dense_loss_and_training_sequences() -> None:
    model = tiny_model("llama")
    batches = list(iterate_batches([random_tokens(6, 24, seed) for seed in range(3)]))
    assert dense_loss(model, batches) == pytest.approx(math.log(perplexity(model, batches).value))
    kept = torch.cat([b.input_ids for b in training_batches(batches, OPTIONS)])
    rows = torch.cat([b.input_ids for b in batches])
    assert torch.equal(kept, rows[[i for i in range(18) if i % 4 != 3]])


def test_a_beam_of_nothing_is_refused() -> None:
    with pytest.raises(ArgumentError, match="beam >= 1"):
        select_layers(
            tiny_model("llama"), [random_tokens(8, 24)], 2, "ghost-search", run=RunOptions(beam=0)
        )
