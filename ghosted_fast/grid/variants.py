"""Ready-made variants: ghosts corrected towards the dense model's predictions, models healed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ghosted_fast.errors import ArgumentError
from ghosted_fast.grid.plan import CORRECTED, After, Variant
from ghosted_fast.improve.correction import correct_ghosts
from ghosted_fast.improve.healing import heal
from ghosted_fast.options import Corrections, HealOptions, check_corrections
from ghosted_fast.recovery import RECOVERIES, check_recovery
from ghosted_fast.text.batches import Batch

# Where corrections can reach the operator.
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


def healed(tokens: int, recovery: str = "ghost", seed: int = 0) -> Variant:
    """Return a recovery that is healed; "ghost" is corrected first, as `ghost_model` does it.

    Args:
        tokens: Tokens to learn from; no more than the text has are taken.
        recovery: One of `RECOVERIES`.
        seed: As in `heal`.

    Raises:
        ArgumentError: There is no such recovery, or no token.
    """
    check_recovery(recovery)
    options = HealOptions(tokens=tokens, seed=seed)
    corrections: Corrections = "auto" if RECOVERIES[recovery].improvable else 0
    name = f"{recovery} healed, {tokens:,} tokens"
    return Variant(name, recovery, partial(_heal, corrections, options))


def _check_operator(recovery: str) -> None:
    if recovery not in WITH_OPERATOR:
        raise ArgumentError(
            f"expected a recovery with an operator of its own, {', '.join(WITH_OPERATOR)}, "
            f"got {recovery!r}"
        )


def _correct(corrections: Corrections, smaller: Any, dense: Any, batches: Sequence[Batch]) -> After:
    facts = correct_ghosts(smaller, dense, batches, corrections)
    return After(corrections=sum(item.accepted for item in facts))


def _heal(
    corrections: Corrections,
    options: HealOptions,
    smaller: Any,
    dense: Any,
    batches: Sequence[Batch],
) -> After:
    found = _correct(corrections, smaller, dense, batches) if corrections else After()
    return replace(found, healing=heal(smaller, dense, batches, options))
