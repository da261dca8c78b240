"""A run of layers that is left out, and the ghost in its place."""

from __future__ import annotations

from dataclasses import dataclass

from ghosted_fast.models.boundaries import LeftOut
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.text.batches import Batch


@dataclass(frozen=True, eq=False)
class Gap:
    """Removed layers [start, stop), and what stands in their place.

    Attributes:
        start: First removed layer.
        stop: One past the last removed layer.
        ghost: Of the model's dtype; None for nothing.
    """

    start: int
    stop: int
    ghost: GhostLinear | None = None

    def on(self, batch: Batch) -> LeftOut:
        """Return the gap as `resume` takes it, for the tokens of one batch."""
        ghost = self.ghost
        if ghost is None:
            return self.start, self.stop, None
        is_first = batch.is_first if ghost.first_state is not None else None
        return self.start, self.stop, lambda x: ghost(x, is_first)
