"""Rounds: every variant runs once in each, in an order that favours none.

Rounds come in pairs, of which the second runs backwards: a drift of the machine and what a place in
the order costs cancel. The orders of the pairs are the rows of a Williams square, in which every
variant follows every other equally often, with names dealt and rows drawn anew for each square. A
ratio is made of ratios within a pair of rounds, never of two medians of different moments.

Rounds go on until the intervals are as narrow as asked at two looks in a row, or until the time is
spent. Looks are a third further apart each time, and the rounds between the two had no part in the
decision to stop, so lucky streaks do not decide.

Source of the squares: Williams, "Experimental designs balanced for the estimation of residual
effects of treatments", 1949.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from ghosted_fast.errors import ArgumentError
from ghosted_fast.timing.estimates import FEWEST, Estimate

PRECISION = 0.02
_GROWTH = 1.35


class Rounds:
    """The samples of some variants, pair of rounds by pair of rounds.

    Args:
        names: The variants; the first is the one that the others are compared with.
        precision: Half of the interval of a ratio to the first, as a share, that is asked for.
        seed: Of the orders.

    Raises:
        ArgumentError: There is no name, or one twice, or the precision is not above 0.
    """

    def __init__(self, names: Sequence[str], precision: float = PRECISION, seed: int = 0) -> None:
        if not names or len(set(names)) < len(names):
            raise ArgumentError(f"expected variants of different names, got {list(names)}")
        if not precision > 0:
            raise ArgumentError(f"expected a precision above 0 such as 0.02, got {precision}")
        self.names, self.precision = list(names), precision
        self._samples: dict[str, list[float]] = {name: [] for name in names}
        self._orders = balanced_orders(self.names, seed)
        self._next_look = FEWEST
        self._was_narrow = self._settled = False

    @property
    def pairs(self) -> int:
        """Pairs of rounds that are complete."""
        return len(self._samples[self.names[0]]) // 2

    def run_pair(self, sample: Callable[[str], float]) -> None:
        """Run two rounds.

        Args:
            sample: Runs a variant and returns its seconds. If it raises, the pair leaves nothing.
        """
        order = next(self._orders)
        taken: dict[str, list[float]] = {name: [] for name in self.names}
        for name in (*order, *reversed(order)):
            taken[name].append(sample(name))
        for name, seconds in taken.items():
            self._samples[name] += seconds
        if self.pairs >= self._next_look:
            narrow = self.half_width <= self.precision
            self._settled = self._settled or (narrow and self._was_narrow)
            self._was_narrow = narrow
            self._next_look = math.ceil(self.pairs * _GROWTH)

    def seconds(self, name: str) -> Estimate:
        """Return the seconds of a sample of a variant.

        Raises:
            ArgumentError: No pair of rounds is complete.
        """
        return Estimate.of(self._samples[name])

    def speedup(self, name: str, over: str | None = None) -> Estimate:
        """Return how many times as fast as another a variant is; the other is the first unnamed.

        Raises:
            ArgumentError: No pair of rounds is complete.
        """
        return self.ratio(self._samples[over or self.names[0]], name)

    def ratio(self, others: Sequence[float], name: str) -> Estimate:
        """Return how long something else takes, in units of a variant's time.

        Args:
            others: Its seconds in each round, in the order of `samples`.
            name: The variant.

        Raises:
            ArgumentError: No pair of rounds is complete.
        """
        ratios = [b / a for a, b in zip(self._samples[name], others, strict=True)]
        if self.pairs > 1:
            ratios = [math.sqrt(a * b) for a, b in zip(ratios[::2], ratios[1::2], strict=True)]
        return Estimate.of(ratios)

    def samples(self, name: str) -> tuple[float, ...]:
        """Return the seconds of a variant, round by round."""
        return tuple(self._samples[name])

    @property
    def half_width(self) -> float:
        """Half of the widest interval of a ratio to the first variant, of one variant its own."""
        if not self.pairs:
            return math.inf
        if len(self.names) == 1:
            return self.seconds(self.names[0]).half_width
        return max(self.speedup(name).half_width for name in self.names[1:])

    @property
    def is_settled(self) -> bool:
        """Whether the ratios were as precise as asked at two looks in a row."""
        return self._settled

    @property
    def share_done(self) -> float:
        """Which share of the rounds that the precision needs have run, as far as is known."""
        if self._settled:
            return 1.0
        if self.pairs < 2:
            return 0.0
        needed = max(self.pairs * (self.half_width / self.precision) ** 2, FEWEST) * _GROWTH
        return min(self.pairs / needed, 1.0)


def balanced_orders(names: Sequence[str], seed: int = 0) -> Iterator[list[str]]:
    """Yield, without end, orders of which each is to be run forwards and then backwards.

    Args:
        names: The variants.
        seed: Of dealing and drawing.
    """
    draw = random.Random(seed)
    count = len(names)
    zigzag = [place // 2 if place % 2 == 0 else count - (place + 1) // 2 for place in range(count)]
    # Of an even number the second half of the rows is the first half backwards.
    shifts = range(count // 2 if count % 2 == 0 else count)
    while True:
        dealt = draw.sample(list(names), count)
        rows = [[dealt[(place + shift) % count] for place in zigzag] for shift in shifts]
        rows = [row if draw.random() < 0.5 else row[::-1] for row in rows]
        yield from draw.sample(rows, len(rows))


def time_variants(
    variants: Mapping[str, Callable[[], float]],
    precision: float = PRECISION,
    seconds: float = 10.0,
    *,
    seed: int = 0,
    after_pair: Callable[[float], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Run rounds of variants until their ratios to the first are known as precisely as asked.

    Args:
        variants: Each runs a variant and returns its seconds, warm.
        precision: Half of the interval of a ratio, as a share.
        seconds: When to stop at the latest; one pair of rounds is always run.
        seed: Of the orders.
        after_pair: Told which share of the work is done, after each pair of rounds.
        clock: What `seconds` is measured by.

    Returns:
        The samples.

    Raises:
        ArgumentError: There is no variant, or the precision is not above 0.
    """
    rounds, began = Rounds(list(variants), precision, seed), clock()
    while True:
        rounds.run_pair(lambda name: variants[name]())
        spent = (clock() - began) / seconds
        if after_pair is not None:
            after_pair(min(max(spent, rounds.share_done), 1.0))
        if spent >= 1.0 or rounds.is_settled:
            return rounds
