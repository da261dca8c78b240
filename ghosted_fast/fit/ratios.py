"""How much larger each channel is behind an interval than before it."""

from __future__ import annotations

import torch
from torch import Tensor

from ghosted_fast.fit.walk import Listener
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.statistics.sample import Interval, Sample


class ChannelRatios(Listener):
    """The mean over sequences of (mean over tokens |y_i|) / (mean over tokens |x_i|), by channel i.

    A channel that is zero in a whole sequence counts there as 1.

    Args:
        decoder: The dense model.
        interval: The layers (start, stop).
        basis: [d, d] fp64, whose columns are the channels; those of the model if not given.
    """

    def __init__(self, decoder: Decoder, interval: Interval, basis: Tensor | None = None) -> None:
        super().__init__(interval)
        self._basis = None if basis is None else basis.float().to(decoder.device)
        self._ratios = torch.zeros(decoder.hidden_size, dtype=torch.float64, device=decoder.device)
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
        sums = []
        for row, mask in zip(states, attended, strict=True):
            z = row[mask].float()
            z = z if self._basis is None else z @ self._basis
            sums.append(z.abs().sum(0, dtype=torch.float64))
        return torch.stack(sums)

    def sums(self) -> list[Tensor]:
        """Return the sum of the ratios, and their number."""
        return [self._ratios, self._sequences]

    def mean(self) -> Tensor:
        """Return the ratios [d], fp64."""
        return self._ratios / int(self._sequences)
