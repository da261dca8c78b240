"""The ghost exactly as published: the yardstick, in plain torch.

    M^T = (X^T X + 1e-6 I)^-1 X^T (Y - X)        y' = x + M x

X and Y are cast to fp64 before they are summed; every attended token counts alike, the first
included; no bias; the damping is absolute; one LU solve in fp64.

Source: Yun, Jo, Karimireddy, Lee, "Ghosted Layers: Unconstrained Activation Alignment for
Recovering Layer-Pruned LLMs", arXiv 2605.15491, the closed form of the operator.
"""

from __future__ import annotations

from torch import Tensor

from ghosted_fast.models.decoder import Decoder
from ghosted_fast.recovery.collector import Collector, Patch
from ghosted_fast.recovery.least_squares import PlainEquations, plain_ghost
from ghosted_fast.statistics.sample import Interval, Sample

DAMPING = 1e-6


class GhostPaperCollector(Collector):
    """X^T X and X^T (Y - X)."""

    def __init__(self, decoder: Decoder, gap: Interval) -> None:
        super().__init__(gap)
        self._decoder = decoder
        self.least_tokens = 2 * decoder.hidden_size
        self._equations = PlainEquations(decoder.hidden_size, decoder.device)

    def update(self, sample: Sample) -> None:
        """Add the attended tokens of a batch."""
        x, y = sample.x[sample.attended].double(), sample.y[sample.attended].double()
        self._equations.add(x, y - x)

    def sums(self) -> list[Tensor]:
        """Return the equations."""
        return self._equations.sums

    def patch(self) -> Patch:
        """Return the ghost."""
        return Patch(plain_ghost(self._decoder, self._equations.solve(DAMPING)))
