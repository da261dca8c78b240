"""A tiny random model of every architecture that vLLM serves with ghosts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ghosted_fast.measure.system import cpu_features
from support.tiny_engines import VOCABULARY_SIZE, engine_model, engine_wrapper

FIRST: dict[str, Any] = {"first_state": True}
NORMED: dict[str, Any] = {"norm_eps": 1e-6}
HEADS = {"num_attention_heads": 2}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * 2
WINDOWS = {"sliding_window": 16, "layer_types": SLIDING}
TIED = {"tie_word_embeddings": True}
# What configurations of an older form call otherwise.
_OLD = dict.fromkeys(("num_attention_heads", "num_hidden_layers", "head_dim"), ...)
_OLDER = {**_OLD, "hidden_size": ..., "max_position_embeddings": ...}
GPT = {"n_embd": 64, "n_head": 2, "n_layer": 6, "n_positions": 256, **_OLDER}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LINEAR = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
SHARED = {"shared_expert_intermediate_size": 64}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [6, 5, 5]}}
HALF_MROPE = {
    "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}
}
LLAMA4 = {**LOCAL_EXPERTS, "num_experts_per_tok": 1, "attention_chunk_size": 128}
DEEPSEEK = {
    **ROUTED_EXPERTS,
    "topk_method": "noaux_tc",  # as in the models' own files
    "scoring_func": "sigmoid",
    "num_attention_heads": 2,
    "head_dim": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
# vLLM 0.32's rotation for processors is wrong where heads have a dimension of their own (dense
# models too); without its own operators it takes torch's.
PLAIN_OPERATORS = {"compilation_config": {"custom_ops": ["none"]}}


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        family: Its `model_type`.
        removed: Layers taken out of six.
        sizes: Fields of its configuration, or of its text part.
        ghosts: What its ghosts are like.
        engine: Arguments of `vllm.LLM`.
        only_bf16: Whether vLLM on the processor runs it in bf16 alone.
        wrapper: Whether it reads pictures too.
    """

    family: str
    removed: tuple[int, ...] = (3,)
    sizes: dict[str, Any] = field(default_factory=dict)
    ghosts: dict[str, Any] = field(default_factory=lambda: FIRST)
    engine: dict[str, Any] = field(default_factory=dict)
    only_bf16: bool = False
    wrapper: bool = False

    def model(self) -> Any:
        """Return the dense model."""
        return (engine_wrapper if self.wrapper else engine_model)(self.family, **self.sizes)


def _wrapper(family: str, removed: tuple[int, ...] = (3,), **options: Any) -> Case:
    sizes = options.pop("sizes", {})
    engine = {"language_model_only": True}
    return Case(family, removed, sizes, engine=engine, wrapper=True, **options)


CASES: tuple[tuple[str, Case], ...] = (
    ("LlamaForCausalLM", Case("llama", (0, 3, 5), TIED)),
    (
        "LlamaForCausalLM",
        Case("llama", ghosts={**NORMED, **FIRST, "quantized": True}),
    ),
    ("Qwen2ForCausalLM", Case("qwen2", sizes=HEADS, ghosts={})),
    ("Qwen3ForCausalLM", Case("qwen3")),
    ("MistralForCausalLM", Case("mistral", (1,), {"sliding_window": None}, NORMED)),
    ("Gemma2ForCausalLM", Case("gemma2", (1,), {"sliding_window": 16, **TIED})),
    ("Gemma3ForCausalLM", Case("gemma3_text", (1,), {"sliding_window": 16, **TIED}, NORMED)),
    ("Phi3ForCausalLM", Case("phi3", sizes=HEADS, ghosts={})),
    ("MixtralForCausalLM", Case("mixtral", sizes={"num_local_experts": 4})),
    ("Qwen3MoeForCausalLM", Case("qwen3_moe", sizes={**EXPERTS, "mlp_only_layers": [1]})),
    (
        "Qwen3NextForCausalLM",
        Case("qwen3_next", sizes={**EXPERTS, **SHARED, **LINEAR}, only_bf16=True),
    ),
    ("Qwen3_5ForCausalLM", Case("qwen3_5_text", sizes=LINEAR, only_bf16=True)),
    (
        "Qwen3_5MoeForCausalLM",
        Case("qwen3_5_moe_text", sizes={**EXPERTS, **SHARED, **LINEAR}, only_bf16=True),
    ),
    (
        "GptOssForCausalLM",
        Case(
            "gpt_oss",
            (2, 3),
            {
                **LOCAL_EXPERTS,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"] * 3,
            },
        ),
    ),
    (
        "Gemma4ForCausalLM",
        Case(
            "gemma4_text",
            (2,),
            {
                **WINDOWS,
                **TIED,
                "num_kv_shared_layers": 0,
                "hidden_size_per_layer_input": 0,
                "global_head_dim": 64,
            },
        ),
    ),
    (
        "Gemma4ForCausalLM",  # with keys and values of earlier layers, and inputs of each layer
        Case(
            "gemma4_text",
            (2,),
            {
                **TIED,
                "num_hidden_layers": 8,
                "num_kv_shared_layers": 2,
                "hidden_size_per_layer_input": 32,
                "vocab_size_per_layer_input": VOCABULARY_SIZE,
                "global_head_dim": 64,
                "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"] * 4,
            },
        ),
    ),
    (
        "Llama4ForCausalLM",
        Case(
            "llama4_text",
            sizes={**LLAMA4, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 1},
        ),
    ),
    ("Glm4ForCausalLM", Case("glm4")),
    ("Glm4MoeForCausalLM", Case("glm4_moe", sizes=ROUTED_EXPERTS)),
    (
        "DeepseekV3ForCausalLM",
        # On a processor with AMX its attention is an operator that takes no fp32 weights.
        Case(
            "deepseek_v3",
            sizes=DEEPSEEK,
            engine=PLAIN_OPERATORS,
            only_bf16="amx_bf16" in cpu_features(),
        ),
    ),
    ("Ministral3ForCausalLM", Case("ministral3", sizes=HEADS)),
    (
        "GraniteForCausalLM",
        Case(
            "granite",
            sizes={
                **HEADS,
                "embedding_multiplier": 3.0,
                "residual_multiplier": 0.5,
                "attention_multiplier": 0.2,
                "logits_scaling": 2.0,
            },
        ),
    ),
    ("GraniteMoeForCausalLM", Case("granitemoe", sizes={**HEADS, **LOCAL_EXPERTS})),
    (
        "GraniteMoeHybridForCausalLM",
        Case(
            "granitemoehybrid",
            sizes={
                **HEADS,
                **LOCAL_EXPERTS,
                **MAMBA,
                "layer_types": ["mamba", "attention", "mamba"] * 2,
                "shared_intermediate_size": 64,
                "residual_multiplier": 0.5,
            },
        ),
    ),
    (
        "NemotronHForCausalLM",
        Case(
            "nemotron_h",
            (2,),
            {
                **HEADS,
                "layers_block_type": [
                    *("linear_attention", "mlp", "full_attention"),
                    *("mlp", "linear_attention", "full_attention"),
                ],
                "mamba_num_heads": 4,
                "mamba_head_dim": 32,
                "ssm_state_size": 16,
                "n_groups": 1,
            },
        ),
    ),
    ("FalconH1ForCausalLM", Case("falcon_h1", sizes={**HEADS, **MAMBA, "mamba_d_ssm": 128})),
    ("Exaone4ForCausalLM", Case("exaone4", sizes={**HEADS, **WINDOWS})),
    ("Ernie4_5ForCausalLM", Case("ernie4_5", sizes=HEADS)),
    (
        "Ernie4_5_MoeForCausalLM",
        Case(
            "ernie4_5_moe",
            sizes={
                **HEADS,
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_intermediate_size": 64,
                "moe_layer_start_index": 1,
                "moe_num_shared_experts": 1,
            },
        ),
    ),
    (
        "Lfm2ForCausalLM",
        Case(
            "lfm2",
            sizes={
                **HEADS,
                **TIED,
                "layer_types": ["conv", "conv", "full_attention"] * 2,
                "block_auto_adjust_ff_dim": False,
                "conv_dim": 64,  # as in the models' own files
                "block_dim": 64,
            },
            engine=PLAIN_OPERATORS,
        ),
    ),
    ("BloomForCausalLM", Case("bloom", sizes={"n_head": 2, "n_layer": 6, **TIED, **_OLD})),
    ("FalconForCausalLM", Case("falcon", sizes={**HEADS, **TIED, "bias": True, "head_dim": ...})),
    ("GPTJForCausalLM", Case("gptj", sizes={**GPT, "rotary_dim": 16})),
    ("GPT2LMHeadModel", Case("gpt2", sizes=GPT, ghosts={})),
    (
        "OPTForCausalLM",
        Case("opt", sizes={**HEADS, "ffn_dim": 128, "word_embed_proj_dim": 64}, ghosts={}),
    ),
    ("Olmo2ForCausalLM", Case("olmo2", sizes=HEADS)),
    ("Olmo3ForCausalLM", Case("olmo3", sizes={**HEADS, **WINDOWS})),
    ("SmolLM3ForCausalLM", Case("smollm3", sizes={**HEADS, "no_rope_layers": [1, 1, 1, 0, 1, 1]})),
    ("SeedOssForCausalLM", Case("seed_oss")),
    ("GPTNeoXForCausalLM", Case("gpt_neox", sizes={**HEADS, "seed": 1})),
    ("Gemma3ForConditionalGeneration", _wrapper("gemma3", (1,), sizes={"sliding_window": 16})),
    (
        "Gemma4ForConditionalGeneration",
        _wrapper(
            "gemma4",
            (2,),
            sizes={
                "per_layer_config": {"5": {"head_dim": 64}},
                "vocab_size_per_layer_input": VOCABULARY_SIZE,
            },
        ),
    ),
    (
        "Llama4ForConditionalGeneration",
        _wrapper("llama4", sizes={**LLAMA4, "moe_layers": list(range(6))}),
    ),
    ("Mistral3ForConditionalGeneration", _wrapper("mistral3")),
    ("Qwen2_5_VLForConditionalGeneration", _wrapper("qwen2_5_vl", sizes=MROPE)),
    ("Qwen3VLForConditionalGeneration", _wrapper("qwen3_vl", sizes=MROPE)),
    (
        "Qwen3_5ForConditionalGeneration",
        _wrapper("qwen3_5", sizes={**LINEAR, **HALF_MROPE}, only_bf16=True),
    ),
    (
        "Qwen3_5MoeForConditionalGeneration",
        _wrapper("qwen3_5_moe", sizes={**LINEAR, **HALF_MROPE}, only_bf16=True),
    ),
    ("SmolVLMForConditionalGeneration", _wrapper("smolvlm")),
)
