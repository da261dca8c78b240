"""Candidates that go up beside the text of a sweep, or past it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ghosted_fast.fit.sweep.shelf import Shelf, boundary_name
from ghosted_fast.models.gap import Gap
from ghosted_fast.models.unloaded.source import Calls
from ghosted_fast.statistics.sample import Interval
from ghosted_fast.text.batches import Batch


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence, and where it is in the text.

    Attributes:
        number: Its number among those that were asked for.
        batch: Its tokens.
        place: Which of this rank's batches has it; None if another rank's has.
        row: Which row of that batch.
    """

    number: int
    batch: Batch
    place: int | None
    row: int


class Riders:
    """Candidates that go up beside the text: held-out states behind the ghosts of their gaps.

    They go up in heats: behind a ghost the states of all rows wait, and in each heat those of some
    rows go on, for the candidates that are still in the race.

    Args:
        rows: All held-out sequences.
        shelf: Where the states are kept.
        stops: Where candidates will join, for the estimate of what there is to do.
        ends: How many of the rows have gone up behind each heat; by default all in one.

    Attributes:
        heats: How many there are.
        heat: Which of them is on its way.
        riding: The candidates that are.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        shelf: Shelf,
        stops: Iterable[int] = (),
        ends: Sequence[int] = (),
    ) -> None:
        self.rows, self._shelf, self.stops = rows, shelf, sorted(stops)
        # One without tokens has nothing to be judged by.
        self.own = [row for row in rows if row.place is not None and row.batch.num_tokens]
        self._ends = list(ends) or [len(rows)]
        self.heats, self.heat = len(self._ends), 0
        self.calls: list[Calls] = []
        self.riding: list[Interval] = []

    @property
    def rows_of_heat(self) -> list[Row]:
        """The rows of all ranks that go up in the heat."""
        return [row for row in self.rows if self._heat_of(row) == self.heat]

    @property
    def tokens(self) -> int:
        """This rank's tokens of the heat, padding included, of one candidate."""
        return sum(row.batch.input_ids.numel() for _, row in self._places())

    def join(self, gap: Gap, x_name: str | None = None) -> None:
        """Let a candidate begin where its gap ends, or its last gap.

        Args:
            gap: The gap, with its ghost.
            x_name: The list of states that enter it, where they are not the dense model's.
        """
        pair = (gap.start, gap.stop)
        for row in self.own:
            x = self._row(x_name or boundary_name(gap.start), row)
            enter = gap.on(row.batch)[2]
            name = _rider_name(pair, self._heat_of(row), gap.stop)
            self._shelf.add(name, x if enter is None else enter(x))
        self.riding.append(pair)

    def advance(self, layer: nn.Module | None, index: int) -> None:
        """Take all candidates through a layer; None for one that does not run on text.

        Their states below it are forgotten.
        """
        places = [place for place, _ in self._places()]
        for pair in self.riding:
            here, there = (_rider_name(pair, self.heat, index + up) for up in (0, 1))
            for number, place in enumerate(places):
                x = self._shelf.get(here, number)
                call = self.calls[place][index]
                self._shelf.add(there, x if layer is None or call is None else call.run(layer, x))
            self._shelf.drop(here)

    def get_off(self, pairs: Iterable[Interval], top: int) -> None:
        """Forget candidates, wherever they are.

        Args:
            pairs: The candidates.
            top: The highest boundary.
        """
        for pair in pairs:
            for heat in range(self.heats):
                for boundary in range(pair[1], top + 1):
                    self._shelf.drop(_rider_name(pair, heat, boundary))
        self.riding = []

    def states(self, pair: Interval | None, boundary: int) -> Iterator[tuple[Row, Tensor]]:
        """Yield a candidate's states at a boundary, for each of this rank's rows of the heat.

        Args:
            pair: The candidate; None for the dense model.
            boundary: Where all are.
        """
        for number, (_, row) in enumerate(self._places()):
            if pair is None:
                yield row, self._row(boundary_name(boundary), row)
            else:
                yield row, self._shelf.get(_rider_name(pair, self.heat, boundary), number)

    def _places(self) -> list[tuple[int, Row]]:
        """Return this rank's rows of the heat, each with its place among all that it has."""
        return [
            (place, row) for place, row in enumerate(self.own) if self._heat_of(row) == self.heat
        ]

    def _heat_of(self, row: Row) -> int:
        return bisect_right(self._ends, row.number)

    def _row(self, name: str, row: Row) -> Tensor:
        """Return the states of a sequence in a list of the text's."""
        assert row.place is not None
        return self._shelf.get(name, row.place)[row.row : row.row + 1]


def _rider_name(pair: Interval, heat: int, boundary: int) -> str:
    return f"rider-{pair[0]:04d}-{pair[1]:04d}-{heat}-{boundary:04d}"
