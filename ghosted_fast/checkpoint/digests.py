"""Digests of what a ghosted folder holds: a checksum of each tensor's bytes in its files.

They find what a disk or a copy has damaged. Ghosts are checked whenever a folder is loaded: they
are small. All tensors are checked where it is asked for, since that reads each of them once more.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.errors import CheckpointError

DIGESTS = "digests.json"
_LENGTH = struct.Struct("<Q")
_GHOST_NAMES = (".ghost.", ".input_ghost.")
_FLOATS = ("F32", "F16", "BF16")
_CHUNK = 1 << 24
_LONGEST_HEADER = 100 << 20


class _Entry(NamedTuple):
    """A tensor in a file: where its bytes are."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def write_digests(folder: Path) -> None:
    """Write the digests of all weights in a folder that was just saved."""
    digests = {name: _digest(entry) for name, entry in sorted(_entries(folder))}
    write_atomically(folder / DIGESTS, json.dumps(digests, indent=1) + "\n")


def check_digests(folder: Path, record: dict[str, Any] | None, every: bool = False) -> None:
    """Raise unless the weights of a ghosted folder are those that were saved.

    Args:
        folder: The folder.
        record: The `ghost` field of its configuration.
        every: Whether all weights are read, not those of ghosts alone.

    Raises:
        CheckpointError: A weight differs from what was saved, or has a dtype that it cannot have.
    """
    found = dict(_entries(folder))
    for name, entry in found.items():
        if _of_ghost(name):
            _check_dtype(folder, name, entry)
    if not (record or {}).get("digests"):
        if every:
            raise CheckpointError(
                f"expected digests of the weights in {str(folder)!r}, got a folder that was saved "
                "without: load it and save it again to add them"
            )
        return
    known = _known(folder)
    for name, entry in found.items():
        # What is missing or has no place, loading tells.
        if not (every or (_of_ghost(name) and name in known)):
            continue
        if known.get(name) != _digest(entry):
            raise CheckpointError(
                f"expected the bytes of {name} in {str(folder)!r} that were saved, got others: the "
                "file is damaged or was edited, copy or save the model again"
            )


def _known(folder: Path) -> dict[str, Any]:
    try:
        known = json.loads((folder / DIGESTS).read_bytes())
        if not isinstance(known, dict):
            raise ValueError(f"a {type(known).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"expected the digests of the weights in {str(folder / DIGESTS)!r}, got {error}: copy "
            "or save the model again"
        ) from error
    return known


def _check_dtype(folder: Path, name: str, entry: _Entry) -> None:
    """Raise unless a ghost's tensor has a dtype that ghosts have."""
    allowed: tuple[str, ...] = (*_FLOATS, "I8") if name.endswith("ghost.weight") else _FLOATS
    if name.endswith(".scale"):
        allowed = ("F32",)
    if entry.dtype not in allowed:
        raise CheckpointError(
            f"expected {name} in {str(folder)!r} in {' or '.join(allowed)}, got {entry.dtype}: the "
            "file was edited, save the model again"
        )


def _of_ghost(name: str) -> bool:
    return any(part in f".{name}" for part in _GHOST_NAMES)


def _digest(entry: _Entry) -> str:
    value = zlib.crc32(f"{entry.dtype}{list(entry.shape)}".encode())
    with entry.path.open("rb") as file:
        file.seek(entry.begin)
        left = entry.end - entry.begin
        while left > 0 and (chunk := file.read(min(left, _CHUNK))):
            value = zlib.crc32(chunk, value)
            left -= len(chunk)
    return f"{value:08x}"


def _entries(folder: Path) -> Iterator[tuple[str, _Entry]]:
    """Yield the tensors in a folder's files of weights; damaged files are for safetensors to tell.

    Raises:
        CheckpointError: A file's header is damaged.
    """
    for pattern in ("model.safetensors", "model-*-of-*.safetensors"):
        for path in sorted(folder.glob(pattern)):
            try:
                yield from _in_file(path)
            except (
                OSError,
                ValueError,
                KeyError,
                TypeError,
                RecursionError,
                struct.error,
            ) as error:
                raise CheckpointError(
                    f"expected a whole file of weights in {str(path)!r}, got one that is "
                    f"damaged or incomplete ({error}): copy or save the model again"
                ) from error


def _in_file(path: Path) -> Iterator[tuple[str, _Entry]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        if length > min(size, _LONGEST_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
    start = _LENGTH.size + length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (start + int(offset) for offset in entry["data_offsets"])
        if not start <= begin <= end <= size or math.prod(entry["shape"]) < 0:
            raise ValueError(f"{name} at bytes {begin} to {end} of {size}")
        yield name, _Entry(path, str(entry["dtype"]), tuple(entry["shape"]), begin, end)
