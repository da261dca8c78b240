"""Weights that compressed-tensors unpacked for a forward pass, packed again to be saved."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

from ghosted_fast.models.structure import share_copy

_log = logging.getLogger(__name__)
_UNPACKED, _PACKED = "decompressed", "compressed"
# What only the packed form needs.
_OF_PACKED = "weight_shape"


def packed_again(model: Any) -> Any:
    """Return a model as it was loaded, where its weights were unpacked since.

    A model of compressed-tensors is unpacked by its first forward pass, and stays so. Saved then,
    it would take the space of the unpacked weights.

    Args:
        model: A transformers model.

    Returns:
        The model itself, if it is no such model. Else a copy whose weights are packed, those of
        each module if they come out the same to the bit when they are unpacked; if any do not, all
        are saved unpacked. The other weights share their memory.
    """
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is None or not any(_status(module) == _UNPACKED for module in model.modules()):
        return model
    packed = share_copy(model)
    settings = packed.config.quantization_config.quantization_config
    status = type(settings.quantization_status)
    changed = [
        name
        for name, module in packed.named_modules()
        if _status(module) == _UNPACKED and not _pack(module, compressor.force_compression_format)
    ]
    if not changed:
        settings.quantization_status = status(_PACKED)
        return packed
    _log.warning(
        "the weights of %d modules, as %s, are others once they are packed: all are saved unpacked",
        len(changed),
        changed[0],
    )
    unpacked = share_copy(model)
    for module in unpacked.modules():
        if _status(module) == _UNPACKED and hasattr(module, _OF_PACKED):
            delattr(module, _OF_PACKED)
    unpacked.config.quantization_config.quantization_config.quantization_status = status(_UNPACKED)
    return unpacked


def _status(module: Any) -> str | None:
    status = getattr(module, "quantization_status", None)
    return getattr(status, "value", status)


def _pack(module: Any, form: Any) -> bool:
    """Pack the weights of a module, and return whether they come out the same.

    In fp32: a bf16 weight over a bf16 scale, rounded to bf16, can be half a step off 127.
    """
    from compressed_tensors.compressors.base import compress_module, decompress_module

    weight = module.weight.detach()
    dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    module.float()
    compress_module(module, form)
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            if tensor is not None and tensor.dtype == torch.float32 and name in dtypes:
                tensor.data = tensor.data.to(dtypes[name])
    again = copy.deepcopy(module)
    decompress_module(again, form)
    return torch.equal(again.weight, weight)
