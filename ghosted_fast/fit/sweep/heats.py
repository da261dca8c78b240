"""Heats of a race in a sweep: all candidates go up with a few rows, and fewer with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from ghosted_fast import distributed
from ghosted_fast.fit.candidates import FEWEST_TOKENS_TO_DROP
from ghosted_fast.fit.sweep.tokens import attended, tokens_of
from ghosted_fast.text.batches import Batch

if TYPE_CHECKING:
    from ghosted_fast.fit.sweep.shape import Shape

# Of the candidates that go up in the first heat, and in each later one, so many go up in the next,
# about. On SmolLM2 without 2, 5 and 9 layers, of 29, 26 and 22 candidates 15, 5 and 4 were left
# behind one sequence, 12, 3 and 3 behind two, 4, 2 and 3 behind four, 3, 1 and 3 behind eight.
_STAY = 1 / 4, 1 / 2


def heat_ends(tokens: Sequence[int], device: torch.device) -> list[int]:
    """Return how many rows have gone up behind each heat.

    The first has just enough tokens for a candidate to be dropped by, in a process group of each
    rank; behind each later one they are twice as many (Jamieson and Talwalkar, arXiv 1502.07943).
    Each heat reads layers once more: on a GPU, where that is expected to take longer than what it
    spares, all go up in one.

    Args:
        tokens: Of each row.
        device: What computes.
    """
    fewest, rows = FEWEST_TOKENS_TO_DROP * distributed.count(), len(tokens)
    # A row's first token is not predicted.
    seen = accumulate(max(count - 1, 0) for count in tokens)
    end = next((row for row, count in enumerate(seen, start=1) if count >= fewest), rows)
    ends = []
    while device.type == "cpu" and 3 * end <= 2 * rows:  # the last is no small one
        ends.append(end)
        end *= 2
    return [*ends, rows]


@dataclass(frozen=True)
class Heats:
    """How much the heats of a race have to do.

    Attributes:
        parts: Held-out tokens of each, padding included.
    """

    parts: tuple[int, ...]

    @classmethod
    def of(cls, batches: Sequence[Batch], tokens: int, device: torch.device | None) -> Heats:
        """Return those of a text.

        Args:
            batches: The text.
            tokens: Held-out tokens that candidates are scored on.
            device: What computes; None where there is no race.
        """
        counts, padded = attended(batches), tokens_of(batches, tokens)
        longest = max((batch.input_ids.shape[1] for batch in batches), default=0)
        rows = padded // max(1, longest)
        if device is None or not rows:
            return cls((padded,))
        ends = heat_ends([sum(counts) // len(counts)] * rows, device)
        return cls(tuple(longest * (end - begin) for begin, end in pairwise([0, *ends])))

    @property
    def tokens(self) -> int:
        """Those of all heats."""
        return sum(self.parts)

    def judged(self, candidates: int) -> int:
        """Return how many tokens go up in all, behind the ghosts of so many candidates, about."""
        first, later = _STAY
        found = candidates * self.parts[0]
        for heat, part in enumerate(self.parts[1:]):
            found += part * max(1, round(candidates * first * later**heat))
        return found

    def read_again(self, shape: Shape, layers: int) -> int:
        """Return what heats behind the first read of the checkpoint, at most.

        Args:
            shape: The model's sizes.
            layers: How many there are above the lowest candidate's gap.
        """
        return (len(self.parts) - 1) * (layers * shape.read_layer_bytes + shape.beside[1])
