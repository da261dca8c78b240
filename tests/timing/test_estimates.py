"""Intervals, and how they are written."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ghosted_fast.errors import ArgumentError
from ghosted_fast.timing import estimates
from ghosted_fast.timing.estimates import Estimate, estimate_from, ratio_text, speed_text


def test_students_quantiles() -> None:
    """Each leaves 1.5 % above it: integrated from its density."""
    grid = np.linspace(-np.pi / 2, np.pi / 2, 400_001)[1:-1]
    for degrees, quantile in enumerate(estimates._STUDENT, start=1):
        t = np.tan(grid)
        density = (1 + t * t / degrees) ** (-(degrees + 1) / 2) * (1 + t * t)
        share = density[t > quantile].sum() / density.sum()
        assert share == pytest.approx(0.015, abs=2e-5)


@pytest.mark.parametrize("count", [2, 4, 7, 8, 15, 40, 200])
def test_an_interval_holds_the_median(count: int) -> None:
    generator = np.random.default_rng(count)
    held = 0
    for _ in range(1000):
        found = Estimate.of(np.exp(generator.laplace(size=count)).tolist())
        assert found.low <= found.value <= found.high
        held += found.low <= 1.0 <= found.high
    assert held >= 950


def test_values_that_resemble_their_neighbours_widen_the_interval() -> None:
    """Without this an interval of such values holds the truth in 70 of 100 cases."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        logs = np.zeros(300)
        for index in range(1, 300):
            logs[index] = 0.6 * logs[index - 1] + generator.normal()
        held += Estimate.of(np.exp(logs).tolist()).low <= 1.0 <= Estimate.of(np.exp(logs)).high
    assert held >= 0.93 * 400


def test_units_and_inverses() -> None:
    found = Estimate(2.0, 1.0, 4.0, 9)
    assert found.inverse == Estimate(0.5, 0.25, 1.0, 9)
    assert found.times(3.0) == Estimate(6.0, 3.0, 12.0, 9)
    assert found.half_width == pytest.approx(math.log(2.0))
    assert estimate_from(found.to_dict()) == found and estimate_from(None) is None
    assert float(found) == 2.0


@pytest.mark.parametrize(
    ("ratio", "written"),
    [
        (Estimate(1.2534, 1.2421, 1.2611, 20), "1.25x ± 0.01"),
        (Estimate(1.2534, 1.2531, 1.2537, 20), "1.2534x ± 0.0003"),
        (Estimate(1.84, 1.4, 2.7, 20), "1.8x ± 0.9"),
        (Estimate(1.84, 0.61, 7.2, 20), "0.6x to 7x"),
        (Estimate(0.987, 0.979, 0.993, 20), "0.987x ± 0.008"),
        (Estimate(0.995, 0.987, 1.004, 20), "not told apart (± 0.01)"),
        (Estimate(1.0, 1.0, 1.0, 20), "not told apart (± 0.0000)"),
        (Estimate(1.84, 0.01, 7.2, 20), "not known"),
        (None, "-"),
    ],
)
def test_a_ratio_shows_the_digits_that_are_known(ratio: Estimate | None, written: str) -> None:
    assert ratio_text(ratio) == written


@pytest.mark.parametrize(
    ("speed", "written"),
    [
        (Estimate(2134.7, 2101.0, 2155.0, 20), "2,130"),
        (Estimate(42.613, 42.5, 42.7, 20), "42.6"),
        (Estimate(1234567.0, 1200000.0, 1300000.0, 20), "1,230,000"),
        (None, "-"),
    ],
)
def test_a_speed_shows_the_digits_that_are_known(speed: Estimate | None, written: str) -> None:
    assert speed_text(speed) == written


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 0.0], [1.0, -2.0], [1.0, math.nan]])
def test_what_has_no_interval(values: list[float]) -> None:
    with pytest.raises(ArgumentError, match="expected two values above 0 at least"):
        Estimate.of(values)
