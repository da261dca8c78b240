"""What it takes to find how many layers a bound allows, where a model is swept through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ghosted_fast.fit.sweep.heats import Heats

if TYPE_CHECKING:
    from ghosted_fast.fit.sweep.shape import Shape

# Lists of the text's states behind ghosts below a gap: what entered the last gap, and what enters
# and leaves a layer on the way to the next.
LISTS_BELOW = 3


def lists_of(candidates: int, in_memory: bool) -> int:
    """Return how many lists of states candidates take on their way up, at most.

    Behind each layer one's states are there twice for a moment. In files those of all are: the ones
    below the layer stay until it is kept that all are above.
    """
    return candidates + 1 if in_memory else 2 * candidates


@dataclass(frozen=True)
class Trying:
    """How much the numbers of layers that are tried have to do.

    Attributes:
        ways: The numbers that are tried, for each number that the bound may lead to.
        every_interval: Whether all intervals of a number of layers are candidates; else one choice
            is, in one piece or several.
        in_pieces: Whether that choice may leave several gaps.
        tokens: Tokens of the text, padding included.
        heats: Of the candidates that race, or of the one choice.
    """

    ways: tuple[tuple[int, ...], ...]
    every_interval: bool
    in_pieces: bool
    tokens: int
    heats: Heats

    @property
    def most(self) -> int:
        """How many numbers are tried, at most."""
        return max(map(len, self.ways), default=0)

    def stored_bytes(self, shape: Shape, in_memory: bool) -> int:
        """Return the bytes of states on the shelf beside the text's."""
        state = shape.hidden_size * shape.itemsize
        found = self.heats.tokens * state * lists_of(self._candidates(shape, 1), in_memory)
        if self.in_pieces:
            found += LISTS_BELOW * self.tokens * state
        return found

    def read_bytes(self, shape: Shape) -> int:
        """Return what is read of the checkpoint after the text and the dense head, at most."""

        def read(count: int) -> float:
            kept = shape.num_layers - count
            first = kept * shape.read_layer_bytes + shape.beside[1]
            return first + self.heats.read_again(shape, kept)

        return int(self._most_of_all_ways(read))

    def operations(self, shape: Shape) -> float:
        """Return how many multiplications and additions it takes, about and at most."""
        square = float(shape.hidden_size) ** 2

        def done(count: int) -> float:
            candidates, kept = self._candidates(shape, count), shape.num_layers - count
            gaps = min(count, kept + 1) if self.in_pieces else 1
            judged = self.heats.judged(candidates)
            riding = judged * kept / (2 if self.every_interval else 1)
            if gaps > 1:
                riding += self.tokens * kept
            fits = candidates * gaps
            sums = 4.0 * square * self.tokens * fits
            solves = 20.0 * square * shape.hidden_size * fits
            head = 2.0 * shape.vocabulary * shape.hidden_size * judged
            return 2.0 * shape.layer_parameters * riding + sums + solves + head

        return self._most_of_all_ways(done)

    def _candidates(self, shape: Shape, count: int) -> int:
        return shape.num_layers - count + 1 if self.every_interval else 1

    def _most_of_all_ways(self, cost: Callable[[int], float]) -> float:
        def total(way: Sequence[int]) -> float:
            return sum(map(cost, way))

        return max(map(total, self.ways), default=0.0)
