"""Divergence of predictions from the states behind the last layer, never from whole logits.

A vocabulary of 262k words makes the logits of 4096 tokens 4 GiB in fp32; the states they come from
are a hundredth of that. So rows of states go through the rest of the model (the final norm, the
head and what comes behind it) a few at a time, and their gradient comes back before the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.models.boundaries import starting_at, visit_boundaries
from ghosted_fast.models.built_whole import text_config_of
from ghosted_fast.models.families import num_layers
from ghosted_fast.ops import divergence, local_divergence
from ghosted_fast.text.batches import Batch

# Logits held at once where rows of states go through a head.
_SLICE_ELEMENTS = 1 << 24


class Exit:
    """What a model makes of the states behind its last layer.

    Args:
        model: A causal language model.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._layers = model, num_layers(model)
        self.vocabulary = int(text_config_of(model.config).vocab_size)

    def states(self, batch: Batch, gradients: bool = False) -> Tensor:
        """Return the states behind the last layer [batch, length, d].

        Args:
            batch: The tokens.
            gradients: Whether autograd shall reach what the model is made of.
        """
        found: dict[int, Tensor] = {}
        visit_boundaries(self._model, batch, [self._layers], found.__setitem__, gradients=gradients)
        return found[self._layers] if gradients else found[self._layers].clone()

    def logits(self, rows: Tensor) -> Tensor:
        """Return the logits [rows, vocabulary] of states [rows, d]."""
        # Sequences of one token each, so that no limit on positions is met.
        tokens = torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        with starting_at(self._model, self._layers, rows[:, None]):
            output = self._model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        return output.logits[:, 0]


def exit_divergence(
    dense: Exit,
    smaller: Exit,
    dense_states: Tensor,
    states: Tensor,
    counted: Tensor,
    gradient: Tensor | None = None,
) -> float:
    """Return the sum over tokens of KL(dense || smaller), nats.

    Args:
        dense: What makes the dense model's predictions.
        smaller: Likewise of the other.
        dense_states: States behind the dense model's last layer [batch, length, d].
        states: Likewise of the other model.
        counted: [batch, length] bool; the other tokens are not looked at.
        gradient: Zeros like the states; if given, it gets the gradient of the sum by them.
    """
    found = 0.0
    ours, theirs = states.detach().flatten(0, 1), dense_states.flatten(0, 1)
    at_once = max(1, _SLICE_ELEMENTS // dense.vocabulary)
    for rows in counted.flatten().nonzero()[:, 0].split(at_once):
        with torch.no_grad():
            expected = dense.logits(theirs[rows])
        chosen = ours[rows]
        with torch.set_grad_enabled(gradient is not None):
            chosen.requires_grad_(gradient is not None)
            logits = smaller.logits(chosen)
        parts, away = divergence(expected, logits, gradient=gradient is not None)
        found += float(parts.sum())
        if gradient is not None:
            (back,) = torch.autograd.grad(logits, chosen, away)
            gradient.view(-1, gradient.shape[-1])[rows] = back
    return found


def exit_local_divergence(
    end: Exit,
    dense_states: Tensor,
    states: Tensor,
    moved: Sequence[Tensor],
    counted: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum over tokens of KL(dense || smaller), and how it bends, see `local_divergence`.

    Args:
        end: What makes the predictions of all.
        dense_states: States behind the dense model's last layer [batch, length, d].
        states: Likewise of the smaller model.
        moved: Likewise of the smaller model with changes, each of them.
        counted: [batch, length] bool; the other tokens are not looked at.

    Returns:
        The divergence [], the slope [k] and the curvature [k, k], fp64, k changes.
    """
    flat = [item.flatten(0, 1) for item in (dense_states, states, *moved)]
    count = len(moved)
    sums = [torch.zeros([count] * axes, dtype=torch.float64) for axes in range(3)]
    at_once = max(1, _SLICE_ELEMENTS // end.vocabulary)
    for rows in counted.flatten().nonzero()[:, 0].split(at_once):
        with torch.no_grad():
            dense, smaller, *others = (end.logits(item[rows]) for item in flat)
        for total, found in zip(sums, local_divergence(dense, smaller, others), strict=True):
            total += found.cpu()
    return sums[0], sums[1], sums[2]
