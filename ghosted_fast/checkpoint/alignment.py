"""Weights of saved models at addresses that processors read fast.

A safetensors file is mapped into memory as it is, so a tensor lies as the file has it: behind a
header whose length is only a multiple of 8. Where tensors do not start at cache lines each wide
load touches two, and decoding is slower. The format lets the header end in spaces, as many as it
takes.
"""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

from ghosted_fast._atomic_files import atomic_file

_CACHE_LINE = 64
_LENGTH = struct.Struct("<Q")


def align_weights(folder: Path) -> None:
    """Make the tensors in a folder's weight files start at a multiple of 64 bytes.

    All of them do if their sizes are such multiples; else those up to the first whose size is not.
    A file that is aligned is left alone, any other replaced once the new one is complete.

    Args:
        folder: A folder that transformers has just saved a model to. Only files of the names that
            it gives to weights are looked at.
    """
    for name in ("model.safetensors", "model-*-of-*.safetensors"):
        for path in folder.glob(name):
            _align(path)


def _align(path: Path) -> None:
    with path.open("rb") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        missing = -(_LENGTH.size + length) % _CACHE_LINE
        if not missing:
            return
        with atomic_file(path) as fresh:
            fresh.write(_LENGTH.pack(length + missing))
            fresh.write(file.read(length) + b" " * missing)
            shutil.copyfileobj(file, fresh, 1 << 24)
