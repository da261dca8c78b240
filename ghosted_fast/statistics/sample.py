"""What a pass of the dense model shows of one interval, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ghosted_fast.errors import NonFiniteError
from ghosted_fast.text.batches import Batch

Interval = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Sample:
    """One batch at the two ends of an interval, in the dense model.

    Attributes:
        interval: (start, stop): x enters layer `start`, y enters layer `stop`.
        x: States that enter the interval [batch, length, d].
        y: States that leave it [batch, length, d], on x's device.
        batch: The tokens.
        index: Number of the batch, for error messages.
        sequences: Sequences in the batches before; they decide the folds.
        mlp_output: What the last layer before the interval adds last to make x [batch, length, d]:
            the output of its MLP, behind a norm if there is one; None if nobody asked for it.
    """

    interval: Interval
    x: Tensor
    y: Tensor
    batch: Batch
    index: int
    sequences: int
    mlp_output: Tensor | None = None

    @property
    def attended(self) -> Tensor:
        """[batch, length] bool: which tokens are no padding."""
        return self.batch.attention_mask.bool()

    def non_finite(self, detail: str) -> NonFiniteError:
        """Return the error for states that are NaN or infinite."""
        start, stop = self.interval
        return NonFiniteError(
            f"expected finite activations at boundaries {start} and {stop}, got NaN or "
            f"infinity in calibration batch {self.index} ({detail}): check the model in this "
            "dtype, or leave that text out"
        )
