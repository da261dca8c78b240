"""A view of a decoder-only model: what every room asks of it, asked once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.models.built_whole import text_config_of
from ghosted_fast.models.contract import Contract, contract_of, device_of
from ghosted_fast.models.families import (
    Family,
    decoder_layers,
    decoder_of,
    final_norm,
    find_family,
    hidden_size,
)
from ghosted_fast.models.needed_layers import why_needed

_DEFAULT_NORM_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Decoder:
    """A transformers decoder-only model, and where its parts are.

    Attributes:
        model: The model.
        family: The record of its family.
        owner: The module that owns and runs the layers.
        layers: The decoder layers.
        hidden_size: Width of the hidden state between two of them.
        dtype: Of its weights, and so of ghosts.
        device: Of its first weight in memory: where tokens go.
    """

    model: Any
    family: Family
    owner: nn.Module
    layers: nn.ModuleList
    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: Any) -> Decoder:
        """Return the view of a model; one that is a view already is returned as it is.

        Raises:
            TypeError: `model` is no transformers model.
            UnknownFamilyError: See `find_family`, as for UnsupportedModelError and VersionError.
        """
        if isinstance(model, cls):
            return model
        family = find_family(model)
        return cls(
            model=model,
            family=family,
            owner=decoder_of(model, family),
            layers=decoder_layers(model, family),
            hidden_size=hidden_size(model),
            dtype=next(model.parameters()).dtype,
            device=device_of(model),
        )

    @property
    def num_layers(self) -> int:
        """Decoder layers that the model has."""
        return len(self.layers)

    @property
    def name(self) -> str:
        """What the model is called: what it was loaded from, or its class."""
        return model_name(self.model)

    @property
    def final_norm(self) -> nn.Module:
        """The norm after the last layer."""
        return final_norm(self.model, self.family)

    @property
    def contract(self) -> Contract:
        """What the layers take from one another: looked at once, in a short forward pass.

        Raises:
            UnsupportedModelError: The layers hand on more than one hidden state.
        """
        return contract_of(self.model, self.layers, self.hidden_size)

    @property
    def uses_layers_below(self) -> bool:
        """Whether layers use more of earlier ones than the state that the last of them hands on."""
        text = text_config_of(self.model.config)
        return bool(getattr(text, "num_kv_shared_layers", 0) or self.contract.makers)

    def needs(self, removed: Collection[int]) -> str | None:
        """Return why a model cannot do without some layers together, None if it can.

        Args:
            removed: Indices of the layers.
        """
        return why_needed(text_config_of(self.model.config), self.num_layers, removed)

    @property
    def norm_eps(self) -> float:
        """Epsilon of the model's own rms, which engines know: that of normed ghosts."""
        return float(
            getattr(text_config_of(self.model.config), "rms_norm_eps", None) or _DEFAULT_NORM_EPS
        )

    def mlp_output(self, layer: int) -> nn.Module:
        """Return the module whose output a layer adds last: its MLP, or the norm behind it.

        Raises:
            UnsupportedModelError: The family's record does not say which it is.
        """
        if not self.family.mlp_output:
            raise UnsupportedModelError(
                f"the recovery 'replaceme' needs to know what a layer of the family "
                f"{self.family.name!r} adds last: give mlp_output and mlp_projections in its "
                "record (ghosted_fast.models.families.register_family), or use another recovery"
            )
        return self.layers[layer].get_submodule(self.family.mlp_output)


def model_name(model: Any) -> str:
    """Return what a model is called: what it was loaded from, or its class."""
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode, and leave it in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
