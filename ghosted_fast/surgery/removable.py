"""Whether a model can do without some layers: asked before any long work."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakKeyDictionary

from torch import nn

from ghosted_fast.errors import UnsupportedModelError
from ghosted_fast.facts import named_layers
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.surgery.cut import remove_layers
from ghosted_fast.surgery.proof import check_computed_alike

# Layers that cannot be removed alone, and others that can, by the list that holds them. None of
# them is kept alive by it, so that layers that are cut in place are let go.
_Alone = WeakKeyDictionary[nn.Module, str | None]
_ALONE: WeakKeyDictionary[nn.ModuleList, _Alone] = WeakKeyDictionary()


def check_removable(model: object, removed: Iterable[int]) -> None:
    """Raise, before any long work, unless a model can do without some layers.

    The layers are cut from a copy that shares the model's memory. The copy must be what is loaded
    after it was saved, and compute what the model does whose layers are passed by.

    Args:
        model: A transformers decoder-only model.
        removed: Indices of the layers to remove.

    Raises:
        ArgumentError, UnknownFamilyError, UnsupportedModelError: See `remove_layers`. Where single
            layers are at fault, the message says which are to be kept.
    """
    decoder, layers = Decoder.of(model), sorted(removed)
    reason = decoder.contract.why_needed(layers)  # looks at what the layers hand on
    if reason is not None:
        raise UnsupportedModelError(reason)
    smaller = remove_layers(decoder.model, layers)
    try:
        check_computed_alike(smaller, decoder.model, layers)
    except UnsupportedModelError as error:
        needed = [layer for layer in layers if _why_not_alone(decoder, layer) is not None]
        if not needed:
            raise
        raise UnsupportedModelError(
            f"expected {named_layers(needed)} to be kept, which others need: "
            f"{_why_not_alone(decoder, needed[0])}"
        ) from error


def _why_not_alone(decoder: Decoder, layer: int) -> str | None:
    """Return why a layer cannot be removed even alone, None if it can; tried once."""
    known = _ALONE.setdefault(decoder.layers, _Alone())
    module = decoder.layers[layer]
    if module not in known:
        try:
            smaller = remove_layers(decoder.model, [layer])
            check_computed_alike(smaller, decoder.model, [layer])
            known[module] = None
        except UnsupportedModelError as error:
            known[module] = str(error)
    return known[module]
