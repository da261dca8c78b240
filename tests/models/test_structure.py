"""Models that share memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.healed_models import fitted, same, weights

from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.structure import share_equal_weights
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import random_tokens, tiny_model


def memory(*models: Any) -> int:
    """Return the bytes that the parameters of models take together."""
    storages = {
        weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes()
        for model in models
        for weight in model.parameters()
    }
    return sum(storages.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_equal_weights_share_memory(family: str) -> None:
    dense = tiny_model(family)
    smaller = copy.deepcopy(fitted(dense))  # as if it were loaded from a folder
    apart, before, own = memory(dense), weights(smaller), memory(dense, smaller)
    (ghost,) = (module for module in smaller.modules() if isinstance(module, GhostLinear))
    shared = share_equal_weights(smaller, dense)
    left = sum(weight.nbytes for weight in ghost.parameters())
    left += sum(weight.nbytes for weight in smaller.parameters() if weight.dim() < 2)
    assert memory(dense, smaller) == apart + left == own - shared
    assert same(before, weights(smaller))
    assert share_equal_weights(smaller, dense) == shared  # nothing is left to share


def test_weights_that_differ_stay_apart() -> None:
    dense = tiny_model("llama")
    smaller = copy.deepcopy(prune_model(dense, [2]))
    with torch.no_grad():
        smaller.model.layers[3].mlp.up_proj.weight[-1, -1] += 1.0
    share_equal_weights(smaller, dense)
    with torch.no_grad():
        smaller.model.layers[3].mlp.up_proj.weight.zero_()
    assert dense.model.layers[4].mlp.up_proj.weight.abs().sum() > 0
    assert not share_equal_weights(copy.deepcopy(prune_model(tiny_model("gpt2"), [2])), dense)


def test_no_two_weights_become_one() -> None:
    """What lies in one place is saved once: of two equal weights one would be lost."""
    dense = tiny_model("llama")
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.mlp.up_proj.weight.copy_(dense.model.layers[0].mlp.up_proj.weight)
    smaller = copy.deepcopy(prune_model(dense, [2]))
    share_equal_weights(smaller, dense)
    places = [weight.data_ptr() for weight in smaller.parameters()]
    assert len(set(places)) == len(places)


def test_ghosts_keep_their_own() -> None:
    dense = tiny_model("llama")
    smaller = fitted(dense)
    (ghost,) = (module for module in smaller.modules() if isinstance(module, GhostLinear))
    with torch.no_grad():
        dense.model.layers[2].self_attn.q_proj.weight.copy_(ghost.weight)  # a removed layer
    smaller = copy.deepcopy(smaller)
    share_equal_weights(smaller, dense)
    (ghost,) = (module for module in smaller.modules() if isinstance(module, GhostLinear))
    with torch.no_grad():
        ghost.weight.zero_()
        assert dense.model.layers[2].self_attn.q_proj.weight.abs().sum() > 0
        smaller(random_tokens(1, 4))
