"""ReplaceMe: the map against `lstsq`, and the folded model against the dense one with a hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.folded_models import check_saved_and_loaded
from support.padded_text import dense_states, padded_batches
from torch import Tensor

from ghosted_fast.errors import ArgumentError, UnsupportedModelError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.families import decoder_layers, find_family
from ghosted_fast.recovery.patches import fit_patches, put_patches
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import FAMILY_NAMES, relative_rms, tiny_model

BEHIND_NORM = ("gemma2", "gemma3_text", "olmo2")


def mlp_outputs(model: Any, layer: int, batch: dict[str, Tensor]) -> Tensor:
    """Return what a layer adds last: the difference that leaving it out makes."""
    kept: list[Tensor] = []
    module = Decoder.of(model).mlp_output(layer)
    handle = module.register_forward_hook(lambda *args: torch.zeros_like(args[2]))
    with torch.no_grad():
        states = dense_states(model, batch)
        without = states[layer + 1]
        handle.remove()
        kept.append(dense_states(model, batch)[layer + 1] - without)
    return kept[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_map_and_fold(family: str) -> None:
    model = tiny_model(family)
    gaps = [(1, 2), (3, 5)]
    patches = fit_patches(model, padded_batches(), [("replaceme", gap) for gap in gaps])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    maps = {}
    for start, stop in gaps:
        rows = []
        for batch in padded_batches():
            mask, states = batch["attention_mask"].bool(), dense_states(model, batch)
            m = mlp_outputs(model, start - 1, batch)[mask].double()
            y, x = states[stop][mask].double(), states[start][mask].double()
            rows.append((m, y - (x - m)))
        m, target = (torch.cat(part) for part in zip(*rows, strict=True))
        exact = torch.linalg.lstsq(m, target).solution.T
        change = patches["replaceme", (start, stop)].mlp_map
        assert change is not None
        assert relative_rms(change + torch.eye(32), exact) < 1e-3
        maps[start - 1] = change + torch.eye(32)
    smaller = put_patches(model, [1, 3, 4], [patches["replaceme", gap] for gap in gaps])
    pruned = prune_model(model, [1, 3, 4])
    for new, old in ((0, 0), (1, 2)):
        Decoder.of(pruned).mlp_output(new).register_forward_hook(
            lambda _, __, output, old=old: (output.double() @ maps[old].T).to(output.dtype)
        )
    batch = padded_batches(1)[0]
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        assert (
            relative_rms(smaller(**batch).logits[mask], pruned(**batch).logits[mask].double())
            < 1e-4
        )
    assert len(decoder_layers(smaller)) == 3
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_folded_model_is_saved_and_loaded(family: str, tmp_path: Any) -> None:
    check_saved_and_loaded("replaceme", family, tmp_path)


@pytest.mark.parametrize("family", BEHIND_NORM)
def test_a_map_behind_a_norm_cannot_be_saved(family: str, tmp_path: Any) -> None:
    model = tiny_model(family)
    patches = fit_patches(model, padded_batches(), [("replaceme", (2, 4))])
    smaller = put_patches(model, [2, 3], list(patches.values()))
    with pytest.raises(UnsupportedModelError, match="cannot be saved"):
        smaller.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    assert sum(p.numel() for p in smaller.parameters()) > sum(
        p.numel() for p in prune_model(model, [2, 3]).parameters()
    )


def test_refusals() -> None:
    model = tiny_model("llama")
    with pytest.raises(ArgumentError, match=r"\[0, 2\) has none before it: keep layer 0"):
        fit_patches(model, padded_batches(), [("replaceme", (0, 2))])
    assert find_family(model).mlp_output == "mlp"
    model.config.model_type = "unheard-of"
    with pytest.raises(UnsupportedModelError, match="mlp_output and mlp_projections"):
        fit_patches(model, padded_batches(), [("replaceme", (2, 4))])
