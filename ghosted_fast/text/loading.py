"""Models and texts by name: hub ids, folders and files become a model and batches of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError, SourceError, check_at_least
from ghosted_fast.text.readers import (
    hub_records,
    json_records,
    parquet_records,
    read_paragraphs,
    texts_of,
)

SELF = "self"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".ndjson", ".parquet")
_SEPARATOR = "\n\n"
# Long enough that a tokenizer works at full speed and that few words are cut at a block's end.
_BLOCK_CHARACTERS = 1 << 20


def is_hub_id(name: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a name can be one on the hub: it looks like no path and ends like no file."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return not looks_like_path and not name.endswith(suffixes) and bool(_HUB_ID.fullmatch(name))


def load_texts(
    spec: str | Path, field: str | None = None, split: str | None = None
) -> Iterator[str]:
    """Read texts from a file or a hub data set, one at a time.

    Args:
        spec: A `.jsonl` or `.parquet` file, any other text file (split at blank lines), or a hub
            data set as `id` or `id:configuration` (needs package datasets).
        field: The field that holds the text; by default "text", else "0", else the only one of
            type string. Plain text files have none.
        split: The hub data set's split, "train" by default.

    Returns:
        An iterator of texts.

    Raises:
        SourceError: The file does not exist or cannot be read, or the field is not there.
        MissingExtraError: Package pyarrow or datasets is needed and absent.
    """
    name = str(spec)
    path = Path(name).expanduser()
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in (".jsonl", ".ndjson"):
            return texts_of(json_records(path), field, name)
        if suffix == ".parquet":
            return texts_of(parquet_records(path), field, name)
        return read_paragraphs(path)
    if path.is_dir():
        raise SourceError(f"{name!r} is a folder; name one text, .jsonl or .parquet file in it")
    if name == SELF:
        raise SourceError("'self' is text that a model generates: call generate_texts")
    hub_id, _, configuration = name.partition(":")
    if name.endswith(_TEXT_SUFFIXES) or not is_hub_id(hub_id, _TEXT_SUFFIXES):
        raise SourceError(
            f"there is no file {name!r}; give a text, .jsonl or .parquet file, or a hub data set"
        )
    return texts_of(hub_records(hub_id, configuration or None, split), field, name)


def token_batches(
    tokenizer: Any,
    texts: Iterable[str],
    num_tokens: int,
    sequence_length: int = 512,
    batch_size: int = 8,
    fewest: int | None = None,
) -> list[Tensor]:
    """Cut texts into full rows of tokens.

    The texts, joined by a blank line, form one stream, so a smaller `num_tokens` gives the first
    rows of a larger one. Each row begins with the BOS token if the tokenizer adds one by itself.

    Args:
        tokenizer: A transformers tokenizer.
        texts: The texts; only as many are read as are needed.
        num_tokens: Tokens wanted; rounded down to whole rows.
        sequence_length: Tokens in a row, BOS included.
        batch_size: Rows in a batch; the last may have fewer.
        fewest: Tokens that will do where the texts hold no more; `num_tokens` if not given.

    Returns:
        Batches of token ids [batch, sequence_length], int64.

    Raises:
        ArgumentError: A number is too small, or `num_tokens` is less than one row.
        SourceError: The texts hold fewer tokens than that.
    """
    prefix = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    check_at_least(len(prefix) + 2, sequence_length=sequence_length)
    check_at_least(1, batch_size=batch_size)
    num_rows = num_tokens // sequence_length
    if num_rows < 1:
        raise ArgumentError(f"expected num_tokens >= {sequence_length}, one row, got {num_tokens}")
    row_tokens = sequence_length - len(prefix)
    needed, least = num_rows * row_tokens, num_rows
    if fewest is not None:
        least = min(num_rows, max(1, fewest // sequence_length))
    stream: list[int] = []
    for block in _blocks(texts):
        stream += tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
        if len(stream) >= needed:
            break
    if len(stream) < least * row_tokens:
        whole = len(stream) // row_tokens * sequence_length
        advice = f"give more text, or ask for {whole}" if whole else "give more text"
        raise SourceError(
            f"expected {least * row_tokens} tokens of text for {least} rows of {sequence_length}, "
            f"got {len(stream)}: {advice}"
        )
    num_rows = min(num_rows, len(stream) // row_tokens)
    rows = torch.tensor(stream[: num_rows * row_tokens], dtype=torch.int64)
    rows = rows.view(num_rows, row_tokens)
    if prefix:
        rows = torch.cat([torch.full((num_rows, 1), prefix[0]), rows], dim=1)
    return list(rows.split(batch_size))


def first_rows(batches: Sequence[Tensor], num_rows: int) -> list[Tensor]:
    """Return the batches of the first rows of a text.

    Args:
        batches: As `token_batches` returns them.
        num_rows: Rows to keep.
    """
    found: list[Tensor] = []
    for batch in batches:
        if num_rows > 0:
            found.append(batch[:num_rows])
        num_rows -= len(batch)
    return found


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer begins a text with the BOS token by itself."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer("a")["input_ids"][:1] == [bos] and plain[:1] != [bos]


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    """Join texts by blank lines into blocks whose borders do not depend on what is needed."""
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= _BLOCK_CHARACTERS:
            yield _SEPARATOR.join([*block, ""])
            block, size = [], 0
    if any(block):
        yield _SEPARATOR.join(block)
