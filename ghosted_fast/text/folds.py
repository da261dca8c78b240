"""Text to learn from and text to judge by: sequences apart, split as the fit's folds are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.errors import CalibrationError
from ghosted_fast.options import GhostOptions
from ghosted_fast.text.batches import Batch, iterate_batches

# Tokens per pass: enough to keep two cores busy, few beside the logits' memory.
PASS_TOKENS = 1024
_FEWEST_HELD_OUT = 128


def split_sequences(
    batches: Iterable[Any],
    held_out_tokens: int,
    device: torch.device | str | None = None,
    options: GhostOptions | None = None,
    keep_rest: bool = False,
) -> tuple[list[Batch], list[Batch]]:
    """Split text into sequences to learn from and sequences to judge by.

    Sequence i is held out where the fit's last fold has it (`is_held_out`).

    Args:
        batches: See `iterate_batches`.
        held_out_tokens: Attended tokens to hold out, as far as there are that many.
        device: Where the tokens go.
        options: How ghosts are fitted: how many folds there are.
        keep_rest: Whether sequences of that fold, once enough are held out, are learned from too.

    Returns:
        The two lists; each element is one sequence.
    """
    options = options or GhostOptions()
    train: list[Batch] = []
    held_out: list[Batch] = []
    sequences = tokens = 0
    for batch in iterate_batches(batches, device):
        for row in range(len(batch.input_ids)):
            sequence = batch.rows(torch.tensor([row], device=batch.input_ids.device))
            if not is_held_out(sequences, options):
                train.append(sequence)
            elif tokens < held_out_tokens:
                held_out.append(sequence)
                tokens += sequence.num_tokens
            elif keep_rest:
                train.append(sequence)
            sequences += 1
    return train, held_out


def check_split(train: Sequence[Batch], held_out: Sequence[Batch]) -> None:
    """Raise unless there is text to learn from and enough to judge by.

    Raises:
        CalibrationError: There is not.
    """
    found = token_count(held_out)
    if found < _FEWEST_HELD_OUT or not token_count(train):
        raise CalibrationError(
            f"expected at least {_FEWEST_HELD_OUT} held-out tokens (every {GhostOptions().folds}th "
            f"sequence is held out) and others to learn from, got {found} of "
            f"{token_count(train) + found}: give more text, or cut it into shorter sequences"
        )


def token_count(sequences: Iterable[Batch]) -> int:
    """Return the number of attended tokens."""
    return sum(sequence.num_tokens for sequence in sequences)


def sequences_for(tokens: int, train: Sequence[Batch]) -> int:
    """Return how many sequences of a text hold about so many tokens; at least 1, at most all."""
    return min(len(train), max(1, round(tokens * len(train) / token_count(train))))


def in_passes(sequences: Iterable[Batch]) -> Iterator[Batch]:
    """Join neighbouring sequences of one length into batches of about a thousand tokens."""
    group: list[Batch] = []
    for sequence in sequences:
        length = sequence.input_ids.shape[1]
        full = (len(group) + 1) * length > PASS_TOKENS
        if group and (full or group[0].input_ids.shape[1] != length):
            yield _joined(group)
            group = []
        group.append(sequence)
    if group:
        yield _joined(group)


def _joined(group: Sequence[Batch]) -> Batch:
    def join(pick: Callable[[Batch], Tensor]) -> Tensor:
        return torch.cat([pick(item) for item in group])

    return Batch(join(lambda item: item.input_ids), join(lambda item: item.attention_mask))


def is_held_out(sequence: int, options: GhostOptions) -> bool:
    """Return whether a calibration sequence, by its number, belongs to the held-out fold."""
    return sequence % options.folds == options.folds - 1


def held_out_batches(
    batches: Sequence[Batch], options: GhostOptions, score_tokens: int
) -> list[Batch]:
    """Return the sequences of the held-out fold, until they hold enough tokens.

    Raises:
        CalibrationError: There are fewer sequences than folds, so that none is held out.
    """
    _, selected = split_sequences(batches, score_tokens, options=options)
    if not selected:
        sequences = sum(len(batch.input_ids) for batch in batches)
        raise CalibrationError(
            f"expected at least {options.folds} calibration sequences (one per fold), got "
            f"{sequences}: cut the text into shorter sequences, or give more"
        )
    return selected


def held_out_places(
    batches: Sequence[Batch], options: GhostOptions, score_tokens: int
) -> list[tuple[int, int]]:
    """Return where the sequences of `held_out_batches` are: the batch and the row in it."""
    return split_places(batches, score_tokens, options)[1]


def split_places(
    batches: Sequence[Batch], held_out_tokens: int, options: GhostOptions | None = None
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return where the sequences of `split_sequences` are: the batch and the row in it."""
    options = options or GhostOptions()
    train: list[tuple[int, int]] = []
    held_out: list[tuple[int, int]] = []
    sequences = tokens = 0
    for index, batch in enumerate(batches):
        for row, count in enumerate(batch.attention_mask.sum(1).tolist()):
            if not is_held_out(sequences, options):
                train.append((index, row))
            elif tokens < held_out_tokens:
                held_out.append((index, row))
                tokens += int(count)
            sequences += 1
    return train, held_out


def training_batches(batches: Sequence[Batch], options: GhostOptions) -> list[Batch]:
    """Return the sequences of all folds but the held-out one."""
    selected: list[Batch] = []
    sequences = 0
    for batch in batches:
        rows = range(len(batch.input_ids))
        kept = [row for row in rows if not is_held_out(sequences + row, options)]
        sequences += len(rows)
        if kept:
            selected.append(batch.rows(torch.tensor(kept, device=batch.input_ids.device)))
    return selected
