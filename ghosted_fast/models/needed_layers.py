"""Layers that a model cannot do without, because of what the other layers use of them."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from ghosted_fast.facts import layers_as_text, named_layers

_COUNTS_TOKENS = re.compile(r"(?<!linear_)attention|hybrid")


def layer_kinds(text: Any, count: int) -> list[str]:
    """Return what a text configuration says each layer is, in transformers' words; empty if none.

    Args:
        text: The text configuration.
        count: Number of layers.
    """
    kinds = getattr(text, "layer_types", None)
    if not isinstance(kinds, list) or len(kinds) != count:
        return []
    return [str(kind) for kind in kinds]


def why_needed(text: Any, count: int, removed: Collection[int]) -> str | None:
    """Return why some layers cannot be removed together, as a message; None if they can.

    Args:
        text: The text configuration.
        count: Number of layers.
        removed: Indices of the layers.
    """
    kinds = layer_kinds(text, count)
    left = [kind for index, kind in enumerate(kinds) if index not in removed]
    own = count - (getattr(text, "num_kv_shared_layers", 0) or 0)
    if own < count:  # each kind of the last layers uses what the last of its kind before them has
        sources = sorted({kind: index for index, kind in enumerate(kinds[:own])}.values())
        if set(sources) & set(removed):
            return (
                f"expected {named_layers(sources)} to be kept: the last {count - own} "
                "layers of this model use their keys and values"
            )
    lost = sorted(set(kinds) - set(left))
    if lost and getattr(text, "is_heterogeneous", False):
        return (
            "expected a layer of each kind to be kept, since this model looks settings up by kind: "
            f"none would be left of {', '.join(lost)}"
        )
    counting = [i for i, kind in enumerate(kinds) if _COUNTS_TOKENS.search(kind)]
    if counting and not set(counting) - set(removed):
        return (
            f"expected one of the layers {layers_as_text(counting)} to be kept: they are the "
            "attention layers of this model, whose other layers have no keys and values to count "
            "tokens by"
        )
    return None
