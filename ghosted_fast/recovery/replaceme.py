"""ReplaceMe: a linear map on the output of the MLP before the gap, folded into its projection.

    T = argmin |m T^T + x_a - y|^2        x_a = x - m, the residual stream that m is added to

m is what the MLP of the last kept layer adds to make x; the layer then adds T m in its place. The
least squares are undamped and in fp64 over all attended tokens, as in the published code (alpha=0).
Where m passes a norm before it is added (Gemma 2 and 3, OLMo 2), T stands behind that norm.

Source: Shopkhoev et al., "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block
Linearization", arXiv 2505.02819, the least-squares estimate, and its code.
"""

from __future__ import annotations

from torch import Tensor

from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.recovery.collector import Collector, Patch
from ghosted_fast.recovery.least_squares import PlainEquations
from ghosted_fast.statistics.sample import Interval, Sample


class MlpMapCollector(Collector):
    """What is common to the recoveries that map the output of the MLP before a gap.

    Attributes:
        name: What the recovery is called.
    """

    needs_mlp_output = True
    name: str

    def __init__(self, decoder: Decoder, gap: Interval) -> None:
        super().__init__(gap)
        if gap[0] == 0:
            raise ArgumentError(
                f"the recovery {self.name!r} maps the output of the MLP before a gap, and the gap "
                f"[0, {gap[1]}) has none before it: keep layer 0, or use another recovery"
            )
        self.least_tokens = 2 * decoder.hidden_size


class ReplaceMeCollector(MlpMapCollector):
    """Sums of m m^T and m (y - x)^T, which give T - I."""

    name = "replaceme"

    def __init__(self, decoder: Decoder, gap: Interval) -> None:
        super().__init__(decoder, gap)
        self._equations = PlainEquations(decoder.hidden_size, decoder.device)

    def update(self, sample: Sample) -> None:
        """Add the attended tokens of a batch."""
        assert sample.mlp_output is not None
        x, y = sample.x[sample.attended].double(), sample.y[sample.attended].double()
        self._equations.add(sample.mlp_output[sample.attended].double(), y - x)

    def sums(self) -> list[Tensor]:
        """Return the equations."""
        return self._equations.sums

    def patch(self) -> Patch:
        """Return the map: with T = I + N, the residue y - x_a - m of the identity is y - x."""
        return Patch(mlp_map=self._equations.solve(damping=0.0))
