"""The divergence and its gradients at the ghosts, against autograd through the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ghosted_fast.errors import ArgumentError, CalibrationError, NonFiniteError
from ghosted_fast.improve import divergence as divergence_module
from ghosted_fast.improve.divergence import Divergence
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.surgery.cut import prune_model, remove_layers
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model
from ghosted_fast.text.batches import Batch, iterate_batches
from ghosted_fast.text.folds import check_split, in_passes, split_sequences

SIZE = 32


def ghosts_in(model: Any, removed: list[int], gaps: int, seed: int = 0, **options: Any) -> Any:
    """Return a model with random ghosts in its gaps."""
    generator = torch.Generator().manual_seed(seed)
    ghosts = []
    for _ in range(gaps):
        ghost = GhostLinear(SIZE, **options)
        with torch.no_grad():
            for parameter in ghost.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        ghosts.append(ghost)
    return remove_layers(model, removed, ghosts)


def padded_batch() -> Batch:
    mask = torch.ones(4, 20, dtype=torch.int64)
    mask[1, :6] = 0
    mask[2, 15:] = 0
    return Batch(random_tokens(4, 20), mask)


def kl_sum(ghosted: Any, dense: Any, batch: Batch) -> torch.Tensor:
    """Return the sum of KL(dense || ghosted) over attended tokens, differentiable."""
    keys = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.no_grad():
        p = dense(**keys).logits.double().log_softmax(-1)
    q = ghosted(**keys).logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)[batch.attention_mask.bool()].sum()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize(
    ("removed", "gaps"), [([2, 3], 1), ([1, 3, 4], 2), ([0, 5], 2), ([4, 5], 1)]
)
@pytest.mark.parametrize("form", ["normed", "raw", "full"])
def test_gradient_is_that_of_the_parameters(
    family: str, removed: list[int], gaps: int, form: str
) -> None:
    dense, batch = tiny_model(family), padded_batch()
    options = {
        "normed": {"norm_eps": 1e-5},
        "raw": {},
        "full": {"norm_eps": 1e-5, "bias": True, "first_state": True},
    }[form]
    ghosted = ghosts_in(dense, removed, gaps, **options)
    divergence = Divergence(ghosted, dense)
    slopes = divergence.gradients(in_passes(batch.rows(torch.tensor([i])) for i in range(4)))
    found = [part for slope in slopes for part in slope.gradient(batch.num_tokens)]
    loss = kl_sum(ghosted, dense, batch) / batch.num_tokens
    expected = torch.autograd.grad(loss, divergence.parameters)
    assert loss.item() > 0.01
    assert len(found) == len(expected)
    for mine, exact in zip(found, expected, strict=True):
        assert relative_rms(mine, exact) < 1e-4
    assert divergence.value([divergence.states(batch)]) == pytest.approx(loss.item(), rel=1e-5)


def test_models_are_left_as_they_were() -> None:
    dense = tiny_model("llama")
    ghosted = ghosts_in(dense, [2, 3], 1)
    divergence = Divergence(ghosted, dense)
    before = divergence.parameters64()
    divergence.gradients([padded_batch()])
    assert all(parameter.requires_grad for parameter in ghosted.parameters())
    assert all(parameter.grad is None for parameter in ghosted.parameters())
    assert not any(module._forward_hooks for module in ghosted.modules())
    for old, new in zip(before, divergence.parameters, strict=True):
        assert torch.equal(old, new.double())
    divergence.set_parameters([2.0 * part for part in before])
    assert torch.equal(divergence.parameters[0].double(), 2.0 * before[0])


def test_logits_of_held_out_text_are_kept_as_far_as_they_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = tiny_model("llama")
    divergence = Divergence(ghosts_in(dense, [2, 3], 1), dense)
    batches = list(iterate_batches(random_tokens(4, 8).split(2)))
    computed = [divergence.states(batch) for batch in batches]
    one = divergence.dense_logits(computed[0]).nbytes
    monkeypatch.setattr(divergence_module, "_KEPT_LOGITS", one)
    first, second = divergence.held_out(batches)
    assert first.logits is not None and first.logits.nbytes == one and second.logits is None
    for states, same in zip([first, second], computed, strict=True):
        assert torch.equal(divergence.dense_logits(states), divergence.dense_logits(same))
    assert divergence.value([first, second]) == divergence.value(computed)


def test_gram_of_the_features_is_weighted_by_inverse_energy() -> None:
    dense, batch = tiny_model("llama"), padded_batch()
    ghosted = ghosts_in(dense, [2, 3], 1, norm_eps=1e-5, first_state=True)
    seen: list[torch.Tensor] = []
    ghost = next(m for m in ghosted.modules() if isinstance(m, GhostLinear))
    handle = ghost.register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
    with torch.no_grad():
        ghosted(batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    counted = batch.attention_mask.bool() & ~batch.is_first
    x, y = (part[counted].double() for part in seen)
    f = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    exact = (f / y.square().mean(-1, keepdim=True)).mT @ f
    (slope,) = Divergence(ghosted, dense).gradients([batch])
    gram = slope.equations().gram.tril()
    ratio = gram.diagonal().sum() / exact.diagonal().sum()
    assert 0.5 < ratio < 2.0  # weights are moved by up to a factor of 2
    assert relative_rms(gram / ratio, exact.tril()) < 0.3
    change = torch.randn(SIZE, SIZE, dtype=torch.float64)
    energy = ((f @ change.mT).square().mean(-1) / y.square().mean(-1)).sum()
    assert 0.5 < slope.relative_energy(change, None) / energy < 2.0
    assert slope.num_tokens == int(counted.sum())


def test_sequences_are_split_as_the_fit_splits_them() -> None:
    batches = [random_tokens(3, 50, seed) for seed in range(4)]
    flat = torch.cat(batches)
    train, held_out = split_sequences(batches, 1000)
    assert torch.equal(torch.cat([b.input_ids for b in held_out]), flat[3::4])
    assert len(train) == 9
    assert len(split_sequences(batches, 101)[1]) == 3
    assert [len(b.input_ids) for b in in_passes(train * 4)] == [20, 16]
    mixed = [next(iterate_batches([random_tokens(1, n)])) for n in (30, 30, 40, 2000, 30)]
    assert [list(b.input_ids.shape) for b in in_passes(mixed)] == [
        [2, 30],
        [1, 40],
        [1, 2000],
        [1, 30],
    ]


def test_too_little_text() -> None:
    with pytest.raises(CalibrationError, match=r"at least 128 held-out tokens.*got 100 of 400"):
        check_split(*split_sequences([random_tokens(4, 100)], 4096))
    with pytest.raises(CalibrationError, match="got 0 of 0"):
        check_split(*split_sequences([], 4096))


def test_models_that_do_not_fit() -> None:
    dense = tiny_model("llama")
    with pytest.raises(ArgumentError, match="with ghosts, got one without"):
        Divergence(prune_model(dense, [2]), dense)
    ghosted = ghosts_in(dense, [2, 3], 1)
    with pytest.raises(ArgumentError, match=r"comes from \(6 layers\), got another, of 5 layers"):
        Divergence(ghosted, tiny_model("llama", num_layers=5))
    next(m for m in ghosted.modules() if isinstance(m, GhostLinear)).quantize()
    with pytest.raises(ArgumentError, match="got int8"):
        Divergence(ghosted, dense)


def test_values_that_are_not_finite() -> None:
    dense = tiny_model("llama")
    ghosted = ghosts_in(dense, [2, 3], 1)
    divergence = Divergence(ghosted, dense)
    divergence.gradients([padded_batch()])  # plain tokens were looked at by then
    divergence.set_parameters([torch.full((SIZE, SIZE), float("inf"))])
    with pytest.raises(NonFiniteError, match="finite states and gradients"):
        divergence.gradients([padded_batch()])
