"""The gaps below an interval, and the states of the text above them, so that none is made twice."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ghosted_fast.fit.memory_budget import default_memory_budget
from ghosted_fast.models.boundaries import Begun
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.gap import Gap
from ghosted_fast.text.batches import Batch

# States that are kept from one gap to the next; batches beyond it begin at the bottom again.
_MOST_BYTES = 1 << 31
# Of what statistics may take without being asked; the rest is for them.
_SHARE = 0.5


def most_kept(state_bytes: int) -> int:
    """Return the most bytes that `Below` keeps of a text.

    Args:
        state_bytes: What the states of the text at one boundary take.
    """
    return min(2 * state_bytes, _MOST_BYTES)


class Below:
    """The gaps that have their ghosts, while those above them are fitted one after the other.

    A pass for the next gap begins where the last one ended: with the states that left it in the
    dense model, and with what its ghost makes of those that entered it. What is kept for that takes
    no more than a quarter of the memory that was free beforehand.

    Args:
        decoder: The dense model.
        to_come: How many gaps will be filled.
        gaps: Those that have their ghosts from the start, ascending.

    Attributes:
        gaps: All that have their ghosts.
    """

    def __init__(self, decoder: Decoder, to_come: int, gaps: Iterable[Gap] = ()) -> None:
        self.gaps = list(gaps)
        self._to_come = 0 if decoder.uses_layers_below else to_come
        # By the number of the batch: the states that enter the last gap, and those that leave it.
        self._ends: dict[int, tuple[Tensor, Tensor]] = {}
        self._bytes = 0
        free = default_memory_budget(decoder.device) if self._to_come > 1 else 0
        self._most = min(_MOST_BYTES, int(_SHARE * free))

    def note(self, index: int, x: Tensor, y: Tensor) -> None:
        """Keep both ends of the gap that a pass is for, unless it is the last.

        Args:
            index: Number of the batch.
            x: What enters the gap, with the ghosts below [batch, length, hidden_size].
            y: What leaves it in the dense model.
        """
        size = x.nbytes + y.nbytes
        if self._to_come > 1 and self._bytes + size <= self._most:
            self._ends[index] = x, y
            self._bytes += size

    def fill(self, gap: Gap) -> None:
        """Take in the gap that the last pass was for."""
        self.gaps.append(gap)
        self._to_come -= 1

    def begun(self, index: int, batch: Batch) -> Begun | None:
        """Return where a batch's next pass can begin, None for at the bottom; it is forgotten.

        Args:
            index: Number of the batch.
            batch: Its tokens.
        """
        if index not in self._ends:
            return None
        x, y = self._ends.pop(index)
        self._bytes -= x.nbytes + y.nbytes
        last = self.gaps[-1]
        enter = last.on(batch)[2]
        with torch.inference_mode():
            return Begun(last.stop, y, x if enter is None else enter(x))
