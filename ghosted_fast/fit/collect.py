"""Calibration: one pass of the dense model over text, into the statistics of all ghosts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ghosted_fast import distributed
from ghosted_fast.fit.below import Below
from ghosted_fast.fit.walk import Listener, walk
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.interval import (
    IntervalStatistics,
    lacks_floor,
    new_statistics,
    update_statistics,
)
from ghosted_fast.statistics.sample import Interval, Sample
from ghosted_fast.statistics.token_weights import energy_floor
from ghosted_fast.text.folds import is_held_out


class StatisticsListener(Listener):
    """Gathers the statistics of one interval.

    Args:
        decoder: The dense model.
        interval: Pair (start, stop) of removed layers.
        options: How the ghost will be fitted.

    Attributes:
        statistics: What was gathered.
    """

    checks_finite = True

    def __init__(self, decoder: Decoder, interval: Interval, options: GhostOptions) -> None:
        super().__init__(interval)
        self.least_tokens = 2 * decoder.hidden_size
        self.options = options
        self.statistics = new_statistics(
            interval, options, decoder.hidden_size, decoder.norm_eps, decoder.device
        )

    def update(self, sample: Sample) -> None:
        """Add a batch to the statistics."""
        if lacks_floor(self.statistics, self.options):  # rank 0 has the text's first batch
            floor = energy_floor(sample.batch, sample.y)
            self.statistics.energy_floor = distributed.from_first(floor)
        update_statistics(self.statistics, sample, self.options)

    def settle(self) -> None:
        """Take the energy floor of rank 0, on a rank that had no batch of its own."""
        if lacks_floor(self.statistics, self.options):
            floor = self.statistics.energy_floor
            self.statistics.energy_floor = distributed.from_first(floor)

    def add_ranks(self, num_sequences: int) -> None:
        """Add what the other ranks have gathered, in one reduction."""
        self.statistics.add_ranks(num_sequences)


class TrainingListener(StatisticsListener):
    """Gathers the statistics of one interval on the sequences that are not held out.

    They are numbered as if there were no others, see `training_batches`.
    """

    def update(self, sample: Sample) -> None:
        """Add what a batch has of these sequences to the statistics."""
        before, rows = sample.sequences, range(len(sample.x))
        kept = [row for row in rows if not is_held_out(before + row, self.options)]
        batch = sample.batch.rows(torch.tensor(kept, dtype=torch.int64, device=sample.x.device))
        if batch.num_tokens:
            part = replace(
                sample,
                x=sample.x[kept],
                y=sample.y[kept],
                batch=batch,
                sequences=before - before // self.options.folds,
            )
            super().update(part)


@distributed.failing_together()
def collect_statistics(
    model: Any,
    batches: Iterable[Any],
    intervals: Sequence[Interval],
    options: GhostOptions | None = None,
    progress: bool = False,
    below: Below | None = None,
) -> list[IntervalStatistics]:
    """Run the dense model once over text and gather the statistics of all intervals.

    Args:
        model: The dense model.
        batches: Calibration tokens, see `iterate_batches`.
        intervals: Pairs (start, stop) of removed layers.
        options: How the ghosts will be fitted.
        progress: Whether to show a progress bar on stderr.
        below: Gaps below the interval, of which there is one then; see `walk`.

    Returns:
        The statistics, in the order of the intervals.

    Raises:
        CalibrationError: There are fewer than 2 x hidden_size tokens.
        NonFiniteError: An activation is NaN or infinite; the message names boundary and batch.
        RankError: Another rank failed, or is gone.
    """
    options = options or GhostOptions()
    decoder = Decoder.of(model)
    distributed.check_same({"intervals": list(intervals), "options": options})
    listeners = [StatisticsListener(decoder, interval, options) for interval in intervals]
    walk(decoder, batches, listeners, below=below, progress=progress)
    return [item.statistics for item in listeners]
