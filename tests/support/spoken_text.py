"""Text that a model itself would write, so that removing layers from it costs something."""

from __future__ import annotations

from typing import Any

import torch

from ghosted_fast.testing import random_tokens


def spoken(model: torch.nn.Module, batches: int = 8, rows: int = 8) -> list[torch.Tensor]:
    """Return batches of sequences of 40 tokens, the most likely ones behind random beginnings."""
    text = torch.cat([random_tokens(rows, 40, seed) for seed in range(batches)])
    with torch.no_grad():
        for position in range(4, 40):
            text[:, position] = 1 + model(text[:, :position]).logits[:, -1, 1:].argmax(-1)
    return list(text.split(rows))


def spoken_with_gaps(model: torch.nn.Module) -> list[Any]:
    """Return such a text with padding, a sequence without tokens and batches of other sizes."""
    found: list[Any] = list(spoken(model, batches=7, rows=4))
    mask = torch.ones_like(found[2])
    mask[2, :20], mask[3] = 0, 0
    found[2] = {"input_ids": found[2], "attention_mask": mask}
    found[3] = found[3][:1, :24]
    found[5] = found[5][:3]
    return found
