"""The way from the states behind the last layer to the predictions, without whole logits."""

from __future__ import annotations

import pytest
import torch
from families.tiny_models import tiny_causal

from ghosted_fast.improve import exits
from ghosted_fast.improve.divergence import divergence_gradient, divergence_sum
from ghosted_fast.improve.exits import Exit, exit_divergence
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.testing import FAMILY_NAMES, random_tokens, relative_rms, tiny_model
from ghosted_fast.text.batches import Batch


def batch() -> Batch:
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[0, :6] = 0
    mask[1, 15:] = 0
    return Batch(random_tokens(3, 20, 5), mask)


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("ghosted", [False, True])
def test_logits_are_the_models(family: str, ghosted: bool) -> None:
    model, given = tiny_model(family), batch()
    if ghosted:  # behind the last layer that is left, with a first state
        ghost = GhostLinear(32, norm_eps=1e-6, first_state=True)
        with torch.no_grad():
            ghost.weight.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
            assert ghost.first_state is not None
            ghost.first_state.fill_(0.5)
        model = remove_layers(model, [5], [ghost])
    with torch.no_grad():
        expected = model(given.input_ids, attention_mask=given.attention_mask).logits
    end = Exit(model)
    states = end.states(given)
    assert states.shape == (3, 20, 32) and end.vocabulary == expected.shape[-1]
    counted = given.attention_mask.bool()
    with torch.no_grad():
        found = end.logits(states[counted])
    assert relative_rms(found, expected[counted]) < 1e-5
    if family == "gemma2":  # the soft cap is there
        assert model.config.final_logit_softcapping
        assert float(found.abs().max()) <= model.config.final_logit_softcapping


def scaled(family: str) -> torch.nn.Module:
    """Return a model whose logits are scaled behind the head."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {"granite": {"logits_scaling": 4.0}, "cohere": {"logit_scale": 0.25}}[family]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        num_hidden_layers=3, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=97, max_position_embeddings=128, bos_token_id=None,
        eos_token_id=None, pad_token_id=0, **sizes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["granite", "cohere"])
def test_scales_behind_the_head_count(family: str) -> None:
    model, given = scaled(family), batch()
    with torch.no_grad():
        expected = model(given.input_ids, attention_mask=given.attention_mask).logits
        end = Exit(model)
        found = end.logits(end.states(given).flatten(0, 1)).view_as(expected)
    counted = given.attention_mask.bool()
    assert relative_rms(found[counted], expected[counted]) < 1e-5
    with torch.no_grad():
        unscaled = model.lm_head(model.model.norm(end.states(given)))
    assert relative_rms(unscaled[counted], expected[counted]) > 0.5


def test_no_layer_runs_where_the_last_ones_use_keys_of_earlier_ones() -> None:
    model, given, run = tiny_causal("gemma4_text"), batch(), []
    assert Decoder.of(model).uses_layers_below
    with torch.no_grad():
        expected = model(given.input_ids, attention_mask=given.attention_mask).logits
        end = Exit(model)
        states = end.states(given)
        for layer in decoder_layers(model):
            layer.register_forward_hook(lambda *_: run.append(1))
        found = end.logits(states.flatten(0, 1)).view_as(expected)
    counted = given.attention_mask.bool()
    assert not run and relative_rms(found[counted], expected[counted]) < 1e-5


@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
def test_divergence_and_gradient_are_those_of_whole_logits(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(exits, "_SLICE_ELEMENTS", rows_at_once * 97)
    dense, other, given = tiny_model("gemma2"), tiny_model("gemma2", seed=1), batch()
    counted = given.attention_mask.bool()
    ends = Exit(dense), Exit(other)
    theirs, ours = ends[0].states(given), ends[1].states(given)
    gradient = torch.zeros_like(ours)
    found = exit_divergence(*ends, theirs, ours, counted, gradient)
    with torch.no_grad():
        p = dense(given.input_ids, attention_mask=given.attention_mask).logits
    ours.requires_grad_()
    q = other.lm_head(other.model.norm(ours))
    cap = other.config.final_logit_softcapping
    q = cap * torch.tanh(q / cap)
    expected = divergence_sum(p, q, given.attention_mask)
    away = divergence_gradient(p, q, given.attention_mask)
    (wanted,) = torch.autograd.grad(q, ours, away)
    assert found == pytest.approx(expected, rel=1e-5)
    assert relative_rms(gradient[counted], wanted[counted]) < 1e-4
    assert not gradient[~counted].any()
