"""Surgery on folders: cut layers out of a checkpoint file by file, the model never in memory."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ghosted_fast import distributed
from ghosted_fast.checkpoint.digests import DIGESTS, write_digests
from ghosted_fast.checkpoint.recipe import RECIPE, attach_recipe, write_recipe
from ghosted_fast.checkpoint.record import is_ghosted
from ghosted_fast.checkpoint.save import (
    check_room,
    check_target,
    whole_folder,
    written_or_told,
)
from ghosted_fast.errors import ArgumentError, CheckpointError, UnsupportedModelError
from ghosted_fast.facts import named_layers
from ghosted_fast.models.cut_config import read_again
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.families import decoder_layers
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.ghosted_layers import ghosts_of
from ghosted_fast.models.loading import load_processor, tokenizer_of
from ghosted_fast.models.unloaded.files import Piece
from ghosted_fast.models.unloaded.opening import (
    Unloaded,
    finished,
    layers_path_of,
    load_into,
    meta_tensors,
    open_unloaded,
    quietly,
)
from ghosted_fast.models.unloaded.stand_in import stand_ins
from ghosted_fast.surgery.cut import remove_layers, removed_intervals
from ghosted_fast.surgery.folder_files import (
    bytes_in,
    ghost_tensors,
    in_shards,
    kept_tensors,
    write_shards,
)
from ghosted_fast.surgery.removable import check_removable

# Beside weights: configurations, code and what else is small.
_OTHER_BYTES = 1 << 26
# What is not carried over: weights in any format and what lists them; what is written anew.
_LEFT = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_MADE = (
    *("config.json", "generation_config.json", "README.md", "modeling_ghosted.py"),
    DIGESTS,
    RECIPE,
)


@dataclass(frozen=True, eq=False)
class FolderCut:
    """A checkpoint without some of its layers, before it is written.

    Attributes:
        source: The dense model.
        removed: The removed layers, sorted.
        model: The cut model, on meta; reports are attached to its configuration.
        shards: What each file will hold, by its name.
    """

    source: Unloaded
    removed: list[int]
    model: Any
    shards: Mapping[str, dict[str, Piece]]

    @property
    def config(self) -> Any:
        """The configuration of the cut model."""
        return self.model.config

    @property
    def num_bytes(self) -> int:
        """Bytes of the files that it is written to, without tokenizer and configuration."""
        return bytes_in(self.shards)

    def save(
        self,
        folder: str | os.PathLike[str],
        tokenizer: Any = None,
        overwrite: bool = False,
        progress: bool = False,
        recipe: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the checkpoint, so that the folder is there complete or not at all.

        Each old file becomes a new one, which is written a few megabytes at a time. Tokenizer,
        processor and what else lies beside the weights of a local folder are copied as they are.
        Before it takes its place, the folder is opened as transformers would load it, and the names
        and shapes of all weights are compared with what its configuration builds. In a process
        group rank 0 alone writes.

        Args:
            folder: The folder to make, see `save_model`.
            tokenizer: A tokenizer or processor to save in the place of the one that is copied.
            overwrite: Whether an existing folder is replaced, once the new one is complete.
            progress: Whether to show a progress bar on stderr.
            recipe: How the model was made, see `save_model`.

        Returns:
            The folder.

        Raises:
            ArgumentError: The folder exists and `overwrite` is False, or it is the source itself.
            CheckpointError: What was written would not load.
            OutputError: It cannot be written, or the disk has too little room; what was there is as
                it was.
        """
        target = Path(folder)
        if not distributed.is_writer():
            return target
        self.check_target(target, overwrite)
        if recipe is not None:
            attach_recipe(self.config, recipe)
        with written_or_told(target), whole_folder(target, overwrite) as fresh:
            _copy_others(self.source, fresh)
            with quietly():
                self.model.save_pretrained(fresh, state_dict={})
            for empty in fresh.glob("*.safetensors"):
                empty.unlink()
            write_shards(fresh, self.shards, progress)
            if is_ghosted(self.config):
                write_digests(fresh)  # of the weights, which are there by now
            if tokenizer is not None:
                tokenizer.save_pretrained(fresh)
            if recipe is not None:
                write_recipe(fresh, recipe)
            _check_loads(open_unloaded(fresh), self.source)
        return target

    def check_target(self, target: Path, overwrite: bool) -> None:
        """Raise, before any work, unless there is room for the folder; see `save`."""
        check_target(target, overwrite)
        if target.exists() and target.resolve() == self.source.folder.resolve():
            raise ArgumentError(
                f"expected another folder than {str(target)!r}, which the model is read from while "
                "the new one is written"
            )
        check_room(target, self.num_bytes + _OTHER_BYTES)


def prune_folder(
    model: str | Path | Unloaded,
    removed: Iterable[int],
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Remove layers from a checkpoint and put nothing in their place; no weight is loaded.

    Args:
        model: A local folder or hub id with safetensors files, or one that was opened.
        removed: Indices of the layers to remove.
        folder: The folder to make.
        overwrite: Whether an existing folder is replaced, once the new one is complete.
        progress: Whether to show a progress bar on stderr.

    Returns:
        The folder; see `cut_folder` and `FolderCut.save` for what is raised.
    """
    return cut_folder(model, removed).save(folder, overwrite=overwrite, progress=progress)


def cut_folder(
    model: str | Path | Unloaded,
    removed: Iterable[int],
    ghosts: Sequence[GhostLinear | None] | None = None,
    checked: bool = False,
) -> FolderCut:
    """Plan how layers are removed from a checkpoint, and a ghost put into each gap.

    What `check_removable` asks is computed with random weights, a layer at a time, and all names
    and shapes of the new files are compared with what the new configuration builds.

    Args:
        model: A local folder or hub id with safetensors files, or one that was opened.
        removed: Indices of the layers to remove.
        ghosts: One ghost or None for each gap, in the order of `removed_intervals`; they are cast
            to the model's dtype, and left as they are.
        checked: Whether `check_removable_unloaded` was asked already.

    Returns:
        The checkpoint, ready to be saved.

    Raises:
        SourceError, CheckpointError, UnsupportedModelError: See `open_unloaded`; or the layers
            cannot be removed, see `remove_layers`, or the files name layers in an unknown way.
        TypeError, ArgumentError: See `remove_layers`.
    """
    source = model if isinstance(model, Unloaded) else open_unloaded(model)
    decoder = Decoder.of(source.model)
    count = decoder.num_layers
    gaps = removed_intervals(removed, count)
    layers = [layer for start, stop in gaps for layer in range(start, stop)]
    if not checked:
        check_removable_unloaded(source, layers)
    placed, cut = _cut_on_meta(source, layers, ghosts)
    kept = [layer for layer in range(count) if layer not in layers]
    pieces = kept_tensors(source, cut, kept)
    added = ghost_tensors(source, cut, placed, pieces)
    _check_names(source, cut, layers, {**pieces, **added})
    return FolderCut(source, layers, cut, in_shards(pieces, added))


def check_removable_unloaded(source: Unloaded, removed: Iterable[int]) -> None:
    """Raise unless a model can do without some layers, see `check_removable`; none is read."""
    with stand_ins(source.model):
        check_removable(source.model, removed)


def _cut_on_meta(
    source: Unloaded, removed: list[int], ghosts: Sequence[GhostLinear | None] | None
) -> tuple[dict[str, GhostLinear], Any]:
    """Return the ghosts by their paths in the cut model, and that model."""
    dtype = Decoder.of(source.model).dtype
    empty = None if ghosts is None else [_on_meta(ghost) for ghost in ghosts]
    cut = remove_layers(source.model, removed, empty)
    # A ghost is part of the model as it is given, so each is found again.
    real = {
        id(without): copy.deepcopy(ghost).to(dtype=dtype)
        for without, ghost in zip(empty or [], ghosts or [], strict=True)
        if ghost is not None
    }
    paths = {module: path for path, module in cut.named_modules()}
    placed = {}
    for _, _, ghost in ghosts_of(decoder_layers(cut)):
        if id(ghost) in real:
            placed[paths[ghost]] = real[id(ghost)]
    return placed, cut


def _on_meta(ghost: GhostLinear | None) -> GhostLinear | None:
    if not isinstance(ghost, GhostLinear):
        return ghost  # None, or what `remove_layers` refuses
    return copy.deepcopy(ghost).to("meta")


def _check_names(
    source: Unloaded, cut: Any, removed: list[int], pieces: Mapping[str, Piece]
) -> None:
    """Raise unless transformers would find all weights of a cut model in some files."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        built = type(cut)(read_again(cut.config))
    info = finished(built, load_into(built, source.settings, meta_tensors(pieces)))
    path = layers_path_of(built)
    found = {
        "lack": sorted(info.missing_keys - source.missing),
        "hold without a place": sorted(n for n in info.unexpected_keys if n.startswith(f"{path}.")),
        "hold in another shape": sorted(name for name, *_ in info.mismatched_keys),
        "not convert": sorted(info.conversion_errors),
    }
    wrong = [f"{what} {', '.join(names[:3])}" for what, names in found.items() if names]
    if wrong:
        raise UnsupportedModelError(
            f"{named_layers(removed)} cannot be removed file by file from this model, whose files "
            f"would {' and '.join(wrong)}: load it and cut it in memory"
        )


def _check_loads(written: Unloaded, source: Unloaded) -> None:
    """Raise unless a folder that was just written is what transformers would load."""
    lacking = sorted(written.missing - source.missing)
    if lacking:
        raise CheckpointError(
            f"the folder that was written lacks {', '.join(lacking[:4])}, which its configuration "
            "asks for: it was not put in place"
        )


def _copy_others(source: Unloaded, fresh: Path) -> None:
    """Copy what lies beside the weights of a local folder; of a hub id, save the tokenizer."""
    if not Path(source.spec).expanduser().is_dir():
        _save_tokenizer(source.spec, fresh)
        return
    for path in source.folder.iterdir():
        if path.name.startswith(".") or path.name in _MADE:
            continue
        if path.is_file() and not path.name.endswith(_LEFT):
            shutil.copy2(path, fresh / path.name)
        elif path.is_dir() and _is_small(path):
            shutil.copytree(path, fresh / path.name)


def _is_small(folder: Path) -> bool:
    """Return whether a folder holds no weights: templates, code."""
    return not any(
        item.name.endswith(_LEFT) or item.stat().st_size > _OTHER_BYTES
        for item in folder.rglob("*")
    )


def _save_tokenizer(spec: str, folder: Path) -> None:
    (load_processor(spec) or tokenizer_of(spec)).save_pretrained(folder)
