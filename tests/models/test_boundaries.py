"""Capturing and resuming at boundaries, against transformers' own record of hidden states."""

from __future__ import annotations

import pytest
import torch

from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.boundaries import resume, visit_boundaries, visit_intervals
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.testing import FAMILY_NAMES, random_tokens, tiny_model
from ghosted_fast.text.batches import Batch, iterate_batches


def padded_batch() -> Batch:
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[1, :6] = 0
    return Batch(random_tokens(3, 20), mask)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_states_and_resumed_logits(family: str) -> None:
    model, batch = tiny_model(family), padded_batch()
    states: dict[int, torch.Tensor] = {}
    visit_boundaries(model, batch, range(7), states.__setitem__)
    with torch.no_grad():
        dense = model(batch.input_ids, attention_mask=batch.attention_mask)
        recorded = model(
            batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states
    for boundary in range(6):  # the last record is taken after the final norm
        torch.testing.assert_close(states[boundary], recorded[boundary])
    for boundary in range(1, 7):
        logits = resume(model, batch, boundary, states[boundary])
        torch.testing.assert_close(logits, dense.logits)
    changed = resume(model, batch, 3, 1.5 * states[2])
    assert not torch.allclose(changed, dense.logits, atol=1e-2)
    assert len(decoder_layers(model)) == 6
    with torch.no_grad():
        again = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.equal(again, dense.logits)


def test_layers_above_the_last_boundary_are_not_run() -> None:
    model = tiny_model("llama")
    ran: list[int] = []
    _ = Decoder.of(model).contract  # looked at once, in a pass of its own
    for index, layer in enumerate(decoder_layers(model)):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    visit_boundaries(model, padded_batch(), [1, 3], lambda *_: None)
    assert ran == [0, 1, 2]


def test_intervals_get_both_their_ends() -> None:
    model, batch = tiny_model("llama"), padded_batch()
    states: dict[int, torch.Tensor] = {}
    visit_boundaries(model, batch, range(7), states.__setitem__)
    intervals = [(2, 4), (0, 6), (2, 3), (5, 6)]
    seen: list[int] = []

    def visit(index: int, x: torch.Tensor, y: torch.Tensor) -> None:
        seen.append(index)
        start, stop = intervals[index]
        assert torch.equal(x, states[start]) and torch.equal(y, states[stop])

    visit_intervals(model, batch, intervals, visit)
    assert sorted(seen) == [0, 1, 2, 3]


def test_layers_are_put_back_even_after_an_error() -> None:
    model = tiny_model("gpt2")
    before = list(decoder_layers(model))
    with pytest.raises(RuntimeError):
        resume(model, padded_batch(), 3, torch.zeros(3, 20, 7))
    assert list(decoder_layers(model)) == before


def test_batches_take_all_their_forms() -> None:
    ids = random_tokens(2, 5)
    forms = [
        ids,
        ids[0],
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        padded_batch(),
    ]
    shapes = [tuple(b.input_ids.shape) for b in iterate_batches(forms)]
    assert shapes == [(2, 5), (1, 5), (2, 5), (3, 20)]
    assert all(b.attention_mask.shape == b.input_ids.shape for b in iterate_batches(forms))
    first = padded_batch().is_first
    assert first.nonzero().tolist() == [[0, 0], [1, 6], [2, 0]]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (random_tokens(2, 5), "put it into a list"),
        ([{"ids": random_tokens(2, 5)}], "input_ids"),
        ([torch.ones(2, 5)], "token ids"),
        (["text"], "token ids"),
        ([{"input_ids": random_tokens(2, 5), "attention_mask": torch.ones(2, 4)}], "shape"),
    ],
)
def test_refused_batches(batches: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        list(iterate_batches(batches))  # type: ignore[arg-type]
