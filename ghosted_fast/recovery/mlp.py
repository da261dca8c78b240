"""What a layer adds last to the residual stream, and a linear map on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.models.families import decoder_layers, find_family
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.ghosted_layers import swap_class
from ghosted_fast.models.runtime_classes import bases_of, maker


@torch.no_grad()
def map_mlp_output(model: Any, layer: int, change: Tensor) -> None:
    """Make a layer add m + N m in place of m, in place.

    The map is folded into the projection that makes m. Where there is a norm between the two it
    becomes a module behind that norm; such a model cannot be saved.

    Args:
        model: The model; weights that change are replaced, not written into.
        layer: Index of the layer.
        change: N [d, d] fp64, [out, in].
    """
    family = find_family(model)
    module = decoder_layers(model)[layer]
    if not family.mlp_projections:
        owner, _, name = family.mlp_output.rpartition(".")
        norm = module.get_submodule(family.mlp_output)
        setattr(module.get_submodule(owner), name, MappedNorm(norm, change, model.dtype))
        swap_class(model, "mapped")
        return
    folded = 0
    for path in family.mlp_projections:
        owner, _, name = path.rpartition(".")
        parent = _submodule(module, owner)
        part = getattr(parent, name, None)
        if isinstance(part, nn.Parameter):
            setattr(parent, name, _mapped(part, change))
            folded += 1
        elif isinstance(part, nn.Module):
            _map_projection(part, change)
            folded += 1
    if folded != 1:
        raise UnsupportedModelError(
            f"expected one of {', '.join(family.mlp_projections)} in layer {layer} of the "
            f"{family.name} model, found {folded}"
        )


def _map_projection(linear: Any, change: Tensor) -> None:
    transposed = not isinstance(linear, nn.Linear)  # GPT-2's Conv1D keeps [in, out]
    linear.weight = _mapped(linear.weight, change, transposed)
    if getattr(linear, "bias", None) is not None:
        linear.bias = _mapped(linear.bias[:, None], change, squeeze=True)


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in filter(None, path.split(".")):
        module = getattr(module, name, None)  # type: ignore[assignment]
        if module is None:
            return None
    return module


def _mapped(
    weight: Any, change: Tensor, transposed: bool = False, squeeze: bool = False
) -> nn.Parameter:
    """Return W + N W, the product in fp64, for W [..., d, in], or [in, d] if transposed."""
    wide = weight.double()
    wide = wide + (wide @ change.mT if transposed else change @ wide)
    new = (wide.squeeze(-1) if squeeze else wide).to(weight.dtype)
    return nn.Parameter(new, requires_grad=weight.requires_grad)


class MappedNorm(nn.Module):
    """A norm and a square operator behind it.

    Args:
        norm: The norm.
        change: N [d, d]: the output is n + N n, with n the norm's.
        dtype: Of the operator.
    """

    def __init__(self, norm: nn.Module, change: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm
        self.map = GhostLinear(len(change), device=change.device, dtype=dtype)
        with torch.no_grad():
            self.map.weight.copy_(change)
        self.map.requires_grad_(False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the mapped, normed states [..., d]."""
        return self.map(self.norm(hidden_states))


@maker("mapped")
def _mapped_model_class(base: Any) -> type:
    """Make the class of models with a `MappedNorm`: they run, but cannot be saved."""

    def save_pretrained(self: Any, *_: Any, **__: Any) -> None:
        raise UnsupportedModelError(
            f"{base.__name__} with the recovery 'replaceme' cannot be saved: its map stands behind "
            "a norm, where it cannot be folded into the MLP, and transformers knows no such "
            "layer. Use the recovery 'ghost' for a model to keep."
        )

    return type(
        base.__name__,
        bases_of(base),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "save_pretrained": save_pretrained,
        },
    )
