"""Which tensors the files of a cut checkpoint hold: those of the old ones, layers renumbered.

No tensor is read for that. A table that has a part for each layer is written without the parts of
the removed ones, a few rows at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.models.unloaded.files import (
    HeldTensor,
    Piece,
    StoredTensor,
    bytes_of,
    num_bytes,
    write_tensors,
)
from ghosted_fast.models.unloaded.opening import Unloaded, layer_in, names_in
from ghosted_fast.text.progress import progress_bar

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ROWS_BYTES = 1 << 24


@dataclass(frozen=True)
class KeptParts:
    """A table that has a part for each layer, without those of removed ones.

    Attributes:
        source: The table.
        axis: Along which the parts lie, 0 or 1.
        count: How many there are.
        kept: The layers whose parts stay, sorted.
    """

    source: StoredTensor
    axis: int
    count: int
    kept: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that is left."""
        shape = list(self.source.shape)
        shape[self.axis] = shape[self.axis] // self.count * len(self.kept)
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        """That of the table."""
        return self.source.dtype

    def chunks(self) -> Iterator[Any]:
        """Yield its bytes, a few rows at a time."""
        rows = self.source.shape[0] if self.axis == 1 else self.count
        row = self.source.nbytes // rows
        if self.axis == 0:
            for layer in self.kept:
                yield from self.source.part(layer * row, row).chunks()
            return
        kept, step = torch.tensor(self.kept), max(1, _ROWS_BYTES // row)
        for first in range(0, rows, step):
            found = self.source.part(first * row, min(step, rows - first) * row).read()
            parts = found.view(-1, self.count, row // self.count)
            yield bytes_of(parts.index_select(1, kept))


def kept_tensors(source: Unloaded, cut: Any, kept: Sequence[int]) -> dict[str, Piece]:
    """Return the tensors that are left of a checkpoint, by their new names, in the old order.

    Args:
        source: The dense model.
        cut: The cut model, on meta.
        kept: The layers that stay, sorted.

    Raises:
        UnsupportedModelError: The names in the files do not say which layer a tensor belongs to.
    """
    shapes = {name: tuple(item.shape) for name, item in cut.state_dict().items()}
    count = 1 + max(layer for layer in source.by_layer if layer is not None)
    found: dict[str, Piece] = {}
    twice = _there_twice(source)
    for name, tensor in source.tensors.items():
        inside = source.names[name]
        layer = layer_in(inside, source.layers_path)
        if name in twice:
            continue
        if layer is None:
            found[name] = _without_parts(tensor, shapes.get(inside), count, kept)
        elif layer in kept:
            found[_renumbered(name, layer, kept.index(layer), source.layers_path)] = tensor
    return found


def _there_twice(source: Unloaded) -> set[str]:
    """Return the names of weights that the model ties to another name of the same bytes.

    Files of `torch.save` name both, and safetensors files one of them, as transformers writes them.
    """
    held = set(source.names.values())
    outside = source.by_layer.get(None, [])
    return {name for name in outside if source.ties.get(source.names[name]) in held}


def _without_parts(
    tensor: StoredTensor, wanted: tuple[int, ...] | None, count: int, kept: Sequence[int]
) -> Piece:
    """Return a tensor outside of the layers, without the parts that a cut model does not have."""
    if wanted is None or wanted == tensor.shape or not tensor.is_plain:
        return tensor  # of one that is not plain no parts can be left out: its shape is refused
    for axis in range(min(2, len(tensor.shape))):
        parts = KeptParts(tensor, axis, count, tuple(kept))
        if tensor.shape[axis] % count == 0 and parts.shape == wanted:
            return parts
    return tensor


def _renumbered(name: str, layer: int, new: int, layers_path: str) -> str:
    """Return the name of a layer's tensor under the layer's new number."""
    parts = name.split(".")
    places = [i for i, part in enumerate(parts) if part == str(layer)]
    listed = layers_path.rpartition(".")[2]
    sure = [i for i in places if i and parts[i - 1] == listed]
    if not places:
        raise UnsupportedModelError(
            f"expected the number of layer {layer} in the name {name!r} of a tensor of that layer, "
            "so that it can be renumbered: load the model and cut it in memory"
        )
    parts[(sure or places)[0]] = str(new)
    return ".".join(parts)


def ghost_tensors(
    source: Unloaded, cut: Any, ghosts: Mapping[str, Any], pieces: Mapping[str, Piece]
) -> dict[str, Piece]:
    """Return the tensors of ghosts, by the names that they have in the files.

    Args:
        source: The dense model.
        cut: The cut model, on meta.
        ghosts: The ghosts, in memory, by their paths in the cut model.
        pieces: The other tensors: where files name layers otherwise, ghosts follow them.
    """
    inside = names_in(cut, source.settings, pieces)
    found: dict[str, Piece] = {}
    for path, ghost in ghosts.items():
        layer_path = path.rpartition(".")[0]
        prefix = next(
            (
                name.removesuffix(known.removeprefix(layer_path))
                for name, known in inside.items()
                if known.startswith(f"{layer_path}.")
                and name.endswith(known.removeprefix(layer_path))
            ),
            layer_path,
        )
        place = f"{prefix}.{path.rpartition('.')[2]}"
        for name, tensor in ghost.state_dict().items():
            found[f"{place}.{name}"] = HeldTensor(tensor)
    return found


def in_shards(
    pieces: Mapping[str, Piece], ghosts: Mapping[str, Piece]
) -> dict[str, dict[str, Piece]]:
    """Return what each file holds, by its name: as the old ones did, and the ghosts.

    Args:
        pieces: What is left of the old files.
        ghosts: The tensors of ghosts: in the only file, or in one of their own.
    """
    groups: dict[Path, dict[str, Piece]] = {}
    for name, piece in pieces.items():
        stored = piece.source if isinstance(piece, KeptParts) else piece
        assert isinstance(stored, StoredTensor)
        groups.setdefault(stored.path, {})[name] = piece
    shards = list(groups.values())
    if len(shards) == 1:
        return {_WEIGHTS: {**shards[0], **ghosts}}
    if ghosts:
        shards.append(dict(ghosts))
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def bytes_in(shards: Mapping[str, Mapping[str, Piece]]) -> int:
    """Return the bytes of all tensors in files."""
    return sum(num_bytes(piece) for shard in shards.values() for piece in shard.values())


def write_shards(folder: Path, shards: Mapping[str, dict[str, Piece]], progress: bool) -> None:
    """Write the files, and the index that says which tensor is in which."""
    for name, shard in progress_bar("writing", progress, of=list(shards.items())):
        write_tensors(folder / name, shard)
    if list(shards) == [_WEIGHTS]:
        return
    pieces = [piece for shard in shards.values() for piece in shard.values()]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(piece.shape) for piece in pieces),
            "total_size": bytes_in(shards),
        },
        "weight_map": {name: file for file, shard in shards.items() for name in sorted(shard)},
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
