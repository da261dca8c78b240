"""Rows of several texts, mixed in shares."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError, SourceError
from ghosted_fast.text.loading import cut_rows, wanted_rows
from ghosted_fast.text.shares import checked_shares

_LOGGER = logging.getLogger(__name__)
# Rows whose order is random. Within any folds each text then has its share.
_BLOCK = 16
Texts = Iterable[str] | Callable[[int], Iterable[str]]


def mix_texts(
    tokenizer: Any,
    sources: Mapping[str, Texts],
    num_tokens: int,
    shares: Mapping[str, float] | None = None,
    sequence_length: int = 512,
    batch_size: int = 8,
    fewest: int | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Cut several texts into full rows of tokens, mixed in shares.

    Each row is of one text, as `token_batches` cuts it. Every 16 rows hold the shares, to about a
    row, in an order by the seed; a smaller `num_tokens` gives the first rows of a larger one. No
    row is taken twice: where one text ends, the mixture does. The global random state is neither
    read nor changed.

    Args:
        tokenizer: A transformers tokenizer.
        sources: The texts by name: each as `token_batches` takes it, or a function that is given
            the tokens that are wanted of it and returns it. Functions are called last.
        num_tokens: Tokens wanted; rounded down to whole rows.
        shares: Of the rows, by name; they add up to 1. By default all texts have the same.
        sequence_length: Tokens in a row, BOS included.
        batch_size: Rows in a batch; the last may have fewer.
        fewest: Tokens that will do where a text ends early, with a warning; `num_tokens` if not
            given.
        seed: Of the order.

    Returns:
        Batches of token ids [batch, sequence_length], int64.

    Raises:
        ArgumentError: A number is too small, shares are wrong, or a text would have no row.
        SourceError: A text cannot be read, or ends too early; the message names it.
    """
    names = list(sources)
    num_rows, least = wanted_rows(tokenizer, num_tokens, sequence_length, batch_size, fewest)
    order = list(islice(_order(_checked(names, shares), seed), num_rows))
    if missing := set(range(len(names))) - set(order):
        raise ArgumentError(
            f"expected num_tokens that give each text a row of {sequence_length}, got none for "
            f"{names[min(missing)]!r} of {num_tokens}: ask for more, or give it a larger share"
        )
    rows: list[Tensor] = [torch.empty(0)] * len(names)
    said = ""
    # What writes its text is not to write what there is no room for.
    for index in sorted(range(len(names)), key=lambda index: callable(sources[names[index]])):
        wanted, name = order.count(index), names[index]
        rows[index], found = _rows_of(tokenizer, name, sources[name], wanted, sequence_length)
        if len(rows[index]) == wanted:
            continue
        places = [place for place, source in enumerate(order) if source == index]
        order = order[: places[len(rows[index])]]
        said = f"the text {name!r} ended after {found} of {wanted * sequence_length} tokens"
        if len(order) < least:
            raise SourceError(
                f"expected {least * sequence_length} tokens of mixed texts, got "
                f"{len(order) * sequence_length}: {said}; give more of it, give it a smaller "
                "share, or ask for fewer tokens"
            )
    if said:
        _LOGGER.warning(
            "%s, and the mixture with it: %d of the %d tokens that were asked for are used",
            said,
            len(order) * sequence_length,
            num_tokens,
        )
    following = [iter(part) for part in rows]
    return list(torch.stack([next(following[index]) for index in order]).split(batch_size))


def _rows_of(
    tokenizer: Any, name: str, source: Texts, wanted: int, sequence_length: int
) -> tuple[Tensor, int]:
    try:
        texts = source(wanted * sequence_length) if callable(source) else source
        return cut_rows(tokenizer, texts, wanted, sequence_length)
    except SourceError as error:
        if name in str(error):
            raise
        raise SourceError(f"text {name!r}: {error}") from error


def _checked(names: Sequence[str], shares: Mapping[str, float] | None) -> list[float]:
    """Return the shares in the order of the texts; they add up to 1.

    Raises:
        ArgumentError: There is no text, or the shares are not those of the texts, not above 0 or do
            not add up.
    """
    if not names:
        raise ArgumentError("expected texts to mix, got none")
    given = dict.fromkeys(names, 1 / len(names)) if shares is None else dict(shares)
    if set(given) != set(names):
        raise ArgumentError(
            f"expected a share of each text ({', '.join(names)}), got shares of "
            f"{', '.join(given) or 'none'}"
        )
    checked = checked_shares(given)
    return [checked[name] for name in names]


def _order(shares: Sequence[float], seed: int) -> Iterator[int]:
    """Yield, without end, which text each row is of.

    In blocks, the next row goes to the text that is furthest behind its share; then the block is
    shuffled. Without that, texts in turn would each have folds of their own.
    """
    generator = random.Random(seed)
    given = [0] * len(shares)
    while True:
        block = []
        for _ in range(_BLOCK):
            count = sum(given) + 1
            behind = [share * count - had for share, had in zip(shares, given, strict=True)]
            block.append(behind.index(max(behind)))
            given[block[-1]] += 1
        generator.shuffle(block)
        yield from block
