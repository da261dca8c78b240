"""What a batch adds to the statistics of an interval."""

from __future__ import annotations

import pytest
import torch
from support.waits import Waits

from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.interval import new_statistics, update_statistics
from ghosted_fast.statistics.sample import Sample
from ghosted_fast.text.batches import Batch

D = 16


def test_a_batch_is_waited_for_once_per_fold_and_three_times_for_first_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where they are, which are kept, whether they are finite; the operator's waits come on top."""
    options = GhostOptions()
    item = new_statistics((1, 2), options, D, 1e-6)
    item.energy_floor = 0.0  # known from the first batch on
    x, y = torch.randn(2, 8, 9, D)
    batch = Batch(torch.zeros(8, 9, dtype=torch.long), torch.ones(8, 9, dtype=torch.long))
    with (waits := Waits(monkeypatch)):
        update_statistics(item, Sample((1, 2), x, y, batch, 0, 0), options)
    assert waits.count == options.folds + 3


def test_first_tokens_are_kept_with_the_numbers_of_their_sequences() -> None:
    options = GhostOptions()
    item = new_statistics((1, 2), options, D, 1e-6)
    x, y = torch.randn(2, 4, 5, D)
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[1, :2] = mask[2] = 0  # padding on the left, and a row of nothing
    batch = Batch(torch.zeros(4, 5, dtype=torch.long), mask)
    update_statistics(item, Sample((1, 2), x, y, batch, 0, 1021), options)
    first = item.first
    assert first is not None and first.count == 3
    (kept_x,), (kept_y,), (sequences,) = first.x, first.y, first.sequences
    assert sequences.tolist() == [1021, 1022]  # of 1024 that are kept, the last but two
    assert torch.equal(kept_x, torch.stack([x[0, 0], x[1, 2]]))
    assert torch.equal(kept_y, torch.stack([y[0, 0], y[1, 2]]))
    every = torch.stack([y[0, 0], y[1, 2], y[3, 0]])
    assert torch.allclose(first.y_sum, every.double().sum(0))
    assert item.gram.num_tokens == int(mask.sum()) - 3
