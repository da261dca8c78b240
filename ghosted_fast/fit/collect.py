"""Calibration: one pass of the dense model over text, into the statistics of all ghosts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ghosted_fast import distributed
from ghosted_fast.errors import CalibrationError
from ghosted_fast.models.boundaries import visit_intervals
from ghosted_fast.models.families import hidden_size
from ghosted_fast.models.gap import Gap
from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.interval import (
    IntervalStatistics,
    _has_no_floor,
    new_statistics,
    update_statistics,
)
from ghosted_fast.statistics.token_weights import energy_floor
from ghosted_fast.text.batches import Batch, iterate_batches


@distributed.together()
def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    intervals: Sequence[tuple[int, int]],
    options: GhostOptions | None = None,
    progress: bool = False,
    gaps: Sequence[Gap] = (),
) -> list[IntervalStatistics]:
    """Run the dense model once over text and gather the statistics of all intervals.

    Layers above the last interval are not computed, and hidden states are dropped as soon as the
    last interval that needs them is served: memory is the statistics and one batch. In a process
    group every rank runs a share of the batches; there is one reduction for each interval.

    Args:
        model: The dense model.
        batches: Calibration tokens, see `iterate_batches`.
        intervals: Pairs (start, stop) of removed layers.
        options: How the ghosts will be fitted.
        progress: Whether to show a progress bar on stderr.
        gaps: Gaps below all the intervals. The states that enter an interval are then those of the
            model with these gaps; the states that leave it stay those of the dense model.

    Returns:
        The statistics, in the order of the intervals.

    Raises:
        CalibrationError: There are fewer than 2 x hidden_size tokens.
        NonFiniteError: An activation is NaN or infinite; the message names boundary and batch.
        RankError: Another rank failed, or is gone.
    """
    options = options or GhostOptions()
    size, device = hidden_size(model), next(model.parameters()).device
    statistics = [new_statistics(model, interval, options) for interval in intervals]
    distributed.check_same({"intervals": list(intervals), "options": options})
    sequences = tokens = turn = 0
    bar = tqdm(desc="calibrating", unit="tok", unit_scale=True, delay=2.0, disable=not progress)
    with bar:
        for index, batch in enumerate(iterate_batches(distributed.whole_text(batches), device)):
            count = batch.num_tokens
            if count and distributed.is_own(turn):
                update = partial(_update, statistics, batch, index, sequences, options)
                visit_intervals(model, batch, intervals, update, [gap.on(batch) for gap in gaps])
            turn += count > 0
            sequences += len(batch.input_ids)
            tokens += count
            bar.update(count)
    # A rank without a batch of its own; in the order in which a batch visits the intervals.
    for item in sorted(statistics, key=lambda item: item.stop):
        if _has_no_floor(item, options):
            item.energy_floor = distributed.from_first(item.energy_floor)
    check_enough_tokens(tokens, 2 * size, size)
    for item in statistics:
        item.add_ranks(sequences)
    return statistics


def _update(
    statistics: Sequence[IntervalStatistics],
    batch: Batch,
    batch_index: int,
    sequences: int,
    options: GhostOptions,
    interval: int,
    x: Tensor,
    y: Tensor,
) -> None:
    item = statistics[interval]
    if _has_no_floor(item, options):  # rank 0 has the text's first batch
        item.energy_floor = distributed.from_first(energy_floor(batch, y))
    update_statistics(item, batch, batch_index, sequences, options, x, y)


def check_enough_tokens(count: int, least: int, size: int) -> None:
    """Raise CalibrationError if there are fewer tokens than a fit of width `size` needs."""
    if count < least:
        reason = f"2 x the hidden size {size}" if least == 2 * size else "one at least"
        raise CalibrationError(
            f"expected at least {least} calibration tokens ({reason}), got {count}: give more text"
        )
