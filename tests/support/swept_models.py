"""Tiny models in folders, and a text, for tests of the sweep."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ghosted_fast.fit import candidates
from ghosted_fast.fit.sweep import heats
from ghosted_fast.fit.sweep.climb import Sweep, SweptText
from ghosted_fast.fit.sweep.shelf import MemoryShelf, Shelf
from ghosted_fast.models.unloaded.files import HeldTensor, StoredTensor
from ghosted_fast.models.unloaded.opening import open_unloaded
from ghosted_fast.models.unloaded.source import FolderSource
from ghosted_fast.surgery.folder import FolderCut
from ghosted_fast.testing import random_tokens, tiny_model
from ghosted_fast.text.batches import iterate_batches
from support.tiny_text import tiny_tokenizer


def text(batches: int = 5, length: int = 48) -> list[Any]:
    """Return a text with padding on the left, a sequence without tokens and one of another size."""
    found: list[Any] = [random_tokens(4, length, seed=seed) for seed in range(batches)]
    mask = torch.ones_like(found[2])
    mask[2, :20], mask[3] = 0, 0
    found[2] = {"input_ids": found[2], "attention_mask": mask}
    found[3] = found[3][:1, : length // 2]
    return found


def saved(folder: Path, family: str, dtype: torch.dtype = torch.float32, layers: int = 6) -> Any:
    """Save a model in several files, with a tokenizer, and return it."""
    model = tiny_model(family, layers, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder)
    return model


class Killed(BaseException):
    """Ends a run as SIGKILL would, but for what is open."""


@contextlib.contextmanager
def killed_at_write(number: int) -> Iterator[list[int]]:
    """End what runs inside at a write of states or of the record, which is left half done.

    Yields:
        The number of the write, once it was met.
    """
    left, original = number, HeldTensor.chunks
    met: list[int] = []

    def half_written(tensor: HeldTensor) -> Iterator[Any]:
        nonlocal left
        left -= 1
        for chunk in original(tensor):
            if not left:
                met.append(number)
                yield chunk[: len(chunk) // 2]
                raise Killed
            yield chunk

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(HeldTensor, "chunks", half_written)
        yield met


def as_pickles(folder: Path) -> None:
    """Put files of torch.save in the places of safetensors files, with an index as theirs."""
    index = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        name = path.with_suffix(".bin").name.replace("model", "pytorch_model", 1)
        torch.save(tensors, folder / name)
        index |= dict.fromkeys(tensors, name)
        path.unlink()
    listed = folder / "model.safetensors.index.json"
    if listed.exists():
        listed.unlink()
        record = {"metadata": {}, "weight_map": index}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(record))


def ask_for_a_tied_head(folder: Path) -> None:
    """Let a configuration say that head and embedding are one, whatever the files hold.

    Transformers believes the files.
    """
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))


def sweep_of(folder: Path, batches: list[Any], shelf: Shelf | None = None) -> Sweep:
    """Return a sweep of a text through a model in a folder."""
    source = FolderSource(open_unloaded(folder))
    held = list(iterate_batches(batches))
    return Sweep(source, SweptText.of(held, source.decoder.device), shelf or MemoryShelf())


def ghosts_of(cut: FolderCut) -> list[torch.Tensor]:
    """Return the weights of a folder's ghosts."""
    pieces = [piece for shard in cut.shards.values() for piece in shard.values()]
    return [piece.tensor for piece in pieces if isinstance(piece, HeldTensor)]


def read_by_layer(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Return where the layers that are read, and the bytes of all that is read, are noted."""
    layers: list[int] = []
    sizes: list[int] = []
    read, read_layer = StoredTensor.read, FolderSource._read_layer

    def noted(tensor: StoredTensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return read(tensor)

    def noted_layer(source: FolderSource, index: int) -> Any:
        layers.append(index)
        return read_layer(source, index)

    monkeypatch.setattr(StoredTensor, "read", noted)
    monkeypatch.setattr(FolderSource, "_read_layer", noted_layer)
    return layers, sizes


def small_heats(monkeypatch: pytest.MonkeyPatch, drop_above: float) -> None:
    """Let candidates be dropped behind 15 tokens, by so many standard errors."""
    for module in (candidates, heats):
        monkeypatch.setattr(module, "FEWEST_TOKENS_TO_DROP", 15)
    monkeypatch.setattr(candidates, "_DROP_ABOVE", drop_above)
