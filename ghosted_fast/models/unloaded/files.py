"""Tensors in files: where they are, read one at a time and never mapped; the safetensors format.

A safetensors file begins with the length of its header (8 bytes, little endian), then the header:
JSON that says of each tensor its dtype, its shape and its place in what follows.

Source: the safetensors format, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from ghosted_fast._atomic_files import atomic_file
from ghosted_fast.errors import CheckpointError

_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 64  # a cache line, as in `ghosted_fast.checkpoint.alignment`
_CHUNK = 1 << 24
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# What a damaged header ends in.
_DAMAGES = (
    struct.error,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    MemoryError,
    OverflowError,
    RecursionError,
)


class Piece(Protocol):
    """What a tensor in a file is made of."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""

    def chunks(self) -> Iterator[Any]:
        """Yield its bytes, a few megabytes at a time."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        path: The file.
        offset: Where the tensor begins, in bytes from the start of the file.
        shape: Its shape.
        dtype: Its dtype.
        strides: How many numbers lie between two neighbours along each axis, as torch has it; None
            where they lie one after the other.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None = None

    @property
    def code(self) -> str:
        """What files call its dtype."""
        return _CODES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_plain(self) -> bool:
        """Whether its numbers lie in the file as they are read, one after the other."""
        return self.strides is None

    @property
    def reading_bytes(self) -> int:
        """What reading it takes beside itself, in bytes."""
        return 0 if self.is_plain else self.span_bytes

    @property
    def span_bytes(self) -> int:
        """The bytes in the file from its first number to its last."""
        if self.strides is None or not self.nbytes:
            return self.nbytes
        steps = zip(self.shape, self.strides, strict=True)
        return (1 + sum((count - 1) * step for count, step in steps)) * self.dtype.itemsize

    def part(self, begin: int, count: int) -> StoredTensor:
        """Return `count` of the bytes of a plain one from byte `begin` on, as uint8 [count]."""
        return StoredTensor(self.path, self.offset + begin, (count,), torch.uint8)

    def read(self) -> Tensor:
        """Return the tensor, in memory of its own.

        Raises:
            CheckpointError: The file ends before it.
        """
        if self.strides is not None:
            numbers = self.span_bytes // self.dtype.itemsize
            span = StoredTensor(self.path, self.offset, (numbers,), self.dtype).read()
            return span.as_strided(self.shape, self.strides).contiguous()
        found = torch.empty(self.shape, dtype=self.dtype)
        self._fill(found)
        return found

    def read_into(self, found: Tensor) -> None:
        """Read the tensor into memory that is there.

        Args:
            found: Contiguous, of its shape and dtype, on the processor.

        Raises:
            CheckpointError: The file ends before it.
        """
        if self.is_plain:
            self._fill(found)
        else:
            found.copy_(self.read())

    def _fill(self, found: Tensor) -> None:
        view = memoryview(bytes_of(found))
        with self.path.open("rb", buffering=0) as file:
            done = 0
            while done < len(view):
                count = os.preadv(file.fileno(), [view[done : done + _CHUNK]], self.offset + done)
                if not count:
                    raise self._ended()
                done += count

    def chunks(self) -> Iterator[Any]:
        """Yield its bytes, a few megabytes at a time; those of one that is not plain all at once.

        Raises:
            CheckpointError: The file ends before it.
        """
        if not self.is_plain:
            yield bytes_of(self.read())
            return
        with self.path.open("rb", buffering=0) as file:
            done = 0
            while done < self.nbytes:
                wanted = min(_CHUNK, self.nbytes - done)
                found = os.pread(file.fileno(), wanted, self.offset + done)
                if not found:
                    raise self._ended()
                done += len(found)
                yield found

    def _ended(self) -> CheckpointError:
        return CheckpointError(
            f"expected {self.nbytes} bytes of a tensor from byte {self.offset} of "
            f"{str(self.path)!r} on, but the file ends before: it is incomplete, copy it again"
        )


@dataclass(frozen=True, eq=False)
class HeldTensor:
    """A tensor in memory that shall be written.

    Attributes:
        tensor: It.
    """

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.tensor.dtype

    def chunks(self) -> Iterator[Any]:
        """Yield its bytes."""
        yield bytes_of(self.tensor.detach().cpu().contiguous())


def bytes_of(tensor: Tensor) -> Any:
    """Return the memory of a contiguous tensor on the processor as numpy bytes, no copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def is_storable(dtype: torch.dtype) -> bool:
    """Return whether safetensors files can hold numbers of a dtype."""
    return dtype in _CODES


def num_bytes(piece: Piece) -> int:
    """Return the bytes of a tensor."""
    return math.prod(piece.shape) * piece.dtype.itemsize


def tensors_in(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file by name, in the order in which they lie.

    Raises:
        CheckpointError: It is no such file, or shorter than its header says.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        start = _LENGTH.size + length
        found = {name: _stored(path, start, item) for name, item in header.items()}
        end = max((item.offset + item.nbytes for item in found.values()), default=0)
    except _DAMAGES as error:
        raise CheckpointError(
            f"expected a safetensors file of tensors of known dtypes, got {str(path)!r}, whose "
            f"header cannot be read ({type(error).__name__}: {error}): it is damaged or "
            "incomplete, copy or save it again"
        ) from error
    if end > size:
        raise CheckpointError(
            f"expected {end} bytes in {str(path)!r}, as its header says, got {size}: the file is "
            "damaged or incomplete, copy it again"
        )
    return dict(sorted(found.items(), key=lambda pair: pair[1].offset))


def _stored(path: Path, start: int, item: dict[str, Any]) -> StoredTensor:
    """Return a tensor of which a header says where it is."""
    begin, end = item["data_offsets"]
    found = StoredTensor(path, start + begin, tuple(item["shape"]), _DTYPES[item["dtype"]])
    if begin < 0 or min(found.shape, default=0) < 0 or end - begin != found.nbytes:
        raise ValueError(f"bytes {begin} to {end} for {item['dtype']} {list(found.shape)}")
    return found


def write_tensors(path: Path, pieces: dict[str, Piece]) -> None:
    """Write a safetensors file that is there whole or not at all, its tensors aligned.

    Args:
        path: The file.
        pieces: The tensors by name, in the order in which they shall lie. Wide dtypes should come
            first, or those behind are not aligned to their own size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, piece in pieces.items():
        end = offset + num_bytes(piece)
        header[name] = {
            "dtype": _CODES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % _ALIGNMENT)
    with atomic_file(path) as file:
        file.write(_LENGTH.pack(len(text)))
        file.write(text)
        for piece in pieces.values():
            _copy(piece, file)


def _copy(piece: Piece, file: BinaryIO) -> None:
    file.writelines(piece.chunks())
