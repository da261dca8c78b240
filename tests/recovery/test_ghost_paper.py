"""The published ghost against the inverse of the formula."""

from __future__ import annotations

import torch
from support.padded_text import dense_states, padded_batches

from ghosted_fast.recovery.patches import fit_patches
from ghosted_fast.testing import relative_rms, tiny_model


def test_agrees_with_the_formula() -> None:
    model = tiny_model("llama")
    jobs = [("ghost-paper", (1, 3)), ("ghost-paper", (4, 5)), ("ghost-paper", (0, 2))]
    patches = fit_patches(model, padded_batches(), jobs)
    for job in jobs:
        start, stop = job[1]
        pairs = []
        for batch in padded_batches():
            states, mask = dense_states(model, batch), batch["attention_mask"].bool()
            pairs.append((states[start][mask], states[stop][mask]))
        x, y = (torch.cat(part).double() for part in zip(*pairs, strict=True))
        inverse = torch.linalg.inv(x.T @ x + 1e-6 * torch.eye(32))
        ghost = patches[job].ghost
        assert ghost is not None and ghost.norm_eps is None and ghost.bias is None
        assert relative_rms(ghost.weight, (inverse @ x.T @ (y - x)).T) < 1e-5
