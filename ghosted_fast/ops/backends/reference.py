"""Plain torch in fp64: slow, and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ghosted_fast.ops import reference
from ghosted_fast.ops.operands import Operands

_OPERATORS: dict[str, Callable[[Any], Any]] = {
    "divergence": reference.divergence_reference,
    "ghost_apply": reference.ghost_apply_reference,
    "ghost_solve": reference.ghost_solve_reference,
    "gram_update": reference.gram_update_reference,
}


def absence_reason() -> str:
    """Return "": torch is everywhere."""
    return ""


def description() -> str:
    """Return what it is."""
    return "torch in fp64, any device, slow"


def refusal(operator: str, operands: Operands) -> str:
    """Return "": every operator has its reference."""
    return ""


def run(operator: str, operands: Operands) -> Any:
    """Run the reference of an operator."""
    return _OPERATORS[operator](operands)
