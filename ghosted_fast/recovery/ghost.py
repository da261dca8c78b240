"""Our ghost: token weights, normed input, held-out damping, first-token state; see `fit_ghost`.

Source: Yun et al., arXiv 2605.15491, for the linear operator; the rest is ours.
"""

from __future__ import annotations

from torch import nn

from ghosted_fast.fit.ghosts import fit_ghost
from ghosted_fast.models.families import hidden_size
from ghosted_fast.options import GhostOptions
from ghosted_fast.recovery.collector import Collector, Patch, Sample
from ghosted_fast.statistics.interval import new_statistics, update_statistics


class GhostCollector(Collector):
    """The statistics of one gap, see `IntervalStatistics`."""

    def __init__(self, model: nn.Module, start: int, stop: int, options: GhostOptions) -> None:
        super().__init__(start, stop)
        parameter = next(model.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        self._options = options
        self.least_tokens = 2 * hidden_size(model)
        self._statistics = new_statistics(model, (start, stop), options)

    def update(self, sample: Sample) -> None:
        """Add a batch to the statistics."""
        update_statistics(
            self._statistics,
            sample.batch,
            sample.index,
            sample.sequences,
            self._options,
            sample.x,
            sample.y,
        )

    def patch(self) -> Patch:
        """Fit the ghost; the statistics are used up."""
        fitted, solution = fit_ghost(self._statistics, self._options)
        return Patch(fitted.to_module(self._dtype, self._device), solution=solution)
