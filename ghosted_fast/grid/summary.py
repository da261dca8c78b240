"""One number for a pairing: its excess perplexity beside that of the best published one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ghosted_fast.grid.table import Grid

PAPER_PAIR = ("streamline", "ghost-paper")


@dataclass(frozen=True)
class Summary:
    """How a pairing does over all numbers of layers and texts.

    Attributes:
        criterion: Its criterion.
        recovery: Its recovery.
        is_default: Whether it is our default.
        to_best_published: Geometric mean of excess (perplexity / dense - 1) relative to that of the
            best published pairing of the same number of layers and text; None where there is none,
            or an excess is not above zero.
        to_paper: The same relative to streamline + ghost-paper.
    """

    criterion: str
    recovery: str
    is_default: bool
    to_best_published: float | None
    to_paper: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


def summaries(grid: Grid) -> list[Summary]:
    """Return the summary of every pairing, the best first."""
    excesses: dict[tuple[str, str], dict[tuple[int, str], float]] = {}
    published: dict[tuple[int, str], float] = {}
    for row in grid.rows:
        for text, value in (row["excess"] or {}).items():
            place = row["remove"], text
            excesses.setdefault((row["criterion"], row["recovery"]), {})[place] = value
            if row["published"]:
                published[place] = min(value, published.get(place, math.inf))
    places = {(row["remove"], text) for row in grid.rows for text in grid.texts}
    paper = excesses.get(PAPER_PAIR, {})
    found = [
        Summary(
            *pair,
            pair == grid.default_pair,
            _geometric_mean(places, own.get, published.get),
            _geometric_mean(places, own.get, paper.get),
        )
        for pair, own in excesses.items()
    ]
    return sorted(found, key=lambda item: item.to_best_published or math.inf)


def _geometric_mean(
    places: Iterable[tuple[int, str]],
    own: Callable[[tuple[int, str]], float | None],
    other: Callable[[tuple[int, str]], float | None],
) -> float | None:
    """Return the geometric mean of own / other, or None if one is missing or not above zero."""
    logs = []
    for place in places:
        value, reference = own(place), other(place)
        if value is None or reference is None or value <= 0 or reference <= 0:
            return None
        logs.append(math.log(value / reference))
    return math.exp(sum(logs) / len(logs)) if logs else None
