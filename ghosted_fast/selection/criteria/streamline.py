"""The interval whose ends point the same way.

Source: Chen et al., "Streamlining Redundant Layers to Compress Large Language Models" (LLM-
Streamline), arXiv 2403.19135, equation 1: the mean over tokens of cos(x_s, x_(s+n)) is largest.
"""

from __future__ import annotations

from ghosted_fast.selection.criteria.distances import mean_distances, one_minus_cosine
from ghosted_fast.selection.criteria.request import (
    Request,
    Selection,
    best_interval,
    wanted_intervals,
)


def by_streamline(request: Request) -> Selection:
    """Choose the interval with the lowest mean of 1 - cos(input of s, input of s + n)."""
    intervals = wanted_intervals(request)
    return best_interval(
        request, mean_distances(request, intervals, one_minus_cosine), "streamline"
    )
