"""Sizes of models with random weights: the shape decides speed and memory, the weights do not."""

from __future__ import annotations

from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
    # Weights of 336 MB in layers of 8 MB: soon swept through, under a limit of half of them.
    "ci": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 1000,
    },
    # The width of the 70b shape, in layers of 300 MB.
    "wide": {
        "hidden_size": 8192,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 256,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def llama_config(shape: str, layers: int | None = None) -> Any:
    """Return the configuration of a llama in bf16.

    Args:
        shape: One of `SHAPES`.
        layers: Another number of layers than the shape has.
    """
    from transformers import LlamaConfig

    sizes = {**SHAPES[shape], "max_position_embeddings": 8192}
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    return LlamaConfig(**sizes, dtype="bfloat16", tie_word_embeddings=False)
