"""The mean distance between the states at the two ends of intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, cosine_similarity

from ghosted_fast.facts import IntervalScore
from ghosted_fast.fit.sweep.climb import show_stored
from ghosted_fast.fit.walk import Listener, walk
from ghosted_fast.selection.criteria.request import Request
from ghosted_fast.statistics.sample import Interval, Sample
from ghosted_fast.text.batches import Batch

Compare = Callable[[Batch, Tensor, Tensor], Tensor]


class Distances(Listener):
    """The sum of the distances at one interval, and their number; see `mean_distances`."""

    checks_finite = True  # a distance that is not finite shows in the scores

    def __init__(self, interval: Interval, compare: Compare) -> None:
        super().__init__(interval)
        self._compare = compare
        self.total = torch.zeros(2, dtype=torch.float64)

    def update(self, sample: Sample) -> None:
        """Add the distances of a batch."""
        distances = self._compare(sample.batch, sample.x, sample.y)
        self.total[0] += float(distances.double().sum())
        self.total[1] += len(distances)

    def sums(self) -> list[Tensor]:
        """Return their sum and number."""
        return [self.total]

    def mean(self) -> float:
        """Return the mean distance."""
        return float(self.total[0] / self.total[1])


def mean_distances(
    request: Request, intervals: Sequence[Interval], compare: Compare
) -> list[IntervalScore]:
    """Return the mean of a distance over the calibration text, for each interval.

    Args:
        request: The model and the text.
        intervals: Pairs (start, stop).
        compare: Gives the distances [n] that one batch adds to the mean, from the batch and the
            states [batch, length, hidden_size] that enter layers start and stop.

    Raises:
        CalibrationError: There is no text.
    """
    listeners = [Distances(interval, compare) for interval in intervals]
    if request.sweep is not None:
        show_stored(request.sweep, listeners)
    else:
        walk(
            request.decoder,
            request.text,
            listeners,
            title="comparing",
            progress=request.run.progress,
        )
    return [IntervalScore(*item.interval, item.mean()) for item in listeners]


def one_minus_cosine(batch: Batch, x: Tensor, y: Tensor) -> Tensor:
    """Return 1 - cos(x, y) of every attended token."""
    attended = batch.attention_mask.bool()
    return 1.0 - cosine_similarity(x[attended].float(), y[attended].float(), dim=-1)
