"""Whether a tokenizer begins texts with the BOS token."""

from __future__ import annotations

from typing import Any


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer begins a text with the BOS token by itself."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer("a")["input_ids"][:1] == [bos] and plain[:1] != [bos]
