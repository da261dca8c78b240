"""What corrections ask of a model with ghosts and its dense one, wherever their layers are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast.facts import CorrectionFacts
from ghosted_fast.improve.slopes import GhostSlope
from ghosted_fast.models.ghost_linear import GhostLinear


class MovedGhosts:
    """The parameters of some ghosts: a point that steps lead away from.

    Args:
        ghosts: The ghosts, in any order; they get parameters of their own.

    Attributes:
        ghosts: The ghosts.
        device: Where they are.
        parameters: Weight, and bias where there is one, of each ghost in turn.
    """

    def __init__(self, ghosts: Sequence[GhostLinear]) -> None:
        self.ghosts = list(ghosts)
        self.device = self.ghosts[0].weight.device
        self.parameters: list[Tensor] = []
        for ghost in self.ghosts:
            ghost.unshare()  # `set_parameters` writes into them
            self.parameters += [ghost.weight] if ghost.bias is None else [ghost.weight, ghost.bias]

    def parameters64(self) -> list[Tensor]:
        """Return copies of the ghosts' parameters, fp64."""
        return [parameter.detach().double() for parameter in self.parameters]

    @torch.no_grad()
    def set_parameters(self, point: Sequence[Tensor]) -> None:
        """Set the ghosts' parameters, rounded to their dtype."""
        for parameter, value in zip(self.parameters, point, strict=True):
            parameter.copy_(value)

    def synchronise(self) -> None:
        """Give all ranks the ghosts of rank 0, to the bit."""
        if distributed.count() > 1:
            self.set_parameters(distributed.from_first(self.parameters64(), self.device))


class Comparison(ABC):
    """Compares a model with ghosts and the dense model on two texts: to learn from, to judge by.

    Args:
        moved: The ghosts.
        num_training: Sequences to learn from; they have numbers from 0 on.
    """

    def __init__(self, moved: MovedGhosts, num_training: int) -> None:
        self.moved, self.num_training = moved, num_training

    @abstractmethod
    def gradients(self, numbers: Sequence[int]) -> list[GhostSlope]:
        """Return the sums of each ghost over some training sequences, of all ranks.

        Args:
            numbers: Of the sequences.

        Raises:
            NonFiniteError: A state or a gradient is NaN or infinite.
        """

    @abstractmethod
    def value(self) -> float:
        """Return the mean divergence per attended held-out token, nats."""

    @abstractmethod
    def local_model(
        self, point: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]
    ) -> tuple[float, Tensor, Tensor]:
        """Return the divergence, its slope [k] and its Gauss-Newton curvature [k, k], k directions.

        The slope and the curvature are those of the line through the point and the direction's end:
        differences of logits, not derivatives. The ghosts are left at the point.

        Args:
            point: Parameters of the ghosts, fp64.
            directions: Changes of them.
        """

    def keep(self, facts: Sequence[CorrectionFacts], last: Sequence[Tensor] | None) -> None:  # noqa: B027 - memory keeps nothing
        """Keep what the corrections have come to for a run that goes on.

        Args:
            facts: What each of them did.
            last: The last step that was taken, fp64.
        """

    def kept(self) -> tuple[list[CorrectionFacts], list[Tensor] | None]:
        """Return what an earlier run has kept, with the ghosts moved to where it had come."""
        return [], None
