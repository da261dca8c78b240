"""Ghosts fitted one after the other, against least squares on the states of the cut model."""

from __future__ import annotations

import pytest
import torch

from ghosted_fast.fit.ghosts import FittedGhost, fit_in_sequence
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
