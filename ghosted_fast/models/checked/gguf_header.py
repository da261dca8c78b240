"""What a GGUF file says of itself: its settings and where its tensors are, and whether it is whole.

Source: the format's description, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import importlib.util
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ghosted_fast.errors import CheckpointError, MissingExtraError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS |= {12: "d"}
_STRING, _ARRAY = 8, 9
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


def require_gguf() -> None:
    """Raise MissingExtraError unless the packages that read GGUF files are there."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"a GGUF model needs {' and '.join(missing)}: pip install 'ghosted_fast[gguf]'"
        )


def read_gguf_header(path: Path) -> GgufHeader:
    """Read what a GGUF file says of itself, and check that it is whole.

    Raises:
        CheckpointError: It is no GGUF file, or damaged, or shorter than its tensors.
        MissingExtraError: What GGUF files are read with is absent.
    """
    require_gguf()
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
        from gguf.constants import GGML_QUANT_SIZES

        # Numbers of a block and its bytes, by the number of the type.
        blocks = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
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
            numbers, block = blocks.get(kind, (1, 0))
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
