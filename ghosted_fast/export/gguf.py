"""A ghosted model as a GGUF file that stock llama.cpp runs.

llama.cpp's architecture `deci` has a block whose attention is one matrix W on the normed hidden
state, x + W x / rms(x): a normed ghost as it is. A feed-forward part is expected of every block,
and gets zeros. Every other block is that of a llama, so families that compute as llama does fit:
with rotations of halves made rotations of pairs by a permutation of the rows of queries and keys.

Source: llama.cpp, src/models/deci.cpp, where Nemotron's blocks are built.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ghosted_fast.errors import ArgumentError, MissingExtraError, UnsupportedModelError
from ghosted_fast.models.families import decoder_layers, decoder_of, dense_model_type, final_norm
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.ghosted_layers import INPUT, OUTPUT, ghost_of, ghosts_of

Precision = Literal["f32", "f16", "q8_0"]

FAMILIES = ("llama", "mistral", "qwen2", "phi3", "granite", "seed_oss", "ernie4_5")
# Those that rotate channels which stand side by side, as llama.cpp does.
_ROTATES_PAIRS = ("ernie4_5",)
# Why the blocks of other families are none of a llama.
REFUSED = {
    **dict.fromkeys(
        ("qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3", "exaone4"),
        "it norms queries and keys",
    ),
    **dict.fromkeys(("gemma2", "glm4"), "it norms what its parts add"),
    **dict.fromkeys(("gemma4_text", "llama4_text"), "its layers are of several kinds"),
    **dict.fromkeys(
        ("mixtral", "gpt_oss", "glm4_moe", "granitemoe", "ernie4_5_moe"), "it has experts"
    ),
    "deepseek_v3": "it has experts and latent attention",
    **dict.fromkeys(
        (
            *("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "granitemoehybrid"),
            *("nemotron_h", "falcon_h1", "lfm2"),
        ),
        "it has layers with a recurrent state or convolutions",
    ),
    "smollm3": "some of its layers rotate nothing",
    "ministral3": "it scales queries by their position",
    "phi4_multimodal": "it reads pictures and sound",
    **dict.fromkeys(
        ("bloom", "mpt", "falcon", "gptj", "gpt2", "opt", "gpt_neox"),
        "it has layer norms with a bias and no gated feed-forward part",
    ),
    **dict.fromkeys(
        (
            *("gemma3", "gemma4", "llama4", "mistral3", "qwen2_5_vl", "qwen3_vl"),
            *("qwen3_5", "qwen3_5_moe", "smolvlm"),
        ),
        "it reads pictures",
    ),
}
_STATIC_ROPES = ("default", "linear", "llama3")
# The least that a block of Q8_0 holds; the feed-forward part of a ghost's block does nothing.
_IDLE_WIDTH = 32
_PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def export_gguf(
    model: Any,
    path: str | os.PathLike[str],
    tokenizer: Any,
    precision: Precision = "f32",
    overwrite: bool = False,
) -> Path:
    """Write a model, ghosted or not, as a GGUF file for stock llama.cpp.

    Args:
        model: A causal language model of one of `FAMILIES`; its ghosts normed, without bias and
            without a state for first tokens.
        path: The file to make. Its parents are made as needed.
        tokenizer: A transformers tokenizer, or the path of a GGUF file whose tokenizer is taken.
        precision: How matrices are stored: "f32", "f16" or "q8_0". Vectors stay fp32.
        overwrite: Whether an existing file is replaced, once the new one is complete.

    Returns:
        The path.

    Raises:
        MissingExtraError: Package gguf is absent.
        ArgumentError: The path is taken, or the precision is unknown.
        UnsupportedModelError: llama.cpp's blocks cannot compute what this model does.
        SourceError: The tokenizer has no counterpart in llama.cpp.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("a GGUF file needs gguf: pip install 'ghosted_fast[gguf]'")
    import gguf

    from ghosted_fast.export.gguf_tokenizer import add_tokenizer

    target = Path(path)
    if target.is_dir() or (target.exists() and not overwrite):
        raise ArgumentError(
            f"{str(target)!r} exists: name another file" + (", or overwrite" * target.is_file())
        )
    kinds = {
        "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
        "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
        "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    }
    if precision not in kinds:
        raise ArgumentError(f"expected precision to be f32, f16 or q8_0, got {precision!r}")
    check_exportable(model)
    kind, file_type = kinds[precision]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        writer = gguf.GGUFWriter(Path(folder) / "model.gguf", "deci")
        writer.add_name(target.stem)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_sizes(writer, model)
        add_tokenizer(writer, tokenizer, model.get_input_embeddings().weight.shape[0])
        for name, tensor in _tensors(model):
            array = tensor.detach().float().cpu().contiguous().numpy()
            fits = precision != "q8_0" or array.shape[-1] % _IDLE_WIDTH == 0
            # As llama.cpp's own converter: rows that make no whole blocks stay in f16.
            stored = kind if fits else gguf.GGMLQuantizationType.F16
            if array.ndim == 1:
                stored = gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (Path(folder) / "model.gguf").replace(target)
    return target


def reason_against(family: str) -> str:
    """Return why stock llama.cpp does not run a family with ghosts, as the end of a sentence."""
    return REFUSED.get(family, "this family was not tried")


def check_exportable(model: Any) -> None:
    """Raise unless blocks of stock llama.cpp compute what a model does.

    Raises:
        UnsupportedModelError: They do not; the message says what to change.
    """
    config = model.config
    family = dense_model_type(config)
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"stock llama.cpp has ghosts in llama's blocks alone: expected a model of the families "
            f"{', '.join(FAMILIES)}, got {family!r}: {reason_against(family)}. Serve it with vLLM, "
            "or export --to ort-genai."
        )
    _check_ghosts(model)
    rope = config.rope_parameters
    head = _head_size(config)
    rotated = 2 * _frequencies(model).numel()
    unlike = {
        "config.hidden_act": (config.hidden_act, "silu"),
        "the number of rotated channels in a head": (rotated, head),
    }
    for name, (value, required) in unlike.items():
        if value != required:
            raise UnsupportedModelError(
                f"stock llama.cpp has ghosts in llama's blocks alone: expected {name} = "
                f"{required}, got {value}. Serve the model with vLLM."
            )
    if rope["rope_type"] not in _STATIC_ROPES:
        raise UnsupportedModelError(
            f"expected a rope_type among {', '.join(_STATIC_ROPES)}, whose frequencies a GGUF file "
            f"can hold, got {rope['rope_type']!r}. Serve the model with vLLM."
        )


def _check_ghosts(model: Any) -> None:
    eps = model.config.rms_norm_eps
    found: list[str] = []
    for index, side, ghost in ghosts_of(decoder_layers(model)):
        where = f"the ghost at the {side} of layer {index}"
        if ghost.norm_eps is None:
            found.append(f"{where} is applied to the hidden state itself")
        elif abs(ghost.norm_eps - eps) > 1e-6 * eps:
            found.append(f"{where} has norm_eps {ghost.norm_eps:g}, and the model's norms {eps:g}")
        if ghost.bias is not None:
            found.append(f"{where} has a bias")
        if ghost.first_state is not None:
            found.append(f"{where} has a state for first tokens")
    if found:
        raise UnsupportedModelError(
            f"stock llama.cpp has no place for what this model does: {'; '.join(found)}. Fit it "
            "again with `ghosted-fast fit --features normed --no-bias --first-state off`, and with "
            "--remove in place of --removed, so that layers are chosen which do without."
        )


def _head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _blocks(model: Any) -> Iterator[nn.Module]:
    """Yield layers and ghosts in the order they act; each is a block of its own in the file."""
    for layer in decoder_layers(model):
        before, after = ghost_of(layer, INPUT), ghost_of(layer, OUTPUT)
        if before is not None:
            yield before
        yield layer
        if after is not None:
            yield after


def _add_sizes(writer: Any, model: Any) -> None:
    config = model.config
    is_ghost = [isinstance(block, GhostLinear) for block in _blocks(model)]
    context = config.max_position_embeddings
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        dense_model_type(config) in ("mistral", "phi3") and config.sliding_window
    ):
        context = min(context, config.sliding_window)  # within the window nothing slides
    writer.add_block_count(len(is_ghost))
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    writer.add_head_count([config.num_attention_heads] * len(is_ghost))
    writer.add_head_count_kv([0 if ghost else config.num_key_value_heads for ghost in is_ghost])
    writer.add_feed_forward_length(
        [_IDLE_WIDTH if ghost else config.intermediate_size for ghost in is_ghost]
    )
    head = _head_size(config)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield llama.cpp's names and the tensors [out, in] or [size] of a model."""
    config = model.config
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    scales = _scales(config)
    yield "token_embd.weight", _scaled(embedding, scales.get("token_embd"))
    yield "output_norm.weight", final_norm(model).weight  # type: ignore[misc]
    if head is not embedding or scales:
        yield "output.weight", _scaled(head, scales.get("output"))
    if config.rope_parameters["rope_type"] != "default":
        frequencies = _frequencies(model)
        exponents = torch.arange(len(frequencies), dtype=torch.float64) * 2 / _head_size(config)
        plain = config.rope_parameters["rope_theta"] ** -exponents
        yield "rope_freqs.weight", (plain / frequencies).float()
    for index, block in enumerate(_blocks(model)):
        prefix = f"blk.{index}"
        if isinstance(block, GhostLinear):
            parts = _ghost_tensors(block)
        else:
            parts = _layer_tensors(block, config, scales)
        for name, tensor in parts:
            yield f"{prefix}.{name}", tensor


def _scales(config: Any) -> dict[str, float]:
    """Return the factors of a Granite, which its matrices take in."""
    if dense_model_type(config) != "granite":
        return {}
    return {
        "token_embd": config.embedding_multiplier,
        "output": 1.0 / config.logits_scaling,
        "attn_q": config.attention_multiplier * _head_size(config) ** 0.5,
        "attn_output": config.residual_multiplier,
        "ffn_down": config.residual_multiplier,
    }


def _scaled(tensor: Tensor, factor: float | None) -> Tensor:
    return tensor if factor is None else tensor.double() * factor


def _frequencies(model: Any) -> Tensor:
    """Return the angular frequencies [head / 2] of a model's rotations, fp64."""
    decoder: Any = decoder_of(model)
    frequencies: Tensor = decoder.rotary_emb.inv_freq
    return frequencies.cpu().double()


def _layer_tensors(
    layer: Any, config: Any, scales: dict[str, float]
) -> Iterator[tuple[str, Tensor]]:
    head = int(layer.self_attn.head_dim)
    halves = dense_model_type(config) not in _ROTATES_PAIRS
    for name, kind, tensor in _projections(layer, config, head):
        if halves and name in ("attn_q", "attn_k"):
            tensor = _pairs_from_halves(tensor, head)
        yield f"{name}.{kind}", _scaled(tensor, scales.get(name))


def _projections(layer: Any, config: Any, head: int) -> Iterator[tuple[str, str, Tensor]]:
    """Yield llama.cpp's name, "weight" or "bias", and each tensor of a layer."""
    modules = dict(layer.named_modules())
    for path, name in _PROJECTIONS.items():
        if path in modules:
            for kind, tensor in modules[path].named_parameters():
                yield name, kind, tensor
    if "self_attn.qkv_proj" in modules:  # Phi 3 keeps them in one
        keys = config.num_key_value_heads * head
        sizes = [config.num_attention_heads * head, keys, keys]
        parts = layer.self_attn.qkv_proj.weight.split(sizes)
        for name, tensor in zip(("attn_q", "attn_k", "attn_v"), parts, strict=True):
            yield name, "weight", tensor
        gate, up = layer.mlp.gate_up_proj.weight.chunk(2)
        yield "ffn_gate", "weight", gate
        yield "ffn_up", "weight", up


def _pairs_from_halves(rows: Tensor, head_size: int) -> Tensor:
    """Order the rows [heads * head_size, ...] so that rotated channels stand side by side."""
    halves = rows.view(-1, 2, head_size // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _ghost_tensors(ghost: GhostLinear) -> Iterator[tuple[str, Tensor]]:
    size = ghost.hidden_size
    weight = ghost.weight if ghost.scale is None else ghost.weight * ghost.scale[:, None]
    yield "attn_norm.weight", torch.ones(size)
    yield "attn_output.weight", weight
    yield "ffn_norm.weight", torch.ones(size)
    for name, shape in (
        ("ffn_gate", (_IDLE_WIDTH, size)),
        ("ffn_up", (_IDLE_WIDTH, size)),
        ("ffn_down", (size, _IDLE_WIDTH)),
    ):
        yield f"{name}.weight", torch.zeros(shape)
