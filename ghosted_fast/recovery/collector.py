"""What a recovery learns a gap's operator from, and what it gives."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from ghosted_fast.fit.walk import Listener
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.statistics.solve import GhostSolution


@dataclass(frozen=True, eq=False)
class Patch:
    """What a recovery puts in the place of one gap; nothing, if all is None.

    Attributes:
        ghost: An operator on the hidden state that enters the gap, of the model's dtype.
        mlp_map: T - I [d, d] fp64, [out, in], for a map T on the output of the MLP before the gap.
        scale: By how much the stream that enters the gap is multiplied, above 0; what the layers
            above the gap add is divided by it instead.
        solution: How the ghost was solved for, where `solve_ghost` did.
        seconds: What it took: a pass of the model, the statistics and the solve. Of a pass that
            fed several recoveries each counts the forward passes and its own part.
        solve_seconds: The solve's part of it.
    """

    ghost: GhostLinear | None = None
    mlp_map: Tensor | None = None
    scale: float | None = None
    solution: GhostSolution | None = None
    seconds: float = 0.0
    solve_seconds: float = 0.0


class Collector(Listener):
    """Gathers what one recovery needs of one gap in a pass of the dense model."""

    @abstractmethod
    def patch(self) -> Patch:
        """Return the operator that the samples determine; what was gathered is used up."""
