"""Ready-made variants: ghosts corrected towards the dense model's predictions, and refined."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ghosted_fast.errors import ArgumentError, check_at_least
from ghosted_fast.grid.plan import CORRECTED, Variant
from ghosted_fast.improve.correction import correct_ghosts
from ghosted_fast.improve.refinement import RefinementOptions, refine_ghosts
from ghosted_fast.options import Corrections, check_corrections
from ghosted_fast.recovery import RECOVERIES
from ghosted_fast.text.batches import Batch

# Where corrections and refinement can reach the operator.
WITH_OPERATOR = tuple(name for name, recovery in RECOVERIES.items() if recovery.has_operator)


def corrected(corrections: Corrections = "auto", recovery: str = "ghost") -> Variant:
    """Return a recovery with corrections; with "auto" and "ghost" it is the library's default.

    Args:
        corrections: As in `correct_ghosts`.
        recovery: One of `WITH_OPERATOR`.

    Raises:
        ArgumentError: The recovery has no operator, or there is no such number of corrections.
    """
    _check_operator(recovery)
    check_corrections(corrections)
    name = CORRECTED if corrections == "auto" else f"{corrections} corrections"
    return Variant(f"{recovery} + {name}", recovery, partial(_correct, corrections))


def refined(steps: int, recovery: str = "ghost", seed: int = 0) -> Variant:
    """Return a recovery that is refined; "ghost" is corrected first, as `ghost_model` does it.

    Args:
        steps: As in `refine_ghosts`.
        recovery: One of `WITH_OPERATOR`.
        seed: As in `refine_ghosts`.

    Raises:
        ArgumentError: The recovery has no operator, or there is no step.
    """
    _check_operator(recovery)
    check_at_least(1, steps=steps)
    corrections: Corrections = "auto" if RECOVERIES[recovery].improvable else 0
    name = f"{recovery} refined, {steps} steps"
    return Variant(name, recovery, partial(_refine, corrections, steps, seed))


def _check_operator(recovery: str) -> None:
    if recovery not in WITH_OPERATOR:
        raise ArgumentError(
            f"expected a recovery with an operator of its own, {', '.join(WITH_OPERATOR)}, "
            f"got {recovery!r}"
        )


def _correct(corrections: Corrections, smaller: Any, dense: Any, batches: Sequence[Batch]) -> int:
    facts = correct_ghosts(smaller, dense, batches, corrections)
    return sum(item.accepted for item in facts)


def _refine(
    corrections: Corrections,
    steps: int,
    seed: int,
    smaller: Any,
    dense: Any,
    batches: Sequence[Batch],
) -> int:
    taken = _correct(corrections, smaller, dense, batches)
    refine_ghosts(smaller, dense, batches, steps, options=RefinementOptions(seed=seed))
    return taken
