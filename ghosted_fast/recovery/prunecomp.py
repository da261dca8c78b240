"""Prune&Comp's magnitude compensation: one number for a gap, folded into weights.

    alpha = mean over sequences and channels of (mean over tokens |y_i|) / (mean over tokens |x_i|)

The published code multiplies by alpha all that makes the stream which enters the gap: the embedding
and, in each layer below, the projections behind attention and MLP. Here what the layers above add
is divided by alpha, which is the same model (see `divide_branches`) but for the epsilon of norms,
and leaves a tied embedding alone, which would scale the logits too.

With several gaps each has its alpha from the dense model's states, as the code measures that of a
run of layers. In its loop over single layers it measures them in the model as it has become; there
the product over the layers of a gap need not be the gap's own alpha.

Source: Chen et al., "Prune&Comp: Free Lunch for Layer-Pruned LLMs via Iterative Pruning with
Magnitude Compensation", arXiv 2507.18212, and its code.
"""

from __future__ import annotations

from ghosted_fast.fit.ratios import ChannelRatios
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.recovery.collector import Collector, Patch
from ghosted_fast.statistics.sample import Interval
from ghosted_fast.surgery.scaling import check_divisible


class PruneCompCollector(ChannelRatios, Collector):
    """The ratios of one gap, see `ChannelRatios`."""

    def __init__(self, decoder: Decoder, gap: Interval) -> None:
        check_divisible(decoder)
        super().__init__(decoder, gap)

    def patch(self) -> Patch:
        """Return the mean of the channels' ratios."""
        return Patch(scale=float(self.mean().mean()))
