"""Models that accelerate has offloaded: they are in no memory, but perhaps in their files."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from ghosted_fast.errors import GhostedFastError, UnsupportedModelError
from ghosted_fast.models.checked.usable import is_offloaded
from ghosted_fast.models.unloaded.files import StoredTensor
from ghosted_fast.models.unloaded.opening import Unloaded, open_unloaded
from ghosted_fast.text.files import first_line

_LOGGER = logging.getLogger(__name__)
# Numbers of each weight in memory that are compared with the file's.
_COMPARED = 1024


def in_files_if_offloaded(model: Any) -> Any:
    """Return an offloaded model as it lies in the files that it was loaded from, others unchanged.

    Args:
        model: A model of transformers, or what names one.

    Returns:
        An `Unloaded`, of which a warning tells; or what was given.

    Raises:
        UnsupportedModelError: It is offloaded, and no files are known of it, or they hold another
            model: other classes, shapes or dtypes, or other numbers than those that are in memory.
    """
    if not isinstance(model, nn.Module) or not is_offloaded(model):
        return model
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not name:
        raise _refused(model, "nothing says which files it was loaded from")
    try:
        unloaded = open_unloaded(name, next(model.parameters()).dtype)
    except GhostedFastError as error:
        raise _refused(model, first_line(error)) from error
    different = _difference(model, unloaded)
    if different is not None:
        raise _refused(model, f"{name!r} {different}")
    _LOGGER.warning("%s is offloaded: it stays in its files, and is swept through by layers", name)
    return unloaded


def _refused(model: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"expected all weights of {type(model).__name__} in memory or in known files, got some "
        f"offloaded by accelerate, and {reason}: load the model without device_map, or onto one "
        "device, or pass the folder that holds it, to be swept through layer by layer"
    )


def _difference(model: Any, unloaded: Unloaded) -> str | None:
    """Return how the model in some files differs from one that was loaded, None if it does not."""
    if type(unloaded.model) is not type(model):
        return f"holds a {type(unloaded.model).__name__}"
    mine, theirs = model.state_dict(), unloaded.model.state_dict()
    shapes = [{n: (t.shape, t.dtype) for n, t in held.items()} for held in (mine, theirs)]
    for name in sorted(mine.keys() | theirs.keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            return f"has no such {name}"
    for name, tensor in mine.items():
        place = unloaded.unchanged.get(name)
        if place is not None and not tensor.is_meta and not _begins_with(tensor, place):
            return f"has other numbers in {name}"
    return None


def _begins_with(tensor: Tensor, place: StoredTensor) -> bool:
    """Return whether the first numbers of a tensor are those at a place in a file."""
    count = min(_COMPARED, tensor.numel())
    if place.is_plain:
        read = place.part(0, count * place.dtype.itemsize).read().view(place.dtype)
    else:
        read = place.read().reshape(-1)[:count]
    return torch.equal(tensor.detach().reshape(-1)[:count].cpu(), read.to(tensor.dtype))
