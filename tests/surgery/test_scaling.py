"""Dividing what layers add is multiplying the stream below, in every family that is served."""

from __future__ import annotations

import pytest
import torch
from support.padded_text import padded_batches

from ghosted_fast.errors import ArgumentError, UnsupportedModelError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.surgery.cut import prune_model, remove_layers
from ghosted_fast.surgery.scaling import check_divisible, divide_branches
from ghosted_fast.testing import FAMILY_NAMES, relative_rms, tiny_model

BEHIND_NORM = ("gemma2", "gemma3_text", "olmo2")
SERVED = [name for name in FAMILY_NAMES if name not in BEHIND_NORM]


@pytest.mark.parametrize("family", SERVED)
def test_the_same_as_an_operator_that_multiplies(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():  # biases of tiny models are zero
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ghost = GhostLinear(32)
    with torch.no_grad():
        ghost.weight.copy_(0.7 * torch.eye(32))
    expected = remove_layers(model, [2, 3], [ghost])
    smaller = prune_model(model, [2, 3])
    divide_branches(smaller, [1.0, 1.0, 1.7, 1.7])
    batch = padded_batches(1)[0]
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        plain = prune_model(model, [2, 3])(**batch).logits[mask]
        exact = expected(**batch).logits[mask].double()
        found = smaller(**batch).logits[mask]
    assert relative_rms(found, exact) < 2e-4  # the norms' epsilon
    assert relative_rms(plain, exact) > 1e-2
    assert sum(p.numel() for p in smaller.parameters()) == sum(
        p.numel() for p in prune_model(model, [2, 3]).parameters()
    )
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("family", BEHIND_NORM)
def test_a_norm_behind_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedModelError, match="a norm stands behind it"):
        check_divisible(Decoder.of(tiny_model(family)))


def test_refusals() -> None:
    model = tiny_model("llama")
    ghosted = remove_layers(model, [2], [GhostLinear(32)])
    with pytest.raises(ArgumentError, match="expected a model without ghosts"):
        divide_branches(ghosted, [1.0] * 5)
    model.config.model_type = "unheard-of"
    with pytest.raises(UnsupportedModelError, match=r"'unheard-of'.* its weights are not known"):
        divide_branches(model, [1.0] * 6)
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj.weight = torch.nn.Parameter(
        torch.zeros(32, 32, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ArgumentError, match="got quantized ones"):
        check_divisible(Decoder.of(model))
