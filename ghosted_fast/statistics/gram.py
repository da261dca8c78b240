"""Streaming normal equations: all that a ghost's fit needs to know of the activations.

With the features `f = x` or `f = x / rms(x)`, the change `delta = y - x` and token weights `w`:

    G = sum w f f^T     C = sum w f delta^T     E = sum w |delta|^2     sum w f     sum w delta

The sums are kept in fp64 in K folds, so they add across batches, processes and machines, and the
error on a held-out fold follows from them without seeing a token twice.

Source: Yun et al., arXiv 2605.15491 (the normal equations); folds, weights and features are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError, NonFiniteError, check_at_least
from ghosted_fast.ops import gram_update
from ghosted_fast.ops.reference import mirror_lower

_BYTES_PER_DOUBLE = 8
# Tokens are added in fp64 if their energy is this many times the median, and they are this few.
_OUTLIER_RATIO = 64.0
_OUTLIER_SHARE = 1 / 16
# Rows that `mean_square` widens at a time on a processor: they stay in its cache.
_ROWS_AT_ONCE = 32


def statistics_bytes(hidden_size: int, folds: int = 4) -> int:
    """Return the bytes that one `GramAccumulator` holds, known before any token is seen."""
    return _BYTES_PER_DOUBLE * folds * (2 * hidden_size**2 + 3 * hidden_size + 2)


def mean_square(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the mean square of each row of [..., d], in a dtype [...], without a copy of them.

    On a processor it is summed in fp64, a few rows at a time: torch's own sums of 16-bit rows take
    three times as long, and are off by 1e-6 of wide ones.
    """
    if rows.device.type != "cpu":
        norm = torch.linalg.vector_norm(rows, dim=-1, dtype=dtype)
        return norm.square() / rows.shape[-1]
    sums = rows.new_empty(rows.shape[:-1], dtype=torch.float64)
    parts = rows.detach().flatten(0, -2).split(_ROWS_AT_ONCE)
    for part, norm in zip(parts, sums.view(-1).split(_ROWS_AT_ONCE), strict=True):
        torch.linalg.vector_norm(part.double(), dim=-1, out=norm)
    return sums.square_().div_(rows.shape[-1]).to(dtype)


@dataclass(frozen=True)
class NormalEquations:
    """The sums of one set of tokens. They add and subtract.

    Attributes:
        gram: G [d, d] fp64; only the lower triangle holds values.
        cross: C [d, d] fp64, rows are features, columns are outputs.
        feature_sum: sum w f [d] fp64.
        delta_sum: sum w delta [d] fp64.
        energy: E = sum w |delta|^2, the error of leaving the ghost out.
        weight_sum: sum of the token weights.
        num_tokens: tokens with a weight above zero.
    """

    gram: Tensor
    cross: Tensor
    feature_sum: Tensor
    delta_sum: Tensor
    energy: float
    weight_sum: float
    num_tokens: int

    def __add__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(
            self.gram + other.gram,
            self.cross + other.cross,
            self.feature_sum + other.feature_sum,
            self.delta_sum + other.delta_sum,
            self.energy + other.energy,
            self.weight_sum + other.weight_sum,
            self.num_tokens + other.num_tokens,
        )

    def __sub__(self, other: NormalEquations) -> NormalEquations:
        return NormalEquations(
            self.gram - other.gram,
            self.cross - other.cross,
            self.feature_sum - other.feature_sum,
            self.delta_sum - other.delta_sum,
            self.energy - other.energy,
            self.weight_sum - other.weight_sum,
            self.num_tokens - other.num_tokens,
        )

    @cached_property
    def _mirrored(self) -> Tensor:
        return mirror_lower(self.gram)

    def error(self, solution: Tensor, bias: Tensor | None = None) -> float:
        """Return sum w |delta - M f - b|^2 over these tokens, in closed form.

        Args:
            solution: M^T [d, outputs] fp64.
            bias: b [outputs] fp64, or None.
        """
        return max(self.energy + self.error_change(solution, bias), 0.0)

    def error_share(self, solution: Tensor, bias: Tensor | None = None) -> float:
        """Return `error` as a share of that of leaving the ghost out; 0 where there is none."""
        return self.error(solution, bias) / self.energy if self.energy > 0.0 else 0.0

    def error_change(self, solution: Tensor, bias: Tensor | None = None) -> float:
        """Return what a ghost adds to the error of leaving it out; below zero where it helps.

        Args:
            solution: M^T [d, outputs] fp64.
            bias: b [outputs] fp64, or None.

        Source: tr(M G M^T) - 2 tr(M C), with the terms of the bias added.
        """
        product = self._mirrored @ solution
        change = float(product.sub_(self.cross, alpha=2.0).mul_(solution).sum())
        if bias is not None:
            change += float(
                2.0 * (bias @ (solution.mT @ self.feature_sum - self.delta_sum))
                + self.weight_sum * (bias @ bias)
            )
        return change

    def sketch(self, signs: Tensor) -> NormalEquations:
        """Return the equations of s random mixtures of the outputs in place of the outputs.

        On average over the signs, `error_change` is the same; it costs s / d of the time.

        Args:
            signs: R [d, s] fp64 of +1 and -1; the mixtures are the outputs times R / sqrt(s).

        Source: the trace estimator of Hutchinson (1990).
        """
        mixed = signs / math.sqrt(signs.shape[1])
        return replace(self, cross=self.cross @ mixed, delta_sum=self.delta_sum @ mixed)


class GramAccumulator:
    """Accumulates the normal equations of one ghost from a stream of activations.

    Memory is `statistics_bytes(hidden_size, folds)` and does not grow with the tokens seen.

    Args:
        hidden_size: d, the width of the hidden state.
        folds: Number of separate sums, at least 1. Held-out errors need at least 2.
        norm_eps: None for features `f = x`; a number for `f = x / sqrt(mean(x^2) + norm_eps)`.
        device: Where the sums live. Default: the CPU.

    Raises:
        ArgumentError: A size or the number of folds is not positive.
    """

    def __init__(
        self,
        hidden_size: int,
        folds: int = 4,
        norm_eps: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_at_least(1, hidden_size=hidden_size, folds=folds)
        self.hidden_size = hidden_size
        self.folds = folds
        self.norm_eps = norm_eps
        self._gram = torch.zeros(
            folds, hidden_size, hidden_size, dtype=torch.float64, device=device
        )
        self._cross = torch.zeros(
            folds, hidden_size, hidden_size, dtype=torch.float64, device=device
        )
        self._moments = torch.zeros(folds, 3, hidden_size, dtype=torch.float64, device=device)
        self._weight_sum = torch.zeros(folds, dtype=torch.float64)
        self._num_tokens = torch.zeros(folds, dtype=torch.int64)

    @property
    def device(self) -> torch.device:
        """Where the sums live."""
        return self._gram.device

    @property
    def num_tokens(self) -> int:
        """Tokens with a weight above zero that were accumulated, over all folds."""
        return int(self._num_tokens.sum())

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """All that adds up over tokens: the tensors themselves, no copies."""
        return self._gram, self._cross, self._moments, self._weight_sum, self._num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes held by the sums."""
        return sum(item.nbytes for item in self.sums)

    def update(
        self, x: Tensor, y: Tensor, token_weight: Tensor | None = None, fold: int = 0
    ) -> GramAccumulator:
        """Add the tokens of one batch.

        A few tokens of far more energy than the rest are added in fp64, the others through the
        fast operator.

        Args:
            x: Hidden states that enter the ghost, [..., d], bf16, fp16 or fp32.
            y: Hidden states that the ghost should give, same shape.
            token_weight: Weights >= 0, shape of x without its last dimension; None for ones.
                Tokens of weight 0 (padding) are not looked at: they may hold anything.
            fold: The fold that these tokens belong to.

        Returns:
            The accumulator itself.

        Raises:
            ArgumentError: A shape, or the fold, does not fit.
            NonFiniteError: A token with a weight above 0 holds NaN or infinity. Nothing was added.
        """
        if not 0 <= fold < self.folds:
            raise ArgumentError(f"expected a fold in 0..{self.folds - 1}, got {fold}")
        if x.shape[-1:] != (self.hidden_size,) or x.shape != y.shape:
            raise ArgumentError(
                f"expected x and y of one shape [..., {self.hidden_size}], "
                f"got {list(x.shape)} and {list(y.shape)}"
            )
        rows, targets = x.reshape(-1, self.hidden_size), y.reshape(-1, self.hidden_size)
        weight = None
        if token_weight is not None:
            if token_weight.shape != x.shape[:-1]:
                raise ArgumentError(
                    f"expected token_weight of shape {list(x.shape[:-1])}, "
                    f"got {list(token_weight.shape)}"
                )
            weight = token_weight.reshape(-1).float()
        outliers, weight_sum, num_tokens = _facts(rows, targets, weight)
        ordinary = weight
        if outliers is not None:
            ones = torch.ones(len(rows), device=rows.device) if weight is None else weight
            ordinary = ones.masked_fill(outliers, 0.0)
        settings: dict[str, Any] = {
            "norm_eps": self.norm_eps,
            "delta": True,
            "gram": self._gram[fold],
            "cross": self._cross[fold],
            "moments": self._moments[fold],
        }
        try:
            gram_update(rows, targets, ordinary, **settings)
        except RuntimeError as error:
            if _all_finite(rows, targets, weight):
                raise
            raise NonFiniteError(str(error)) from error
        if outliers is not None:
            few = None if weight is None else weight[outliers]
            gram_update(rows[outliers], targets[outliers], few, **settings, backend="reference")
        self._weight_sum[fold] += weight_sum
        self._num_tokens[fold] += num_tokens
        return self

    def merge(self, other: GramAccumulator) -> GramAccumulator:
        """Add the sums of another accumulator, fold by fold.

        Raises:
            ArgumentError: The two differ in size, folds or features.
        """
        kinds = [(item.hidden_size, item.folds, item.norm_eps) for item in (self, other)]
        if kinds[0] != kinds[1]:
            raise ArgumentError(
                "expected accumulators of one kind, got (hidden_size, folds, norm_eps) = "
                f"{kinds[0]} and {kinds[1]}"
            )
        for mine, theirs in zip(self.sums, other.sums, strict=True):
            mine += theirs.to(mine.device)
        return self

    def fold(self, index: int) -> NormalEquations:
        """Return the normal equations of one fold."""
        feature_sum, delta_sum, delta_squares = self._moments[index]
        return NormalEquations(
            self._gram[index],
            self._cross[index],
            feature_sum,
            delta_sum,
            float(delta_squares.sum()),
            float(self._weight_sum[index]),
            int(self._num_tokens[index]),
        )

    def fold_tokens(self, index: int) -> int:
        """Return the tokens with a weight above zero in one fold."""
        return int(self._num_tokens[index])

    def total(self) -> NormalEquations:
        """Return the normal equations of all folds together."""
        feature_sum, delta_sum, delta_squares = self._moments.sum(0)
        return NormalEquations(
            self._gram.sum(0),
            self._cross.sum(0),
            feature_sum,
            delta_sum,
            float(delta_squares.sum()),
            float(self._weight_sum.sum()),
            self.num_tokens,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and the settings, as plain tensors and numbers."""
        return {
            "hidden_size": self.hidden_size,
            "folds": self.folds,
            "norm_eps": self.norm_eps,
            "gram": self._gram,
            "cross": self._cross,
            "moments": self._moments,
            "weight_sum": self._weight_sum,
            "num_tokens": self._num_tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the sums by saved ones.

        Raises:
            ArgumentError: The state is of another size, number of folds or kind of features.
        """
        for name in ("hidden_size", "folds", "norm_eps"):
            if state[name] != getattr(self, name):
                raise ArgumentError(
                    f"expected a state with {name} = {getattr(self, name)}, got {state[name]}"
                )
        for name in ("gram", "cross", "moments", "weight_sum", "num_tokens"):
            getattr(self, f"_{name}").copy_(state[name])


def _facts(x: Tensor, y: Tensor, weight: Tensor | None) -> tuple[Tensor | None, float, int]:
    """Return what the host must know of a batch, for which it waits once.

    Returns:
        Which few tokens carry far more energy than the others [tokens] bool, or None; the sum of
        the weights; the tokens with a weight above zero.

    In fp32 the products of such tokens would drown the last bits of everybody else's, and the solve
    amplifies just those. They are added in fp64. Token weights by inverse energy leave none.
    """
    if len(x) < 2:
        if weight is None:
            return None, float(len(x)), len(x)
        return None, float(weight.double().sum()), int((weight > 0).sum())
    energy = mean_square(x)
    if weight is not None:
        energy = energy * weight
    counts = energy > 0
    median = energy.masked_fill(~counts, math.nan).nanmedian()
    outliers = torch.isfinite(energy) & (energy > _OUTLIER_RATIO * median)
    found = [outliers.sum(), counts.sum()]
    if weight is not None:
        found += [weight.double().sum(), (weight > 0).sum()]
    few, counted, *rest = torch.stack([item.double() for item in found]).tolist()
    weight_sum, num_tokens = rest or (len(x), len(x))
    if not 0 < few <= max(1, int(_OUTLIER_SHARE * counted)):
        return None, weight_sum, int(num_tokens)
    all_finite = _all_finite(x[outliers], y[outliers])
    return outliers if all_finite else None, weight_sum, int(num_tokens)


def _all_finite(*tensors: Tensor | None) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors if t is not None)
