"""Rounds on a simulated machine: orders, intervals, stops. No test looks at a clock."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable

import pytest

from ghosted_fast.errors import ArgumentError
from ghosted_fast.timing.rounds import Rounds, balanced_orders, time_variants


class Machine:
    """A clock that drifts by 20 %, has two speeds, and stalls in one sample of ten."""

    def __init__(self, seed: int, noise: float = 0.02) -> None:
        self.draw = random.Random(seed)
        self.now, self.slow, self.noise = 0.0, False, noise
        self.phase = self.draw.uniform(0, 6)

    def sample(self, cost: float) -> float:
        self.slow ^= self.draw.random() < 0.03
        drift = 1 + 0.2 * math.sin(self.now / 40 + self.phase)
        seconds = cost * drift * (1.5 if self.slow else 1.0)
        seconds *= math.exp(self.draw.gauss(0, self.noise)) * (
            3.0 if self.draw.random() < 0.1 else 1.0
        )
        self.now += seconds
        return seconds


def runs(
    loss: float, seconds: float, count: int, others: int = 0
) -> list[tuple[Rounds, Callable[[], float]]]:
    done = []
    for seed in range(count):
        machine = Machine(seed)
        variants = {"dense": lambda m=machine: m.sample(0.1)}
        for index in range(others):
            variants[f"other {index}"] = lambda m=machine: m.sample(0.1)
        variants["ghosted"] = lambda m=machine: m.sample(0.1 * loss)
        found = time_variants(variants, seconds=seconds, seed=seed, clock=lambda m=machine: m.now)
        done.append(found)
    return done


@pytest.mark.slow
@pytest.mark.parametrize("others", [0, 1, 2])
def test_intervals_hold_the_truth_and_find_a_loss(others: int) -> None:
    ratios = [found.speedup("ghosted") for found in runs(1.03, 1e4, 1000 // (1 + others), others)]
    held = sum(ratio.low <= 1 / 1.03 <= ratio.high for ratio in ratios) / len(ratios)
    assert held >= 0.93
    assert sum(ratio.high < 1.0 for ratio in ratios) / len(ratios) >= 0.95
    assert sorted(ratio.half_width for ratio in ratios)[int(0.9 * len(ratios))] <= 0.02


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.3, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0])
def test_intervals_hold_the_truth_when_the_time_is_spent(seconds: float) -> None:
    ratios = [found.speedup("ghosted") for found in runs(1.03, seconds, 1000)]
    assert sum(ratio.low <= 1 / 1.03 <= ratio.high for ratio in ratios) / len(ratios) >= 0.93


@pytest.mark.slow
def test_neither_of_a_pair_is_favoured() -> None:
    ratios = [found.speedup("ghosted") for found in runs(1.0, 1e4, 1000)]
    assert abs(sum(math.log(ratio.value) for ratio in ratios)) / len(ratios) < 0.005
    assert sum(ratio.holds_one for ratio in ratios) / len(ratios) >= 0.93


def test_what_a_predecessor_leaves_behind_does_not_show() -> None:
    """After the first variant everything takes 10 % longer, and each of the others is after it."""
    draw = random.Random(0)
    before = ["b"]

    def sample(name: str) -> float:
        seconds = (1.1 if before[0] == "a" else 1.0) * math.exp(draw.gauss(0, 0.01))
        before[0] = name
        return seconds

    rounds = Rounds(["a", "b", "c"])
    for _ in range(300):
        rounds.run_pair(sample)
    for name in "bc":
        assert rounds.speedup(name).value == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7])
def test_orders_are_balanced_for_place_and_predecessor(count: int) -> None:
    names = [str(index) for index in range(count)]
    pairs = count // 2 if count % 2 == 0 else count
    orders = list(itertools.islice(balanced_orders(names, seed=1), 3 * pairs))
    for start in range(0, len(orders), pairs):
        square = [half for order in orders[start : start + pairs] for half in (order, order[::-1])]
        places = Counter((place, name) for row in square for place, name in enumerate(row))
        assert len(places) == count * count and len(set(places.values())) == 1
        follows = Counter(pair for row in square for pair in itertools.pairwise(row))
        assert len(follows) == count * (count - 1) and len(set(follows.values())) <= 1
    assert count < 3 or orders[:pairs] != orders[pairs : 2 * pairs]


def test_the_order_is_dealt_by_the_seed() -> None:
    def first(seed: int) -> list[list[str]]:
        return list(itertools.islice(balanced_orders(list("abcd"), seed), 8))

    assert first(1) == first(1) != first(2)


def test_a_round_that_fails_leaves_nothing() -> None:
    rounds = Rounds(["a", "b"])
    rounds.run_pair(lambda name: 1.0)
    calls = itertools.count()

    def fail(name: str) -> float:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return 5.0

    with pytest.raises(KeyboardInterrupt):
        rounds.run_pair(fail)
    assert rounds.pairs == 1
    assert rounds.seconds("a").value == pytest.approx(1.0)


def test_a_stop_needs_two_narrow_looks() -> None:
    """Equal samples have no width at all, and still the rounds go on to a second look."""
    told: list[float] = []
    found = time_variants(
        {"a": lambda: 1.0, "b": lambda: 2.0}, after_pair=told.append, clock=lambda: 0.0
    )
    assert found.pairs == 11
    assert found.speedup("b").value == pytest.approx(0.5)
    assert told == sorted(told)


def test_looks_are_taken_whoever_asks() -> None:
    """Two series that are asked about at different times stop at the same pair."""
    asked, silent = Rounds(["a", "b"]), Rounds(["a", "b"])
    for pair in range(1, 12):
        for rounds in (asked, silent):
            rounds.run_pair(lambda name: 1.0)
        assert asked.is_settled == (pair >= 11)
    assert silent.is_settled


def test_rounds_end_when_the_time_is_spent() -> None:
    machine = Machine(3)
    told: list[float] = []
    found = time_variants(
        {name: lambda: machine.sample(1.0) for name in "ab"},
        precision=1e-6,
        seconds=100.0,
        after_pair=told.append,
        clock=lambda: machine.now,
    )
    assert 100.0 <= machine.now < 100.0 + 12.0
    assert told[-1] == 1.0 and 0 < told[0] < 0.2
    assert not found.is_settled


def test_one_variant_alone_is_measured_for_its_own_seconds() -> None:
    draw = random.Random(0)
    found = time_variants({"a": lambda: math.exp(draw.gauss(0, 0.05))}, clock=lambda: 0.0)
    assert found.seconds("a").half_width <= 0.02
    assert found.seconds("a").low < 1.0 < found.seconds("a").high


def test_nothing_is_known_before_the_first_pair() -> None:
    with pytest.raises(ArgumentError, match="expected two values above 0 at least"):
        Rounds(["a"]).seconds("a")


@pytest.mark.parametrize("names", [[], ["a", "b", "a"]])
def test_names_must_differ(names: list[str]) -> None:
    with pytest.raises(ArgumentError, match="expected variants of different names"):
        Rounds(names)


def test_a_precision_is_above_zero() -> None:
    with pytest.raises(ArgumentError, match=r"expected a precision above 0 such as 0.02, got 0"):
        Rounds(["a"], precision=0)


def test_a_ratio_to_what_is_no_variant_is_taken_round_by_round() -> None:
    rounds = Rounds(["a", "b"])
    clock = iter(range(1, 9))
    for _ in range(2):
        rounds.run_pair(lambda name: float(next(clock)))
    twice = [2.0 * seconds for seconds in rounds.samples("b")]
    assert rounds.ratio(twice, "b").value == pytest.approx(2.0)
    assert rounds.ratio(rounds.samples("b"), "a") == rounds.speedup("a", "b")
    assert len(rounds.samples("a")) == 4
