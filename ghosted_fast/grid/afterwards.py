"""What the variants of a grid do to a smaller model once its operators are fitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ghosted_fast.batches import Batch
from ghosted_fast.correction import correct_ghosts
from ghosted_fast.refinement import refine_ghosts


def corrected(smaller: Any, dense: Any, batches: Sequence[Batch]) -> int:
    """Correct the ghosts as `ghost_model` does by default; return the accepted corrections."""
    return sum(fact.accepted for fact in correct_ghosts(smaller, dense, batches))


def refined(smaller: Any, dense: Any, batches: Sequence[Batch]) -> int:
    """Refine the operators alone."""
    refine_ghosts(smaller, dense, batches)
    return 0


def corrected_and_refined(smaller: Any, dense: Any, batches: Sequence[Batch]) -> int:
    """Correct the ghosts, then refine them; return the accepted corrections."""
    corrections = corrected(smaller, dense, batches)
    refine_ghosts(smaller, dense, batches)
    return corrections
