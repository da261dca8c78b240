"""Perplexity: the exponential of the mean loss per token, with an interval over passages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ghosted_fast.errors import ArgumentError, NonFiniteError
from ghosted_fast.facts import notebook_table
from ghosted_fast.measure.bootstrap import check_confidence, percentile_interval
from ghosted_fast.models.checked.bos import telling_missing_bos
from ghosted_fast.models.decoder import evaluating
from ghosted_fast.text.batches import Batch, iterate_batches
from ghosted_fast.text.progress import progress_bar

_LOGGER = logging.getLogger(__name__)
# fp32 logits held at once by the loss: 16 MiB, so that they stay in a CPU's outer cache.
_SLICE_ELEMENTS = 1 << 22
# Logits that a model may return in one call: 1 GiB in bf16.
_CALL_ELEMENTS = 1 << 29
_RESAMPLES = 2000


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model on a text; `float()` gives `value`.

    Attributes:
        value: exp of the mean loss over all predicted tokens.
        low: Lower end of the bootstrap percentile interval over passages.
        high: Upper end of it.
        num_tokens: Predicted tokens.
        passage_losses: Mean loss of each passage (row), nats per token.
        passage_tokens: Predicted tokens of each passage.
        confidence: Of the interval.
    """

    value: float
    low: float
    high: float
    num_tokens: int
    passage_losses: tuple[float, ...]
    passage_tokens: tuple[int, ...]
    confidence: float

    def __float__(self) -> float:
        return self.value

    def _repr_html_(self) -> str:
        interval = f"{self.low:.2f} to {self.high:.2f} ({self.confidence:.0%})"
        row = [f"{self.value:.2f}", interval, f"{self.num_tokens:,}"]
        return notebook_table("Perplexity", [row], ["perplexity", "interval", "tokens"])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


@torch.inference_mode()
def perplexity(
    model: Any,
    batches: Iterable[Any],
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> Perplexity:
    """Measure a model's perplexity; every row of every batch is one passage.

    A token counts if it and the token before it are attended. The interval is a percentile
    bootstrap that draws whole passages, since the tokens of one passage are not independent.

    Args:
        model: A causal language model.
        batches: Dicts with input_ids [B, T] (and attention_mask), or token tensors [B, T] or [T].
        confidence: Of the interval, between 0 and 1.
        seed: Of the bootstrap.
        progress: Show a progress bar on stderr.

    Returns:
        The perplexity.

    Raises:
        ArgumentError: The confidence is out of range, or no token is predicted.
        NonFiniteError: The loss of a passage is not finite.
    """
    with evaluating(model):
        bar = progress_bar("perplexity", progress, of=batches)
        whole = telling_missing_bos(model, iterate_batches(bar, model.device))
        parts = (part for batch in whole for part in parts_of(batch, model))
        return perplexity_from(parts, partial(_logits, model), confidence, seed)


def _logits(model: Any, batch: Batch) -> Tensor:
    return model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits


@torch.inference_mode()
def perplexity_from(
    batches: Iterable[Batch],
    logits_of: Callable[[Batch], Tensor],
    confidence: float = 0.95,
    seed: int = 0,
) -> Perplexity:
    """Measure the perplexity of predictions, wherever they come from; see `perplexity`.

    Args:
        batches: The tokens.
        logits_of: Returns the logits [B, T, V] of a batch.
        confidence: As in `perplexity`.
        seed: As in `perplexity`.

    Raises:
        ArgumentError: The confidence is out of range, or no token is predicted.
        NonFiniteError: The loss of a passage is not finite.
    """
    check_confidence(confidence)
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    for batch in batches:
        logits = logits_of(batch)
        loss, count = cross_entropy_sum(logits, batch.input_ids, batch.attention_mask)
        sums.append(loss.cpu())
        counts.append(count.cpu())
    total = torch.cat(sums).numpy() if sums else np.zeros(0)
    tokens = torch.cat(counts).numpy() if counts else np.zeros(0, dtype=np.int64)
    return _summary(total, tokens, confidence, seed)


def parts_of(batch: Batch, model: Any) -> list[Batch]:
    """Split a batch by rows so that the logits of one call stay within memory."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    rows = max(1, _CALL_ELEMENTS // (batch.input_ids.shape[1] * vocabulary))
    pairs = zip(batch.input_ids.split(rows), batch.attention_mask.split(rows), strict=True)
    return [Batch(*pair) for pair in pairs]


def cross_entropy_sum(
    logits: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum the next-token loss of each row over its attended tokens, in fp64.

    Args:
        logits: As in `token_losses`, as the others.
        input_ids: Likewise.
        attention_mask: Likewise.

    Returns:
        The sum of losses [B], fp64, nats, and the number of predicted tokens [B], int64.
    """
    losses, predicted = token_losses(logits, input_ids, attention_mask)
    return losses.sum(1, dtype=torch.float64), predicted.sum(1)


def predicted_positions(attention_mask: Tensor) -> Tensor:
    """Return where a next token is predicted [B, T - 1] bool, from a mask [B, T]."""
    return attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()


def token_losses(
    logits: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the next-token loss of each position.

    It is computed in fp32 in slices of positions, so that no fp32 copy of the logits of a whole
    batch exists.

    Args:
        logits: [B, T, V], any floating dtype; position t predicts token t + 1.
        input_ids: [B, T], int64.
        attention_mask: [B, T]; 0 marks padding, whose logits may be anything, NaN included.

    Returns:
        The losses [B, T - 1], fp32, nats, 0 where no token is predicted; and where one is,
        [B, T - 1] bool.
    """
    batch, length, vocabulary = logits.shape
    predicted = predicted_positions(attention_mask)
    losses = torch.zeros(batch, length - 1, device=logits.device)
    step = max(1, _SLICE_ELEMENTS // (batch * vocabulary))
    for start in range(0, length - 1, step):
        stop = min(start + step, length - 1)
        losses[:, start:stop] = functional.cross_entropy(
            logits[:, start:stop].float().flatten(0, 1),
            input_ids[:, start + 1 : stop + 1].flatten(),
            reduction="none",
        ).view(batch, stop - start)
    return torch.where(predicted, losses, 0.0), predicted


def _summary(total: Any, tokens: Any, confidence: float, seed: int) -> Perplexity:
    kept = tokens > 0
    if not kept.all():
        _LOGGER.warning("%d passages hold no token to predict: left out", int((~kept).sum()))
    total, tokens = total[kept], tokens[kept]
    if not tokens.size:
        raise ArgumentError(
            "expected a passage with two attended tokens at least, got no token to predict"
        )
    if not np.isfinite(total).all():
        first = int(np.flatnonzero(~np.isfinite(total))[0])
        raise NonFiniteError(f"the loss of passage {first} of {tokens.size} is not finite")
    draws = np.random.default_rng(seed).multinomial(
        tokens.size, np.full(tokens.size, 1 / tokens.size), size=_RESAMPLES
    )
    with np.errstate(over="ignore"):
        low, high = percentile_interval(np.exp((draws @ total) / (draws @ tokens)), confidence)
        value = float(np.exp(total.sum() / tokens.sum()))
    return Perplexity(
        value=value,
        low=low,
        high=high,
        num_tokens=int(tokens.sum()),
        passage_losses=tuple((total / tokens).tolist()),
        passage_tokens=tuple(tokens.tolist()),
        confidence=confidence,
    )
