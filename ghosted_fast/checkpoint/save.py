"""Save a model to a folder as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ghosted_fast import distributed
from ghosted_fast._atomic_files import atomic_folder
from ghosted_fast.checkpoint.alignment import align_weights
from ghosted_fast.checkpoint.model_card import CARD, is_ours, write_card
from ghosted_fast.checkpoint.recipe import attach_recipe, write_recipe
from ghosted_fast.checkpoint.record import is_ghosted
from ghosted_fast.errors import ArgumentError, GhostedFastError, OutputError
from ghosted_fast.models.checked.usable import repair_generation
from ghosted_fast.models.quantized.packing import packed_again
from ghosted_fast.models.unloaded.sharded import whole_on_first
from ghosted_fast.text.files import first_line, is_readable_name

# A file that every folder of such a kind has.
_MARKS = {"a model's folder": "config.json", "an adapter's folder": "adapter_config.json"}


def check_place(path: str | os.PathLike[str]) -> None:
    """Raise unless something can be written under a name: where it will be, or a folder of its own.

    Raises:
        OutputError: A part of the path is a file, or there is no right or no room.
    """
    try:
        if not is_readable_name(str(path)):
            raise ValueError("a name that is not UTF-8")
        place = _existing(Path(path).absolute().parent)
        with tempfile.NamedTemporaryFile(prefix=f".{Path(path).name}.", dir=place):
            pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"expected a place to write {str(path)!r} to, got {why}: name another, or make room "
            "and rights there"
        ) from error


def check_room(path: str | os.PathLike[str], needed: int) -> None:
    """Raise unless the disk has room for what is to be written.

    Args:
        path: Where it will be written.
        needed: Bytes that it takes.

    Raises:
        OutputError: There is less.
    """
    free = shutil.disk_usage(_existing(Path(path).absolute())).free
    if free < needed:
        raise OutputError(
            f"expected {_size(needed)} of room to write {str(path)!r}, got {_size(free)}: free "
            "some, or name another place"
        )


def weight_bytes(model: Any) -> int:
    """Return the bytes of a model's weights, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr() or id(tensor): tensor.nbytes for tensor in tensors}.values())


def rewrite_facts(config: Any, folder: str | os.PathLike[str]) -> None:
    """Write the configuration and the model card of a saved model anew, each whole or not at all.

    Args:
        config: The configuration of what the folder holds, with other facts in its report.
        folder: The folder.
    """
    with tempfile.TemporaryDirectory(prefix=".facts.", dir=folder) as fresh:
        config.save_pretrained(fresh)
        (Path(fresh) / "config.json").replace(Path(folder) / "config.json")
    if is_ghosted(config):
        write_card(config, Path(folder))


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def save_model(
    model: Any,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    overwrite: bool = False,
    recipe: Mapping[str, Any] | None = None,
) -> Path:
    """Save a model, so that the folder is there complete or not at all.

    The files are written to a temporary folder beside the target, which is renamed at the end. The
    result loads with `AutoModelForCausalLM.from_pretrained` once `ghosted_fast` is imported. In a
    process group only rank 0 saves, as in transformers; the other ranks return at once, or when
    they have sent their parts of a model that is sharded (`heal(shard=True)`), which rank 0 has
    whole meanwhile. Weights are aligned in their files (`align_weights`).

    Args:
        model: A transformers model, ghosted or not.
        folder: The folder to make. Its parents are made as needed.
        tokenizer: A tokenizer to save beside the model, or the processor of one that reads pictures
            or sound too (`load_processor`), or None.
        overwrite: Whether an existing folder is replaced, once the new one is complete. A README.md
            that this library did not write is kept.
        recipe: How the model was made, see `checkpoint.recipe`; a ghosted one keeps it in its
            configuration.

    Returns:
        The folder.

    Raises:
        ArgumentError: The folder exists and `overwrite` is False, a file has its name, or it holds
            something that is no model.
        OutputError: It cannot be written: no room, or no right. What was there is as it was.
    """
    target = Path(folder)
    with whole_on_first(model):
        if not distributed.is_writer():
            return target
        check_target(target, overwrite)
        check_place(target)
        check_room(target, weight_bytes(model))
        repair_generation(model)
        with written_or_told(target):
            return _save(model, target, tokenizer, recipe)


@contextmanager
def written_or_told(target: Path) -> Iterator[None]:
    """Have what stops a model from being written told in one error.

    Raises:
        OutputError: In the place of what the system, safetensors or tokenizers raised.
    """
    try:
        yield
    except (GhostedFastError, MemoryError):
        raise
    except Exception as error:  # the system's, and those that safetensors and tokenizers make of it
        raise OutputError(
            f"expected to write the model to {str(target)!r}, got {first_line(error)}: nothing was "
            "changed there; check the room, the rights and that the model can be saved"
        ) from error


def _save(model: Any, target: Path, tokenizer: Any, recipe: Mapping[str, Any] | None) -> Path:
    if recipe is not None:
        attach_recipe(model.config, recipe)
    with whole_folder(target, overwrite=True) as fresh:
        saved = model if is_ghosted(model.config) else packed_again(model)
        saved.save_pretrained(fresh)
        align_weights(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        if recipe is not None:
            write_recipe(fresh, recipe)
    return target


def check_target(folder: Path, overwrite: bool, kind: str = "a model's folder") -> None:
    """Raise unless a folder can be made, or replaced.

    Args:
        folder: The folder.
        overwrite: Whether it may be replaced.
        kind: What may be replaced: a key of `_MARKS`.

    Raises:
        ArgumentError: The folder exists and `overwrite` is False, a file has its name, or it holds
            something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"expected a folder to save to, got the file {str(folder)!r}")
    if folder.exists() and not overwrite:
        raise ArgumentError(
            f"the folder {str(folder)!r} exists: choose another, or pass overwrite=True"
        )
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARKS[kind]).is_file():
        raise ArgumentError(
            f"expected {kind} to replace, got {str(folder)!r}, which holds other files: "
            "name another"
        )


@contextmanager
def whole_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that takes a model's place once the block has ended well.

    Args:
        target: The folder. Its parents are made as needed.
        overwrite: Whether an existing folder is replaced. A README.md that this library did not
            write is kept.

    Raises:
        ArgumentError: See `check_target`.
    """
    check_target(target, overwrite)
    with atomic_folder(target) as workspace:
        fresh = workspace / "new"
        fresh.mkdir()
        yield fresh
        card = target / CARD
        if card.is_file() and not is_ours(card):
            shutil.copy2(card, fresh / CARD)
