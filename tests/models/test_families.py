"""The table of families, the search by structure, and their refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, StableLmConfig

from ghosted_fast.errors import UnknownFamilyError, UnsupportedModelError
from ghosted_fast.models import families
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import FAMILY_NAMES, random_tokens, tiny_config, tiny_model


def tiny_stablelm(num_layers: int = 4) -> Any:
    """Return a model of a family that is not in the table."""
    config = StableLmConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_parts_are_found_with_and_without_head(family: str) -> None:
    model = tiny_model(family, num_layers=4)
    assert families.find_family(model).name == family
    assert families.num_layers(model) == 4
    assert families.hidden_size(model) == 32
    layers = families.decoder_layers(model)
    assert families.decoder_layers(model.base_model) is layers
    assert layers in families.decoder_of(model).children()

    order: list[str] = []
    layers[3].register_forward_hook(lambda *_: order.append("last layer"))
    families.final_norm(model).register_forward_hook(lambda *_: order.append("norm"))
    model.get_output_embeddings().register_forward_hook(lambda *_: order.append("head"))
    model(random_tokens(1, 3))
    assert order == ["last layer", "norm", "head"]


def test_every_family_of_the_tests_is_in_the_table() -> None:
    assert set(FAMILY_NAMES) == set(families.known_families())


def test_unknown_family_is_found_by_structure() -> None:
    model = tiny_stablelm()
    family = families.find_family(model)
    assert (family.name, family.layers, family.final_norm) == ("stablelm", "layers", "norm")
    assert families.final_norm(model) is model.model.norm
    pruned = prune_model(model, [1])
    assert len(pruned.model.layers) == pruned.config.num_hidden_layers == 3


def test_unknown_family_without_structure_is_refused() -> None:
    model = tiny_stablelm()
    model.model.others = nn.ModuleList([nn.Identity() for _ in range(4)])
    with pytest.raises(UnknownFamilyError, match=r"'stablelm'.*layers.*others.*register_family"):
        families.find_family(model)
    del model.model.others
    model.model.norm = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="no norm after the last layer"):
        families.final_norm(model)


def test_layer_indices_of_an_unknown_family_are_remapped() -> None:
    model = tiny_stablelm()
    model.config.special_layers = [0, 3]
    assert prune_model(model, [1]).config.special_layers == [0, 2]


def test_registered_family_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    model = tiny_stablelm()
    model.model.others = nn.ModuleList([nn.Identity() for _ in range(4)])
    families.register_family(families.Family("stablelm"))
    assert families.num_layers(model) == 4
    assert "stablelm" in families.known_families()


def test_list_per_layer_of_an_unknown_family_is_cut() -> None:
    config = FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
    config.window_of_layer = [1, 2, 3, 4]
    pruned = prune_model(AutoModelForCausalLM.from_config(config), [0, 2])
    assert pruned.config.window_of_layer == [2, 4]


@pytest.mark.parametrize(
    ("family", "changed", "named"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    ],
)
def test_settings_that_depend_on_the_index_are_refused(
    family: str, changed: dict[str, Any], named: str
) -> None:
    config = tiny_config(family)
    config.update(changed)
    with pytest.raises(UnsupportedModelError, match=named):
        families.find_family(AutoModelForCausalLM.from_config(config))


def test_encoder_models_are_refused() -> None:
    model = tiny_model("llama", num_layers=2)
    model.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedModelError, match="decoder-only"):
        families.find_family(model)


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), None, "model"])
def test_other_objects_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="expected a transformers model"):
        families.find_family(wrong)
