"""Perplexity against fp64 arithmetic written out, with padding, and its refusals."""

from __future__ import annotations

import math

import pytest
import torch

from ghosted_fast.errors import ArgumentError, NonFiniteError
from ghosted_fast.measure import perplexity as evaluation
from ghosted_fast.measure.perplexity import cross_entropy_sum, perplexity
from ghosted_fast.testing import random_tokens, relative_rms, tiny_model


def padded(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return 4 rows: full, padded right, padded left, and with one attended token only."""
    ids = random_tokens(4, 20, seed)
    mask = torch.ones_like(ids)
    mask[1, 13:] = 0
    mask[2, :5] = 0
    mask[3, 1:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def exact_losses(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> list[list[float]]:
    chances = logits.double().log_softmax(-1)
    return [
        [
            -chances[row, t, ids[row, t + 1]].item()
            for t in range(ids.shape[1] - 1)
            if mask[row, t] and mask[row, t + 1]
        ]
        for row in range(ids.shape[0])
    ]


@pytest.mark.parametrize("slice_elements", [1, 97 * 4 * 7, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_sum(
    slice_elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "_SLICE_ELEMENTS", slice_elements)
    batch = padded()
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(4, 20, 97, generator=generator)).to(dtype)
    logits[1, 13:] = math.nan
    total, count = cross_entropy_sum(logits, **batch)
    exact = exact_losses(logits, ids=batch["input_ids"], mask=batch["attention_mask"])
    assert total.dtype == torch.float64
    assert count.tolist() == [len(row) for row in exact] == [19, 12, 14, 0]
    assert relative_rms(total, torch.tensor([sum(row) for row in exact])) <= 1e-6


def test_cross_entropy_sum_of_one_token() -> None:
    ids = random_tokens(2, 1)
    total, count = cross_entropy_sum(torch.randn(2, 1, 97), ids, torch.ones_like(ids))
    assert total.tolist() == [0.0, 0.0]
    assert count.tolist() == [0, 0]


@pytest.mark.parametrize("call_elements", [1, 1 << 29])
def test_perplexity(call_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_CALL_ELEMENTS", call_elements)
    model, batch = tiny_model("llama"), padded()
    result = perplexity(model, [batch, random_tokens(2, 11)])
    with torch.inference_mode():
        losses = exact_losses(
            model(**batch).logits, batch["input_ids"], batch["attention_mask"]
        ) + exact_losses(
            model(random_tokens(2, 11)).logits, random_tokens(2, 11), torch.ones(2, 11)
        )
    kept = [row for row in losses if row]
    every = [loss for row in kept for loss in row]
    assert result.num_tokens == len(every) == sum(result.passage_tokens)
    assert float(result) == result.value == pytest.approx(math.exp(sum(every) / len(every)), 1e-5)
    assert result.passage_losses == pytest.approx([sum(row) / len(row) for row in kept], 1e-5)
    assert min(result.passage_losses) < math.log(result.low) < math.log(result.value)
    assert math.log(result.value) < math.log(result.high) < max(result.passage_losses)
    assert perplexity(model, [batch, random_tokens(2, 11)]) == result


def test_interval_widens_with_confidence() -> None:
    model, batches = tiny_model("gpt2"), [random_tokens(8, 16)]
    narrow, wide = perplexity(model, batches, 0.5), perplexity(model, batches, 0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_one_passage_has_no_width() -> None:
    result = perplexity(tiny_model("llama", 2), [random_tokens(1, 16)[0]])
    assert result.low == pytest.approx(result.value)
    assert result.high == pytest.approx(result.value)


def test_training_mode_is_given_back() -> None:
    model = tiny_model("llama", 2).train()
    perplexity(model, [random_tokens(1, 8)])
    assert model.training


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_out_of_range(confidence: float) -> None:
    with pytest.raises(ArgumentError, match="expected a confidence between 0 and 1"):
        perplexity(tiny_model("llama", 2), [random_tokens(1, 8)], confidence)


@pytest.mark.parametrize("batches", [[], [random_tokens(3, 1)]], ids=["none", "short"])
def test_nothing_to_predict(batches: list[torch.Tensor]) -> None:
    with pytest.raises(ArgumentError, match="two attended tokens"):
        perplexity(tiny_model("llama", 2), batches)


def test_loss_that_is_not_finite() -> None:
    model = tiny_model("llama", 2)
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(NonFiniteError, match="loss of passage 0 of 2 is not finite"):
        perplexity(model, [random_tokens(2, 8)])
