"""Whether a smaller model and a dense one belong together."""

from __future__ import annotations

from typing import Any

from ghosted_fast.checkpoint.record import is_ghosted, removal_record
from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.built_whole import text_config_of
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.families import num_layers
from ghosted_fast.models.unloaded.sharded import check_plain, check_shardable
from ghosted_fast.options import Rank


def check_pair(smaller: Any, dense: Any) -> None:
    """Raise unless a model could come from a dense one by the removal of layers.

    Raises:
        ArgumentError: It could not.
    """
    text, dense_text = text_config_of(smaller.config), text_config_of(dense.config)
    count, _ = removal_record(smaller.config, num_layers(smaller))
    layers = num_layers(dense)
    same_size = text.vocab_size == dense_text.vocab_size
    same_size &= text.hidden_size == dense_text.hidden_size
    fits = count == layers if is_ghosted(smaller.config) else count <= layers
    if not same_size or not fits:
        raise ArgumentError(
            f"expected the dense model that the smaller one comes from ({count} layers), got "
            f"another, of {layers} layers"
        )


def check_same_dtype(smaller: Any, dense: Any) -> None:
    """Raise unless two models are in one dtype.

    Raises:
        ArgumentError: They are not.
    """
    found, expected = Decoder.of(smaller).dtype, Decoder.of(dense).dtype
    if found != expected:
        raise ArgumentError(
            f"expected both models in one dtype, got the smaller one in {found} and the dense one "
            f"in {expected}: load both in the same (dtype=, --dtype)"
        )


def check_sharding(smaller: Any, dense: Any, rank: Rank, shard: bool) -> None:
    """Raise unless two models are whole on every rank, and can be shared out if asked for.

    Args:
        smaller: A model.
        dense: The one that it comes from.
        rank: Of the factors that are trained.
        shard: Whether the ranks shall share the weights out.

    Raises:
        ArgumentError, UnsupportedModelError: See `check_plain` and `check_shardable`; or whole
            weights are trained.
    """
    for model in (smaller, dense):
        check_plain(model)
        if shard:
            check_shardable(model)
    if shard and rank == "full":
        raise ArgumentError(
            'expected a number as the rank to share the weights out with, got "full": whole '
            "weights in training are held by every rank; train factors, or leave shard=True "
            "(--shard) away"
        )
