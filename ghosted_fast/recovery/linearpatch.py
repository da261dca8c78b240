"""LinearPatch: the size of each channel behind the gap, as it is or in a Hadamard basis.

With z = x ("D") or z = x H ("R", H an orthonormal Hadamard matrix), and likewise for y,

    r_i = mean over sequences of (mean over tokens |z_i(y)|) / (mean over tokens |z_i(x)|)
    y' = x diag(r)    or    y' = x H diag(r) H^T

This is what the published code computes: one ratio per sequence, all its tokens included, then the
mean over sequences. The Hadamard matrix of a size is not unique: ours is `hadamard`. A channel that
is zero in a whole sequence counts there as r = 1. Without the paper's distillation.

Source: Chen et al., "A Simple Linear Patch Revives Layer-Pruned Large Language Models", arXiv
2505.24680, P = H D H^T, and its code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghosted_fast.models.decoder import Decoder
from ghosted_fast.recovery.collector import Collector, Patch
from ghosted_fast.recovery.hadamard import hadamard
from ghosted_fast.recovery.least_squares import plain_ghost
from ghosted_fast.statistics.sample import Interval, Sample


class LinearPatchCollector(Collector):
    """Means of |z| per sequence and channel, as the sum of their ratios.

    Args:
        decoder: The dense model.
        gap: The removed layers (start, stop).
        rotated: Whether the channels are those of the Hadamard basis.
    """

    def __init__(self, decoder: Decoder, gap: Interval, rotated: bool) -> None:
        super().__init__(gap)
        self._decoder = decoder
        size, device = decoder.hidden_size, decoder.device
        self._basis = hadamard(size).to(device) if rotated else None
        self._ratios = torch.zeros(size, dtype=torch.float64, device=device)
        self._sequences = torch.zeros((), dtype=torch.int64)

    def update(self, sample: Sample) -> None:
        """Add the ratios of the batch's sequences."""
        used = sample.attended.any(-1)
        x, y = (self._sizes(states, sample.attended) for states in (sample.x, sample.y))
        ratios = torch.where(x > 0, y / x, 1.0)[used]
        self._ratios += ratios.sum(0)
        self._sequences += len(ratios)

    def _sizes(self, states: Tensor, attended: Tensor) -> Tensor:
        """Return the sum of |z| over the attended tokens [batch, d], fp64."""
        basis = None if self._basis is None else self._basis.float()
        sums = []
        for row, mask in zip(states, attended, strict=True):
            z = row[mask].float()
            z = z if basis is None else z @ basis
            sums.append(z.abs().sum(0, dtype=torch.float64))
        return torch.stack(sums)

    def sums(self) -> list[Tensor]:
        """Return the sum of the ratios, and their number."""
        return [self._ratios, self._sequences]

    def patch(self) -> Patch:
        """Return the operator as a ghost: M = diag(r) - I, or H diag(r) H^T - I."""
        change = torch.diag(self._ratios / int(self._sequences) - 1.0)
        if self._basis is not None:
            change = self._basis @ change @ self._basis.mT
        return Patch(plain_ghost(self._decoder, change))
