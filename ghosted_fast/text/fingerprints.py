"""Digests that tell one text, and one model, from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ghosted_fast.text.batches import Batch

_NUMBERS_PER_WEIGHT = 1024


def text_digest(batches: Iterable[Batch]) -> str:
    """Return a digest of tokens and masks."""
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in (batch.input_ids, batch.attention_mask):
            digest.update(str(list(tensor.shape)).encode())
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def token_digest(batches: Iterable[Tensor]) -> str:
    """Return a digest of rows of token ids, however many of them a batch has."""
    digest = hashlib.sha256()
    for batch in batches:
        for row in batch:
            digest.update(f"{len(row)} ".encode())
            digest.update(row.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def model_digest(model: nn.Module) -> str:
    """Return a digest of a model's weights: names, shapes and the first numbers of each."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        first = weight.detach().reshape(-1)[:_NUMBERS_PER_WEIGHT].cpu().float()
        digest.update(first.numpy().tobytes())
    return digest.hexdigest()[:16]


def stored_digest(tensors: Mapping[str, Any]) -> str:
    """Return a digest of weights in files: names, places, shapes and the first bytes of each.

    Args:
        tensors: `StoredTensor`s by name.
    """
    digest = hashlib.sha256()
    for name, item in tensors.items():
        digest.update(f"{name} {item.path.name} {item.offset} {item.dtype} {item.shape}".encode())
        with item.path.open("rb") as file:
            file.seek(item.offset)
            digest.update(file.read(min(item.nbytes, 4 * _NUMBERS_PER_WEIGHT)))
    return digest.hexdigest()[:16]
