"""What a grid consists of: variants of recoveries, and the checks of what was asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghosted_fast.errors import ArgumentError, GhostedFastError
from ghosted_fast.facts import HealingFacts
from ghosted_fast.fit.walk import check_enough_tokens
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.recovery import RECOVERIES, check_recovery
from ghosted_fast.selection.criteria import CRITERIA, check_criterion
from ghosted_fast.selection.select import check_layer_count
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.calibration_text import CalibrationText

_LOGGER = logging.getLogger(__name__)
CORRECTED = "corrections"
# The library's default is the first of these recoveries that a grid has, with this criterion.
DEFAULT_CRITERION, DEFAULT_RECOVERIES = "ghost", (f"ghost + {CORRECTED}", "ghost")


@dataclass(frozen=True)
class After:
    """What was done to a smaller model after its recovery.

    Attributes:
        corrections: Corrections that its ghosts have now.
        healing: What its healing did, if it was healed: all of its layers may be others then.
            Else those below the one before the lowest gap are the dense model's.
    """

    corrections: int = 0
    healing: HealingFacts | None = None


@dataclass(frozen=True)
class Variant:
    """A recovery, and what is done to its model afterwards.

    Attributes:
        name: What tables call it: "ghost", "ghost + 2 corrections", "ghost healed, 100,000 tokens".
        recovery: One of `RECOVERIES`.
        after: Called with the smaller model, the dense model and the calibration batches. Changes
            the smaller model in place, and returns what it did.
        criteria: The criteria that it is paired with; None for all.
    """

    name: str
    recovery: str
    after: Callable[[Any, Any, Sequence[Batch]], After] | None = None
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
    return CRITERIA[criterion].published and variant.published


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


@dataclass(frozen=True)
class GridPlan:
    """What a grid compares, and what it measures.

    Attributes:
        criteria: Names out of `CRITERIA`. None for all that can choose layers of the model.
        recoveries: Names out of `RECOVERIES`, or variants of them (`corrected`, `healed`). None
            for all, and the ghost with corrections, which is the library's default.
        name: What the model is called; by default what its configuration says.
        speed: Arguments of `compare_throughput`, for example `{"seconds": 60}`, to measure speed,
            once for each shape of model; None leaves it out.
        accuracy: A function of a model that returns its accuracy by task, in 0..1; None leaves
            the columns out.
        accuracy_name: What it measures; results of another are not taken for these.
        seed: Of the bootstrap.
        overwrite: Whether results of other settings in the folder may be replaced.
    """

    criteria: Sequence[str] | None = None
    recoveries: Sequence[str | Variant] | None = None
    name: str | None = None
    speed: Mapping[str, Any] | None = None
    accuracy: Callable[[Any], dict[str, float]] | None = None
    accuracy_name: str = ""
    seed: int = 0
    overwrite: bool = False


def criteria_for(decoder: Decoder, remove: Sequence[int]) -> tuple[str, ...]:
    """Return all criteria that can choose layers of a model; log why others cannot."""
    found = []
    for name, criterion in CRITERIA.items():
        try:
            criterion.check(decoder, max(remove, default=1))
            found.append(name)
        except GhostedFastError as error:
            _LOGGER.warning("the criterion %r is left out: %s", name, error)
    return tuple(found)


def check_plan(
    decoder: Decoder,
    calibration: CalibrationText,
    evaluations: Mapping[str, Sequence[Batch]],
    remove: Sequence[int],
    criteria: Sequence[str],
) -> None:
    """Raise unless a grid can be run to its end.

    Raises:
        ArgumentError: A criterion or a number of layers cannot be used, is given twice or is
            missing, or there is no text to evaluate on.
        CalibrationError: There is too little text to calibrate on.
    """
    for count in remove:
        check_layer_count(count, decoder.num_layers)
    for criterion in criteria:
        check_criterion(criterion)
        CRITERIA[criterion].check(decoder, max(remove, default=1))
    _check_distinct("number of layers", remove)
    _check_distinct("criterion", criteria)
    _check_distinct("evaluation text", list(evaluations))
    for name, batches in evaluations.items():
        if not any(batch.num_tokens > 1 for batch in batches):
            raise ArgumentError(f"expected tokens to predict in the text {name!r}, got none")
    size = decoder.hidden_size
    check_enough_tokens(calibration.num_tokens, 2 * size, size)


def _check_distinct(what: str, items: Sequence[Any]) -> None:
    if not items or len(set(items)) < len(items):
        raise ArgumentError(f"expected at least one {what}, and each once, got {list(items)}")
