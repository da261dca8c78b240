"""Small quantized models, in the forms in which they are published."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mxfp4Config,
    TorchAoConfig,
)

from ghosted_fast.testing import tiny_model

NUM_LAYERS = 6
# Left as they are, by name and by an expression.
PLAIN = ["lm_head", "model.layers.5.mlp.up_proj"]
DOWN = r"re:.*layers\.(0|4)\.mlp\.down_proj$"


def wide_llama(dtype: torch.dtype = torch.float32) -> Any:
    """Return a model whose weights have blocks of 64: the least of several formats."""
    sizes = {**tiny_model("llama").config.to_dict(), "num_hidden_layers": NUM_LAYERS}
    sizes |= {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "dtype": dtype}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).eval()


def torchao_model(folder: Path, kind: str) -> Any:
    """Return a model that torchao quantizes as it is loaded."""
    import torchao.quantization as ao

    wide_llama().save_pretrained(folder)
    int8, int4 = ao.Int8WeightOnlyConfig(), ao.IntxWeightOnlyConfig(weight_dtype=torch.int4)
    kinds = {"int8": int8, "int4": int4, "fp8": ao.Float8WeightOnlyConfig()}
    kinds["dynamic-int8"] = ao.Int8DynamicActivationInt8WeightConfig()
    if kind == "by-name":
        names = {"_default": int8, PLAIN[1]: None, DOWN: None, "model.layers.4.mlp.gate_proj": int4}
        settings = TorchAoConfig(ao.FqnToConfig(names))
    else:
        settings = TorchAoConfig(kinds[kind], modules_to_not_convert=list(PLAIN))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).eval()


def compressed_model(
    folder: Path, form: str, dtype: torch.dtype = torch.float32, **loading: Any
) -> Any:
    """Return a model that was saved by compressed-tensors, loaded with some arguments."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    weights: dict[str, Any] = {"num_bits": 8, "type": "int", "strategy": "channel"}
    if form == "float-quantized":
        weights["type"] = "float"
    if form == "pack-quantized":
        weights |= {"num_bits": 4, "strategy": "group", "group_size": 32}
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if form != "pack-quantized":
        group["input_activations"] = {
            "num_bits": 8, "type": weights["type"], "strategy": "token", "dynamic": True
        }  # fmt: skip
    settings = QuantizationConfig(
        config_groups={"group": group},
        ignore=[*PLAIN, DOWN],
        format=form,
        quantization_status="compressed",
    )
    model = wide_llama(dtype)
    apply_quantization_config(model, settings)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            blocks = module.weight.data.unflatten(-1, (-1, scheme.weights.group_size or
                                                       module.in_features))  # fmt: skip
            scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
            module.weight_scale.data.copy_(scale)
    ModelCompressor.from_pretrained_model(model, quantization_format=form).compress_model(model)
    model.save_pretrained(folder)
    _set(folder, settings.model_dump(mode="json"))
    return AutoModelForCausalLM.from_pretrained(folder, **loading).eval()


def fp8_folder(folder: Path) -> Path:
    """Save a model in fp8 with a scale for each block of 32 x 32, as DeepSeek's are."""
    model = wide_llama(torch.bfloat16)
    tensors = {}
    for name, weight in model.state_dict().items():
        tensors[name] = weight.clone()
        if "_proj.weight" in name and not name.startswith(PLAIN[1]):
            blocks = weight.float().unflatten(0, (-1, 32)).unflatten(-1, (-1, 32))
            scale = blocks.abs().amax((1, 3)) / 448
            small = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)
            tensors[name] = small.to(torch.float8_e4m3fn)
            tensors[name.replace(".weight", ".weight_scale_inv")] = scale
    settings = FineGrainedFP8Config(weight_block_size=(32, 32), modules_to_not_convert=list(PLAIN))
    return _saved(folder, model.config, tensors, settings.to_dict())


def mxfp4_folder(folder: Path) -> Path:
    """Save a gpt_oss whose experts are in MXFP4."""
    llama = tiny_model("llama").config
    config = GptOssConfig(
        num_hidden_layers=NUM_LAYERS,
        hidden_size=64,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=llama.vocab_size,
        pad_token_id=0,
        eos_token_id=1,
        dtype=torch.bfloat16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tensors = dict(GptOssForCausalLM(config).to(torch.bfloat16).state_dict())
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inner, outer = tensors.pop(name).shape
            shape = experts, outer, inner // 32
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.full(shape, 122, dtype=torch.uint8)
    names = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]
    return _saved(folder, config, tensors, Mxfp4Config(modules_to_not_convert=names).to_dict())


def _saved(folder: Path, config: Any, tensors: dict[str, Any], settings: dict[str, Any]) -> Path:
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _set(folder, settings)
    return folder


def _set(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a quantization into a saved configuration."""
    path = folder / "config.json"
    plain = {name: getattr(value, "value", value) for name, value in settings.items()}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": plain}))


QUANTIZED: dict[str, Callable[[Path], Any]] = {
    **{
        f"torchao-{kind}": lambda folder, kind=kind: torchao_model(folder, kind)
        for kind in ("int8", "int4", "fp8", "dynamic-int8", "by-name")
    },
    **{
        form: lambda folder, form=form: compressed_model(folder, form)
        for form in ("float-quantized", "int-quantized", "pack-quantized")
    },
    "pack-quantized-bf16": lambda f: compressed_model(f, "pack-quantized", torch.bfloat16),
    "int-quantized-bf16": lambda f: compressed_model(f, "int-quantized", torch.bfloat16),
    **{
        f"unpacked-{kind}": lambda folder, kind=kind: compressed_model(
            folder,
            f"{kind}-quantized",
            quantization_config=CompressedTensorsConfig(dequantize=True),
        )
        for kind in ("int", "float")
    },
    "fp8": lambda f: AutoModelForCausalLM.from_pretrained(
        fp8_folder(f), quantization_config=FineGrainedFP8Config(dequantize=True)
    ).eval(),
    "mxfp4": lambda f: AutoModelForCausalLM.from_pretrained(
        mxfp4_folder(f), quantization_config=Mxfp4Config(dequantize=True)
    ).eval(),
}


def settings_of(folder: Path) -> Any:
    """Return the settings of a quantization in a saved configuration, None if there are none."""
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def in_a_list(value: Any, found: str) -> Iterable[Any]:
    """Yield the lists and the keys of mappings under a name, wherever it is in settings."""
    if isinstance(value, dict):
        for name, entry in value.items():
            if name == found and entry is not None:
                yield list(entry)
            yield from in_a_list(entry, found)
