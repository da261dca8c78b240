"""Text and dense states that the tests of the recoveries share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ghosted_fast.testing import random_tokens


def padded_batches(count: int = 6) -> list[dict[str, Tensor]]:
    """Return batches of 4 sequences, padded left, right and on both sides."""
    batches = []
    for seed in range(count):
        mask = torch.ones(4, 24, dtype=torch.int64)
        mask[0, :5] = mask[1, -7:] = mask[2, :3] = mask[2, -2:] = 0
        batches.append({"input_ids": random_tokens(4, 24, seed), "attention_mask": mask})
    return batches


def dense_states(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the input of every layer, by transformers itself (no boundary after the last)."""
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    return list(output.hidden_states)
