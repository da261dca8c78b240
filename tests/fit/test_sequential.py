"""Ghosts fitted one after the other, against least squares on the states of the cut model."""

from __future__ import annotations

import pytest
import torch
from families.tiny_models import tiny_causal

from ghosted_fast.fit import below
from ghosted_fast.fit.ghosts import FittedGhost, fit_in_sequence
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.gap import Gap
from ghosted_fast.options import GhostOptions
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model
from ghosted_fast.text.batches import iterate_batches

PLAIN = GhostOptions("raw", "uniform", "off", damping=1e-3)


def least_squares(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x, y = x.flatten(0, 1).double(), y.flatten(0, 1).double()
    gram = x.mT @ x + PLAIN.damping * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.linalg.solve(gram, x.mT @ (y - x)).mT


def states(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return tuple(model(ids, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_each_ghost_is_the_least_squares_map_from_what_it_is_given(family: str) -> None:
    model, ids = tiny_model(family), random_tokens(40, 24)
    batches = list(iterate_batches(ids.split(7)))
    fits = fit_in_sequence(model, batches, [(1, 2), (3, 5)], PLAIN)
    (first, _), (second, solution) = fits
    dense = states(model, ids)
    assert relative_rms(first.weight, least_squares(dense[1], dense[2])) < 1e-4
    half_cut = remove_layers(model, [1], [first.to_module(torch.float32, "cpu")])
    # Layer 3 of the dense model is layer 2 of the one that lost layer 1.
    given = states(half_cut, ids)[2]
    assert relative_rms(second.weight, least_squares(given, dense[5])) < 1e-4
    assert relative_rms(second.weight, least_squares(dense[3], dense[5])) > 1e-3
    assert solution.num_tokens == 40 * 24


def test_the_first_tokens_state_goes_through_the_gaps() -> None:
    model, ids = tiny_model("llama"), random_tokens(40, 24)
    mask = torch.ones_like(ids)
    mask[::3, :5] = 0
    options = GhostOptions(first_state="on")
    batch = {"input_ids": ids, "attention_mask": mask}
    fits = fit_in_sequence(model, list(iterate_batches([batch])), [(0, 1), (2, 4)], options)
    firsts: list[FittedGhost] = [fitted for fitted, _ in fits]
    with torch.no_grad():
        dense = model(**batch, output_hidden_states=True).hidden_states
    for fitted, stop in zip(firsts, (1, 4), strict=True):
        expected = dense[stop][torch.arange(40), mask.argmax(1)].double().mean(0)
        assert fitted.first_state is not None
        assert relative_rms(fitted.first_state, expected) < 1e-5


def counted_fits(
    model: torch.nn.Module, gaps: list[tuple[int, int]], limit: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[torch.Tensor], list[int]]:
    """Return the ghosts' weights, and how often each layer ran, with so many bytes for states."""
    monkeypatch.setattr(below, "_MOST_BYTES", limit)
    ids = random_tokens(40, 24)
    mask = torch.ones_like(ids)
    mask[::3, :5] = 0
    parts = zip(ids.split(10), mask.split(10), strict=True)
    batches = list(iterate_batches([{"input_ids": x, "attention_mask": m} for x, m in parts]))
    decoder = Decoder.of(model)
    layers = decoder.layers
    assert decoder.contract  # is looked at in a pass of its own
    runs = [0] * len(layers)
    for index, layer in enumerate(layers):

        def count(*_: object, index: int = index) -> None:
            runs[index] += 1

        layer.register_forward_hook(count)
    fits = fit_in_sequence(decoder, batches, gaps, GhostOptions(first_state="on"))
    return [fitted.weight for fitted, _ in fits], runs


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_pass_begins_where_the_last_one_ended(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gaps = [(0, 1), (2, 4), (5, 6)]
    of_a_batch = 2 * 10 * 24 * 32 * 4
    found, runs = {}, {}
    for batches in (0, 2, 4):
        model = tiny_model(family, 8)
        found[batches], runs[batches] = counted_fits(model, gaps, batches * of_a_batch, monkeypatch)
    for others in (found[2], found[4]):
        assert all(torch.equal(*pair) for pair in zip(found[0], others, strict=True))
    # Four batches: the dense model up to each gap's end, and the smaller one up to its beginning.
    assert runs[0] == [12, 8 + 8, 8, 8, 4 + 4, 4, 0, 0]
    # The dense model once, and the smaller one's layers between the gaps.
    assert runs[4] == [4, 4 + 4, 4, 4, 4 + 4, 4, 0, 0]
    assert runs[2] == [(one + other) // 2 for one, other in zip(runs[0], runs[4], strict=True)]


def test_no_more_is_kept_than_a_quarter_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps, of_a_batch = [(0, 1), (2, 4), (5, 6)], 2 * 10 * 24 * 32 * 4
    _, expected = counted_fits(tiny_model("llama", 8), gaps, 2 * of_a_batch, monkeypatch)
    monkeypatch.setattr(below, "default_memory_budget", lambda _: 2 * 2 * of_a_batch)
    _, runs = counted_fits(tiny_model("llama", 8), gaps, 1 << 31, monkeypatch)
    assert runs == expected
    monkeypatch.undo()
    _, all_kept = counted_fits(tiny_model("llama", 8), gaps, 1 << 31, monkeypatch)
    assert sum(all_kept) < sum(runs)


def test_layers_that_use_more_of_those_below_begin_at_the_bottom(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_causal("gemma4_text")
    assert Decoder.of(model).uses_layers_below
    found, runs = counted_fits(model, [(0, 1), (2, 3)], 1 << 31, monkeypatch)
    expected, same_runs = counted_fits(tiny_causal("gemma4_text"), [(0, 1), (2, 3)], 0, monkeypatch)
    assert runs == same_runs and runs[0] == 8
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_nothing_is_kept_for_a_gap_that_does_not_come() -> None:
    decoder = Decoder.of(tiny_model("llama", 4))
    (batch,) = iterate_batches([random_tokens(2, 6)])
    x, y = torch.ones(2, 6, 32), torch.zeros(2, 6, 32)
    one, two = (below.Below(decoder, count) for count in (1, 2))
    for kept in (one, two):
        kept.note(0, x, y)
        kept.fill(Gap(0, 1))
    assert one.begun(0, batch) is None
    begun = two.begun(0, batch)
    assert begun is not None and (begun.boundary, begun.whole, begun.smaller) == (1, y, x)
    two.note(0, x, y)
    two.fill(Gap(2, 3))
    assert two.begun(0, batch) is None
