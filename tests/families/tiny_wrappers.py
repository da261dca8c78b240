"""Tiny random models of every multimodal class of transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families.shrinking import (
    TOKEN_IDS,
    disturbed,
    has_text_part,
    merge,
    resized,
    shrunk_heads,
    shrunk_ids,
    shrunk_layers,
    shrunk_rope,
)
from families.wrapper_tables import (
    CLASSES,
    EXTRA,
    HEAD_WIDTH,
    LAYERS,
    MROPE,
    TEXT,
    TEXT_PARTS,
    TOWER,
    TOWER_LISTS,
)


def wrapper_types() -> list[str]:
    """Return the model types of all multimodal classes."""
    return sorted(CLASSES)


def shortened(values: list[Any], count: int) -> list[Any]:
    """Return a list of one value a layer, made as long as the layers, with every kind in it."""
    if values == list(range(len(values))):
        return list(range(count))
    made = (values * count)[:count]
    kinds = [value for index, value in enumerate(values) if value not in values[:index]]
    for index, kind in enumerate(kind for kind in kinds if kind not in made):
        made[count - 1 - index] = kind
    return made


def shrunk(config: dict[str, Any], text: bool, known: dict[int, int]) -> dict[str, Any]:
    """Return the fields of a config with small sizes in the place of large ones."""
    layers = config.get("num_hidden_layers")
    table = TEXT if text else TOWER
    if config.get("model_type") in MROPE:
        config["rope_parameters"].setdefault("mrope_section", [1, 1, 1])
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            shrunk(value, key in TEXT_PARTS, known)
        elif key == "rope_parameters" and isinstance(value, dict):
            shrunk_rope(value, HEAD_WIDTH)
        elif key == "per_layer_config" and value:
            config[key] = shrunk_layers(value, table)
        elif key in TOWER_LISTS and value is not None:
            config[key] = TOWER_LISTS[key]
        elif key == "layers_block_type":
            config[key] = shortened(value, 8)
        elif key == "cross_attention_layers":
            config[key] = [index for index in value if index < LAYERS]
        else:
            resized(config, key, layers, table, shortened)
    if isinstance(config.get("image_size"), int) and isinstance(config.get("patch_size"), int):
        config["image_size"] = 4 * config["patch_size"]
    shrunk_heads(config)
    shrunk_ids(config, known, (*TOKEN_IDS, "_id", "_start", "_end"))
    return config


def tiny_config(model_type: str) -> Any:
    """Return the shrunken default config of a type."""
    made = CONFIG_MAPPING[model_type]
    fields = made().to_dict()
    shrunk(fields, not has_text_part(fields, TEXT_PARTS), {})
    merge(fields, EXTRA.get(model_type, {}))
    return made.from_dict(fields)


def tiny_wrapper(model_type: str) -> PreTrainedModel:
    """Return a tiny random model of a type, the same one each time."""
    config = tiny_config(model_type)
    found = getattr(transformers, CLASSES[model_type])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = found(config).float().eval()
        disturbed(model.get_decoder() if hasattr(model, "get_decoder") else model)
    return model
