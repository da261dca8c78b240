"""What the shrinkers of configurations share."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

HEADS, NOISE = 4, 0.05
FIRST_SPECIAL_ID = 60
TOKEN_IDS = ("_token_id", "_token_index", "_token_ids")


def shrunk_ids(config: dict[str, Any], known: dict[int, int], ends: tuple[str, ...]) -> None:
    """Put the ids of special tokens into the vocabulary, equal ones at the same place.

    Args:
        config: The fields of a config.
        known: Where ids were put before.
        ends: How the names of such fields end.
    """
    common = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
    for key, value in config.items():
        if not key.endswith(ends):
            continue
        if key in common:
            config[key] = None if value is None else common[key]
        elif isinstance(value, int) and not isinstance(value, bool):
            config[key] = known.setdefault(value, FIRST_SPECIAL_ID + len(known))
        elif isinstance(value, list) and all(isinstance(one, int) for one in value):
            config[key] = [known.setdefault(v, FIRST_SPECIAL_ID + len(known)) for v in value]


def shrunk_rope(rope: dict[str, Any], width: int) -> None:
    """Make the sections of rotary embeddings fit the width of a head."""
    for value in rope.values():
        if isinstance(value, dict):
            shrunk_rope(value, width)
    if rope.get("partial_rotary_factor") is not None:
        rope["partial_rotary_factor"] = max(rope["partial_rotary_factor"], 0.5)
    if rope.get("mrope_section"):
        count = len(rope["mrope_section"])
        pairs = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [pairs // count + (i < pairs % count) for i in range(count)]
    if rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = 64


def shrunk_heads(config: dict[str, Any]) -> dict[str, Any]:
    """Make the heads of latent attention agree with each other."""
    if config.get("kv_lora_rank") is None:
        return config
    config["num_key_value_heads"] = config.get("num_attention_heads", HEADS)
    rope, plain = config.get("qk_rope_head_dim", 8), config["qk_nope_head_dim"]
    if "qk_head_dim" in config:
        config["qk_head_dim"] = rope + plain
    if "head_dim" in config:
        config["head_dim"] = rope
    return config


def shrunk_layers(values: dict[Any, Any], table: dict[str, int]) -> dict[Any, Any]:
    """Return the settings of single layers for the layers that are left, with small sizes."""
    return {
        index: shrunk_heads({name: table.get(name, given) for name, given in one.items()})
        for index, one in values.items()
        if int(index) < table["num_hidden_layers"]
    }


def resized(
    config: dict[str, Any],
    key: str,
    layers: int | None,
    table: dict[str, int],
    shorten: Callable[[list[Any], int], list[Any]],
) -> None:
    """Give a field a small size, or one entry for each of few layers.

    Args:
        config: The fields of a config.
        key: The field.
        layers: How many layers the config had.
        table: Small sizes by the names of fields.
        shorten: Makes a list of one entry a layer shorter.
    """
    value, count = config[key], table["num_hidden_layers"]
    if isinstance(value, list | tuple) and layers and len(value) == layers:
        config[key] = [table[key]] * count if key in table else shorten(list(value), count)
    elif key in table and type(value) is int and value > 0:
        config[key] = table[key]


def merge(config: dict[str, Any], extra: dict[str, Any]) -> None:
    """Put fields into a config, nested ones too, unless they say what they are.

    Args:
        config: The fields of a config.
        extra: What they become; `...` takes a field out.
    """
    for key, value in extra.items():
        part = config.get(key)
        if value is ...:
            config.pop(key, None)
        elif isinstance(value, dict) and isinstance(part, dict) and "model_type" not in value:
            merge(part, value)
        else:
            config[key] = deepcopy(value)


def has_text_part(fields: dict[str, Any], parts: tuple[str, ...]) -> bool:
    """Return whether the fields of a config hold those of its text part, by one of its names."""
    return any(isinstance(fields.get(key), dict) for key in parts)


def disturbed(model: nn.Module) -> None:
    """Add noise to all matrices, so that every layer changes what comes out."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter), alpha=NOISE)
