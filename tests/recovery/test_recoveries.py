"""What all recoveries share: one pass, several gaps, budgets, errors, the way through."""

from __future__ import annotations

import pytest
import torch
from support.padded_text import padded_batches

from ghosted_fast.errors import ArgumentError, CalibrationError, NonFiniteError
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.options import RunOptions
from ghosted_fast.pipeline import ghost_model
from ghosted_fast.recovery import RECOVERIES
from ghosted_fast.recovery.patches import fit_patches
from ghosted_fast.surgery.cut import prune_model
from ghosted_fast.testing import random_tokens, tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("recovery", list(RECOVERIES))
@pytest.mark.parametrize("criterion", ["streamline", "shortgpt", "sleb"])
def test_any_criterion_goes_with_any_recovery(recovery: str, criterion: str) -> None:
    model = tiny_model("llama")
    smaller, report = ghost_model(model, padded_batches(), 2, criterion=criterion, recovery="none")
    if 0 in report.removed and recovery.startswith("replaceme"):
        with pytest.raises(ArgumentError, match="has none before it"):
            ghost_model(model, padded_batches(), 2, criterion=criterion, recovery=recovery)
        return
    smaller, report = ghost_model(
        model, padded_batches(), 2, criterion=criterion, recovery=recovery
    )
    assert report.recovery == recovery and len(decoder_layers(smaller)) == 4
    assert report.num_tokens > 0 and bool(report.ghosts) == (recovery == "ghost")
    pruned = prune_model(model, report.removed)
    with torch.no_grad():
        same = torch.equal(smaller(random_tokens(1, 9)).logits, pruned(random_tokens(1, 9)).logits)
    # Where no layer is above the gap, "prunecomp" has none to scale.
    is_top = report.removed == list(range(report.removed[0], 6))
    assert same == (recovery == "none" or (recovery == "prunecomp" and is_top))


@pytest.mark.slow
@pytest.mark.parametrize("recovery", [name for name in RECOVERIES if name != "none"])
def test_one_pass_gives_what_single_passes_give(recovery: str) -> None:
    model = tiny_model("llama")
    jobs = [(name, gap) for name in RECOVERIES for gap in ((1, 3), (4, 5))]
    together = fit_patches(model, padded_batches(), jobs)
    alone = fit_patches(model, iter(padded_batches()), [(recovery, (4, 5))])
    one, other = together[recovery, (4, 5)], alone[recovery, (4, 5)]
    if one.mlp_map is not None and other.mlp_map is not None:
        assert torch.equal(one.mlp_map, other.mlp_map)
    elif one.scale is not None:
        assert one.scale == other.scale
    else:
        assert one.ghost is not None and other.ghost is not None
        assert torch.equal(one.ghost.weight, other.ghost.weight)


def test_a_small_budget_takes_several_passes() -> None:
    model = tiny_model("llama")
    jobs = [("ghost-paper", (1, 3)), ("ghost-paper", (4, 5)), ("replaceme", (2, 3))]
    plenty = fit_patches(model, padded_batches(), jobs)
    little = fit_patches(model, iter(padded_batches()), jobs, memory_budget=16 * 32 * 32)
    for job in jobs[:2]:
        one, other = plenty[job].ghost, little[job].ghost
        assert one is not None and other is not None and torch.equal(one.weight, other.weight)
    with pytest.raises(CalibrationError, match=f"at least {16 * 32 * 32} bytes"):
        fit_patches(model, padded_batches(), jobs, memory_budget=16 * 32 * 32 - 1)


def test_in_place() -> None:
    model = tiny_model("llama")
    smaller, _ = ghost_model(
        model, padded_batches(), removed=[2], recovery="replaceme", run=RunOptions(inplace=True)
    )
    assert smaller is model and len(decoder_layers(model)) == 5


def test_refusals() -> None:
    model = tiny_model("llama")
    with pytest.raises(ArgumentError, match=r"expected a recovery out of none, .* got 'magic'"):
        ghost_model(model, padded_batches(), removed=[2], recovery="magic")
    with pytest.raises(CalibrationError, match="at least 64 calibration tokens"):
        fit_patches(model, [random_tokens(1, 20)], [("ghost-paper", (2, 3))])
    with pytest.raises(CalibrationError, match="at least 1 calibration tokens"):
        fit_patches(model, [], [("linearpatch-d", (2, 3))])
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"boundaries 2 and 3.* batch 0"):
        fit_patches(model, padded_batches(), [("linearpatch-d", (2, 3))])
