"""The pass over text that calibration makes, raced with the bare layers under it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.fit.collect import collect_statistics
from ghosted_fast.models.boundaries import visit_boundaries
from ghosted_fast.options import GhostOptions
from ghosted_fast.text.batches import iterate_batches
from ghosted_fast.timing.rounds import PRECISION, Rounds, time_variants
from ghosted_fast.timing.stopwatch import warm_sample


def passes(
    model: Any, batches: Sequence[Tensor], intervals: list[tuple[int, int]], options: GhostOptions
) -> dict[str, Callable[[], None]]:
    """Return the pass that collects statistics, and the bare layers up to its last boundary."""
    last = max(stop for _, stop in intervals)

    def collected() -> None:
        collect_statistics(model, batches, intervals, options)

    def bare() -> None:
        for batch in iterate_batches(batches):
            visit_boundaries(model, batch, [last], lambda *_: None)

    return {"collected": collected, "bare": bare}


def in_rounds(
    works: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    precision: float = PRECISION,
) -> Rounds:
    """Return the times of works that are long enough to be timed one by one, run in rounds."""
    variants = {
        label: partial(warm_sample, work, device, 1, warm_up=False) for label, work in works.items()
    }
    return time_variants(variants, precision, seconds)
