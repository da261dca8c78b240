"""From normal equations to a ghost: damping chosen on held-out folds, robust Cholesky solve.

Solves `(G + damping I) M^T = C` (Yun et al., arXiv 2605.15491). The choice of the damping by the
closed-form error on held-out folds, the escalation and the optional bias are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError, CalibrationError, SolveError
from ghosted_fast.gram import GramAccumulator, NormalEquations
from ghosted_fast.ops import ghost_solve

Damping = float | Literal["auto"]

# Relative to the mean of G's diagonal. Below the first value fp64 rounding decides, above the last
# the ghost fades into the identity.
DAMPING_PATH = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
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
    path = DAMPING_PATH if damping == "auto" else (damping / mean_diagonal(total),)
    errors = _held_out_errors(gram, total, path, bias)
    relative = _best_damping(path, errors)
    if damping == "auto":
        damping = relative * mean_diagonal(total)
    solution, offset, facts = solve_equations(total, damping, bias)
    return GhostSolution(
        weight=solution.mT.contiguous(),
        bias=offset,
        fit_error=_ratio(total.error(solution, offset), total.energy),
        held_out_error=errors[path.index(relative)] if errors else None,
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
    unit = mean_diagonal(train)
    path = DAMPING_PATH if damping == "auto" else (damping / unit,)
    errors = _split_errors(train, held_out, path, bias) if held_out.num_tokens else []
    solution, offset, facts = solve_equations(train, _best_damping(path, errors) * unit, bias)
    return solution, offset, facts["damping"]


def solve_equations(
    equations: NormalEquations, damping: float, bias: bool
) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """Solve one set of equations at one absolute damping, raised tenfold until it succeeds.

    Returns:
        M^T [d, d] fp64, the bias [d] fp64 or None, and `damping`, `condition`, `residual`.

    Raises:
        SolveError: No damping made the system solvable.
    """
    gram, cross = equations.gram, equations.cross
    feature_sum, delta_sum = equations.moments[0], equations.moments[1]
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


def _held_out_errors(
    gram: GramAccumulator, total: NormalEquations, path: Sequence[float], bias: bool
) -> list[float]:
    """Return the held-out error of each relative damping, over all folds; [] with under two."""
    folds = [k for k in range(gram.folds) if gram.fold_tokens(k)]
    if len(folds) < 2:
        return []
    errors, energy = [0.0] * len(path), 0.0
    for k in folds:  # one fold at a time: the memory beside the statistics stays constant
        held_out = gram.fold(k)
        for index, error in enumerate(_split_errors(total - held_out, held_out, path, bias)):
            errors[index] += error
        energy += held_out.energy
    return [_ratio(error, energy) for error in errors]


def _split_errors(
    train: NormalEquations, held_out: NormalEquations, path: Sequence[float], bias: bool
) -> list[float]:
    unit = mean_diagonal(train)
    errors = []
    for relative in path:
        solution, offset, _ = solve_equations(train, relative * unit, bias)
        errors.append(held_out.error(solution, offset))
    return errors


def _best_damping(path: Sequence[float], errors: Sequence[float]) -> float:
    if not errors:
        return path[len(path) // 2]
    return path[min(range(len(path)), key=errors.__getitem__)]


def _ratio(error: float, energy: float) -> float:
    return error / energy if energy > 0.0 else 0.0
