"""LinearPatch against its definition, sequence by sequence."""

from __future__ import annotations

import pytest
import torch
from support.padded_text import dense_states, padded_batches
from torch import Tensor

from ghosted_fast.recovery.hadamard import hadamard
from ghosted_fast.recovery.patches import fit_patches
from ghosted_fast.testing import tiny_model


def published(model: torch.nn.Module, start: int, stop: int, basis: Tensor) -> Tensor:
    """Return H diag(r) H^T, one sequence at a time."""
    ratios = []
    for batch in padded_batches():
        states = dense_states(model, batch)
        for row, mask in enumerate(batch["attention_mask"].bool()):
            x, y = (states[b][row][mask].double() @ basis for b in (start, stop))
            ratios.append(y.abs().mean(0) / x.abs().mean(0))
    return basis @ torch.diag(torch.stack(ratios).mean(0)) @ basis.mT


@pytest.mark.parametrize("name", ["linearpatch-d", "linearpatch-r"])
def test_agrees_with_the_definition(name: str) -> None:
    model = tiny_model("llama")
    basis = hadamard(32) if name.endswith("r") else torch.eye(32, dtype=torch.float64)
    jobs = [(name, (1, 3)), (name, (0, 2)), (name, (4, 5))]
    patches = fit_patches(model, padded_batches(), jobs)
    for _, (start, stop) in jobs:
        ghost = patches[name, (start, stop)].ghost
        assert ghost is not None and ghost.norm_eps is None and ghost.bias is None
        exact = published(model, start, stop, basis) - torch.eye(32)
        torch.testing.assert_close(ghost.weight.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_silent_channel_stays_silent() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 0.0
    patch = fit_patches(model, padded_batches(), [("linearpatch-d", (0, 2))])
    ghost = patch["linearpatch-d", (0, 2)].ghost
    assert ghost is not None and float(ghost.weight[3].abs().sum()) == 0.0
