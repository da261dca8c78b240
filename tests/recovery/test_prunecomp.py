"""Prune&Comp against its published form, the stream multiplied below the gap, written out."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support.folded_models import check_saved_and_loaded
from support.padded_text import dense_states, padded_batches

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.grid import GridPlan, run_grid
from ghosted_fast.recovery.patches import fit_patches, put_patches
from ghosted_fast.selection.select import select_layers
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model


def all_states(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the state at every boundary, the one that enters the final norm included."""
    seen: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    states = dense_states(model, batch)
    handle.remove()
    return [*states[:-1], seen[0]]


def scale(model: Any, start: int, stop: int) -> float:
    """Return alpha, sequence by sequence, in fp64 numpy."""
    ratios = []
    for batch in padded_batches():
        states = all_states(model, batch)
        for row, mask in enumerate(batch["attention_mask"].bool()):
            x, y = (states[b][row][mask].double().numpy() for b in (start, stop))
            ratios.append(np.abs(y).mean(0) / np.abs(x).mean(0))
    return float(np.mean(ratios))


def multiplied_below(model: Any, gaps: list[tuple[int, int]], scales: list[float]) -> Any:
    """Return the model as the published code makes it, the highest gap first."""
    published = copy.deepcopy(model)
    layers = list(published.model.layers)
    with torch.no_grad():
        for (start, stop), alpha in sorted(zip(gaps, scales, strict=True), reverse=True):
            published.model.embed_tokens.weight *= alpha
            for layer in layers[:start]:
                layer.self_attn.o_proj.weight *= alpha
                layer.mlp.down_proj.weight *= alpha
            del layers[start:stop]
    published.model.layers = torch.nn.ModuleList(layers)
    published.config.num_hidden_layers = len(layers)
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    return published


@pytest.mark.parametrize("gaps", [[(2, 4)], [(1, 2), (3, 5)], [(0, 2)]])
def test_is_the_published_model(gaps: list[tuple[int, int]]) -> None:
    model = tiny_model("llama")
    patches = fit_patches(model, padded_batches(), [("prunecomp", gap) for gap in gaps])
    scales = [scale(model, *gap) for gap in gaps]
    for gap, alpha in zip(gaps, scales, strict=True):
        assert patches["prunecomp", gap].scale == pytest.approx(alpha, rel=1e-5)
    removed = [layer for start, stop in gaps for layer in range(start, stop)]
    smaller = put_patches(model, removed, [patches["prunecomp", gap] for gap in gaps])
    published = multiplied_below(model, gaps, scales)
    batch = padded_batches(1)[0]
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        exact = published(**batch).logits[mask].double()
        assert relative_rms(smaller(**batch).logits[mask], exact) < 2e-4
        plain = prune_model(model, removed)(**batch).logits[mask]
    assert relative_rms(plain, exact) > 1e-2


def test_with_nothing_above_the_gap_it_is_the_pruned_model() -> None:
    """The final norm takes the scale of the published code off."""
    model = tiny_model("llama")
    patches = fit_patches(model, padded_batches(), [("prunecomp", (4, 6))])
    alpha = patches["prunecomp", (4, 6)].scale
    assert alpha is not None and abs(alpha - 1.0) > 0.05
    smaller, pruned = put_patches(model, [4, 5], list(patches.values())), prune_model(model, [4, 5])
    batch = padded_batches(1)[0]
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        logits = smaller(**batch).logits
        assert torch.equal(logits, pruned(**batch).logits)
        published = multiplied_below(model, [(4, 6)], [alpha])(**batch).logits
    assert relative_rms(logits[mask], published[mask].double()) < 2e-4


def test_a_compensated_model_is_saved_and_loaded(tmp_path: Any) -> None:
    check_saved_and_loaded("prunecomp", "llama", tmp_path)


def influences_of(model: Any) -> list[float]:
    """Return the block influence of each layer, fp64."""
    found = []
    states = [all_states(model, batch) for batch in padded_batches()]
    masks = [batch["attention_mask"].bool() for batch in padded_batches()]
    for layer in range(len(states[0]) - 1):
        ends = [
            torch.cat([item[b][mask] for item, mask in zip(states, masks, strict=True)]).double()
            for b in (layer, layer + 1)
        ]
        found.append(float(1 - torch.cosine_similarity(*ends).mean()))
    return found


def growing() -> Any:
    """Return a model whose upper layers add so much that the lower ones go first."""
    model = tiny_model("llama", 7)
    with torch.no_grad():
        for power, layer in enumerate(model.model.layers[3:], 1):
            layer.self_attn.o_proj.weight *= 4.0**power
            layer.mlp.down_proj.weight *= 4.0**power
    return model


def test_the_criterion_measures_the_compensated_model_anew() -> None:
    model = growing()
    chosen = select_layers(model, padded_batches(), 3, "prunecomp")
    alive, removed = list(range(7)), []
    current = copy.deepcopy(model)
    for turn in range(3):
        influences = influences_of(current)
        if turn < 2:
            best = int(np.argmin(influences))
            alpha = scale(current, best, best + 1)
            current = multiplied_below(current, [(best, best + 1)], [alpha])
            removed.append(alive.pop(best))
            assert chosen.choices[len(removed)] == sorted(removed)
    for layer, influence in zip(alive, influences, strict=True):
        assert chosen.scores[layer].score == pytest.approx(influence, rel=1e-3)
    assert max(removed) < 3 and chosen.choices[3] == chosen.removed
    # Where sizes are not made up for, the layers above turn the state by other angles.
    plain = dict(zip(alive, influences_of(prune_model(model, removed)), strict=True))
    above = [layer for layer in alive if layer > max(removed)]
    assert any(abs(chosen.scores[layer].score / plain[layer] - 1) > 0.01 for layer in above)


def test_families_with_a_norm_behind_are_refused() -> None:
    model = tiny_model("gemma3_text")
    with pytest.raises(UnsupportedModelError, match="'gemma3_text' add to the stream"):
        select_layers(model, padded_batches(), 2, "prunecomp")
    with pytest.raises(UnsupportedModelError, match="a norm stands behind it"):
        fit_patches(model, padded_batches(), [("prunecomp", (2, 4))])


@pytest.mark.slow
def test_a_grid_of_everything_leaves_out_what_cannot_be(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    texts = {"text": [random_tokens(4, 24, 90)]}
    plan = GridPlan(recoveries=["none", "prunecomp"])
    found = run_grid(tiny_model("gemma3_text"), padded_batches(), texts, [1], tmp_path, plan=plan)
    criteria = {row["criterion"] for row in found.rows}
    assert "prunecomp" not in criteria and {"lorp", "ghost", "shortgpt"} <= criteria
    assert "the criterion 'prunecomp' is left out" in caplog.text
    for row in found.rows:
        assert (row["refused"] is not None) == (row["recovery"] == "prunecomp")
    with pytest.raises(UnsupportedModelError):
        run_grid(
            tiny_model("gemma3_text"), padded_batches(), texts, [1], tmp_path / "other",
            plan=GridPlan(criteria=["prunecomp"]),
        )  # fmt: skip
