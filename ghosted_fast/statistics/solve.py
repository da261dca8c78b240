"""From normal equations to a ghost: damping chosen on held-out folds, robust Cholesky solve.

Solves `(G + damping I) M^T = C` (Yun et al., arXiv 2605.15491). The choice of the damping by the
closed-form error on held-out folds, the escalation and the optional bias are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError, CalibrationError, SolveError
from ghosted_fast.ops import ghost_solve
from ghosted_fast.statistics.gram import GramAccumulator, NormalEquations

Damping = float | Literal["auto"]

# Relative to the mean of G's diagonal. Below the first value fp64 rounding decides, above the last
# the ghost fades into the identity.
DAMPING_PATH = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# Where no fold can be held out.
_MIDDLE = DAMPING_PATH[len(DAMPING_PATH) // 2]
# Where it is looked at first: what thousands of tokens of a real model ask for.
_LIKELY = 5
# Mixtures of the outputs that stand for all of them in the choice of the damping.
_MIXTURES = 96
_ESCALATIONS = 16
_FIRST_ESCALATION = 1e-12


@dataclass(frozen=True)
class GhostSolution:
    """The optimum of one ghost, in fp64.

    Attributes:
        weight: M [d, d] fp64, as `nn.Linear` keeps it: weight[out, in].
        bias: b [d] fp64, or None.
        fit_error: sum w |delta - M f - b|^2 / sum w |delta|^2 over the tokens of the fit. 0 is a
            perfect fit; 1 is what leaving the ghost out gives.
        held_out_error: The same ratio over folds that the operator was not fitted on, at this
            damping; None where there are fewer than two folds with tokens.
        condition: Estimate of the condition number of the matrix that was factored (damped, unit
            diagonal).
        damping: The absolute damping that was used, after any escalation.
        residual: Relative residual of the linear system.
        num_tokens: Tokens of the fit.
    """

    weight: Tensor
    bias: Tensor | None
    fit_error: float
    held_out_error: float | None
    condition: float
    damping: float
    residual: float
    num_tokens: int


def solve_ghost(
    gram: GramAccumulator, damping: Damping = "auto", bias: bool = False
) -> GhostSolution:
    """Solve for the ghost that the accumulated statistics determine.

    Args:
        gram: The statistics, with their folds.
        damping: Absolute damping >= 0, or "auto": the value of a path, relative to the mean of G's
            diagonal, with the lowest error on held-out folds.
        bias: Whether to fit an additive bias as well (never damped).

    Returns:
        The solution. Its `damping` says what was used: if a factorisation fails, damping is raised
        tenfold until one succeeds.

    Raises:
        ArgumentError: The damping is negative or not finite.
        CalibrationError: No token was accumulated.
        SolveError: No damping made the system solvable.
    """
    if damping != "auto" and not (
        isinstance(damping, int | float) and math.isfinite(damping) and damping >= 0
    ):
        raise ArgumentError(f'expected a damping >= 0 or "auto", got {damping!r}')
    total = gram.total()
    if not total.num_tokens:
        raise CalibrationError(
            "expected statistics of at least one token, got none: call update() first"
        )
    held_out = None
    folds = [k for k in range(gram.folds) if gram.fold_tokens(k)]
    if len(folds) >= 2:
        unit = mean_diagonal(total)
        if damping == "auto":
            damping = _choose_damping(gram, total, bias) * unit
        held_out = _held_out_error(gram, total, damping / unit, bias)
    elif damping == "auto":
        damping = _MIDDLE * mean_diagonal(total)
    solution, offset, facts = solve_equations(total, damping, bias)
    return GhostSolution(
        weight=solution.mT.contiguous(),
        bias=offset,
        fit_error=total.error_share(solution, offset),
        held_out_error=held_out,
        num_tokens=total.num_tokens,
        **facts,
    )


def solve_on_split(
    train: NormalEquations, held_out: NormalEquations, damping: Damping = "auto", bias: bool = False
) -> tuple[Tensor, Tensor | None, float]:
    """Solve on one set of tokens, with the damping that another set of tokens prefers.

    Args:
        train: The equations to solve.
        held_out: The equations to judge dampings by; if they hold no token, the middle of the path
            is taken.
        damping: As in `solve_ghost`.
        bias: Whether to fit a bias.

    Returns:
        M^T [d, d] fp64, the bias [d] fp64 or None, and the damping used.
    """
    damping = damping_on_split(train, held_out, damping, bias)
    solution, offset, facts = solve_equations(train, damping, bias)
    return solution, offset, facts["damping"]


def damping_on_split(
    train: NormalEquations, held_out: NormalEquations, damping: Damping, bias: bool
) -> float:
    """Return the absolute damping that `solve_on_split` solves with."""
    if damping != "auto":
        return damping
    relative = _MIDDLE
    if held_out.num_tokens:
        relative = _lowest(partial(_changes, train, held_out, bias))
    return relative * mean_diagonal(train)


def outputs_at(equations: NormalEquations, damping: float, bias: bool, features: Tensor) -> Tensor:
    """Return what the solution gives for a few rows, M f + b, without solving for all of M.

    One column is solved for each row in place of one for each output:
    M f = C^T (G + damping I)^-1 f.

    Args:
        equations: The equations.
        damping: Absolute, raised where it must be, as in `solve_equations`.
        bias: Whether there is a bias.
        features: f [n, d] fp64.

    Returns:
        [n, outputs] fp64.

    Raises:
        SolveError: No damping made the system solvable.
    """
    cross, mean = equations.cross, None
    if bias:
        mean = equations.delta_sum / equations.weight_sum
        cross = cross - torch.outer(equations.feature_sum, mean)
        features = features - equations.feature_sum / equations.weight_sum
    columns = replace(
        equations, cross=features.mT.contiguous(), delta_sum=features.new_zeros(len(features))
    )
    solution, _, _ = solve_equations(columns, damping, bias)
    found = solution.mT @ cross
    return found if mean is None else found + mean


def solve_equations(
    equations: NormalEquations, damping: float, bias: bool
) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """Solve one set of equations at one absolute damping, raised tenfold until it succeeds.

    Returns:
        M^T [d, outputs] fp64, the bias [outputs] fp64 or None, and `damping`, `condition`,
        `residual`.

    Raises:
        SolveError: No damping made the system solvable.
    """
    gram, cross = equations.gram, equations.cross
    feature_sum, delta_sum = equations.feature_sum, equations.delta_sum
    if bias:  # the optimal bias makes the problem one about deviations from the means
        gram = gram - torch.outer(feature_sum, feature_sum) / equations.weight_sum
        cross = cross - torch.outer(feature_sum, delta_sum) / equations.weight_sum
    smallest = _FIRST_ESCALATION * max(mean_diagonal(equations), torch.finfo(torch.float64).tiny)
    for _ in range(_ESCALATIONS):
        solution, info = ghost_solve(gram, cross, damping)
        failed, condition, residual = info.tolist()
        if not failed:
            offset = None
            if bias:
                offset = (delta_sum - solution.mT @ feature_sum) / equations.weight_sum
            facts = {"damping": damping, "condition": condition, "residual": residual}
            return solution, offset, facts
        damping = max(10.0 * damping, smallest)
    raise SolveError(
        f"the normal equations of {equations.num_tokens} tokens could not be factored with any "
        f"damping up to {damping:.3g}: check the activations, or calibrate on more text"
    )


def mean_diagonal(equations: NormalEquations) -> float:
    """Return the mean of G's diagonal, the unit of relative damping; 1 where G is zero."""
    return float(equations.gram.diagonal().mean()) or 1.0


def _choose_damping(gram: GramAccumulator, total: NormalEquations, bias: bool) -> float:
    """Return the relative damping of the path with the lowest error over all folds held out."""

    def changes(dampings: Sequence[float]) -> list[float]:
        found = [_changes(*split, bias, dampings) for split in _splits(gram, total)]
        return [sum(folds) for folds in zip(*found, strict=True)]

    return _lowest(changes)


def _held_out_error(
    gram: GramAccumulator, total: NormalEquations, relative: float, bias: bool
) -> float:
    """Return the error over all folds held out at one relative damping, as a share of E."""
    error = energy = 0.0
    for train, held_out in _splits(gram, total):
        solution, offset, _ = solve_equations(train, relative * mean_diagonal(train), bias)
        error += held_out.error(solution, offset)
        energy += held_out.energy
    return _ratio(error, energy)


def _splits(
    gram: GramAccumulator, total: NormalEquations
) -> Iterator[tuple[NormalEquations, NormalEquations]]:
    """Yield (all folds but one, that one), one at a time: memory stays constant."""
    for k in range(gram.folds):
        if gram.fold_tokens(k):
            held_out = gram.fold(k)
            yield total - held_out, held_out


def _changes(
    train: NormalEquations, held_out: NormalEquations, bias: bool, dampings: Sequence[float]
) -> list[float]:
    """Return the `error_change` of relative dampings on the held-out tokens.

    It is estimated on random mixtures of the outputs, the same for each damping. So a damping costs
    little more than its factorisation, d^3 / 3 flops in place of 13 d^3 / 3. (One
    eigendecomposition would serve all of them, but takes longer than factoring for each: 5 times a
    solve of all outputs at d = 576, and the rotations of G and C come on top.)
    """
    outputs = train.cross.shape[1]
    if outputs > _MIXTURES:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (outputs, _MIXTURES), generator=generator).to(train.cross)
        signs = 2.0 * signs - 1.0
        train, held_out = train.sketch(signs), held_out.sketch(signs)
    unit = mean_diagonal(train)
    changes = []
    for relative in dampings:
        solution, offset, _ = solve_equations(train, relative * unit, bias)
        changes.append(held_out.error_change(solution, offset))
    return changes


def _lowest(changes: Callable[[Sequence[float]], list[float]]) -> float:
    """Return the damping of the path with the lowest error.

    The error falls and then rises along the path. So it is looked at around a likely value, and
    beyond that only on the side where it still falls.

    Args:
        changes: Returns by how much some dampings change the error.
    """
    known: dict[int, float] = {}
    lowest = _LIKELY
    while new := [
        index
        for index in (lowest - 1, lowest, lowest + 1)
        if 0 <= index < len(DAMPING_PATH) and index not in known
    ]:
        found = changes([DAMPING_PATH[index] for index in new])
        known |= dict(zip(new, found, strict=True))
        lowest = min(sorted(known), key=known.__getitem__)
    return DAMPING_PATH[lowest]


def _ratio(error: float, energy: float) -> float:
    return error / energy if energy > 0.0 else 0.0
