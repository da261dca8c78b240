"""Whether a model is one that can be worked on as it is: not wrapped, not elsewhere, not empty."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast.errors import NonFiniteError, UnsupportedModelError

_LOGGER = logging.getLogger(__name__)
# What a module without weights is marked by while random ones stand in for them.
STAND_IN = "_stands_in_for"
# What an invalid generation configuration is repaired to.
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def check_unwrapped(model: Any) -> None:
    """Raise if a model is wrapped by another library.

    Raises:
        TypeError, UnsupportedModelError: It is; the message says how to unwrap it.
    """
    kind, name = type(model), type(model).__name__
    if name == "OptimizedModule" and hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(
            f"expected a model as it was before torch.compile, got {name}: pass model._orig_mod, "
            "and compile the result"
        )
    if kind.__module__.partition(".")[0] == "peft":
        raise _adapters(name)
    if name in ("DataParallel", "DistributedDataParallel"):
        raise TypeError(f"expected a transformers model, got {name} around one: pass model.module")


def _adapters(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"expected a model without adapters, got {name} with some: merge them first (PEFT's "
        "model.merge_and_unload()), and pass what that returns"
    )


def has_stand_ins(model: nn.Module) -> bool:
    """Return whether a model's weights are in files, and others are lent to it while it runs."""
    return any(STAND_IN in vars(module) for module in model.modules())


def is_offloaded(model: nn.Module) -> bool:
    """Return whether accelerate keeps weights of a model elsewhere, and fetches them to compute."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return False  # refused for its adapters
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    return hooked and any(weight.is_meta for weight in model.parameters())


def check_in_memory(model: nn.Module) -> None:
    """Raise unless all weights of a model are in memory, and are all that it computes with.

    Raises:
        UnsupportedModelError: Some are offloaded, on the meta device, or adapters.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _adapters(type(model).__name__)
    gone = next((name for name, weight in model.named_parameters() if weight.is_meta), None)
    if gone is None:
        return
    if is_offloaded(model):
        raise UnsupportedModelError(
            f"expected all weights of {type(model).__name__} in memory, got {gone} offloaded by "
            "accelerate: load the model without device_map, or onto one device, or give its folder "
            "to ghost_model or prune_folder, which leave it in its files"
        )
    raise UnsupportedModelError(
        f"expected all weights of {type(model).__name__} in memory, got {gone} on the meta device: "
        "load the model with from_pretrained"
    )


def check_finite_logits(model: Any, logits: Any) -> None:
    """Raise unless what a model says of a few plain tokens is finite.

    Raises:
        NonFiniteError: It is not; the message names what usually helps.
    """
    if not isinstance(logits, Tensor) or bool(torch.isfinite(logits).all()):
        return
    half = logits.dtype == torch.float16
    advice = "load it in bfloat16, whose range is larger (dtype='bfloat16', --dtype bf16)"
    if not half:
        advice = "check its weights, or copy or download the model again"
    raise NonFiniteError(
        f"expected finite logits of {type(model).__name__} for plain tokens, got NaN or infinity "
        f"in {str(logits.dtype).removeprefix('torch.')}: {advice}"
    )


def repair_generation(model: Any) -> None:
    """Give a model whose generation settings transformers refuses to save others that it saves.

    Args:
        model: The model, whose `generation_config` may be replaced; a warning says so.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError as error:
        kept = {key: getattr(settings, key, None) for key in _KEPT}
        why = " ".join(str(error).split())
        _LOGGER.warning(
            "the model's generation settings are such as transformers does not save (%s): only its "
            "special tokens are kept",
            why,
        )
        model.generation_config = type(settings)(**kept)
