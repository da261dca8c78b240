"""Models that others cut and hooked, made ghosted models that save and load."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.hooks_of_others import SIZE, closure, logits, operator, published
from torch import nn
from transformers import AutoModelForCausalLM

from ghosted_fast.checkpoint.save import save_model
from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.surgery.adopt.swap import swap_ghosts
from ghosted_fast.surgery.cut import prune_model, remove_layers
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("stale", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "opt"])
def test_a_hooked_model_becomes_one_that_saves(family: str, stale: bool, tmp_path: Path) -> None:
    """Codes cut the list of layers, and leave their numbers and the configuration as they were."""
    dense = tiny_model(family)
    model = prune_model(dense, [1, 2, 4]) if not stale else copy.deepcopy(dense)
    layers = decoder_layers(model)
    if stale:
        for layer in (4, 2, 1):
            del layers[layer]
    published(layers[0], operator(1))
    published(layers[1], operator(2))
    before = logits(model) if family != "gemma3_text" or not stale else None
    names = swap_ghosts(model, removed=[1, 2, 4])
    assert [name.split(".")[-2:] for name in names] == [["0", "ghost"], ["1", "ghost"]]
    ghosts = [layer.ghost for layer in list(layers)[:2]]
    expected = remove_layers(dense, [1, 2, 4], ghosts)
    assert torch.equal(logits(model), logits(expected))
    if before is not None:
        assert relative_rms(logits(model), before) < 1e-5
    save_model(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.config.ghost["removed"] == [1, 2, 4]
    assert len(loaded.config.ghost["ghosts"]) == 2
    assert torch.equal(logits(loaded), logits(model))
    tokens = random_tokens(2, 5)
    models = (loaded, expected, model)
    generated = [item.generate(tokens, max_new_tokens=8, do_sample=False) for item in models]
    assert all(torch.equal(generated[0], other) for other in generated)


def test_operators_elsewhere_are_not_saved(tmp_path: Path) -> None:
    model = prune_model(tiny_model("llama"), [2, 3])
    model.ghost = nn.Linear(SIZE, SIZE)
    model.model.layers[1].register_parameter("extra", nn.Parameter(operator()))
    model.model.layers[1].register_forward_hook(lambda module, _, y: y @ module.extra)
    model.model.layers[1].register_forward_hook(lambda _, __, y: y + model.ghost(y))
    before = logits(model)
    names = set(tiny_model("llama", num_layers=4).state_dict())
    swap_ghosts(model, removed=[2, 3])
    assert relative_rms(logits(model), before) < 1e-5
    added = {f"model.layers.1.ghost.{name}" for name in ("weight", "bias")}
    assert set(model.state_dict()) == names | added
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ([1, 2], r"the gaps \[\(1, 3\)\], \[1\], got ghosts behind \[3\] layers"),
        (
            [3, 4, 5],
            "to be 4, the layers that the model has, or 7, with the 3 removed",
        ),
        ([9], "expected layers in"),
    ],
)
def test_removed_layers_that_do_not_fit(removed: list[int], message: str) -> None:
    model = tiny_model("llama")
    del model.model.layers[3:5]
    closure(model.model.layers[2], operator())
    with pytest.raises(ArgumentError, match=message):
        swap_ghosts(model, removed=removed)
    assert len(model.model.layers[2]._forward_hooks) == 1
    with pytest.raises(ArgumentError, match=r"in hooks with removed=, got \['model.norm'\]"):
        swap_ghosts(model, ["model.layers.2", "model.norm"], removed=[3, 4])
    swap_ghosts(model, removed=[3, 4])
    with pytest.raises(ArgumentError, match="got no such hook: give the operators"):
        swap_ghosts(model, removed=[3, 4])
