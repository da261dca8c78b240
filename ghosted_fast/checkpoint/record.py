"""The record of ghosts in a saved configuration, and whether this version reads it."""

from __future__ import annotations

from typing import Any

from ghosted_fast.errors import CheckpointError
from ghosted_fast.models.families import GHOSTED_PREFIX, decoder_layers

# A model that is built of its cut configuration; one that is built whole, layers taken out of it.
FORMAT, FORMAT_WHOLE = 1, 2

# Families have 1e-5 or 1e-6; what is larger is damage.
_LARGEST_EPSILON = 1e-2
_RECORD_KEYS = {"layer", "side", "bias", "norm_eps", "first_state", "quantization"}


def is_ghosted(config: Any) -> bool:
    """Return whether a configuration is that of a ghosted model."""
    return str(config.model_type).startswith(GHOSTED_PREFIX)


def removal_record(config: Any, count: int) -> tuple[int, list[int]]:
    """Return the number of layers of the dense model, and the indices of those removed from it.

    Args:
        config: The configuration of a model, ghosted or not.
        count: Number of layers that the model has now.
    """
    if is_ghosted(config) and config.ghost is not None:
        return int(config.ghost["num_hidden_layers"]), list(config.ghost["removed"])
    return count, []


def check_record(record: Any, model_type: str, *counts: int) -> None:
    """Raise unless a saved record describes ghosts that this version can build.

    Args:
        record: The `ghost` field of a configuration; None for no ghosts.
        model_type: The dense family of the configuration.
        counts: Numbers of layers that the configuration names, of which one must be the model's.

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
    if record["format"] > FORMAT_WHOLE:
        raise CheckpointError(
            f"the model was saved in format {record['format']}, and this ghosted_fast reads up to "
            f"{FORMAT_WHOLE}: install a newer one (pip install --upgrade ghosted_fast)"
        )
    removed, dense = record.get("removed"), record.get("num_hidden_layers")
    ghosts = record.get("ghosts")
    num_layers = _kept(removed, dense)
    consistent = (
        num_layers in counts
        and record.get("family", model_type) == model_type
        and (record["format"] == FORMAT or _builds_whole(record))
        and isinstance(ghosts, list)
        and all(
            isinstance(ghost, dict)
            and set(ghost) == _RECORD_KEYS
            and type(ghost["layer"]) is int
            and ghost["layer"] in range(num_layers)
            and ghost["side"] in ("input", "output")
            and ghost["quantization"] in (None, "int8")
            and type(ghost["bias"]) is type(ghost["first_state"]) is bool
            and _is_epsilon(ghost["norm_eps"])
            for ghost in ghosts
        )
    )
    if not consistent:
        described = " or ".join(map(str, sorted(set(counts))))
        raise CheckpointError(
            f"the configuration's ghost field does not fit a {model_type} model of {described} "
            f"layers: expected a record of such ghosts, got "
            f"{record!r}. The saved configuration is damaged or was edited: save the model again."
        )


def _is_epsilon(value: Any) -> bool:
    """Return whether a value is the epsilon of a normed ghost, or None for one that is not."""
    return value is None or (type(value) is float and 0.0 < value <= _LARGEST_EPSILON)


def _kept(removed: Any, dense: Any) -> int:
    """Return how many layers a record leaves; 0 if its lists are damaged."""
    if not isinstance(dense, int) or not isinstance(removed, list):
        return 0
    if not all(isinstance(layer, int) and 0 <= layer < dense for layer in removed):
        return 0
    return dense - len(set(removed))


def _builds_whole(record: dict[str, Any]) -> bool:
    """Return whether a record has what a model is built whole of."""
    return (
        isinstance(record.get("dense_config"), dict)
        and isinstance(record.get("per_layer"), dict)
        and isinstance(record.get("layers"), str)
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
