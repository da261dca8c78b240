"""The mean distance between the states at the two ends of intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, cosine_similarity
from tqdm import tqdm

from ghosted_fast import distributed
from ghosted_fast.errors import CalibrationError
from ghosted_fast.facts import IntervalScore
from ghosted_fast.models.boundaries import visit_intervals
from ghosted_fast.selection.criteria.request import Request
from ghosted_fast.text.batches import Batch, iterate_batches

Compare = Callable[[Batch, Tensor, Tensor], Tensor]


def mean_distances(
    request: Request, intervals: Sequence[tuple[int, int]], compare: Compare
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
    # The sum of the distances, and their number.
    totals = torch.zeros(len(intervals), 2, dtype=torch.float64)
    device = next(request.model.parameters()).device
    bar = tqdm(
        desc="comparing", unit="tok", unit_scale=True, delay=2.0, disable=not request.progress
    )
    with bar:
        for turn, batch in enumerate(iterate_batches(request.batches, device)):

            def add(index: int, x: Tensor, y: Tensor) -> None:
                distances = compare(batch, x, y)  # noqa: B023 - called within this turn
                totals[index, 0] += float(distances.double().sum())
                totals[index, 1] += len(distances)

            if distributed.is_own(turn):
                visit_intervals(request.model, batch, intervals, add)
            bar.update(batch.num_tokens)
    distributed.add_up([totals])
    if not totals[:, 1].any():
        raise CalibrationError("expected calibration tokens, got none: give some text")
    return [
        IntervalScore(*pair, total / count)
        for pair, (total, count) in zip(intervals, totals.tolist(), strict=True)
    ]


def one_minus_cosine(batch: Batch, x: Tensor, y: Tensor) -> Tensor:
    """Return 1 - cos(x, y) of every attended token."""
    attended = batch.attention_mask.bool()
    return 1.0 - cosine_similarity(x[attended].float(), y[attended].float(), dim=-1)
