"""Tiny random models and error bounds, shared by the tests and the benchmarks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

FAMILY_NAMES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "opt",
    "gpt_neox",
    "olmo2",
    "mixtral",
    "qwen3_moe",
)

_ROPE_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_SIZES: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "sliding_window": 16},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [1],
    },
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
    },
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 128},
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
}
VOCABULARY_SIZE = 97


def tiny_config(family: str, num_layers: int = 6) -> Any:
    """Return a small random-model configuration of a family.

    Args:
        family: One of `FAMILY_NAMES` (a transformers `model_type`).
        num_layers: Number of decoder layers.

    Returns:
        A transformers configuration: hidden size 32, 97 tokens, no special tokens.
    """
    from transformers import CONFIG_MAPPING

    sizes = dict(_SIZES[family]) if family in ("opt", "gpt2", "gpt_neox") else dict(_ROPE_SIZES)
    sizes.update(_SIZES.get(family, {}))
    return CONFIG_MAPPING[family](
        num_hidden_layers=num_layers,
        vocab_size=VOCABULARY_SIZE,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
        **sizes,
    )


def tiny_model(
    family: str, num_layers: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """Return a random causal language model of a family, in evaluation mode.

    The residual branches are scaled up so that every layer changes the hidden state visibly: with
    the default initialisation a tiny model is nearly the identity, and tests of surgery would pass
    whatever was removed.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, num_layers))
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(0.0, 0.25)
                elif isinstance(module, nn.Embedding):
                    module.weight.normal_(0.0, 0.5)
        for parameter in model.parameters():  # buffers stay as loading in this dtype leaves them
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def random_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Return token ids [batch, length], int64, in 1..VOCABULARY_SIZE-1 (0 is the pad token)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY_SIZE, (batch, length), generator=generator)


def relative_rms(value: Tensor, exact: Tensor) -> float:
    """Return |value - exact| / |exact| in Frobenius norms, computed in fp64."""
    exact = exact.double()
    size = exact.norm().item()
    error = (value.double() - exact).norm().item()
    return error / size if size else error


def scaled_rms(value: Tensor, exact: Tensor, gram: Tensor) -> float:
    """Return the rms of (value - exact)_ij / sqrt(G_ii G_jj), for matrices [d, d].

    The scale is the one that a sum of products of column i with column j has, so channels with
    large activations do not hide the error of the others.
    """
    scale = gram.double().diagonal().clamp_min(1e-300).sqrt()
    error = (value.double() - exact.double()) / (scale[:, None] * scale[None, :])
    return math.sqrt(error.square().mean().item())


def outlier_activations(
    num_tokens: int, hidden_size: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Return activations [num_tokens, hidden_size] with channels and tokens 1000 times the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden_size, generator=generator)
    x[:, :: max(1, hidden_size // 3)] *= 1000.0
    x[:: max(1, num_tokens // 5)] *= 1000.0 if dtype != torch.float16 else 10.0
    if dtype == torch.float16:
        x /= 1000.0
    return x.to(dtype)
