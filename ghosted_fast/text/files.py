"""Files of text as people have them: folders, compression, encodings, and what is no text."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ghosted_fast.errors import MissingExtraError, SourceError

# How a name ends, and what the file is read as.
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_OPENERS: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
# What is no text, by how its bytes begin: its name, and what to do with it.
_EXTRACT = "take the text out of it (pandoc, or 'save as plain text') and give that"
_OTHERS: dict[bytes, tuple[str, str]] = {
    b"%PDF": ("a PDF document", "take the text out of it (pdftotext) and give that"),
    b"PK\x03\x04": ("a .docx, .zip or the like", _EXTRACT),
    b"\xd0\xcf\x11\xe0": ("an old Office document", _EXTRACT),
    b"{\\rtf": ("an RTF document", _EXTRACT),
    b"GGUF": ("a model in GGUF", "give it as the model, and a text as the text"),
    b"SQLite format 3": ("a SQLite database", "write its text into a .jsonl file"),
    b"\x89HDF": ("an HDF5 file", "write its text into a .jsonl file"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it and give what is in it"),
    b"Rar!": ("a RAR archive", "unpack it and give what is in it"),
}
_ENCODINGS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_LOOKED_AT = 4096
# Characters of what another library says that go into an error.
_LONGEST_LINE = 240
# Files that stand beside texts and hold none.
_BESIDE = ("readme", "license", "licence", "dataset_info", "dataset_dict", "state.json")


def kind_of(path: Path) -> str:
    """Return what a file is read as, by its name: "text" unless it names another kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return KINDS.get(suffixes[-1], "text") if suffixes else "text"


def files_in(folder: Path) -> list[Path]:
    """Return the files of text in a folder and its folders, by name.

    Raises:
        SourceError: There is none, they are of several kinds, or the folder is a model's.
    """
    if (folder / "config.json").is_file():
        raise SourceError(
            f"expected texts in {str(folder)!r}, got a model's folder (it holds config.json): name "
            "a text"
        )
    named = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_named(path)]
    files = [path for path in named if not path.relative_to(folder).as_posix().startswith(".")]
    kinds = Counter(kind_of(path) for path in files)
    if not kinds:
        raise SourceError(
            f"{str(folder)!r} is a folder, expected to hold files of text ({', '.join(KINDS)}), "
            "got none: name a folder that holds some, or one file"
        )
    if len(kinds) > 1:
        held = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
        raise SourceError(
            f"expected files of one kind in {str(folder)!r}, got {held}: name one file, or move "
            "the others out"
        )
    return files


def _is_named(path: Path) -> bool:
    name = path.name.lower()
    stem = name.removesuffix(path.suffix.lower()) if name.endswith(COMPRESSED) else name
    return stem.endswith(tuple(KINDS)) and not name.startswith((".", "_", *_BESIDE))


def check_text(path: Path) -> None:
    """Raise, by its first bytes, if a file is no text.

    Raises:
        SourceError: It is a document, an archive, a model, or binary; the message names it.
        MissingExtraError: It is compressed in a way that needs a package.
    """
    if kind_of(path) in ("parquet", "arrow"):
        return
    with reading(path), _open_bytes(path) as file:
        head = file.read(_LOOKED_AT)
    encoded = any(head.startswith(mark) for mark in _ENCODINGS)
    for magic, (name, advice) in _OTHERS.items():
        if head.startswith(magic):
            raise SourceError(f"expected text in {str(path)!r}, got {name}: {advice}")
    if b"\x00" in head and not encoded:
        raise SourceError(
            f"expected text in {str(path)!r}, got a binary file: give a .txt, .jsonl, .csv or "
            ".parquet file"
        )


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a file of text, compressed or not, as UTF-8, or as UTF-16 if it is marked so.

    Lines end as they do in the file.

    Raises:
        SourceError: It cannot be read: no such encoding, damaged, or no permission.
    """
    check_text(path)
    with reading(path), _open_bytes(path) as file:
        head = file.read(4)
        encoding = next((e for mark, e in _ENCODINGS.items() if head.startswith(mark)), "utf-8")
        file.seek(0)
        with io.TextIOWrapper(file, encoding=encoding, newline="") as text:
            yield text


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into the library's errors.

    Raises:
        SourceError: It cannot be read; the message names it.
    """
    name = repr(str(path))
    try:
        yield
    except UnicodeError as error:
        raise SourceError(
            f"{name} is not UTF-8 text: expected UTF-8, got {error}; convert it first (iconv -f "
            "WINDOWS-1252 -t UTF-8)"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise SourceError(
            f"expected {name} to unpack, got {first_line(error)}: the file is damaged or "
            "incomplete, copy it again"
        ) from error
    except OSError as error:
        raise SourceError(
            f"expected to read {name}, got {error.strerror or first_line(error)}: check the file "
            "and your rights to it"
        ) from error


def _open_bytes(path: Path) -> Any:
    """Open a file's bytes, unpacked where they are compressed."""
    with path.open("rb") as file:
        head = file.read(6)
    for magic, opener in _OPENERS.items():
        if head.startswith(magic):
            return opener(path, "rb")
    return _open_zstd(path) if head.startswith(_ZSTD_MAGIC) else path.open("rb")


def _open_zstd(path: Path) -> Any:
    try:
        return _Rewound(path, importlib.import_module("compression.zstd").open)
    except ImportError:
        pass
    try:
        return _Rewound(path, importlib.import_module("zstandard").open)
    except ImportError:
        pass
    try:
        pyarrow = importlib.import_module("pyarrow")
    except ImportError as error:
        raise MissingExtraError(
            f"{str(path)!r} is compressed with zstd, which needs pyarrow: "
            "pip install 'ghosted_fast[data]'"
        ) from error
    return _Rewound(path, lambda name, mode: pyarrow.input_stream(str(name), compression="zstd"))


class _Rewound(io.RawIOBase):
    """A stream that cannot go back, opened anew where it is asked to."""

    def __init__(self, path: Path, opener: Any) -> None:
        self._path, self._opener = path, opener
        self._stream = opener(path, "rb")

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that text cannot be sought in."""
        return False

    def seek(self, offset: int, whence: int = 0) -> int:
        """Begin anew."""
        assert offset == whence == 0
        self._stream.close()
        self._stream = self._opener(self._path, "rb")
        return 0

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with what is next."""
        try:
            found = self._stream.read(len(buffer))
        except Exception as error:  # three packages, each with its own
            raise EOFError(first_line(error)) from error
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()
        super().close()


def first_line(error: BaseException) -> str:
    """Return what an error says, without the pages and the long lists that some libraries add."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines[0]) <= _LONGEST_LINE else f"{lines[0][:_LONGEST_LINE]}..."


def is_readable_name(name: str) -> bool:
    """Return whether every library can open a file of a name: it is UTF-8, without a NUL."""
    try:
        return b"\x00" not in name.encode()
    except UnicodeEncodeError:
        return False
