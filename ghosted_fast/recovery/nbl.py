"""NBL's linear estimator, of a whole gap: the best affine map by the mean squared error.

    M = Cov(y - x, x) Cov(x, x)^-1    b = E[y - x] - M E[x]        y' = x + M x + b

in fp64 over all attended tokens, undamped, as the published code has it. There X and Y are what
enters and leaves the attention of one layer, whose residual path stays, and so it is here with a
run of layers. Only the estimator is NBL's: which attention it would replace, by canonical
correlations, is no matter of layers. So it stands here as the reference for a plain fit with a
bias.

Source: Erdogan, Tonin, Cevher, "Efficient Large Language Model Inference with Neural Block
Linearization", arXiv 2505.21077, the LMMSE estimator, and its code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghosted_fast.models.decoder import Decoder
from ghosted_fast.recovery.collector import Collector, Patch
from ghosted_fast.recovery.least_squares import PlainEquations, plain_ghost, solve_plain
from ghosted_fast.statistics.sample import Interval, Sample


class NBLCollector(Collector):
    """Sums of x, y - x, x x^T and x (y - x)^T, and the number of tokens."""

    def __init__(self, decoder: Decoder, gap: Interval) -> None:
        super().__init__(gap)
        size, device = decoder.hidden_size, decoder.device
        self._decoder = decoder
        self.least_tokens = 2 * size
        self._equations = PlainEquations(size, device)
        self._x, self._delta = torch.zeros(2, size, dtype=torch.float64, device=device).unbind()
        self._tokens = torch.zeros((), dtype=torch.int64)

    def update(self, sample: Sample) -> None:
        """Add the attended tokens of a batch."""
        x, y = sample.x[sample.attended].double(), sample.y[sample.attended].double()
        self._equations.add(x, y - x)
        self._x += x.sum(0)
        self._delta += (y - x).sum(0)
        self._tokens += len(x)

    def sums(self) -> list[Tensor]:
        """Return the sums."""
        return [*self._equations.sums, self._x, self._delta, self._tokens]

    def patch(self) -> Patch:
        """Return the ghost: the number of tokens less one divides both covariances alike."""
        gram, cross = self._equations.sums
        count = int(self._tokens)
        x, delta = self._x / count, self._delta / count
        centred = gram - count * torch.outer(x, x), cross - count * torch.outer(x, delta)
        weight = solve_plain(*centred)
        return Patch(plain_ghost(self._decoder, weight, delta - weight @ x))
