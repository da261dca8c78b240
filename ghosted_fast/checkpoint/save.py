"""Save a model to a folder as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ghosted_fast import distributed
from ghosted_fast._atomic_files import atomic_folder
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
    if target.exists() and not target.is_dir():
        raise ArgumentError(f"expected a folder to save to, got the file {str(target)!r}")
    if target.exists() and not overwrite:
        raise ArgumentError(
            f"the folder {str(target)!r} exists: choose another, or pass overwrite=True"
        )
    with atomic_folder(target) as workspace:
        fresh = workspace / "new"
        saved = model if is_ghosted(model.config) else packed_again(model)
        saved.save_pretrained(fresh)
        align_weights(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        card = target / CARD
        if card.is_file() and not is_ours(card):
            shutil.copy2(card, fresh / CARD)
    return target
