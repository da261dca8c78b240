"""The plug-in that vLLM loads by itself: ghosted models as native vLLM models.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`). It
registers names only; the classes are made when a model of the family is loaded. The tests run over
the tables here, and the pages are made of them.
"""

from __future__ import annotations

# Architectures of which vLLM has a class of its own.
NATIVE = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "GptOssForCausalLM",
    "Gemma4ForCausalLM",
    "Llama4ForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "Ministral3ForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "NemotronHForCausalLM",
    "FalconH1ForCausalLM",
    "Exaone4ForCausalLM",
    "Ernie4_5ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "Lfm2ForCausalLM",
    "BloomForCausalLM",
    "FalconForCausalLM",
    "GPTJForCausalLM",
    "GPT2LMHeadModel",
    "OPTForCausalLM",
    # With pictures
    "Gemma3ForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
    "SmolVLMForConditionalGeneration",
)
# Of these, those whose layers hand on the hidden state itself, and a residual that nothing reads.
WHOLE = ("Exaone4ForCausalLM", "GraniteMoeHybridForCausalLM")
# What holds for some of them alone.
_BF16 = "tested in bf16, which vLLM's linear attention on a processor asks for"
_OWN_ROTATION = (
    "vLLM 0.32 on a processor rotates wrongly in fp32, dense models too, without "
    '`--compilation-config \'{"custom_ops": ["none"]}\'`'
)
NOTES = {
    "GptOssForCausalLM": "gaps of an even length: each second layer has a window",
    "Llama4ForCausalLM": "where each second layer has experts, gaps of an even length",
    "NemotronHForCausalLM": "tested without experts, which vLLM runs on a GPU alone",
    "GPT2LMHeadModel": "without a state for first tokens",
    "OPTForCausalLM": "without a state for first tokens",
    "BloomForCausalLM": "with tied embeddings",
    "DeepseekV3ForCausalLM": f"{_OWN_ROTATION}; on one with AMX its attention takes bf16 alone",
    "Lfm2ForCausalLM": _OWN_ROTATION,
    **dict.fromkeys(
        (
            *("Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"),
            *("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
        ),
        _BF16,
    ),
}
# Those that vLLM runs through transformers' own modules.
THROUGH_TRANSFORMERS = (
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "SmolLM3ForCausalLM",
    "SeedOssForCausalLM",
    "GPTNeoXForCausalLM",
)
# Why others are not served.
REFUSED = {
    "MptForCausalLM": "vLLM 0.28 was the last with this class",
    "Phi4MultimodalForCausalLM": "vLLM 0.12 was the last with this class",
}

_HERE = "ghosted_fast.serving.vllm.models"


def register() -> None:
    """Make the ghosted architectures known to vLLM; any number of times."""
    from vllm import ModelRegistry

    from ghosted_fast.serving.vllm.configuration import register_parser

    known = ModelRegistry.get_supported_archs()
    for name in (*NATIVE, *THROUGH_TRANSFORMERS):
        if f"Ghosted{name}" not in known:
            ModelRegistry.register_model(f"Ghosted{name}", f"{_HERE}:Ghosted{name}")
    register_parser()


def reason_against(architecture: str) -> str:
    """Return why vLLM does not serve an architecture with ghosts, as the end of a sentence."""
    return REFUSED.get(architecture, "this family was not tried")
