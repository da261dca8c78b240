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

from ghosted_fast.fit.ratios import ChannelRatios
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.recovery.collector import Collector, Patch
from ghosted_fast.recovery.hadamard import hadamard
from ghosted_fast.recovery.least_squares import plain_ghost
from ghosted_fast.statistics.sample import Interval


class LinearPatchCollector(ChannelRatios, Collector):
    """The ratios of one gap, see `ChannelRatios`.

    Args:
        decoder: The dense model.
        gap: The removed layers (start, stop).
        rotated: Whether the channels are those of the Hadamard basis.
    """

    def __init__(self, decoder: Decoder, gap: Interval, rotated: bool) -> None:
        basis = hadamard(decoder.hidden_size).to(decoder.device) if rotated else None
        super().__init__(decoder, gap, basis)
        self._decoder = decoder
        self._exact_basis = basis

    def patch(self) -> Patch:
        """Return the operator as a ghost: M = diag(r) - I, or H diag(r) H^T - I."""
        change = torch.diag(self.mean() - 1.0)
        if self._exact_basis is not None:
            change = self._exact_basis @ change @ self._exact_basis.mT
        return Patch(plain_ghost(self._decoder, change))
