"""NBL's estimator against numpy's covariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.padded_text import dense_states, padded_batches

from ghosted_fast.errors import CalibrationError, SolveError
from ghosted_fast.recovery.patches import fit_patches, put_patches
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_estimator(family: str) -> None:
    model = tiny_model(family)
    gaps = [(0, 2), (2, 3), (3, 5)]
    patches = fit_patches(model, padded_batches(), [("nbl", gap) for gap in gaps])
    for start, stop in gaps:
        rows: dict[int, list[np.ndarray]] = {start: [], stop: []}
        for batch in padded_batches():
            mask, states = batch["attention_mask"].bool(), dense_states(model, batch)
            for boundary, kept in rows.items():
                kept.append(states[boundary][mask].double().numpy())
        x, y = (np.concatenate(rows[boundary]) for boundary in (start, stop))
        both = np.cov(np.hstack([y - x, x]), rowvar=False)
        weight = both[:32, 32:] @ np.linalg.inv(both[32:, 32:])
        bias = (y - x).mean(0) - weight @ x.mean(0)
        ghost = patches["nbl", (start, stop)].ghost
        assert ghost is not None and ghost.bias is not None and ghost.norm_eps is None
        assert relative_rms(ghost.weight, torch.from_numpy(weight)) < 1e-4
        assert relative_rms(ghost.bias, torch.from_numpy(bias)) < 1e-4
        # The error left has mean zero and nothing in common with x: what no other affine map has.
        left = torch.from_numpy(y) - ghost(torch.from_numpy(x).float()).double()
        assert float(left.mean(0).abs().max()) < 1e-4
    smaller = put_patches(model, [2], [patches["nbl", (2, 3)]])
    assert torch.isfinite(smaller(random_tokens(1, 9)).logits).all()


def test_refusals() -> None:
    with pytest.raises(CalibrationError, match="at least 64 calibration tokens"):
        fit_patches(tiny_model("llama"), [random_tokens(1, 20)], [("nbl", (2, 3))])
    model = tiny_model("llama")
    with torch.no_grad():  # a channel that never varies
        model.model.embed_tokens.weight[:, 3] = 0.0
    with pytest.raises(SolveError, match="give more text, or use the recovery 'ghost'"):
        fit_patches(model, padded_batches(), [("nbl", (0, 2))])
