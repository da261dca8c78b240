"""Records out of files and hub data sets, read one at a time.

A record is a mapping of names to values, or a text alone.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ghosted_fast.errors import MissingExtraError, SourceError
from ghosted_fast.text.files import first_line, open_text

Record = Mapping[str, Any] | str
# A record is held in memory while it is read, so that a file in which none ends does not fill it.
_LONGEST = 1 << 30
_CHUNK = 1 << 20
_LONGEST_TOKEN = 1 << 12  # of JSON, but for strings
# A file of JSON may be one object around the list of records.
_AROUND = ("data", "train", "rows", "records", "examples", "texts")
_DELIMITERS = (",", "\t", ";", "|")


def read_records(path: Path, kind: str) -> Iterator[Record]:
    """Read the records of a file of a kind; see `ghosted_fast.text.files.KINDS`.

    Raises:
        SourceError: The file is damaged, or not what it is called; the message names the place.
        MissingExtraError: Package pyarrow is needed and absent.
    """
    readers: dict[str, Callable[[Path], Iterator[Record]]] = {
        "jsonl": _json_lines,
        "json": _json_list,
        "csv": _csv_rows,
        "parquet": _parquet_rows,
        "arrow": _arrow_rows,
    }
    return readers[kind](path)


def _json_lines(path: Path) -> Iterator[Record]:
    with open_text(path) as file:
        for number, line in enumerate(_lines(file, path), 1):
            if line.strip():
                yield _checked(_decoded(line, f"line {number}", path), f"line {number}", path)


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    while line := file.readline(_LONGEST):
        if len(line) == _LONGEST:
            raise _too_long(path)
        yield line


def _too_long(path: Path) -> SourceError:
    return SourceError(
        f"expected records of less than {_LONGEST >> 20} million characters in {str(path)!r}, got "
        "one that is longer: split it, or give a plain text file"
    )


def _decoded(text: str, place: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{place} of {str(path)!r} is not JSON: expected one object, got {first_line(error)}; "
            "correct it or leave it out"
        ) from error


def _checked(value: Any, place: str, path: Path) -> Record:
    if isinstance(value, dict | str):
        return value
    raise SourceError(
        f"{place} of {str(path)!r} must be a JSON object; got {type(value).__name__}, expected "
        '{"text": ...}: write it so'
    )


def _json_list(path: Path) -> Iterator[Record]:
    """Read a file of one list of records, or of one object around it; lines of JSON too."""
    with open_text(path) as file:
        values = _Values(file, path)
        first = values.begins()
        if first != "[":
            yield from _json_objects(values, path)
            return
        values.skip("[")
        for number in itertools.count(1):
            if values.begins() == "]":
                break
            yield _checked(values.next(number), f"record {number}", path)
            if values.begins() == ",":
                values.skip(",")
            elif values.begins() != "]":
                raise values.broken(number, "no ',' or ']' behind it")
        values.skip("]")
        if values.begins():
            raise values.broken(number, "something behind the end of the list")


def _json_objects(values: _Values, path: Path) -> Iterator[Record]:
    """Read objects one after another; a single one may hold the list."""
    number = 0
    held: Any = None
    while values.begins():
        number += 1
        value = values.next(number)
        if number == 1:
            held = value
            continue
        if number == 2:
            yield _checked(held, "record 1", path)
        yield _checked(value, f"record {number}", path)
    if number != 1:
        return
    lists = [] if not isinstance(held, dict) else [held[n] for n in _AROUND if _is_list(held, n)]
    if len(lists) == 1:
        for index, value in enumerate(lists[0], 1):
            yield _checked(value, f"record {index}", path)
        return
    yield _checked(held, "record 1", path)


def _is_list(held: dict[str, Any], name: str) -> bool:
    value = held.get(name)
    return isinstance(value, list) and all(isinstance(item, dict | str) for item in value[:1])


class _Values:
    """JSON values out of a file, of which no more is held than one of them."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0

    def begins(self) -> str:
        """Return the next character that is no space, "" at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def skip(self, character: str) -> None:
        """Go behind a character, which is the next."""
        assert self.begins() == character
        self._at += 1

    def next(self, number: int) -> Any:
        """Return the next value, whose number is for messages."""
        self.begins()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # A number at the end of what was read may go on.
                if end < len(self._text) or not self._more():
                    self._at = end
                    return value
            except (ValueError, RecursionError) as error:
                if not self._may_go_on(error) or not self._more():
                    raise self.broken(number, first_line(error)) from error

    def _may_go_on(self, error: Exception) -> bool:
        """Return whether a value may be whole once more of the file is there."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        is_string = error.msg.startswith("Unterminated string")
        return is_string or len(self._text) - error.pos < _LONGEST_TOKEN

    def broken(self, number: int, why: str) -> SourceError:
        """Return the error for a value that is not JSON."""
        return SourceError(
            f"record {number} of {str(self._path)!r} is not JSON: expected a list of objects, or "
            f"an object a line, got {why}; correct it"
        )

    def _more(self) -> bool:
        """Read on, twice as far each time a value does not end; return whether there was more."""
        self._text, self._at = self._text[self._at :], 0
        if len(self._text) > _LONGEST:
            raise _too_long(self._path)
        found = self._file.read(max(_CHUNK, len(self._text)))
        self._text += found
        return bool(found)


def _csv_rows(path: Path) -> Iterator[Record]:
    with open_text(path) as file:
        head = file.readline(_CHUNK)
        delimiter = max(_DELIMITERS, key=head.count)
        lines = _chained(head, file)
        rows = csv.reader(lines, delimiter=delimiter, strict=delimiter != "\t")
        names = next(_rows(rows, path), [])
        for row in _rows(rows, path):
            if len(row) > len(names):
                raise SourceError(
                    f"expected {len(names)} values, as in the first line, in line "
                    f"{rows.line_num} of {str(path)!r}, got {len(row)}: put texts that hold "
                    f"{delimiter!r} in quotes"
                )
            if row:
                yield dict(zip(names, row, strict=False))


def _chained(head: str, file: TextIO) -> Iterator[str]:
    yield head
    while line := file.readline(_LONGEST):
        yield line


def _rows(rows: Any, path: Path) -> Iterator[list[str]]:
    while True:
        try:
            with _long_fields():
                row = next(rows, None)
        except csv.Error as error:
            raise SourceError(
                f"line {rows.line_num} of {str(path)!r} is not CSV: expected values in quotes "
                f"where they hold commas, quotes or ends of lines, got {first_line(error)}; "
                "correct it"
            ) from error
        if row is None:
            return
        yield row


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let fields be long while a row is read: the limit is the module's own, for all."""
    limit = csv.field_size_limit(_LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _parquet_rows(path: Path) -> Iterator[Record]:
    pyarrow = _pyarrow(path)
    with _arrow_errors(pyarrow, path, "parquet"), pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


def _arrow_rows(path: Path) -> Iterator[Record]:
    pyarrow = _pyarrow(path)
    with _arrow_errors(pyarrow, path, "arrow"), pyarrow.OSFile(str(path)) as file:
        try:
            batches = iter(pyarrow.ipc.open_stream(file))
        except pyarrow.ArrowInvalid:
            opened = pyarrow.ipc.open_file(file)
            batches = map(opened.get_batch, range(opened.num_record_batches))
        for batch in batches:
            for start in range(0, batch.num_rows, 256):
                yield from batch.slice(start, 256).to_pylist()


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(
            f"a {path.suffix} file needs pyarrow: pip install 'ghosted_fast[data]'"
        ) from error
    return pyarrow


@contextmanager
def _arrow_errors(pyarrow: Any, path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(
            f"cannot read {str(path)!r} as {kind}: expected a whole {kind} file, got "
            f"{first_line(error)}; copy it again"
        ) from error


def hub_records(hub_id: str, configuration: str | None, split: str | None) -> Iterator[Record]:
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
    except Exception as error:  # the hub, the network, pandas, pyarrow and the data set's own
        raise SourceError(
            f"cannot load the data set {hub_id!r}: {first_line(error)}; expected a text file, or a "
            "data set of the hub: check the name and the network"
        ) from error
