"""Tiny random models of every causal language model class of transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families.causal_tables import (
    EXTRA,
    HEAD_WIDTH,
    LAYERS,
    SLIDING,
    TEXT,
    TEXT_PARTS,
    TOWER,
)
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

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3@3-dense": ("deepseek_v3", {"first_k_dense_replace": 3}),
    "glm4_moe@3-dense": ("glm4_moe", {"first_k_dense_replace": 3}),
    "ernie4_5_moe@3-dense": ("ernie4_5_moe", {"moe_layer_start_index": 3}),
    "lfm2_moe@3-dense": ("lfm2_moe", {"num_dense_layers": 3}),
    # The two layers in the middle make the keys and values that the last two use again.
    "gemma3n_text@producers": (
        "gemma3n_text",
        {
            "num_hidden_layers": LAYERS,
            "num_kv_shared_layers": 2,
            "intermediate_size": [96] * LAYERS,
            "layer_types": SLIDING,
            "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
        },
    ),
    "gemma4_text@dense": (
        "gemma4_text",
        {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    ),
    "gemma4_text@moe": (
        "gemma4_text",
        {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
        },
    ),
    "llama4_text@every-second": (
        "llama4_text",
        {"interleave_moe_layer_step": 2, "moe_layers": [1, 3, 5]},
    ),
    "qwen2_moe@every-second": ("qwen2_moe", {"decoder_sparse_step": 2}),
    "qwen3_next@only-attention": (
        "qwen3_next",
        {"layer_types": ["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"] * 2},
    ),
    "falcon@new": ("falcon", {"new_decoder_architecture": True}),
    "rwkv@rescaled": ("rwkv", {"rescale_every": 6}),
    "gpt2@scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
}


def causal_types() -> list[str]:
    """Return the model types of all causal language model classes."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shortened(values: list[Any], count: int) -> list[Any]:
    """Return a list of one value a layer, made as long as the layers, with every kind in it."""
    if values == list(range(len(values))):
        return list(range(count))
    kinds = [value for index, value in enumerate(values) if value not in values[:index]]
    if len(kinds) == 1:
        return kinds * count
    if values == sorted(values) and isinstance(values[0], str):
        return [kinds[0]] + [kinds[1]] * (count - 1)
    if len(kinds) == 2 and 2 * values.count(kinds[0]) != len(values):
        rare = min(kinds, key=values.count)
        usual = next(kind for kind in kinds if kind != rare)
        return [rare if index % 3 == 2 else usual for index in range(count)]
    made = (values * count)[:count]
    for index, kind in enumerate(kind for kind in kinds if kind not in made):
        made[count - 1 - index] = kind
    return made


def shrunk(config: dict[str, Any], text: bool, known: dict[int, int]) -> dict[str, Any]:
    """Return the fields of a config with small sizes in the place of large ones."""
    layers = next((config[n] for n in ("num_hidden_layers", "num_layers") if config.get(n)), None)
    table = TEXT if text else TOWER
    for key, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            shrunk(value, key in TEXT_PARTS, known)
        elif key == "rope_parameters" and isinstance(value, dict):
            shrunk_rope(value, HEAD_WIDTH)
        elif key == "per_layer_config" and value:
            config[key] = shrunk_layers(value, table)
        else:
            resized(config, key, layers, table, shortened)
    if isinstance(config.get("image_size"), int) and isinstance(config.get("patch_size"), int):
        config["image_size"] = 4 * config["patch_size"]
    shrunk_heads(config)
    shrunk_ids(config, known, TOKEN_IDS)
    return config


def tiny_config(model_type: str, changes: dict[str, Any] | None = None) -> Any:
    """Return the shrunken default config of a type, with changes."""
    made = CONFIG_MAPPING[model_type]
    fields = made().to_dict()
    shrunk(fields, not has_text_part(fields, TEXT_PARTS), {})
    if fields.get("is_decoder") is False and not fields.get("is_encoder_decoder"):
        fields["is_decoder"] = True
    merge(fields, EXTRA.get(model_type, {}))
    merge(fields, changes or {})
    return made.from_dict(fields)


def tiny_causal(model_type: str, variant: str = "") -> PreTrainedModel:
    """Return a tiny random model of a type, the same one each time."""
    changes = VARIANTS[f"{model_type}@{variant}"][1] if variant else {}
    config = tiny_config(model_type, changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        disturbed(model)
    return model
