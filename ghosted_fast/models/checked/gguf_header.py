"""What a GGUF file says of itself: its settings and where its tensors are, and whether it is whole.

Source: the format's description, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ghosted_fast.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS |= {12: "d"}
_STRING, _ARRAY = 8, 9
# Numbers of a block and its bytes, by the number of the type.
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8),
    28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip
_MOST_DIMENSIONS = 4
_MOST_NAMED = 1 << 20
_LONGEST_KEY = 1 << 16


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself.

    Attributes:
        settings: Its key-value pairs, but arrays and long strings.
        shapes: The shape of each tensor, as the file has it (fastest first).
        bytes_needed: How long the file has to be for its tensors; those of unknown types count
            nothing.
    """

    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    bytes_needed: int

    def of_family(self, name: str) -> Any:
        """Return a setting of the file's architecture, None if it has none."""
        return self.settings.get(f"{self.settings.get('general.architecture')}.{name}")


def read_gguf_header(path: Path) -> GgufHeader:
    """Read what a GGUF file says of itself, and check that it is whole.

    Raises:
        CheckpointError: It is no GGUF file, or damaged, or shorter than its tensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            header = _Reader(file, size).header()
        except (struct.error, ValueError, OverflowError, MemoryError, RecursionError) as error:
            raise CheckpointError(
                f"expected a whole GGUF file in {str(path)!r}, got one whose beginning is damaged "
                f"({error}): copy or download it again"
            ) from error
    if header.bytes_needed > size:
        raise CheckpointError(
            f"expected {header.bytes_needed} bytes in {str(path)!r}, got {size}: the file is "
            "incomplete, copy or download it again"
        )
    return header


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def header(self) -> GgufHeader:
        if self._file.read(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version, tensors, pairs = self._unpack("<IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, known are 2 and 3")
        if max(tensors, pairs) > _MOST_NAMED:
            raise ValueError(f"{tensors} tensors and {pairs} settings")
        settings = dict(self._pair() for _ in range(pairs))
        found: dict[str, tuple[int, ...]] = {}
        end = 0
        for _ in range(tensors):
            name = self._string()
            (count,) = self._unpack("<I")
            if count > _MOST_DIMENSIONS:
                raise ValueError(f"tensor {name!r} has {count} dimensions")
            shape = self._unpack(f"<{count}Q")
            kind, offset = self._unpack("<IQ")
            if name in found:
                raise ValueError(f"tensor {name!r} is there twice")
            found[name] = tuple(shape)
            numbers, block = _BLOCKS.get(kind, (1, 0))
            end = max(end, offset + math.prod(shape) // numbers * block)
        alignment = settings.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"an alignment of {alignment!r}")
        start = -(-self._file.tell() // alignment) * alignment
        return GgufHeader(settings, found, start + end)

    def _pair(self) -> tuple[str, Any]:
        name = self._string()
        (kind,) = self._unpack("<I")
        return name, self._value(kind)

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._unpack(f"<{_NUMBERS[kind]}")[0]
        if kind == _STRING:
            (length,) = self._unpack("<Q")
            return self._skip(length) if length > _LONGEST_KEY else self._text(length)
        if kind != _ARRAY:
            raise ValueError(f"a setting of the unknown type {kind}")
        inner, count = self._unpack("<IQ")
        if inner in _NUMBERS:
            return self._skip(count * struct.calcsize(f"<{_NUMBERS[inner]}"))
        if count > self._size:
            raise ValueError(f"a list of {count} entries")
        for _ in range(count):
            if inner == _STRING:
                self._skip(self._unpack("<Q")[0])
            else:
                self._value(inner)
        return None

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        if length > _LONGEST_KEY:
            raise ValueError(f"a name of {length} bytes")
        return self._text(length)

    def _text(self, length: int) -> str:
        return self._bytes(length).decode("utf-8", "replace")

    def _unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))

    def _bytes(self, count: int) -> bytes:
        found = self._file.read(count)
        if len(found) != count:
            raise ValueError("it ends there")
        return found

    def _skip(self, count: int) -> None:
        if self._file.tell() + count > self._size:
            raise ValueError("it ends there")
        self._file.seek(count, 1)
