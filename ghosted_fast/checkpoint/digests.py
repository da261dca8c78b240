"""Digests of what a ghosted folder holds: a checksum of each tensor's bytes in its files.

They find what a disk or a copy has damaged. Ghosts are checked whenever a folder is loaded: they
are small. All tensors are checked where it is asked for, since that reads each of them once more.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.errors import CheckpointError
from ghosted_fast.models.unloaded.files import StoredTensor, tensors_in

DIGESTS = "digests.json"
_GHOST_NAMES = (".ghost.", ".input_ghost.")
_FLOATS = ("F32", "F16", "BF16")


def write_digests(folder: Path) -> None:
    """Write the digests of all weights in a folder that was just saved."""
    digests = {name: _digest(tensor) for name, tensor in sorted(_stored(folder).items())}
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
    found = _stored(folder)
    for name, tensor in found.items():
        if _of_ghost(name):
            _check_dtype(folder, name, tensor)
    if not (record or {}).get("digests"):
        if every:
            raise CheckpointError(
                f"expected digests of the weights in {str(folder)!r}, got a folder that was saved "
                "without: load it and save it again to add them"
            )
        return
    known = _known(folder)
    for name, tensor in found.items():
        # What is missing or has no place, loading tells.
        if not (every or (_of_ghost(name) and name in known)):
            continue
        if known.get(name) != _digest(tensor):
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


def _check_dtype(folder: Path, name: str, tensor: StoredTensor) -> None:
    """Raise unless a ghost's tensor has a dtype that ghosts have."""
    allowed: tuple[str, ...] = (*_FLOATS, "I8") if name.endswith("ghost.weight") else _FLOATS
    if name.endswith(".scale"):
        allowed = ("F32",)
    if tensor.code not in allowed:
        raise CheckpointError(
            f"expected {name} in {str(folder)!r} in {' or '.join(allowed)}, got {tensor.code}: the "
            "file was edited, save the model again"
        )


def _of_ghost(name: str) -> bool:
    return any(part in f".{name}" for part in _GHOST_NAMES)


def _digest(tensor: StoredTensor) -> str:
    value = zlib.crc32(f"{tensor.code}{list(tensor.shape)}".encode())
    for chunk in tensor.chunks():
        value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def _stored(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors in a folder's files of weights.

    Raises:
        CheckpointError: A file is damaged or incomplete.
    """
    found: dict[str, StoredTensor] = {}
    for pattern in ("model.safetensors", "model-*-of-*.safetensors"):
        for path in sorted(folder.glob(pattern)):
            found |= tensors_in(path)
    return found
