"""Texts out of files and records, read one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ghosted_fast.errors import SourceError
from ghosted_fast.text.chat import ChatWriter, is_chat, messages_of
from ghosted_fast.text.files import open_text
from ghosted_fast.text.records import Record

# Longer texts come in pieces, so that neither memory nor a tokenizer's time grows with them.
LONGEST_TEXT = 1 << 20
# How far from the end of a piece it is cut at a space, if there is one.
_SPACE_WITHIN = 1 << 12
_USUAL = ("text", "0", "content")


def read_paragraphs(path: Path) -> Iterator[str]:
    """Read a text file, split at blank lines; of one that is long, a piece at a time.

    Raises:
        SourceError: The file is not UTF-8.
    """
    lines: list[str] = []
    size = 0
    with open_text(path) as file:
        while line := file.readline(LONGEST_TEXT):
            line = line.replace("\r\n", "\n").replace("\r", "\n")
            if line.strip():
                lines.append(line)
                size += len(line)
            if lines and (not line.strip() or size >= LONGEST_TEXT):
                yield "".join(lines).strip("\n")
                lines, size = [], 0
    if lines:
        yield "".join(lines).strip("\n")


def in_pieces(texts: Iterable[str], longest: int = LONGEST_TEXT) -> Iterator[str]:
    """Cut texts that are long into pieces, at spaces where there are some; leave the others."""
    for text in texts:
        start = 0
        while len(text) - start > longest:
            stop = start + longest
            near = max(start + 1, stop - _SPACE_WITHIN)
            space = max(text.rfind(mark, near, stop) for mark in " \n")
            stop = space + 1 if space > 0 else stop
            yield text[start:stop]
            start = stop
        yield text[start:] if start else text


def texts_of(
    records: Iterable[Record], field: str | None, name: str, tokenizer: Any = None
) -> Iterator[str]:
    """Take the text out of records.

    Args:
        records: The records.
        field: The field that holds the text, or the conversation; by default "text", else what
            looks like a conversation, else "0", else "content", else the only one of type string
            in the first record.
        name: Of the source, for messages.
        tokenizer: What has the chat template; None where there is none.

    Raises:
        SourceError: The field is not clear, or a record has no text in it.
    """
    writer = ChatWriter(tokenizer, name)
    chats: bool | None = None
    for number, record in enumerate(records, 1):
        if isinstance(record, str):
            yield record
            continue
        if chats is None:
            chats = _is_conversation(record, field)
            if not chats and field is None:
                field = _text_field(record, name)
        if chats:
            yield writer.text_of(_conversation(record, field, number, name), number)
            continue
        assert field is not None
        if not isinstance(record.get(field), str):
            raise SourceError(
                f"record {number} of {name!r} has no text in field {field!r}; "
                f"its fields are {_fields(record)}: expected a string there, got "
                f"{type(record.get(field)).__name__}; name another (--field), or leave the record "
                "out"
            )
        yield record[field]


def _is_conversation(record: Mapping[str, Any], field: str | None) -> bool:
    if field is not None:
        return is_chat(record, field)
    return not isinstance(record.get("text"), str) and is_chat(record)


def _conversation(
    record: Mapping[str, Any], field: str | None, number: int, name: str
) -> list[dict[str, str]]:
    try:
        if not is_chat(record, field):
            raise ValueError(f"the fields are {_fields(record)}")
        return messages_of(record, field)
    except ValueError as error:
        raise SourceError(
            f"record {number} of {name!r} has no conversation as the first has: expected messages "
            f"with role and content, got a record where {error}; correct it or leave it out"
        ) from error


def _text_field(record: Mapping[str, Any], name: str) -> str:
    strings = [key for key, value in record.items() if isinstance(value, str)]
    for usual in _USUAL:
        if usual in strings:
            return usual
    if len(strings) == 1:
        return strings[0]
    raise SourceError(
        f"which field of {name!r} holds the text? its fields are {_fields(record)}; name one "
        f"(--field): expected one field with a string, got {len(strings)}"
    )


def _fields(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} ({type(value).__name__})" for key, value in record.items()) or "none"
