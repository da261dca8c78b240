"""What layers add to the residual stream, divided: the same as the stream below multiplied.

A layer reads the stream through a norm, which takes any scale off it. So a stream that is alpha
times as large may be left as it is, if all that is added to it from there on is divided by alpha:
it is then 1 / alpha of what it was, in every layer above and at the final norm. Nothing is added to
the model, no embedding is touched, and the two agree but for the norms' epsilon.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast.errors import ArgumentError, UnsupportedModelError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.families import Family
from ghosted_fast.models.ghost_linear import GhostLinear

# What makes the output of a layer's attention; that of its MLP stands in the family's record.
_ATTENTION = {
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "mistral", "phi3", "mixtral", "qwen3_moe"), "self_attn.o_proj"
    ),
    "opt": "self_attn.out_proj",
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
}


def check_divisible(decoder: Decoder) -> None:
    """Raise unless it is known how to divide what a model's layers add.

    Raises:
        ArgumentError: The model has ghosts, or weights that are no floating-point numbers.
        UnsupportedModelError: It is not known which weights make it, or a norm stands behind them,
            which takes the scale off again.
    """
    family = decoder.family
    if any(isinstance(module, GhostLinear) for module in decoder.model.modules()):
        raise ArgumentError(
            "expected a model without ghosts, whose layers' weights can be divided, got one with "
            "ghosts: begin with the dense model"
        )
    if family.name not in _ATTENTION or not family.mlp_projections:
        raise UnsupportedModelError(
            f"what layers of the family {family.name!r} add to the stream cannot be divided, "
            "since a norm stands behind it or its weights are not known: expected one of "
            f"{', '.join(_ATTENTION)}; use another recovery or criterion than 'prunecomp'"
        )
    for layer in decoder.layers:
        for owner, name in _parts(layer, family):
            if not getattr(owner, name).is_floating_point():
                raise ArgumentError(
                    "expected floating-point weights, got quantized ones, which cannot be divided: "
                    "load the model without quantization"
                )


@torch.no_grad()
def divide_branches(model: Any, divisors: Sequence[float]) -> None:
    """Divide what each layer adds to the residual stream, in place.

    Weights are replaced, not written into, and rounded once. Layers with the divisor 1 are left.

    Args:
        model: The model, see `check_divisible`.
        divisors: One for each layer, above 0.

    Raises:
        ArgumentError, UnsupportedModelError: See `check_divisible`.
    """
    decoder = Decoder.of(model)
    check_divisible(decoder)
    for layer, divisor in zip(decoder.layers, divisors, strict=True):
        if divisor == 1.0:
            continue
        for owner, name in _parts(layer, decoder.family):
            setattr(owner, name, _divided(getattr(owner, name), divisor))


def _parts(layer: nn.Module, family: Family) -> list[tuple[nn.Module, str]]:
    """Return the parameters of a layer that are linear in what it adds: their owners and names.

    Raises:
        UnsupportedModelError: The layer has not just one attention and one MLP.
    """
    found: list[tuple[nn.Module, str]] = []
    for paths in ((_ATTENTION[family.name],), family.mlp_projections):
        items = [(path, item) for path in paths if (item := _at(layer, path)) is not None]
        if len(items) != 1:
            raise UnsupportedModelError(
                f"expected one of {', '.join(paths)} in each layer of the {family.name} model, "
                f"found {len(items)}"
            )
        ((path, item),) = items
        if isinstance(item, nn.Parameter):  # stacked weights of experts
            owner, _, name = path.rpartition(".")
            found.append((layer.get_submodule(owner), name))
            continue
        found.append((item, "weight"))
        if getattr(item, "bias", None) is not None:
            found.append((item, "bias"))
    return found


def _at(layer: nn.Module, path: str) -> Any:
    item: Any = layer
    for name in path.split("."):
        item = getattr(item, name, None)
        if item is None:
            return None
    return item


def _divided(weight: Tensor, divisor: float) -> nn.Parameter:
    new = (weight.double() / divisor).to(weight.dtype)
    return nn.Parameter(new, requires_grad=weight.requires_grad)
