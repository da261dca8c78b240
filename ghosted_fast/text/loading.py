"""Models and texts by name: hub ids, folders and files become a model and batches of tokens."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError, SourceError, check_at_least
from ghosted_fast.text.bos import adds_bos
from ghosted_fast.text.files import COMPRESSED, KINDS, check_text, files_in, first_line, kind_of
from ghosted_fast.text.readers import LONGEST_TEXT, in_pieces, read_paragraphs, texts_of
from ghosted_fast.text.records import Record, hub_records, read_records

_LOGGER = logging.getLogger(__name__)
SELF = "self"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TEXT_SUFFIXES = (*KINDS, *COMPRESSED)
_SEPARATOR = "\n\n"
# Long enough that a tokenizer works at full speed and that few words are cut at a block's end.
_BLOCK_CHARACTERS = 1 << 20
# Of tokenizers in Python, whose time grows with the square of what they are given at once.
_SLOW_CHARACTERS = 1 << 12


def is_hub_id(name: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a name can be one on the hub: it looks like no path and ends like no file."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return not looks_like_path and not name.endswith(suffixes) and bool(_HUB_ID.fullmatch(name))


def load_texts(
    spec: str | Path, field: str | None = None, split: str | None = None, tokenizer: Any = None
) -> Iterator[str]:
    """Read texts from files or a hub data set, one at a time.

    Args:
        spec: A `.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet` or `.arrow` file of records, any other
            text file (split at blank lines), each also compressed (`.gz`, `.zst`, `.bz2`, `.xz`); a
            folder of such files of one kind; or a hub data set as `id` or `id:configuration` (needs
            package datasets).
        field: The field that holds the text or the conversation; by default "text", else what looks
            like a conversation (`messages`, `conversations`, `prompt` and `completion`, ...), else
            "0", else "content", else the only one of type string. Plain text files have none.
        split: The hub data set's split, "train" by default.
        tokenizer: The tokenizer whose chat template makes texts of conversations.

    Returns:
        An iterator of texts. What is longer than a million characters comes in pieces.

    Raises:
        SourceError: The file does not exist, is no text or cannot be read, or the field is not
            there.
        MissingExtraError: Package pyarrow or datasets is needed and absent.
    """
    name = str(spec)
    path = Path(name).expanduser()
    if path.is_file():
        check_text(path)
        return _texts_in(path, field, tokenizer)
    if path.is_dir():
        files = files_in(path)
        return chain.from_iterable(load_texts(file, field, split, tokenizer) for file in files)
    if path.exists():
        raise SourceError(
            f"expected a file or a folder of text, got {name!r}, which is neither: write what it "
            "gives into a file first"
        )
    if name == SELF:
        raise SourceError("'self' is text that a model generates: call generate_texts")
    hub_id, _, configuration = name.partition(":")
    if name.lower().endswith(_TEXT_SUFFIXES) or not is_hub_id(hub_id, _TEXT_SUFFIXES):
        raise SourceError(
            f"there is no file {name!r}: expected a file or a folder of text, or a hub data set, "
            "got a name of none; check the path"
        )
    records = hub_records(hub_id, configuration or None, split)
    return in_pieces(texts_of(records, field, name, tokenizer))


def _texts_in(path: Path, field: str | None, tokenizer: Any) -> Iterator[str]:
    kind = kind_of(path)
    if kind == "text":
        return read_paragraphs(path)
    records: Iterator[Record] = read_records(path, kind)
    return in_pieces(texts_of(records, field, str(path), tokenizer))


def check_texts(spec: str | Path, field: str | None = None, split: str | None = None) -> None:
    """Raise, before any model is loaded, unless a text of a name begins as texts do.

    Of files the first record is read, of a hub data set nothing.

    Args:
        spec: See `load_texts`.
        field: See there.
        split: See there.

    Raises:
        SourceError: There is no such text, it is empty, or its first record holds none.
        MissingExtraError: A package is needed and absent.
    """
    path = Path(str(spec)).expanduser()
    texts = load_texts(spec, field, split, tokenizer=_AnyTemplate())
    if path.exists() and not any(text.strip() for text in texts):
        raise SourceError(f"expected text in {str(spec)!r}, got none: give a file that holds some")


class _AnyTemplate:
    """Stands for a tokenizer where it matters only whether there is a conversation."""

    chat_template, bos_token = "any", None

    def apply_chat_template(self, messages: Any, tokenize: bool) -> str:
        """Return the messages as they are."""
        return str(messages)


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
    Texts of more than a million characters (4096 for tokenizers in Python) are taken in pieces.

    Args:
        tokenizer: A transformers tokenizer.
        texts: The texts; only as many are read as are needed.
        num_tokens: Tokens wanted; rounded down to whole rows.
        sequence_length: Tokens in a row, BOS included.
        batch_size: Rows in a batch; the last may have fewer.
        fewest: Tokens that will do where the texts hold no more, with a warning; `num_tokens` if
            not given.

    Returns:
        Batches of token ids [batch, sequence_length], int64.

    Raises:
        ArgumentError: A number is too small, or `num_tokens` is less than one row.
        SourceError: The texts hold fewer tokens than that.
    """
    num_rows, least = wanted_rows(tokenizer, num_tokens, sequence_length, batch_size, fewest)
    rows, found = cut_rows(tokenizer, texts, num_rows, sequence_length)
    if len(rows) < least:
        whole = len(rows) * sequence_length
        advice = f"give more text, or ask for {whole}" if whole else "give more text"
        needed = least * (sequence_length - adds_bos(tokenizer))
        raise SourceError(
            f"expected {needed} tokens of text for {least} rows of {sequence_length}, "
            f"got {found}: {advice}"
        )
    if len(rows) < num_rows:
        _LOGGER.warning(
            "the text holds %d of the %d tokens that were asked for: all of it is used",
            len(rows) * sequence_length,
            num_tokens,
        )
    return list(rows.split(batch_size))


def wanted_rows(
    tokenizer: Any, num_tokens: int, sequence_length: int, batch_size: int, fewest: int | None
) -> tuple[int, int]:
    """Return how many rows are wanted, and how many will do; see `token_batches`.

    Raises:
        ArgumentError: A number is too small, or `num_tokens` is less than one row.
    """
    check_at_least(2 + adds_bos(tokenizer), sequence_length=sequence_length)
    check_at_least(1, batch_size=batch_size)
    num_rows = num_tokens // sequence_length
    if num_rows < 1:
        raise ArgumentError(f"expected num_tokens >= {sequence_length}, one row, got {num_tokens}")
    if fewest is None:
        return num_rows, num_rows
    return num_rows, min(num_rows, max(1, fewest // sequence_length))


def cut_rows(
    tokenizer: Any, texts: Iterable[str], num_rows: int, sequence_length: int
) -> tuple[Tensor, int]:
    """Cut texts into full rows of tokens; see `token_batches`.

    Args:
        tokenizer: A transformers tokenizer.
        texts: The texts; only as many are read as are needed.
        num_rows: Rows wanted.
        sequence_length: Tokens in a row, BOS included.

    Returns:
        The rows [at most num_rows, sequence_length], int64, and the tokens of what was read.

    Raises:
        SourceError: The tokenizer does not take a text.
    """
    prefix = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    row_tokens = sequence_length - len(prefix)
    stream: list[int] = []
    slow = not getattr(tokenizer, "is_fast", True)
    longest, characters = (
        (_SLOW_CHARACTERS, _SLOW_CHARACTERS) if slow else (LONGEST_TEXT, _BLOCK_CHARACTERS)
    )
    for block in _blocks(in_pieces(texts, longest), characters):
        stream += _tokens_of(tokenizer, block)
        if len(stream) >= num_rows * row_tokens:
            break
    num_rows = min(num_rows, len(stream) // row_tokens)
    rows = torch.tensor(stream[: num_rows * row_tokens], dtype=torch.int64)
    rows = rows.view(num_rows, row_tokens)
    if prefix:
        rows = torch.cat([torch.full((num_rows, 1), prefix[0]), rows], dim=1)
    return rows, len(stream)


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


def _tokens_of(tokenizer: Any, block: str) -> list[int]:
    """Return the tokens of a text, in which halves of surrogates become replacement characters.

    Raises:
        SourceError: The tokenizer cannot take it.
    """
    try:
        block.encode()
    except UnicodeEncodeError:
        block = block.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    try:
        tokens: list[int] = tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # pyo3's, sentencepiece's, and those of code of its own
        raise SourceError(
            f"expected text that the tokenizer takes, got {first_line(error)} at "
            f"{block[:40]!r}: leave that text out, or load the tokenizer anew"
        ) from error
    return tokens


def _blocks(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Join texts by blank lines into blocks whose borders do not depend on what is needed."""
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= characters:
            yield _SEPARATOR.join([*block, ""])
            block, size = [], 0
    if any(block):
        yield _SEPARATOR.join(block)
