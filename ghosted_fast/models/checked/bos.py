"""Whether a text begins its rows as the model's own tokenizer begins every text."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from ghosted_fast import distributed
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.bos import adds_bos


def tell_missing_bos(model: Any, batch: Batch | None) -> None:
    """Warn, once for each model, of rows without the BOS token that the model is used with.

    The tokenizer is looked for where the model was loaded from, on this machine alone, and only if
    no row begins with the BOS token of the configuration. Where there is none, nothing is said.

    Args:
        model: A transformers model.
        batch: The first rows of its text; None where they cannot be seen without being read.
    """
    config = getattr(model, "config", None)
    if batch is None or config is None or not distributed.is_writer():
        return
    begins = set(batch.input_ids[batch.is_first].tolist())
    if not begins or begins & _configured(config):
        return
    name = str(getattr(config, "_name_or_path", "") or "")
    bos = _added_bos(name)
    if bos is not None and bos not in begins:
        _warn(name, bos)


def telling_missing_bos(model: Any, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches as they are, and look at the first; see `tell_missing_bos`."""
    for index, batch in enumerate(batches):
        if index == 0:
            tell_missing_bos(model, batch)
        yield batch


def _configured(config: Any) -> set[int]:
    """Return the BOS tokens that a configuration names, its own and that of its text part."""
    parts = (config, getattr(config, "text_config", None))
    found = (getattr(part, "bos_token_id", None) for part in parts)
    return {token for token in found if isinstance(token, int)}


@functools.lru_cache(maxsize=32)
def _added_bos(name: str) -> int | None:
    """Return the BOS token that the tokenizer of a folder or hub id adds; None if it adds none."""
    if not name:
        return None
    from transformers import AutoTokenizer

    try:
        # Nothing is fetched, and no code of the folder is run.
        tokenizer = AutoTokenizer.from_pretrained(
            name, local_files_only=True, trust_remote_code=False
        )
        return int(tokenizer.bos_token_id) if adds_bos(tokenizer) else None
    except Exception:  # whatever tokenizers raise: there is none to compare with
        return None


@functools.lru_cache(maxsize=32)
def _warn(name: str, bos: int) -> None:
    warnings.warn(
        f"expected rows that begin with the BOS token {bos}, as the tokenizer of {name!r} begins "
        "every text, got rows without: a model is not used in this way, and computes other states. "
        "Begin each row with it, as ghosted_fast.token_batches(tokenizer, texts, num_tokens) does",
        UserWarning,
        stacklevel=4,
    )
