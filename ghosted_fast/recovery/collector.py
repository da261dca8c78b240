"""What a recovery learns a gap's operator from, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.statistics.solve import GhostSolution
from ghosted_fast.text.batches import Batch


@dataclass(frozen=True, eq=False)
class Patch:
    """What a recovery puts in the place of one gap; nothing, if all is None.

    Attributes:
        ghost: An operator on the hidden state that enters the gap, of the model's dtype.
        mlp_map: T - I [d, d] fp64, [out, in], for a map T on the output of the MLP before the gap.
        solution: How the ghost was solved for, where `solve_ghost` did.
        seconds: What it took: a pass of the model, the statistics and the solve. Of a pass that
            fed several recoveries each counts the forward passes and its own part.
    """

    ghost: GhostLinear | None = None
    mlp_map: Tensor | None = None
    solution: GhostSolution | None = None
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Sample:
    """One batch at the two ends of a gap, in the dense model.

    Attributes:
        x: States that enter the gap [batch, length, d].
        y: States that leave it [batch, length, d].
        mlp_output: What the last layer before the gap adds last to make x [batch, length, d]: the
            output of its MLP, behind a norm if there is one; None if no collector asked for it.
        batch: The tokens.
        index: Number of the batch.
        sequences: Sequences in the batches before.
    """

    x: Tensor
    y: Tensor
    mlp_output: Tensor | None
    batch: Batch
    index: int
    sequences: int

    @property
    def attended(self) -> Tensor:
        """[batch, length] bool: which tokens are no padding."""
        return self.batch.attention_mask.bool()


class Collector(ABC):
    """Gathers what one recovery needs of one gap in a pass of the dense model.

    Attributes:
        start: First removed layer.
        stop: One past the last removed layer.
        needs_mlp_output: Whether samples must have `mlp_output`.
        least_tokens: Tokens without which there is no operator.
        seconds: Time spent in `update` so far, as `collect` counts it.
    """

    needs_mlp_output = False
    least_tokens = 1

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self.seconds = 0.0

    @abstractmethod
    def update(self, sample: Sample) -> None:
        """Take in one batch."""

    @abstractmethod
    def patch(self) -> Patch:
        """Return the operator that the samples determine."""
