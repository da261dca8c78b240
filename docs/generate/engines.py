"""Which families other engines serve, read out of the lists that refuse and are tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from docs.generate.markdown import table

# The families that people run, by the names of their models and by `model_type`.
COUNTED: Mapping[str, tuple[str, ...]] = {
    "Llama 2, 3, SmolLM 2": ("llama",),
    "Llama 4": ("llama4_text", "llama4"),
    "Mistral, Mixtral": ("mistral", "mixtral"),
    "Mistral 3, Ministral 3": ("mistral3", "ministral3"),
    "Qwen 2, 2.5, 3": ("qwen2", "qwen3", "qwen3_moe"),
    "Qwen 3 Next": ("qwen3_next",),
    "Qwen 3.5": ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe"),
    "Qwen 2.5 VL, 3 VL": ("qwen2_5_vl", "qwen3_vl"),
    "Gemma 2": ("gemma2",),
    "Gemma 3": ("gemma3_text", "gemma3"),
    "Gemma 4": ("gemma4_text", "gemma4"),
    "Phi 3, 4": ("phi3", "phi4_multimodal"),
    "gpt-oss": ("gpt_oss",),
    "GLM 4, 4.5": ("glm4", "glm4_moe"),
    "DeepSeek 3": ("deepseek_v3",),
    "Granite": ("granite", "granitemoe", "granitemoehybrid"),
    "Nemotron H": ("nemotron_h",),
    "Falcon, Falcon H1": ("falcon", "falcon_h1"),
    "OLMo 2, 3": ("olmo2", "olmo3"),
    "SmolLM 3": ("smollm3",),
    "SmolVLM": ("smolvlm",),
    "EXAONE 4": ("exaone4",),
    "Seed-OSS": ("seed_oss",),
    "ERNIE 4.5": ("ernie4_5", "ernie4_5_moe"),
    "LFM 2": ("lfm2",),
    "BLOOM, MPT, GPT-J": ("bloom", "mpt", "gptj"),
    "GPT-2, OPT, GPT-NeoX": ("gpt2", "opt", "gpt_neox"),
}


def served_by_vllm() -> str:
    """Return how vLLM serves each family that counts, or why it does not."""
    from ghosted_fast.serving.vllm import NATIVE, NOTES, THROUGH_TRANSFORMERS, reason_against

    def how(kind: str) -> str:
        name = architecture(kind)
        if name in NATIVE:
            note = NOTES.get(name)
            return "native" + (f"; {note}" if note else "")
        if name in THROUGH_TRANSFORMERS:
            return "through transformers"
        return f"no: {reason_against(name)}"

    return _families(how)


def served_by_llamacpp() -> str:
    """Return which of the families that count can be written as GGUF, or why one cannot."""
    from ghosted_fast.export.gguf import FAMILIES, reason_against

    return _families(lambda kind: "yes" if kind in FAMILIES else f"no: {reason_against(kind)}")


def served_by_ort_genai() -> str:
    """Return the families whose graphs ONNX Runtime GenAI builds with ghosts, in a sentence."""
    from ghosted_fast.export.ort_genai import FAMILIES

    return f"Families: {', '.join(f'`{name}`' for name in FAMILIES)}."


def architecture(kind: str) -> str:
    """Return the class of a model type's models: of those with pictures too, where it has both."""
    from transformers.models.auto import modeling_auto as auto

    for names in (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ):
        if kind in names:
            found = names[kind]
            return found if isinstance(found, str) else found[0]
    raise KeyError(f"transformers has no language model of the type {kind!r}")


def _families(how: Callable[[str], str]) -> str:
    """Return the table of families, one row for those that are served alike."""
    rows = []
    for name, kinds in COUNTED.items():
        alike: dict[str, list[str]] = {}
        for kind in kinds:
            alike.setdefault(how(kind), []).append(f"`{kind}`")
        rows += [[name, ", ".join(types), served] for served, types in alike.items()]
    return table(["models", "`model_type`", "served"], rows, 3)
