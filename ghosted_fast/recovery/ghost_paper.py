"""The ghost exactly as published: the yardstick, in plain torch.

    M^T = (X^T X + 1e-6 I)^-1 X^T (Y - X)        y' = x + M x

X and Y are cast to fp64 before they are summed; every attended token counts alike, the first
included; no bias; the damping is absolute; one LU solve in fp64.

Source: Yun, Jo, Karimireddy, Lee, "Ghosted Layers: Unconstrained Activation Alignment for
Recovering Layer-Pruned LLMs", arXiv 2605.15491, the closed form of the operator.
"""

from __future__ import annotations

import torch
from torch import nn

from ghosted_fast.models.families import hidden_size
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.recovery.collector import Collector, Patch, Sample
from ghosted_fast.recovery.least_squares import PlainEquations

DAMPING = 1e-6


class GhostPaperCollector(Collector):
    """X^T X and X^T (Y - X)."""

    def __init__(self, model: nn.Module, start: int, stop: int) -> None:
        super().__init__(start, stop)
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._size = hidden_size(model)
        self.least_tokens = 2 * self._size
        self._equations = PlainEquations(self._size, self._device)

    def update(self, sample: Sample) -> None:
        """Add the attended tokens of a batch."""
        x, y = sample.x[sample.attended].double(), sample.y[sample.attended].double()
        self._equations.add(x, y - x)

    def patch(self) -> Patch:
        """Return the ghost."""
        ghost = GhostLinear(self._size, device=self._device, dtype=self._dtype)
        with torch.no_grad():
            ghost.weight.copy_(self._equations.solve(DAMPING))
        return Patch(ghost.requires_grad_(False))
