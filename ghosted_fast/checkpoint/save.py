"""Save a model to a folder as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ghosted_fast import distributed
from ghosted_fast.checkpoint.alignment import align_weights
from ghosted_fast.checkpoint.model_card import CARD, is_ours
from ghosted_fast.checkpoint.record import is_ghosted
from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.quantized.packing import packed_again


def save_model(
    model: Any, folder: str | os.PathLike[str], tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """Save a model, so that the folder is there complete or not at all.

    The files are written to a temporary folder beside the target, which is renamed at the end. The
    result loads with `AutoModelForCausalLM.from_pretrained` once `ghosted_fast` is imported. In a
    process group only rank 0 saves, as in transformers; the other ranks return at once. Weights are
    aligned in their files (`align_weights`).

    Args:
        model: A transformers model, ghosted or not.
        folder: The folder to make. Its parents are made as needed.
        tokenizer: A tokenizer to save beside the model, or the processor of one that reads pictures
            or sound too (`load_processor`), or None.
        overwrite: Whether an existing folder is replaced, once the new one is complete. A README.md
            that this library did not write is kept.

    Returns:
        The folder.

    Raises:
        ArgumentError: The folder exists and `overwrite` is False, or a file has its name.
    """
    target = Path(folder)
    if not distributed.is_writer():
        return target
    with whole_folder(target, overwrite) as fresh:
        saved = model if is_ghosted(model.config) else packed_again(model)
        saved.save_pretrained(fresh)
        align_weights(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
    return target


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise unless a folder can be made, or replaced.

    Raises:
        ArgumentError: The folder exists and `overwrite` is False, or a file has its name.
    """
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"expected a folder to save to, got the file {str(folder)!r}")
    if folder.exists() and not overwrite:
        raise ArgumentError(
            f"the folder {str(folder)!r} exists: choose another, or pass overwrite=True"
        )


@contextmanager
def whole_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that takes its place once the block has ended well.

    Args:
        target: The folder. Its parents are made as needed.
        overwrite: Whether an existing folder is replaced. A README.md that this library did not
            write is kept.

    Raises:
        ArgumentError: See `check_target`.
    """
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh = workspace / "new"
        fresh.mkdir()
        yield fresh
        if target.exists():
            card = target / CARD
            if card.is_file() and not is_ours(card):
                shutil.copy2(card, fresh / CARD)
            target.rename(workspace / "old")
        fresh.rename(target)
    except BaseException:
        if (workspace / "old").exists() and not target.exists():
            (workspace / "old").rename(target)
        raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
