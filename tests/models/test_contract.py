"""What layers hand on is looked at before anything is calibrated."""

from __future__ import annotations

import pytest
import torch
from families.tiny_models import tiny_causal
from torch import Tensor

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.models.boundaries import leaving_out, resume, visit_boundaries
from ghosted_fast.models.contract import Returned, as_returned, plain_tokens, state_in, with_state
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import random_tokens, tiny_model
from ghosted_fast.text.batches import Batch


@pytest.mark.parametrize(("name", "sequence"), [("bloom", tuple), ("openai-gpt", list)])
def test_layers_that_return_sequences_are_left_out_and_resumed(name: str, sequence: type) -> None:
    model = tiny_causal(name)
    ids = random_tokens(2, 9, 1)
    batch = Batch(ids, torch.ones_like(ids))
    assert {found and found.sequence for found in Decoder.of(model).contract.returns} == {sequence}
    states: dict[int, Tensor] = {}
    visit_boundaries(model, batch, [2], states.__setitem__)
    with torch.inference_mode():
        whole = model(ids, attention_mask=batch.attention_mask).logits
        assert torch.equal(resume(model, batch, 2, states[2]), whole)
        pruned = prune_model(model, [3, 4])(ids, attention_mask=batch.attention_mask).logits
        with leaving_out(model, [(3, 5, None)]):
            assert torch.equal(model(ids, attention_mask=batch.attention_mask).logits, pruned)


def test_most_layers_return_the_state_alone() -> None:
    assert Decoder.of(tiny_model("llama")).contract.returns == [None] * 6


def test_another_shape_is_refused() -> None:
    model = tiny_model("llama")
    layers = model.model.layers
    layers[0].register_forward_hook(lambda *io: torch.stack([io[2], io[2]], 2))
    layers[1].register_forward_pre_hook(lambda *io: None)
    with pytest.raises(UnsupportedModelError, match=r"state of shape \(1, 4, 2, 32\)"):
        _ = Decoder.of(model).contract


@pytest.mark.parametrize(
    ("name", "state"), [("reformer", "prev_attn_output"), ("zaya", "output 1")]
)
def test_a_second_state_that_each_layer_changes_is_refused(name: str, state: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"hands a second state.*{state}"):
        _ = Decoder.of(tiny_causal(name)).contract


def test_layers_whose_second_state_others_use_are_found() -> None:
    # Layers 0, 1 and 4 choose which tokens are looked at, for themselves and for those behind them.
    contract = Decoder.of(tiny_causal("glm_moe_dsa")).contract
    assert contract.makers == {2: 1, 3: 1, 5: 4}
    assert contract.second == "prev_topk_indices"
    assert contract.why_needed([2, 3]) is None and contract.why_needed([0, 4, 5]) is None
    reason = contract.why_needed([1, 2])
    assert reason is not None and "expected layer 1 to be kept: layer 3" in reason


def test_a_pass_that_starts_in_the_middle_has_the_second_state() -> None:
    model = tiny_causal("glm_moe_dsa")
    ids = random_tokens(2, 24, 1) % 30 + 5  # more tokens than are looked at
    batch = Batch(ids, torch.ones_like(ids))
    states: dict[int, Tensor] = {}
    visit_boundaries(model, batch, [3], states.__setitem__)
    with torch.inference_mode():
        whole = model(ids, attention_mask=batch.attention_mask).logits
        assert torch.equal(resume(model, batch, 3, states[3]), whole)
        pruned = prune_model(model, [2])(ids, attention_mask=batch.attention_mask).logits
        with leaving_out(model, [(2, 3, None)]):  # layer 3 gets what layer 1 left
            assert torch.equal(model(ids, attention_mask=batch.attention_mask).logits, pruned)


def test_states_are_put_in_and_taken_out() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert state_in(x) is x and state_in((x, y)) is x and state_in([x, y]) is x
    assert with_state(x, y) is y and with_state([x, y], y) == [y, y]
    assert as_returned(x, None, {}) is x
    assert as_returned(x, Returned(tuple, 3, ((2, "b"),)), {"b": y}) == (x, None, y)


def test_tokens_that_mean_something_are_not_used() -> None:
    model = tiny_model("llama")
    model.config.bos_token_id, model.config.eos_token_id = 0, [1, 3]
    assert plain_tokens(model).tolist() == [[2, 4, 5, 6]]


def test_a_model_that_asks_for_more_than_text_is_refused() -> None:
    model = tiny_model("llama")
    model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(UnsupportedModelError, match="text alone \\(ZeroDivisionError"):
        _ = Decoder.of(model).contract


def test_layers_below_are_computed_where_those_above_use_their_keys() -> None:
    model = tiny_causal("gemma4_text")
    ids = random_tokens(2, 9, 1) % 30 + 5
    batch = Batch(ids, torch.ones_like(ids))
    last = Decoder.of(model).num_layers - 1
    states: dict[int, Tensor] = {}
    visit_boundaries(model, batch, [last], states.__setitem__)
    with torch.inference_mode():
        whole = model(ids, attention_mask=batch.attention_mask).logits
    assert torch.equal(resume(model, batch, last, states[last]), whole)
    other = resume(model, batch, last, states[last] + 1)
    assert not torch.allclose(other, whole, atol=1e-3)
