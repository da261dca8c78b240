"""Shares of a mixture."""

from __future__ import annotations

from collections.abc import Mapping

from ghosted_fast.errors import ArgumentError

# How far shares may be from adding up, so that three thirds can be written.
_ROUNDING = 0.01


def checked_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """Return shares that add up to 1, from such as nearly do.

    Raises:
        ArgumentError: One is not above 0, or they do not add up.
    """
    total = sum(shares.values())
    if not all(share > 0 for share in shares.values()) or not abs(total - 1) <= _ROUNDING:
        got = " + ".join(map(percent, shares.values()))
        raise ArgumentError(f"expected shares above 0 that add up to 100%, got {got}")
    return {name: share / total for name, share in shares.items()}


def percent(share: float) -> str:
    """Return a share as people read it."""
    return f"{100 * share:.3g}%"
