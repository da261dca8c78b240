"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes its place, or an existing one's, once the block has ended well.

    Args:
        path: The file. Its folder is made as needed; an existing file leaves its permissions.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all; see `atomic_file`.

    Args:
        path: The file.
        text: What it shall hold, written as UTF-8.
    """
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside a target, whose "new" takes its place once the block ends.

    Args:
        target: The folder. Its parents are made as needed; an existing folder is put aside at the
            very end, and put back if the new one cannot take its place.

    Yields:
        An empty folder, removed with all else that is in it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = workspace / "old"
    try:
        yield workspace
        if target.exists():
            target.rename(old)
        (workspace / "new").rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(workspace, ignore_errors=True)
