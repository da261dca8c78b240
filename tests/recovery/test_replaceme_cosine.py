"""ReplaceMe's cosine objective against Adam in fp64 numpy, its gradient written out."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from support.padded_text import dense_states, padded_batches

from ghosted_fast import distributed
from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.recovery import replaceme_cosine
from ghosted_fast.recovery.patches import fit_patches, put_patches
from ghosted_fast.recovery.swept import check_swept_recovery
from ghosted_fast.testing import relative_rms, tiny_model


def rows_of(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return m and t of all attended tokens, from transformers' own record and a hook."""
    model = tiny_model("llama")
    seen: list[torch.Tensor] = []
    Decoder.of(model).mlp_output(start - 1).register_forward_hook(
        lambda *call: seen.append(call[2].detach())
    )
    outputs, targets = [], []
    for batch in padded_batches():
        mask, states = batch["attention_mask"].bool(), dense_states(model, batch)
        m = seen.pop()[mask].double().numpy()
        x, y = (states[boundary][mask].double().numpy() for boundary in (start, stop))
        outputs.append(m)
        targets.append(y - x + m)
    return np.concatenate(outputs), np.concatenate(targets)


def adam(m: np.ndarray, t: np.ndarray, steps: Iterable[np.ndarray]) -> torch.Tensor:
    """Minimise 1 - cos(T m, t), in each step over some of the tokens; return T."""
    unit = t / np.linalg.norm(t, axis=1, keepdims=True)
    weight = np.eye(m.shape[1])
    first, second = np.zeros_like(weight), np.zeros_like(weight)
    for step, rows in enumerate(steps, 1):
        mapped = m[rows] @ weight.T
        size = np.linalg.norm(mapped, axis=1, keepdims=True)
        along = (mapped * unit[rows]).sum(1, keepdims=True) / size
        slope = -((unit[rows] - along * mapped / size) / size).T @ m[rows] / len(rows)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        ahead = np.sqrt(second / (1 - 0.999**step)) + 1e-8
        weight = weight - 1e-4 * (first / (1 - 0.9**step)) / ahead
    return torch.from_numpy(weight)


def test_ten_rounds_of_adam() -> None:
    m, t = rows_of(2, 4)
    assert 0 < len(m) <= 1024  # one step a round, whatever the order
    patches = fit_patches(tiny_model("llama"), padded_batches(), [("replaceme-cosine", (2, 4))])
    change = patches["replaceme-cosine", (2, 4)].mlp_map
    assert change is not None
    exact = adam(m, t, 10 * [np.arange(len(m))]) - torch.eye(32)
    assert 5e-4 < float(exact.abs().max()) < 2e-3
    assert relative_rms(change, exact) < 1e-2


def test_batches_of_tokens_and_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round goes once through all tokens, the last of them in a smaller step."""
    monkeypatch.setattr(replaceme_cosine, "TOKENS", 64)
    monkeypatch.setattr(replaceme_cosine, "ROUNDS", 40)
    m, t = rows_of(2, 4)
    assert len(m) % 64
    once, again = (
        replaceme_cosine.cosine_map(torch.from_numpy(m), torch.from_numpy(t), torch.device("cpu"))
        for _ in range(2)
    )
    assert torch.equal(once, again)
    draw, steps = torch.Generator().manual_seed(0), []
    for _ in range(40):
        order = torch.randperm(len(m), generator=draw).numpy()
        steps += np.split(order, range(64, len(m), 64))
    exact = adam(m, t, steps)
    assert relative_rms(once - torch.eye(32), exact - torch.eye(32)) < 1e-2


def test_the_map_is_folded() -> None:
    model = tiny_model("llama")
    patches = fit_patches(model, padded_batches(), [("replaceme-cosine", (2, 4))])
    change = patches["replaceme-cosine", (2, 4)].mlp_map
    assert change is not None
    smaller = put_patches(model, [2, 3], list(patches.values()))
    before = model.model.layers[1].mlp.down_proj.weight.double()
    expected = before + change @ before
    assert relative_rms(smaller.model.layers[1].mlp.down_proj.weight, expected) < 1e-6


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with pytest.raises(ArgumentError, match=r"'replaceme-cosine' maps .*\[0, 2\) has none before"):
        fit_patches(model, padded_batches(), [("replaceme-cosine", (0, 2))])
    with pytest.raises(ArgumentError, match="other than 'replaceme-cosine'"):
        check_swept_recovery("replaceme-cosine")
    with pytest.raises(ArgumentError, match="other than 'prunecomp'"):
        check_swept_recovery("prunecomp")
    check_swept_recovery("nbl")
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(ArgumentError, match="expected one process"):
        replaceme_cosine.ReplaceMeCosineCollector(Decoder.of(model), (2, 4))
