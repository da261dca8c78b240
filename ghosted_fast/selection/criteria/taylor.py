"""First-order importance: how much the loss would change if a block's weights went to zero.

Source: Kim et al., "Shortened LLaMA: A Simple Depth Pruning for Large Language Models", arXiv
2402.02834, section 3.1: the importance of a block is the sum over its weights of |w dL/dw|, with L
the mean next-token loss over the calibration samples. As in the authors' code the weights of norms
count and biases do not. The first blocks look unimportant to this measure but are not, so the paper
keeps the first four and the last two ("Taylor+"): here they are chosen after all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast.fit.walk import turns
from ghosted_fast.measure.perplexity import token_losses
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.selection.criteria.request import Request, Selection, in_order
from ghosted_fast.text.batches import Batch

FIRST_KEPT, LAST_KEPT = 4, 2


def by_taylor(request: Request) -> Selection:
    """Choose the layers of the lowest importance, those that the paper keeps after all others."""
    scores = block_importance(request.decoder, request.held_out(), request.run.progress)
    count = request.num_layers
    kept = {*range(FIRST_KEPT), *range(count - LAST_KEPT, count)}
    order = sorted(range(count), key=lambda i: (request.rests(i), i in kept, scores[i]))
    return in_order(order, scores, request.remove, "taylor")


def block_importance(model: Any, batches: Sequence[Batch], progress: bool = False) -> list[float]:
    """Return the sum of |w dL/dw| over the weights of each decoder layer.

    The sums of the gradients take as much memory as the layers do in fp32. The model is left as it
    was, gradients included.

    Args:
        model: A causal language model.
        batches: The tokens that L is the mean loss of.
        progress: Whether to show a progress bar on stderr.

    Returns:
        One number for each layer.
    """
    decoder = Decoder.of(model)
    blocks = [
        [p for name, p in layer.named_parameters() if not name.endswith("bias")]
        for layer in decoder.layers
    ]
    weights = [weight for block in blocks for weight in block]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    tokens = torch.zeros((), dtype=torch.int64)
    with _differentiable(weights):
        for turn in turns(batches, decoder.device, "gradients", progress):
            if not turn.is_own:
                continue
            batch = turn.batch
            logits = decoder.model(
                batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
            loss, predicted = token_losses(logits, batch.input_ids, batch.attention_mask)
            # Experts that no token of the batch was sent to have no gradient.
            gradients = torch.autograd.grad(loss.sum(), weights, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:
                    total += gradient
            tokens += predicted.sum().cpu()
    for total in [*sums, tokens]:
        distributed.add_up([total])
    with torch.no_grad():
        saliences = iter(
            float((weight.float() * total).abs().sum(dtype=torch.float64)) / max(int(tokens), 1)
            for weight, total in zip(weights, sums, strict=True)
        )
        return distributed.from_first([sum(next(saliences) for _ in block) for block in blocks])


@contextmanager
def _differentiable(weights: Sequence[Tensor]) -> Iterator[None]:
    """Ask for gradients of some parameters, and leave their settings as they were."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)
