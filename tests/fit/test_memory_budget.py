"""Budgets of memory for statistics."""

from __future__ import annotations

import pytest

from ghosted_fast.errors import CalibrationError
from ghosted_fast.fit.memory_budget import passes_within
from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.interval import interval_bytes

OPTIONS = GhostOptions()


def test_budget_is_cut_into_passes_or_refused() -> None:
    intervals = [(i, i + 2) for i in range(5)]
    each = interval_bytes(32, OPTIONS)
    groups = passes_within(intervals, 32, OPTIONS, 2 * each)
    assert [len(group) for group in groups] == [2, 2, 1]
    with pytest.raises(CalibrationError, match=str(each)):
        passes_within(intervals, 32, OPTIONS, each - 1)
