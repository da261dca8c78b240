"""Candidates that go up beside the text of a sweep, or past it."""

from __future__ import annotations

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

    Args:
        rows: All held-out sequences.
        shelf: Where the states are kept.
        stops: Where candidates will join, for the estimate of what there is to do.
    """

    def __init__(self, rows: Sequence[Row], shelf: Shelf, stops: Iterable[int] = ()) -> None:
        self.rows, self._shelf, self.stops = rows, shelf, sorted(stops)
        # One without tokens has nothing to be judged by.
        self.own = [row for row in rows if row.place is not None and row.batch.num_tokens]
        self.calls: list[Calls] = []
        self.riding: list[Interval] = []

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
            self._shelf.add(_rider_name(pair, gap.stop), x if enter is None else enter(x))
        self.riding.append(pair)

    def advance(self, layer: nn.Module | None, index: int) -> None:
        """Take all candidates through a layer; None for one that does not run on text.

        Their states below it are forgotten.
        """
        for pair in self.riding:
            here, there = (_rider_name(pair, boundary) for boundary in (index, index + 1))
            for place in range(len(self.own)):
                x = self._shelf.get(here, place)
                call = self.calls[place][index]
                self._shelf.add(there, x if layer is None or call is None else call.run(layer, x))
            self._shelf.drop(here)

    def get_off(self, boundary: int) -> None:
        """Forget all candidates, which have reached a boundary."""
        for pair in self.riding:
            self._shelf.drop(_rider_name(pair, boundary))
        self.riding = []

    def states(self, pair: Interval | None, boundary: int) -> Iterator[Tensor]:
        """Yield a candidate's states at a boundary, for each of this rank's rows.

        Args:
            pair: The candidate; None for the dense model.
            boundary: Where all are.
        """
        for place, row in enumerate(self.own):
            if pair is None:
                yield self._row(boundary_name(boundary), row)
            else:
                yield self._shelf.get(_rider_name(pair, boundary), place)

    def _row(self, name: str, row: Row) -> Tensor:
        """Return the states of a sequence in a list of the text's."""
        assert row.place is not None
        return self._shelf.get(name, row.place)[row.row : row.row + 1]


def _rider_name(pair: Interval, boundary: int) -> str:
    return f"rider-{pair[0]:04d}-{pair[1]:04d}-{boundary:04d}"
