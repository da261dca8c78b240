"""Our ghost: token weights, normed input, held-out damping, first-token state; see `fit_ghost`.

Source: Yun et al., arXiv 2605.15491, for the linear operator; the rest is ours.
"""

from __future__ import annotations

from ghosted_fast.fit.collect import StatisticsListener
from ghosted_fast.fit.ghosts import fit_ghost
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.options import GhostOptions
from ghosted_fast.recovery.collector import Collector, Patch
from ghosted_fast.statistics.interval import IntervalStatistics
from ghosted_fast.statistics.sample import Interval


class GhostCollector(StatisticsListener, Collector):
    """The statistics of one gap, see `IntervalStatistics`."""

    def __init__(self, decoder: Decoder, gap: Interval, options: GhostOptions) -> None:
        super().__init__(decoder, gap, options)
        self._decoder = decoder

    def patch(self) -> Patch:
        """Fit the ghost; the statistics are used up."""
        return ghost_patch(self._decoder, self.statistics, self.options)


def ghost_patch(decoder: Decoder, statistics: IntervalStatistics, options: GhostOptions) -> Patch:
    """Fit the ghost of one gap; the statistics are used up."""
    fitted, solution = fit_ghost(statistics, options)
    return Patch(fitted.module_of(decoder), solution=solution)
