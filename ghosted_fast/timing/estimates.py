"""What timings say: a median with an interval that holds under drift, spikes and changes of speed.

Timings of a machine that others use too are neither normal nor independent: a sample may take
three times as long, and a slow minute meets many samples in a row. So the estimate is the median,
and its interval lies between two order statistics, whose ranks stand as far from the middle as the
binomial distribution of signs asks, and further by how much neighbouring samples resemble each
other. Fewer than `FEWEST` values have no such ranks; theirs is Student's interval, which is wide.

Source of the interval: Hettmansperger and Sheather, "Confidence intervals based on interpolated
order statistics", 1986, in the normal approximation; of the correction for dependence: the
integrated autocorrelation time of the signs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from ghosted_fast.errors import ArgumentError

# Values from which on an interval goes by ranks.
FEWEST = 8
# Rounds end when intervals are narrow, which chooses the narrow ones among them: an interval of
# this confidence holds the truth in 95 of 100 cases at such a stop.
_CONFIDENCE = 0.97
# Student's quantile for it, by degrees of freedom from 1.
_STUDENT = (21.205, 5.643, 3.896, 3.298, 3.003, 2.829)


@dataclass(frozen=True)
class Estimate:
    """A quantity above 0 with its interval of 95 %; `float()` gives `value`.

    Attributes:
        value: The median.
        low: Lower end of the interval.
        high: Upper end of it.
        samples: How many values it was made of.
    """

    value: float
    low: float
    high: float
    samples: int

    def __float__(self) -> float:
        return self.value

    @property
    def half_width(self) -> float:
        """Half of the interval as a share of the value, on a logarithmic scale."""
        return math.log(self.high / self.low) / 2.0

    @property
    def holds_one(self) -> bool:
        """Whether the interval holds 1: as a ratio, two things are not told apart."""
        return self.low <= 1.0 <= self.high

    @property
    def inverse(self) -> Estimate:
        """The estimate of 1 over the quantity."""
        return Estimate(1.0 / self.value, 1.0 / self.high, 1.0 / self.low, self.samples)

    def times(self, factor: float) -> Estimate:
        """Return the estimate of the quantity in another unit."""
        return Estimate(factor * self.value, factor * self.low, factor * self.high, self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return the estimate of the median of values above 0, in the order they were taken.

        Raises:
            ArgumentError: There are fewer than two, or one is not above 0.
        """
        if len(values) < 2 or not all(value > 0 for value in values):
            raise ArgumentError(
                f"expected two values above 0 at least, got {list(values)[:4]}: measure once more"
            )
        logs = np.log(np.asarray(values, dtype=np.float64))
        low, high = _interval(logs)
        return cls(math.exp(np.median(logs)), math.exp(low), math.exp(high), len(logs))

    def __str__(self) -> str:
        spread = max(self.high - self.value, self.value - self.low)
        digits = _digits(spread)
        return f"{round(self.value, digits):,.{max(digits, 0)}f} ± {spread:,.{max(digits, 0)}f}"


def ratio_text(ratio: Estimate | None) -> str:
    """Return a ratio for people: "1.25x ± 0.01", or that two things are not told apart.

    No digit is shown that is not known; where not even the first is, both ends of the interval.
    """
    if ratio is None:
        return "-"
    if ratio.high > 100.0 * ratio.low:
        return "not known"
    if ratio.high > 2.0 * ratio.low:
        return f"{ratio.low:.1g}x to {ratio.high:.1g}x"
    if ratio.holds_one:
        spread = max(ratio.high - 1.0, 1.0 - ratio.low)
        return f"not told apart (± {spread:.{max(_digits(spread), 0)}f})"
    value, _, half = str(ratio).partition(" ± ")
    return f"{value}x ± {half}"


def speed_text(speed: Estimate | None) -> str:
    """Return a speed for people, rounded to what is known of it: 2,130."""
    if speed is None:
        return "-"
    digits = _digits(max(speed.high - speed.value, speed.value - speed.low))
    return f"{round(speed.value, digits):,.{max(digits, 0)}f}"


def estimate_from(record: Any) -> Estimate | None:
    """Return the estimate that JSON has kept, None where it has none."""
    return None if record is None else Estimate(**record)


def _digits(spread: float) -> int:
    """Return the decimal places that are known of a number with such a spread."""
    return 4 if spread <= 0 else min(4, -math.floor(math.log10(spread)))


def _interval(logs: np.ndarray) -> tuple[float, float]:
    count = len(logs)
    if count < FEWEST:
        half = _STUDENT[count - 2] * float(logs.std(ddof=1)) / math.sqrt(count)
        middle, median = float(logs.mean()), float(np.median(logs))
        return min(middle - half, median), max(middle + half, median)
    ordered = np.sort(logs)
    quantile = NormalDist().inv_cdf(0.5 + _CONFIDENCE / 2.0)
    distance = quantile * math.sqrt(count * _dependence(logs)) / 2.0
    place = max(count / 2.0 - distance - 0.5, 0.0)
    places = np.arange(count)
    low, high = np.interp([place, count - 1 - place], places, ordered)
    return float(low), float(high)


def _dependence(logs: np.ndarray) -> float:
    """Return by how many times the signs' dependence widens the variance of their sum."""
    signs = np.sign(logs - np.median(logs))
    signs -= signs.mean()
    variance, count = float((signs * signs).mean()), len(signs)
    if variance == 0.0:
        return 1.0
    total = 1.0
    for lag in range(1, count // 4 + 1):
        correlation = float((signs[:-lag] * signs[lag:]).sum()) / count / variance
        if correlation < 1.0 / math.sqrt(count):  # no more than chance gives
            break
        total += 2.0 * correlation
    return total
