"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Of Linux's renameat2: the working folder, and that two names change places at once.
_HERE, _EXCHANGE = -100, 2


def exchange(one: Path, other: Path) -> bool:
    """Let two files or folders of one file system change places at once, if the system can.

    Args:
        one: A path that exists.
        other: Another.

    Returns:
        Whether they did.
    """
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(swap(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0)


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
        target: The folder. Its parents are made as needed. An existing folder changes places with
            the new one at the very end, at once where the system can: else it is put aside, and put
            back if the new one cannot take its place.

    Yields:
        An empty folder, removed with all else that is in it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = workspace / "old"
    try:
        yield workspace
        fresh = workspace / "new"
        if not target.exists():
            fresh.rename(target)
        elif not exchange(fresh, target):
            target.rename(old)
            fresh.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(workspace, ignore_errors=True)
