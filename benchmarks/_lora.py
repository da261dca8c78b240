"""LoRA on the text itself, as people fine-tune pruned models: no dense model takes part.

Factors, steps and rates are those of a healing. What differs is the loss, the cross-entropy of the
next token of the text, and that the last state is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ghosted_fast.improve.factors import Trained
from ghosted_fast.improve.gradients import kernels_with_gradients
from ghosted_fast.improve.healing_run import Run, learning_rate_share, take_step
from ghosted_fast.models.decoder import evaluating
from ghosted_fast.options import Rank

_PER_STEP = 1024


def train_on_text(
    model: Any, batches: Sequence[Tensor], tokens: int, rank: Rank, rate: float
) -> int:
    """Train a model in place, and return how many tokens it learned from.

    Args:
        model: A model without some of its layers.
        batches: Token ids [rows, length], all rows of one length.
        tokens: How many to learn from.
        rank: Of the factors of each linear map.
        rate: The learning rate, before it falls.
    """
    rows = torch.cat(list(batches))[: tokens // batches[0].shape[1]]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    steps = rows[order].split(max(1, _PER_STEP // rows.shape[1]))
    trained = Trained(model, rank, seed=0)
    point = [part.detach().clone() for part in trained.parameters]
    run = Run.start("", point, 0.0, 0.0)
    with kernels_with_gradients(model), evaluating(model):
        for chosen in steps:
            trained.move_to(run.point)
            with trained.applied():
                logits = model(chosen, use_cache=False).logits[:, :-1].flatten(0, 1).float()
                loss = functional.cross_entropy(logits, chosen[:, 1:].flatten())
                found = torch.autograd.grad(loss, trained.parameters, allow_unused=True)
            gradients = [
                torch.zeros_like(value) if part is None else part
                for part, value in zip(found, run.point, strict=True)
            ]
            take_step(run, gradients, rate * learning_rate_share(run), trained.rate_shares)
            run.share = run.step / len(steps)
        trained.move_to(run.point)
    trained.fold()
    return rows.numel()
