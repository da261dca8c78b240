"""The plug-in that vLLM loads by itself: ghosted models as native vLLM models.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). It
registers names only; the classes are made when a model of the family is loaded.
"""

from __future__ import annotations

# Architectures that vLLM has natively, and where.
NATIVE = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
# Those that vLLM runs through transformers' own modules.
THROUGH_TRANSFORMERS = ("Olmo2ForCausalLM",)
# Other families that can be ghosted; their classes say what to do.
REFUSED = ("GPT2LMHeadModel", "OPTForCausalLM", "GPTNeoXForCausalLM")

_HERE = "ghosted_fast.serving.vllm.models"


def register() -> None:
    """Make the ghosted architectures known to vLLM; any number of times."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name in (*NATIVE, *THROUGH_TRANSFORMERS, *REFUSED):
        if f"Ghosted{name}" not in known:
            ModelRegistry.register_model(f"Ghosted{name}", f"{_HERE}:Ghosted{name}")
