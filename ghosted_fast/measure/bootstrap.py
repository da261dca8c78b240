"""Percentile intervals of bootstraps.

The samples are drawn independently, as questions and passages are. Timings resemble their
neighbours, and are not: `timing.estimates` has intervals of medians for them.

Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ghosted_fast.errors import ArgumentError


def check_confidence(confidence: float) -> None:
    """Raise ArgumentError unless a confidence is between 0 and 1."""
    if not 0 < confidence < 1:
        raise ArgumentError(f"expected a confidence between 0 and 1, got {confidence}")


def percentile_interval(draws: ArrayLike, confidence: float) -> tuple[float, float]:
    """Return the ends between which the middle of the draws lies.

    Args:
        draws: The quantity in each resample, [draws].
        confidence: Share of the draws that lie between, from 0 to 1.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(draws), (tail, 1 - tail))
    return float(low), float(high)
