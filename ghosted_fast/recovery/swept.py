"""From states on a shelf to operators: what `fit_gaps` does where a model is swept through."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ghosted_fast import distributed
from ghosted_fast.errors import ArgumentError, GhostedFastError
from ghosted_fast.fit.sweep.climb import Sweep, pass_gap, show_stored
from ghosted_fast.models.gap import Gap
from ghosted_fast.options import GhostOptions
from ghosted_fast.recovery import RECOVERIES, check_recovery
from ghosted_fast.recovery.collector import Patch
from ghosted_fast.recovery.patches import solve
from ghosted_fast.statistics.sample import Interval


def check_swept_recovery(name: str) -> None:
    """Raise ArgumentError unless a recovery can be fitted in a sweep."""
    check_recovery(name)
    method = RECOVERIES[name]
    if method.collector is not None and not method.has_operator:
        raise ArgumentError(
            f"expected a recovery other than {name!r} for a model that is swept through layer by "
            "layer: it changes weights of the model itself. Choose another, or give more memory"
        )


def fit_gaps_swept(
    sweep: Sweep, recovery: str, gaps: Sequence[Interval], options: GhostOptions
) -> list[Patch]:
    """Learn what one recovery puts into the gaps of one model, see `fit_gaps`.

    With several gaps that are fitted one after the other, the layers between them are read once
    more: the states that enter a gap are then those of the model with the ghosts below.

    Args:
        sweep: With the states at both ends of each gap on its shelf.
        recovery: One of `RECOVERIES`, see `check_swept_recovery`.
        gaps: The removed layers (start, stop), ascending, at least one layer apart.
        options: How ghosts are fitted.

    Returns:
        The operators, in the order of the gaps.

    Raises:
        ArgumentError: There is no such recovery, or it cannot serve a gap.
        CalibrationError: There is too little text.
        NonFiniteError: An activation is NaN or infinite.
    """
    check_swept_recovery(recovery)
    method, decoder = RECOVERIES[recovery], sweep.source.decoder
    if method.collector is None:
        return [Patch() for _ in gaps]
    in_sequence = method.sequential and options.sequential
    patches: list[Patch] = []
    x_name: str | None = None
    for number, gap in enumerate(gaps):
        began = time.perf_counter()
        collector = method.collector(decoder, gap, options)
        show_stored(sweep, [collector], x_name)
        found = distributed.on_first(partial(solve, collector), decoder.device)
        if isinstance(found, GhostedFastError):
            raise found
        patches.append(replace(found, seconds=time.perf_counter() - began))
        if in_sequence and number + 1 < len(gaps):
            x_name = pass_gap(sweep, Gap(*gap, found.ghost), gaps[number + 1][0], x_name)
    if x_name is not None:
        sweep.shelf.drop(x_name)
    return patches
