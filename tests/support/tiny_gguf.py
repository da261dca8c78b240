"""Tiny models in GGUF files."""

from __future__ import annotations

from pathlib import Path

from ghosted_fast.export.gguf_tokenizer import add_tokenizer
from support.tiny_engines import byte_tokenizer, engine_model


def write_gguf_model(path: Path, num_layers: int = 2, kind: str = "F32") -> None:
    """Write a model of random weights that transformers reads.

    Args:
        path: The file.
        num_layers: Its layers.
        kind: How matrices are stored, as `gguf` calls it; vectors stay fp32.
    """
    import gguf

    model = engine_model(num_layers=num_layers, head_dim=16)
    stored = gguf.GGMLQuantizationType[kind]
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_tokenizer(writer, byte_tokenizer(), config.vocab_size)
    for name, tensor in model.state_dict().items():
        numbers, its_kind = tensor.numpy(), None
        if tensor.ndim > 1 and kind != "F32":
            numbers, its_kind = gguf.quants.quantize(numbers, stored), stored
        writer.add_tensor(names.get_name(name, (".weight",)), numbers, raw_dtype=its_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
