"""Sizes and settings of tiny models that read more than text, and what cannot be tried."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from families.shrinking import FIRST_SPECIAL_ID, HEADS

LAYERS, WIDTH, KV_HEADS, HEAD_WIDTH, VOCABULARY = 6, 64, 2, 16, 160
TOWER_LAYERS, TOWER_WIDTH, TOWER_HEADS = 2, 32, 2

NEEDS_IMAGE = "its forward pass asks for an image"
UNTESTABLE: dict[str, str] = {
    "blip": NEEDS_IMAGE,
    "blip-2": NEEDS_IMAGE,
    "diffusion_gemma": "it denoises a canvas that each forward pass fills at random",
    "gemma3n": "its vision tower needs timm",
    "idefics": NEEDS_IMAGE,
    "instructblip": NEEDS_IMAGE,
    "instructblipvideo": "its forward pass asks for a video",
    "kosmos-2": NEEDS_IMAGE,
    "kyutai_speech_to_text": "its tokens are rows of one text id and many audio ids",
    "pi0": "its forward pass asks for a robot's state and an image",
    "pix2struct": "its forward pass asks for an image's patches",
    "pp_formulanet": NEEDS_IMAGE,
    "qwen2_5_omni": "the class has no forward pass; qwen2_5_omni_thinker is its language model",
    "qwen3_omni_moe": "the class has no forward pass; qwen3_omni_moe_thinker is its language model",
    "t5gemma2": "an encoder and a decoder, whose token ids come apart",
    "udop": "its forward pass asks for boxes around the tokens",
    "vision-encoder-decoder": NEEDS_IMAGE,
    "voxtral_realtime": "its forward pass asks for audio",
}

TEXT_PARTS = ("text_config", "decoder", "thinker_config")
TEXT = {
    "hidden_size": WIDTH,
    "d_model": WIDTH,
    "embed_dim": WIDTH,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "ffn_dim": 96,
    "d_ff": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "moe_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "share_expert_dim": 32,
    "moe_hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_layers": TOWER_LAYERS,
    "num_attention_heads": HEADS,
    "num_heads": HEADS,
    "attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_global_key_value_heads": KV_HEADS,
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": KV_HEADS,
    "num_sliding_attention_heads": HEADS,
    "head_dim": HEAD_WIDTH,
    "global_head_dim": HEAD_WIDTH,
    "swa_head_dim": HEAD_WIDTH,
    "d_kv": HEAD_WIDTH,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 128,
    "original_max_position_embeddings": 64,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "ssm_state_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "n_groups": 2,
    "chunk_size": 8,
    "block_multiple_of": 16,
    "shared_experts_intermediate_size": 32,
    "hc_lowrank": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "rotary_dim": 8,
    "attention_chunk_size": 8,
    "floor_scale": 8,
}
TOWER = {
    "hidden_size": TOWER_WIDTH,
    "d_model": TOWER_WIDTH,
    "embed_dim": TOWER_WIDTH,
    "hidden_dim": TOWER_WIDTH,
    "intermediate_size": 48,
    "encoder_ffn_dim": 48,
    "mlp_dim": 48,
    "num_hidden_layers": TOWER_LAYERS,
    "num_layers": TOWER_LAYERS,
    "n_layers": TOWER_LAYERS,
    "num_blocks": TOWER_LAYERS,
    "encoder_layers": TOWER_LAYERS,
    "depth": TOWER_LAYERS,
    "num_attention_heads": TOWER_HEADS,
    "num_key_value_heads": TOWER_HEADS,
    "encoder_attention_heads": TOWER_HEADS,
    "attention_heads": TOWER_HEADS,
    "num_heads": TOWER_HEADS,
    "head_dim": 16,
    "dim_head": 16,
    "projection_dim": TOWER_WIDTH,
    "output_dim": WIDTH,
    "out_hidden_size": WIDTH,
    "text_hidden_size": WIDTH,
    "encoder_hidden_size": TOWER_WIDTH,
    "vocab_size": VOCABULARY,
    "base_channels": 32,
    "num_position_embeddings": 16,
    "audio_hidden_size": TOWER_WIDTH,
    "adapter_in_dim": TOWER_WIDTH,
    "adapter_input_size": TOWER_WIDTH,
    "adapter_out_dim": WIDTH,
    "moe_intermediate_size": 16,
    "num_local_experts": 4,
    "num_filters": 4,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "max_position_embeddings": 128,
    "projector_hidden_size": WIDTH,
    "alignment_intermediate_size": WIDTH,
    "projection_hidden_dim": WIDTH,
    "projection_hidden_size": TOWER_WIDTH,
    "projection_intermediate_size": WIDTH,
    "merged_hidden_size": WIDTH,
    "vision_hidden_size": TOWER_WIDTH,
    "vision_output_dim": WIDTH,
    "projector_input_dim": WIDTH,
    "projector_output_dim": WIDTH,
    "max_img_size": 64,
    "downsample_hidden_size": 16,
    "output_channels": TOWER_WIDTH,
    "codebook_size": 64,
    "num_embeddings": 64,
}
TOWER_LISTS = {
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "downsample_channels": [32, 32],
}
MROPE = (
    "cosmos3_edge_text",
    "ernie4_5_vl_moe_text",
    "glm4v_moe_text",
    "glm4v_text",
    "glm_ocr_text",
    "paddleocr_vl_text",
    "qwen2_5_omni_text",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_omni_moe_text",
    "qwen3_vl_moe_text",
    "qwen3_vl_text",
    "qwen4_exp_text",
)
SPLIT = ["sliding_attention", "full_attention"] * 3
MIXED = ["dense", "sparse", "sparse"] * 2
WIDE_FULL_ATTENTION = {"per_layer_config": {"05": {"head_dim": 2 * HEAD_WIDTH}}}
PLAIN_TOWER = {
    "model_type": "siglip_vision_model",
    "hidden_size": TOWER_WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": TOWER_LAYERS,
    "num_attention_heads": TOWER_HEADS,
    "image_size": 32,
    "patch_size": 8,
}
AUDIO_CODER = {"num_filters": 4, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
EXTRA: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": FIRST_SPECIAL_ID}},
    "cohere_compass": {
        "text_config": {
            "layer_types": SPLIT,
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
                for kind in ("sliding_attention", "full_attention")
            },
        }
    },
    "deepseek_ocr2": {
        "text_config": {
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": MIXED,
        }
    },
    "dots3_note": {
        "text_config": {
            "head_dim": 24,
            "rope_parameters": {"sliding_attention": {"partial_rotary_factor": 1 / 3}},
        }
    },
    "emu3": {"vocabulary_map": {"<image>": FIRST_SPECIAL_ID, "<|extra_200|>": 61}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [32, 16]}},
    "florence2": {
        "vision_config": {
            "depths": [1, 1, 1, 1],
            "embed_dim": [16, 16, 32, 32],
            "num_heads": [2, 2, 2, 2],
            "num_groups": [2, 2, 2, 2],
            "projection_dim": WIDTH,
        }
    },
    "fun_asr_nano": {"adaptor_config": {"hidden_size": WIDTH, "intermediate_size": WIDTH // 4}},
    "gemma4": {"text_config": WIDE_FULL_ATTENTION},
    "gemma4_unified": {"text_config": WIDE_FULL_ATTENTION},
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "granite4_vision": {
        "downsample_rate": "2/4",
        "deepstack_layer_map": [[-2, 0], [-1, 1]],
        "spatial_target_layers": [2, 3, 4, 5],
        "vision_config": {"hidden_size": 64},
    },
    "hunyuan_vl": {
        "text_config": {
            "head_dim": HEAD_WIDTH,
            "rope_parameters": {"mrope_section": [2, 2, 2, 2]},
        }
    },
    "inkling_mm_model": {
        "text_config": {"mlp_layer_types": MIXED, "logits_mup_width_multiplier": 1.0}
    },
    "lfm2_vl": {
        "text_config": {
            "full_attn_idxs": [2, 5],
            "layer_types": ["conv", "conv", "full_attention"] * 2,
        }
    },
    "llama4": {"text_config": {"moe_layers": [1, 3, 5]}},
    "mistral4": {"rope_parameters": {"partial_rotary_factor": 1 / 3}},
    # With fewer keys than tokens to choose from, what its indexer chooses depends on later tokens.
    "mistral_large4": {"text_config": {"index_topk": 16}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "muse_spark": {
        "text_config": {"mlp_layer_types": MIXED},
        "audio_config": {
            "patch_sizes": [2, 2],
            "hidden_sizes": [8, TOWER_WIDTH],
            "depths": [1, 1],
            "out_hidden_size": WIDTH,
        },
    },
    "fast_vlm": {"vision_config": PLAIN_TOWER},
    "perception_lm": {
        "vision_config": {**PLAIN_TOWER, "model_args": {"embed_dim": TOWER_WIDTH}},
    },
    "qwen3_omni_moe_thinker": {"text_config": {"mlp_only_layers": [1]}},
    "qwen3_vl_moe": {"text_config": {"mlp_only_layers": [1]}},
    "qwen4_exp": {
        "text_config": {
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
    },
    "step3p7": {
        "text_config": {
            "layer_types": SPLIT,
            "sliding_window": 8,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}
            },
        }
    },
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": AUDIO_CODER,
        "semantic_tokenizer_encoder_config": AUDIO_CODER,
    },
}
CLASSES = {**MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
