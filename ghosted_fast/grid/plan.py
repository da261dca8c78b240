"""What a grid consists of: variants of recoveries, and the checks of what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghosted_fast.errors import ArgumentError
from ghosted_fast.fit.collect import check_enough_tokens
from ghosted_fast.models.families import hidden_size
from ghosted_fast.models.families import num_layers as layer_count
from ghosted_fast.recovery import RECOVERIES, check_recovery
from ghosted_fast.selection.select import CRITERIA, check_layer_count
from ghosted_fast.text.batches import Batch

OUR_CRITERIA = ("ghost", "ghost-search")
CORRECTED = "corrections"
# The library's default is the first of these recoveries that a grid has, with this criterion.
DEFAULT_CRITERION, DEFAULT_RECOVERIES = "ghost", (f"ghost + {CORRECTED}", "ghost")


@dataclass(frozen=True)
class Variant:
    """A recovery, and what is done to its model afterwards.

    Attributes:
        name: What tables call it: "ghost", "ghost + 2 corrections", "ghost refined".
        recovery: One of `RECOVERIES`.
        after: Called with the smaller model, the dense model and the calibration batches. Changes
            the smaller model in place, from the layer before the lowest gap on, and returns the
            number of corrections it has now.
        criteria: The criteria that it is paired with; None for all.
    """

    name: str
    recovery: str
    after: Callable[[Any, Any, Sequence[Batch]], int] | None = None
    criteria: tuple[str, ...] | None = None

    def serves(self, criterion: str) -> bool:
        """Return whether it is paired with a criterion."""
        return self.criteria is None or criterion in self.criteria

    @property
    def published(self) -> bool:
        """Whether it is a published method, as it was published."""
        return RECOVERIES[self.recovery].published and self.after is None


def default_of(variants: Sequence[Variant]) -> tuple[str, str] | None:
    """Return the criterion and recovery of the library's default, or None if it is not there."""
    names = {variant.name for variant in variants}
    recovery = next((name for name in DEFAULT_RECOVERIES if name in names), None)
    return None if recovery is None else (DEFAULT_CRITERION, recovery)


def is_published(criterion: str, variant: Variant) -> bool:
    """Return whether a pairing consists of published methods alone."""
    return criterion not in OUR_CRITERIA and variant.published


def variants_of(recoveries: Sequence[str | Variant]) -> list[Variant]:
    """Return the variants that names and variants mean.

    Raises:
        ArgumentError: There is none, one twice, or no recovery of a name.
    """
    variants = [item if isinstance(item, Variant) else Variant(item, item) for item in recoveries]
    for variant in variants:
        check_recovery(variant.recovery)
    _check_distinct("recovery", [variant.name for variant in variants])
    return variants


def check_plan(
    model: Any,
    calibration: Sequence[Batch],
    evaluations: Mapping[str, Sequence[Batch]],
    num_layers: Sequence[int],
    criteria: Sequence[str],
) -> None:
    """Raise unless a grid can be run to its end.

    Raises:
        ArgumentError: A criterion or a number of layers cannot be used, is given twice or is
            missing, or there is no text to evaluate on.
        CalibrationError: There is too little text to calibrate on.
    """
    layers = layer_count(model)
    for count in num_layers:
        check_layer_count(count, layers)
    for criterion in criteria:
        if criterion not in CRITERIA:
            raise ArgumentError(
                f"expected criteria out of {', '.join(CRITERIA)}, got {criterion!r}"
            )
    _check_distinct("number of layers", num_layers)
    _check_distinct("criterion", criteria)
    _check_distinct("evaluation text", list(evaluations))
    for name, batches in evaluations.items():
        if not any(batch.num_tokens > 1 for batch in batches):
            raise ArgumentError(f"expected tokens to predict in the text {name!r}, got none")
    size = hidden_size(model)
    check_enough_tokens(sum(batch.num_tokens for batch in calibration), 2 * size, size)


def _check_distinct(what: str, items: Sequence[Any]) -> None:
    if not items or len(set(items)) < len(items):
        raise ArgumentError(f"expected at least one {what}, and each once, got {list(items)}")
