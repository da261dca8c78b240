"""Ghosts that were fitted in one copy of a model, put into another: in a quantized one, say."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

from ghosted_fast.checkpoint.record import is_ghosted, removal_record
from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.families import decoder_layers, num_layers
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.models.ghosted_layers import INPUT, ghosts_of
from ghosted_fast.surgery.cut import remove_layers, removed_intervals

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class TakenGhosts:
    """What was done to a model: all that another copy of it needs to be treated alike.

    Attributes:
        num_layers: Layers of the dense model.
        hidden_size: Its width.
        removed: The removed layers.
        ghosts: One for each gap, in the order of `removed_intervals`, or None.
        report: What is known of the fit.
    """

    num_layers: int
    hidden_size: int
    removed: list[int]
    ghosts: list[GhostLinear | None]
    report: dict[str, Any] | None


def take_ghosts(model: Any) -> TakenGhosts:
    """Return copies of a model's ghosts, in main memory, and what they stand for.

    The model itself can be let go before another is loaded. Of one that was healed the ghosts alone
    are taken, with a warning: the weights of its layers were trained with them.

    Args:
        model: A ghosted model.

    Raises:
        ArgumentError: It is not ghosted.
    """
    if not is_ghosted(model.config):
        raise ArgumentError("expected a ghosted model to take ghosts from, got one without any")
    count, removed = removal_record(model.config, num_layers(model))
    kept = [layer for layer in range(count) if layer not in removed]
    placed = {
        0 if side == INPUT else kept[index] + 1: copy.deepcopy(ghost).to("cpu")
        for index, side, ghost in ghosts_of(decoder_layers(model))
    }
    return TakenGhosts(
        num_layers=count,
        hidden_size=Decoder.of(model).hidden_size,
        removed=removed,
        ghosts=[placed.get(start) for start, _ in removed_intervals(removed, count)],
        report=_report_of_ghosts(model.config.ghost.get("report")),
    )


def _report_of_ghosts(report: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what is known of the ghosts, without healings of the layers beside them."""
    found = copy.deepcopy(report)
    if found is None or not any(item["maps"] for item in found.get("healed", [])):
        return found
    _LOGGER.warning(
        "the model was healed: its ghosts were trained together with the weights of its layers, "
        "which stay behind: heal the model that they are put into (ghosted_fast.heal)"
    )
    found["healed"] = [item for item in found["healed"] if not item["maps"]]
    return found


def put_ghosts(model: Any, taken: TakenGhosts, inplace: bool = False) -> Any:
    """Remove the same layers from a dense model, and put the same ghosts in their place.

    Args:
        model: Another copy of the dense model, in any precision.
        taken: What `take_ghosts` returned. Its ghosts become part of the model.
        inplace: Whether to cut the given model; otherwise a copy that shares its weights.

    Returns:
        The smaller model. The weights of its layers are those of `model`, to the bit.

    Raises:
        ArgumentError: The model has other layers, or layers were removed from it.
        UnsupportedModelError: See `remove_layers`.
    """
    decoder = Decoder.of(model)
    expected, got = (taken.num_layers, taken.hidden_size), (decoder.num_layers, decoder.hidden_size)
    if is_ghosted(model.config) or expected != got:
        said = "a ghosted one" if is_ghosted(model.config) else f"{got[0]} layers of width {got[1]}"
        raise ArgumentError(
            f"expected a dense model of {expected[0]} layers of width {expected[1]}, as the one "
            f"that the ghosts were fitted in, got {said}"
        )
    smaller = remove_layers(model, taken.removed, taken.ghosts, inplace=inplace)
    if taken.report is not None:
        smaller.config.ghost["report"] = copy.deepcopy(taken.report)
    return smaller
