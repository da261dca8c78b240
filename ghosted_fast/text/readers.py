"""Records of text out of files and hub data sets, read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ghosted_fast.errors import MissingExtraError, SourceError


def first_line(error: Exception) -> str:
    """Return what an error says, without the pages that some libraries add."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def read_paragraphs(path: Path) -> Iterator[str]:
    """Read a text file, split at blank lines.

    Raises:
        SourceError: The file is not UTF-8.
    """
    lines: list[str] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    lines.append(line)
                elif lines:
                    yield "".join(lines).strip("\n")
                    lines = []
    except UnicodeDecodeError as error:
        raise SourceError(f"{str(path)!r} is not UTF-8 text: {error}") from error
    if lines:
        yield "".join(lines).strip("\n")


def json_records(path: Path) -> Iterator[Mapping[str, Any]]:
    """Read a file of one JSON object a line.

    Raises:
        SourceError: A line is not a JSON object; the message names the line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise SourceError(f"line {number} of {str(path)!r} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise SourceError(
                    f"line {number} of {str(path)!r} must be a JSON object; "
                    f"got {type(record).__name__}"
                )
            yield record


def parquet_records(path: Path) -> Iterator[Mapping[str, Any]]:
    """Read a parquet file.

    Raises:
        SourceError: The file is not parquet.
        MissingExtraError: Package pyarrow is absent.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtraError(
            "a .parquet file needs pyarrow: pip install 'ghosted_fast[data]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise SourceError(f"cannot read {str(path)!r} as parquet: {first_line(error)}") from error


def hub_records(
    hub_id: str, configuration: str | None, split: str | None
) -> Iterator[Mapping[str, Any]]:
    """Stream a hub data set.

    Raises:
        SourceError: There is no such data set, or it cannot be reached.
        MissingExtraError: Package datasets is absent.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"there is no file {hub_id!r}, and a hub data set needs datasets: "
            "pip install 'ghosted_fast[data]'"
        ) from error
    try:
        yield from datasets.load_dataset(
            hub_id, configuration, split=split or "train", streaming=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise SourceError(f"cannot load the data set {hub_id!r}: {first_line(error)}") from error


def texts_of(records: Iterator[Mapping[str, Any]], field: str | None, name: str) -> Iterator[str]:
    """Take the text out of records.

    Args:
        records: The records.
        field: The field that holds the text; by default "text", else "0", else the only one of
            type string in the first record.
        name: Of the source, for messages.

    Raises:
        SourceError: The field is not clear, or a record has no text in it.
    """
    for number, record in enumerate(records, 1):
        field = _text_field(record, name) if field is None else field
        if not isinstance(record.get(field), str):
            raise SourceError(
                f"record {number} of {name!r} has no text in field {field!r}; "
                f"its fields are {_fields(record)}"
            )
        yield record[field]


def _text_field(record: Mapping[str, Any], name: str) -> str:
    strings = [key for key, value in record.items() if isinstance(value, str)]
    for usual in ("text", "0"):
        if usual in strings:
            return usual
    if len(strings) == 1:
        return strings[0]
    raise SourceError(
        f"which field of {name!r} holds the text? its fields are {_fields(record)}; name one"
    )


def _fields(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} ({type(value).__name__})" for key, value in record.items()) or "none"
