"""One bit of a tensor in a saved folder, changed as a disk or a copy changes it."""

from __future__ import annotations

from pathlib import Path

from ghosted_fast.models.unloaded.files import StoredTensor, tensors_in


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors in all files of weights in a folder, by name."""
    return {n: t for path in folder.glob("*.safetensors") for n, t in tensors_in(path).items()}


def flip(folder: Path, name: str) -> None:
    """Change one bit in the middle of a tensor."""
    tensor = stored_tensors(folder)[name]
    with tensor.path.open("r+b") as file:
        place = tensor.offset + tensor.nbytes // 2
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
