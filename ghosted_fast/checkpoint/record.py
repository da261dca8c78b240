"""The record of ghosts in a saved configuration, and whether this version reads it."""

from __future__ import annotations

from typing import Any

from ghosted_fast.errors import CheckpointError
from ghosted_fast.models.families import GHOSTED_PREFIX, decoder_layers

FORMAT = 1


_RECORD_KEYS = {"layer", "side", "bias", "norm_eps", "first_state", "quantization"}


def is_ghosted(config: Any) -> bool:
    """Return whether a configuration is that of a ghosted model."""
    return str(config.model_type).startswith(GHOSTED_PREFIX)


def removal_record(config: Any) -> tuple[int, list[int]]:
    """Return the number of layers of the dense model, and the indices of those removed from it."""
    if is_ghosted(config) and config.ghost is not None:
        return int(config.ghost["num_hidden_layers"]), list(config.ghost["removed"])
    return int(config.num_hidden_layers), []


def check_record(record: Any, num_layers: int) -> None:
    """Raise unless a saved record describes ghosts that this version can build.

    Args:
        record: The `ghost` field of a configuration; None for no ghosts.
        num_layers: Number of layers of the model as it is now.

    Raises:
        CheckpointError: The record is newer than this version, or damaged.
    """
    if record is None:
        return
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise CheckpointError(
            f"expected the configuration's ghost field to be a dict with a format number, got "
            f"{record!r}: the saved configuration is damaged, save the model again"
        )
    if record["format"] > FORMAT:
        raise CheckpointError(
            f"the model was saved in format {record['format']}, and this ghosted_fast reads up to "
            f"{FORMAT}: install a newer one (pip install --upgrade ghosted_fast)"
        )
    removed, dense = record.get("removed"), record.get("num_hidden_layers")
    ghosts = record.get("ghosts")
    consistent = (
        isinstance(removed, list)
        and isinstance(dense, int)
        and dense - len(set(removed)) == num_layers
        and all(isinstance(layer, int) and 0 <= layer < dense for layer in removed)
        and isinstance(ghosts, list)
        and all(
            isinstance(ghost, dict)
            and set(ghost) == _RECORD_KEYS
            and ghost["layer"] in range(num_layers)
            and ghost["side"] in ("input", "output")
            and ghost["quantization"] in (None, "int8")
            for ghost in ghosts
        )
    )
    if not consistent:
        raise CheckpointError(
            f"the configuration's ghost field does not fit a model of {num_layers} layers: "
            f"{record!r}. The saved configuration is damaged or was edited: save the model again."
        )


def refresh_record(model: Any) -> None:
    """Write the ghosts that a model has now into its configuration."""
    from ghosted_fast.models.ghosted_layers import ghosts_of

    model.config.ghost["ghosts"] = [
        {
            "layer": index,
            "side": side,
            "bias": ghost.bias is not None,
            "norm_eps": ghost.norm_eps,
            "first_state": ghost.first_state is not None,
            "quantization": ghost.quantization,
        }
        for index, side, ghost in ghosts_of(decoder_layers(model))
    ]
