"""Models whose packed weights were unpacked while they were loaded."""

from __future__ import annotations

from typing import Any


def forget_packing(model: Any) -> None:
    """Make an ordinary model, in place, of one whose weights were unpacked when it was loaded.

    What is left of the packed file forbids to save it, or gives the weights the names that they had
    in that file.

    Args:
        model: A transformers model; one that is still packed is left as it is.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        if any(
            _unpacks(conversion) for conversion in getattr(model, "_weight_conversions", None) or []
        ):
            model._weight_conversions = None  # those of the family hold
        return
    if getattr(quantizer, "packed_modules", None):
        return
    method = getattr(quantizer.quantization_config, "quant_method", None)
    if getattr(method, "value", method) == "gguf":
        model.hf_quantizer = None
        quantizer.remove_quantization_config(model)


def _unpacks(conversion: Any) -> bool:
    """Return whether a step of loading is one of a quantizer's."""
    operations = getattr(conversion, "operations", None) or []
    return any(getattr(operation, "hf_quantizer", None) is not None for operation in operations)
