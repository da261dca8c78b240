"""Paired differences: against all draws there are, and against scores that are known."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from ghosted_fast.errors import ArgumentError
from ghosted_fast.measure.paired import paired_difference


def test_the_interval_is_that_of_all_draws() -> None:
    own, other = [1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 0]
    pairs = [a - b for a, b in zip(own, other, strict=True)]
    means = [sum(drawn) / 6 for drawn in itertools.product(pairs, repeat=6)]
    found = paired_difference([own], [other], confidence=0.8)
    assert found.value == pytest.approx(2 / 6)
    ends = np.quantile(means, (0.1, 0.9))
    assert (found.low, found.high) == pytest.approx(tuple(ends), abs=1e-9)
    assert (found.num_samples, found.confidence) == (6, 0.8)


def test_what_both_get_alike_does_not_widen_it() -> None:
    draw = random.Random(0)
    other = [draw.randrange(2) for _ in range(400)]
    own = [1 - value if place % 40 == 0 else value for place, value in enumerate(other)]
    found = paired_difference([own], [other])
    # Ten of 400 differ; two scores that know nothing of one another would be 0.07 apart.
    assert found.high - found.low < 0.035
    apart = paired_difference([draw.sample(own, 400)], [other])
    assert apart.high - apart.low > 0.1


def test_sets_count_alike_however_many_samples_they_have() -> None:
    small, large = ([1, 1, 1, 1], [0, 0, 0, 0]), ([0] * 100, [0] * 100)
    found = paired_difference([small[0], large[0]], [small[1], large[1]])
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.num_samples == 104 and float(found) == found.to_dict()["value"]


def test_it_covers_the_true_difference_as_often_as_it_says() -> None:
    generator, covered = np.random.default_rng(0), 0
    for seed in range(200):
        other = generator.random(300) < 0.5
        # Right where the other is, but for a tenth; and in a twentieth where it is not.
        own = np.where(other, generator.random(300) < 0.9, generator.random(300) < 0.05)
        found = paired_difference([own.astype(int)], [other.astype(int)], seed=seed)
        covered += found.low <= 0.5 * 0.9 + 0.5 * 0.05 - 0.5 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_same_seed_gives_the_same() -> None:
    own, other = [1, 0, 1, 1, 0], [0, 0, 1, 0, 1]
    assert paired_difference([own], [other]) == paired_difference([own], [other])


@pytest.mark.parametrize(
    ("own", "other"), [([], []), ([[]], [[]]), ([[1, 0]], [[1]]), ([[1], [0]], [[1]])]
)
def test_samples_must_be_the_same(own: list, other: list) -> None:
    with pytest.raises(ArgumentError, match="expected the same samples of both models"):
        paired_difference(own, other)


def test_a_confidence_is_between_0_and_1() -> None:
    with pytest.raises(ArgumentError, match="confidence between 0 and 1, got 95"):
        paired_difference([[1]], [[1]], confidence=95)
