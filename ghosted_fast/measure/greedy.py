"""What a model writes when it always takes the likeliest token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError, check_at_least
from ghosted_fast.models.decoder import evaluating
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.progress import progress_bar
from ghosted_fast.text.turns import end_tokens

_PAD = 0


@torch.inference_mode()
def greedy_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    batch_size: int = 8,
    progress: bool = False,
) -> list[list[int]]:
    """Let a model go on after each prompt.

    Whatever its generation settings say of sampling or of repeated tokens, the likeliest token is
    taken.

    Args:
        model: A causal language model.
        prompts: Tokens of each prompt, of any lengths.
        new_tokens: Tokens that it writes at most.
        batch_size: Prompts at a time; those of like length go together.
        progress: Show a progress bar on stderr.

    Returns:
        The tokens that it wrote after each prompt, an end-of-text token included.

    Raises:
        ArgumentError: A prompt is empty, or a number is below 1.
    """
    check_at_least(1, new_tokens=new_tokens, batch_size=batch_size)
    if not all(prompts):
        raise ArgumentError("expected prompts of one token at least, got an empty one")
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    ends = end_tokens(model)
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluating(model), progress_bar("writing", progress, of=len(prompts)) as bar:
        for first in range(0, len(prompts), batch_size):
            chosen = by_length[first : first + batch_size]
            batch = padded([prompts[index] for index in chosen], before=True).to(model.device)
            written = model.generate(
                batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                pad_token_id=_PAD,
            )
            rows = written[:, batch.input_ids.shape[1] :].tolist()
            for index, row in zip(chosen, rows, strict=True):
                answers[index] = _until_end(row, ends)
            bar.update(len(chosen))
    return answers


def padded(rows: Sequence[Sequence[int]], before: bool) -> Batch:
    """Return token rows of any lengths as one batch.

    Args:
        rows: Tokens of each row.
        before: Whether padding stands before the tokens; else behind them.
    """
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), _PAD, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        filled = slice(length - len(row), None) if before else slice(len(row))
        ids[place, filled] = _as_row(row)
        mask[place, filled] = 1
    return Batch(ids, mask)


def _as_row(row: Sequence[int]) -> Tensor:
    return torch.tensor(list(row), dtype=torch.int64)


def _until_end(row: list[int], ends: frozenset[int]) -> list[int]:
    stop = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[: stop + 1]
