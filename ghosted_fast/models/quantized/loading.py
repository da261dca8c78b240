"""A copy of a model that is quantized as it is loaded, to calibrate in."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from ghosted_fast.errors import ArgumentError, MissingExtraError
from ghosted_fast.models.loading import (
    auto_class,
    load_tokenizer,
    loading,
    locate_model,
    read_config,
    resolve_dtype,
    source_options,
)

KINDS = ("int8", "nf4")
_PACKAGES = ("bitsandbytes", "accelerate")


def check_quantizable(spec: str | Path, kind: str, trust_remote_code: bool = False) -> None:
    """Raise, before any weight is read, unless a model can be loaded in a quantized form.

    Args:
        spec: A hub id or a local folder.
        kind: One of `KINDS`.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ArgumentError: There is no such kind, or the model is quantized already or a GGUF file.
        MissingExtraError: Package bitsandbytes or accelerate is absent.
        SourceError: There is no such model.
    """
    if kind not in KINDS:
        raise ArgumentError(f"expected a model quantized in {' or '.join(KINDS)}, got {kind!r}")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"a model in {kind} needs {' and '.join(missing)}: pip install {' '.join(_PACKAGES)}"
        )
    name, gguf_file = locate_model(str(spec), None)
    if gguf_file is not None:
        raise ArgumentError(
            f"expected a folder or hub id with the unquantized weights, to load them in {kind}, "
            f"got the GGUF file {gguf_file!r}: name the model that it was made of"
        )
    config = read_config(name, trust_remote_code)
    if quantization_of(config) is not None:
        raise ArgumentError(
            f"expected unquantized weights to load in {kind}, got {str(spec)!r}, which is "
            f"quantized ({quantization_of(config)}): name the model that it was made of, or fit on "
            "it as it is"
        )


def load_quantized(
    spec: str | Path,
    kind: str,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a language model, quantized by bitsandbytes, and its tokenizer, in evaluation mode.

    Weights are quantized one by one as they are read, so that they never are in memory in full.

    Args:
        spec: A hub id or a local folder.
        kind: "int8" or "nf4".
        dtype: That of what is not quantized, and of the ghosts; see `load_model`.
        device: Where the model goes.
        trust_remote_code: Whether code that comes with the model may run.

    Returns:
        The model and the tokenizer.

    Raises:
        ArgumentError: See `check_quantizable`; or nothing in the model can be quantized.
        MissingExtraError, SourceError: See `check_quantizable`.
    """
    check_quantizable(spec, kind, trust_remote_code)
    from transformers import BitsAndBytesConfig

    name, _ = locate_model(str(spec), None)
    config = read_config(name, trust_remote_code)
    wanted = resolve_dtype(dtype)
    if kind == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        computed = wanted or config.dtype or torch.float32
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed
        )
    options = source_options(name, trust_remote_code)
    tokenizer = load_tokenizer(name, spec, options)
    with loading(f"{spec} in {kind}"):
        model = auto_class(config).from_pretrained(
            name,
            dtype=wanted or "auto",
            quantization_config=settings,
            device_map={"": device},
            **options,
        )
    if not any(type(module).__module__.startswith("bitsandbytes") for module in model.modules()):
        raise ArgumentError(
            f"expected linear layers that bitsandbytes can quantize in {kind}, got none in "
            f"{str(spec)!r}: fit on the model as it is"
        )
    return model.eval(), tokenizer


def quantization_of(config: Any) -> str | None:
    """Return what a model's weights are quantized by, None if they are not.

    Args:
        config: The model's configuration.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    values = settings if isinstance(settings, dict) else settings.to_dict()
    method = values.get("quant_method")
    name = str(getattr(method, "value", method))
    if values.get("load_in_8bit"):
        return f"{name} int8"
    if values.get("load_in_4bit"):
        return f"{name} {values.get('bnb_4bit_quant_type')}"
    form = values.get("format")
    return f"{name} {form}" if form else name
