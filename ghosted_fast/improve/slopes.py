"""Sums over tokens of the divergence's gradients at one ghost: what its next step is made from."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ghosted_fast import distributed
from ghosted_fast.errors import NonFiniteError
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.ops import gram_update
from ghosted_fast.ops.reference import mirror_lower
from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.gram import NormalEquations
from ghosted_fast.statistics.token_weights import token_weights
from ghosted_fast.text.batches import Batch

_BY_INVERSE_ENERGY = GhostOptions(token_weight="inverse_energy")


class GhostSlope:
    """Sums over tokens, of one ghost: gradients of the divergence, their Gram and the features'.

    The Gram weighs tokens by 1 / mean(y^2): behind the ghost the state is normalised, so that the
    curvature of the divergence falls with the square of the state's size.

    Args:
        ghost: The ghost.

    Attributes:
        has_bias: Whether the ghost has a bias.
        num_tokens: Tokens that were added.
    """

    def __init__(self, ghost: GhostLinear) -> None:
        size, device = ghost.hidden_size, ghost.weight.device
        self.has_bias = ghost.bias is not None
        self.num_tokens = 0
        self._norm_eps = ghost.norm_eps
        self._gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._cross = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._gradient_gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._moments = torch.zeros(3, size, dtype=torch.float64, device=device)
        self._gradient_sum = torch.zeros(size, dtype=torch.float64, device=device)
        self._weight_sum = 0.0

    def add(self, x: Tensor, y: Tensor, gradient: Tensor, counted: Tensor) -> None:
        """Add the tokens of a batch.

        Args:
            x: States that enter the ghost [..., d].
            y: Its outputs [..., d].
            gradient: Gradient of the summed divergence by y [..., d].
            counted: [...] bool; the other tokens are not looked at.

        Raises:
            NonFiniteError: A state or a gradient is NaN or infinite.
        """
        eps = self._norm_eps
        weight = (token_weights(x, y, _BY_INVERSE_ENERGY, eps) * counted).flatten()
        rows, changes = x.flatten(0, -2), gradient.flatten(0, -2)
        try:
            gram_update(
                rows, token_weight=weight, norm_eps=eps, gram=self._gram, moments=self._moments
            )
            ones = counted.flatten().float()
            gram_update(rows, changes, ones, norm_eps=eps, cross=self._cross)
            gram_update(changes, token_weight=ones, gram=self._gradient_gram)
        except RuntimeError as error:
            raise NonFiniteError(
                f"expected finite states and gradients at the ghost, got NaN or infinity ({error}):"
                " check the models in this dtype, or leave that text out"
            ) from error
        self._gradient_sum += changes[counted.flatten()].double().sum(0)
        self._weight_sum += float(weight.double().sum())
        self.num_tokens += int(counted.sum())

    def add_ranks(self) -> None:
        """Add what the other ranks have summed, so that all have the sums of all tokens."""
        counts = torch.tensor([self._weight_sum, self.num_tokens], dtype=torch.float64)
        sums = [self._gram, self._cross, self._gradient_gram, self._moments, self._gradient_sum]
        distributed.add_up([*sums, counts])
        self._weight_sum, self.num_tokens = float(counts[0]), int(counts[1])

    def gradient(self, tokens: int) -> list[Tensor]:
        """Return the gradient of the mean over `tokens` by weight [d, d] (and bias [d]), fp64."""
        found = [self._cross.mT / tokens]
        return [*found, self._gradient_sum / tokens] if self.has_bias else found

    def relative_energy(self, weight: Tensor, bias: Tensor | None) -> float:
        """Return the sum over tokens of mean(c^2) / mean(y^2), c the change of the output y.

        Args:
            weight: Change of the weight [d, d], fp64.
            bias: Change of the bias [d], fp64, or None.
        """
        still = replace(
            self.equations(),
            cross=torch.zeros_like(self._cross),
            delta_sum=torch.zeros_like(self._gradient_sum),
        )
        return still.error_change(weight.mT, bias) / len(weight)

    def output_scaled(self, changes: Tensor, damping: float) -> Tensor:
        """Return (S + damping)^-1 times changes of the output, S the Gram of the gradients.

        Args:
            changes: Of a weight [d, d] or of a bias [d], fp64.
            damping: Relative to the mean of S's diagonal, > 0.
        """
        gram = mirror_lower(self._gradient_gram)
        gram.diagonal().add_(damping * float(gram.diagonal().mean()) or 1.0)
        columns = changes.reshape(len(changes), -1)
        return torch.cholesky_solve(columns, torch.linalg.cholesky(gram)).reshape(changes.shape)

    def equations(self) -> NormalEquations:
        """Return the damped step's equations: (G + damping) dM^T = sum f g^T."""
        return NormalEquations(
            self._gram,
            self._cross,
            self._moments[0],
            self._gradient_sum,
            0.0,
            self._weight_sum,
            self.num_tokens,
        )


def mapped_tokens(ghost: GhostLinear, batch: Batch) -> Tensor:
    """Return [batch, length] bool: the attended tokens whose output follows from the weight.

    Of a ghost with a first state these are not the first ones.
    """
    attended = batch.attention_mask.bool()
    return attended if ghost.first_state is None else attended & ~batch.is_first
