"""Sizes and settings of tiny causal models, and what cannot be tried."""

from __future__ import annotations

from typing import Any

from families.shrinking import HEADS

LAYERS, WIDTH, KV_HEADS, HEAD_WIDTH, VOCABULARY = 6, 64, 2, 16, 128
TOWER_LAYERS, TOWER_WIDTH, TOWER_HEADS = 2, 32, 2
NOISE = 0.05

UNTESTABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "it reads the hidden states and the cache of another model",
    "gemma4_unified_assistant": "it reads the hidden states and the cache of another model",
    "musicgen": "its tokens are audio codes, several rows for one text",
    "musicgen_melody": "its tokens are audio codes, several rows for one text",
}

SIZES: list[tuple[int, tuple[str, ...]]] = [
    (
        WIDTH,
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "emb_dim",
            "embedding_dim",
            "embedding_size",
            "word_embed_proj_dim",
            "attention_hidden_size",
            "lru_width",
        ),
    ),
    (
        LAYERS,
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
            "num_decoder_layers",
            "num_encoder_layers",
            "num_blocks",
            "max_window_layers",
        ),
    ),
    (
        HEADS,
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "attention_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "num_decoder_attention_heads",
            "num_encoder_attention_heads",
            "swa_num_attention_heads",
            "num_sliding_attention_heads",
            "linear_num_value_heads",
            "linear_num_heads",
            "num_query_groups",
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
        ),
    ),
    (
        KV_HEADS,
        (
            "num_key_value_heads",
            "num_kv_heads",
            "kv_n_heads",
            "num_global_key_value_heads",
            "swa_num_key_value_heads",
            "linear_num_key_heads",
            "index_n_heads",
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_topk",
            "moe_top_k",
            "moe_k",
            "top_k_experts",
            "zero_expert_num",
            "o_groups",
            "n_groups",
        ),
    ),
    (
        1,
        (
            "n_shared_experts",
            "num_shared_experts",
            "moe_num_shared_experts",
            "n_group",
            "num_expert_group",
            "topk_group",
            "first_k_dense_replace",
            "num_dense_layers",
            "moe_layer_start_index",
        ),
    ),
    (
        HEAD_WIDTH,
        (
            "head_dim",
            "global_head_dim",
            "swa_head_dim",
            "dim_head",
            "d_head",
            "d_kv",
            "attention_head_dim",
            "attention_head_size",
            "kv_channels",
            "qk_nope_head_dim",
            "v_head_dim",
            "kv_lora_rank",
            "q_lora_rank",
            "o_lora_rank",
            "index_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_head_dim",
            "state_size",
            "ssm_state_size",
            "mamba_d_state",
            "query_pre_attn_scalar",
            "index_topk",
            "rel_extent",
            "input_embedding_size",
            "pronunciation_embed_dim",
            "shape_embed_dim",
            "laurel_rank",
            "block_multiple_of",
            "block_size",
            "adapter_rank",
            "router_hidden_size",
            "dim_model_base",
        ),
    ),
    (
        8,
        (
            "qk_rope_head_dim",
            "rotary_dim",
            "hidden_size_per_layer_input",
            "time_step_rank",
            "mamba_dt_rank",
            "mamba_chunk_size",
            "chunk_size",
            "d_rel",
            "gated_norm_rank",
            "hc_lowrank",
            "floor_scale",
            "sliding_window",
            "sliding_window_size",
            "attention_window_size",
            "attention_chunk_size",
            "window_size",
            "local_attention",
            "keep_window_size",
            "local_attention_window_len",
        ),
    ),
    (24, ("qk_head_dim",)),
    (
        96,
        (
            "intermediate_size",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "ffn_dim",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_hidden_size",
            "feed_forward_size",
            "dim_ff",
            "dff",
            "d_ff",
            "d_inner",
            "output_embedding_size",
        ),
    ),
    (
        32,
        (
            "moe_intermediate_size",
            "expert_ffn_hidden_size",
            "shared_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "mamba_d_head",
            "mamba_head_dim",
            "mamba_headdim",
        ),
    ),
    (
        VOCABULARY,
        (
            "vocab_size",
            "decoder_vocab_size",
            "unpadded_vocab_size",
            "vocab_size_per_layer_input",
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_seq_len",
            "context_length",
            "model_max_length",
            "max_target_positions",
            "max_source_positions",
            "mamba_d_ssm",
            "pronunciation_vocab_size",
            "shape_vocab_size",
        ),
    ),
    (64, ("original_max_position_embeddings",)),
]
TEXT = {name: size for size, names in SIZES for name in names}
TEXT |= {"mamba_n_heads": 4, "mamba_num_heads": 4}
TOWER_SIZES: list[tuple[int, tuple[str, ...]]] = [
    (
        TOWER_WIDTH,
        (
            "hidden_size",
            "d_model",
            "embed_dim",
            "hidden_dim",
            "adapter_in_dim",
            "adapter_input_size",
            "projection_dim",
            "base_channels",
        ),
    ),
    (48, ("intermediate_size", "encoder_ffn_dim", "mlp_dim")),
    (TOWER_LAYERS, ("num_hidden_layers", "num_layers", "encoder_layers", "depth", "num_blocks")),
    (TOWER_HEADS, ("num_attention_heads", "num_key_value_heads", "num_heads", "attention_heads")),
    (
        WIDTH,
        ("output_dim", "out_hidden_size", "text_hidden_size", "output_channels", "adapter_out_dim"),
    ),
    (16, ("head_dim", "num_position_embeddings")),
]
TOWER = {name: size for size, names in TOWER_SIZES for name in names}
TEXT_PARTS = ("text_config", "decoder", "decoder_config", "global_config", "encoder_config")

SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "linear_attention", "full_attention"] * 2
HYBRID = ["linear_attention", "linear_attention", "hybrid"] * 2
CONVOLVED = ["conv", "conv", "full_attention"] * 2
SPARSE = ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"] * 2
PREFIX = ["dense"] + ["sparse"] * 5
INDEXERS = ["full", "full", "shared", "shared", "full", "shared"]
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FEW_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
# Gemma 4 derives the settings of single layers from their types.
_GEMMA4 = {"per_layer_config": ..., "global_head_dim": 2 * HEAD_WIDTH}
_DOTS3_NOTE = {
    "head_dim": 24,
    "rope_parameters": {"sliding_attention": {"partial_rotary_factor": 1 / 3}},
}
_QWEN4 = {
    "eos_token_id": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [2],
    "number_of_conv_states": 3,
    "ple_embed_dim": WIDTH,
    "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "heads_per_ngram": 2,
}

EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 5]},
    "blt": {
        "encoder_hash_byte_group_vocab": 512,
        "patcher_config": {"hidden_size": WIDTH, "num_attention_heads": HEADS},
        "encoder_config": {"hidden_size_global": WIDTH, "num_hidden_layers": 2},
        "decoder_config": {"hidden_size_global": WIDTH, "num_hidden_layers": 2},
    },
    "cohere2_moe": {"mlp_layer_types": PREFIX},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": {
            kind: {**PLAIN_ROPE, "mrope_section": [3, 3, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": KV_HEADS},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 96, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v4": {
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ]
        * 2,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots1": {**FEW_EXPERTS, "layer_types": SLIDING, "first_k_dense_replace": 1},
    "dots3_note": {"text_config": _DOTS3_NOTE},
    "dots3_note_text": _DOTS3_NOTE,
    "ernie4_5_moe": {"moe_layer_end_index": LAYERS - 1},
    "gemma3n_text": {
        "num_hidden_layers": 8,
        "num_kv_shared_layers": 1,
        "intermediate_size": [96] * 8,
        "layer_types": [*SLIDING, "sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 6,
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": {
        **_GEMMA4,
        "num_hidden_layers": 8,
        "num_kv_shared_layers": 1,
        "layer_types": [*SLIDING, "sliding_attention", "full_attention"],
    },
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "glm_moe_dsa": {"indexer_types": INDEXERS},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": LINEAR},
    "hrm_text": {"num_layers_per_stack": None},
    "hunyuan_v1_dense": {"head_dim": HEAD_WIDTH},
    "hunyuan_v1_moe": {"head_dim": HEAD_WIDTH},
    "hy_v4": {"indexer_types": INDEXERS},
    "inkling2_text": {"log_scaling_n_floor": 8},
    "inkling_text": {"mlp_layer_types": PREFIX},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "laguna": {"layer_types": SLIDING, "num_attention_heads_per_layer": [HEADS] * LAYERS},
    "lfm2": {"full_attn_idxs": [2, 5], "layer_types": CONVOLVED},
    "lfm2_moe": {"layer_types": CONVOLVED},
    "lfm3": {"layer_types": ["conv", "full_attention", "sliding_attention"] * 2},
    "mamba2": {"head_dim": 32},
    "mellum": {"layer_types": SLIDING},
    "minimax_m3_vl_text": {"mlp_layer_types": PREFIX, "layer_types": SPARSE},
    "ministral": {"head_dim": HEAD_WIDTH, "layer_types": SLIDING},
    "mllama": {"text_config": {"cross_attention_layers": [3]}},
    "nemotron": {"head_dim": HEAD_WIDTH, "num_key_value_heads": KV_HEADS},
    "nemotron_h": {
        "num_hidden_layers": 8,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2,
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"hash_seed": 0, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 48]},
    "rwkv": {"rescale_every": 0},
    "whisper": {"begin_suppress_tokens": []},
    "xlm": {"causal": True},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD_WIDTH,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
    },
    "zamba2": {
        "layers_block_type": HYBRID,
        "hybrid_layer_ids": [2, 5],
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD_WIDTH,
        "num_key_value_heads": HEADS,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "sliding_window": 8,
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"] * 2,
    },
}
