"""How many tokens parts of a text have, known before it is swept."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ghosted_fast.options import GhostOptions
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.folds import is_held_out


def tokens_of(batches: Sequence[Batch], tokens: int) -> int:
    """Return how many tokens sequences take, padding included, that hold so many attended ones.

    Args:
        batches: The text; one without memory is taken to have no padding.
        tokens: Attended tokens.
    """
    counts = attended(batches)
    longest = max((batch.input_ids.shape[1] for batch in batches), default=0)
    wanted = math.ceil(tokens * len(counts) / max(1, sum(counts)))
    return min(len(counts), wanted) * longest


def held_out_tokens(batches: Sequence[Batch]) -> int:
    """Return how many attended tokens of a text can be held out, see `tokens_of`."""
    counts, options = attended(batches), GhostOptions()
    return sum(count for number, count in enumerate(counts) if is_held_out(number, options))


def attended(batches: Sequence[Batch]) -> list[int]:
    """Return how many attended tokens each sequence has."""
    found: list[int] = []
    for batch in batches:
        rows, length = batch.input_ids.shape
        whole = batch.attention_mask.is_meta
        found += [length] * rows if whole else batch.attention_mask.sum(1).tolist()
    return found
