"""Tables and numbers as Markdown has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from docs.generate.results import Machine, machines
from ghosted_fast.timing.estimates import estimate_from, ratio_text, speed_text


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """Return a table.

    Args:
        columns: Headings.
        rows: Cells, as many in each as there are headings.
        words: How many columns, from the left, hold words; the others are aligned right.

    Raises:
        ValueError: A row has another number of cells.
    """
    if wrong := [row for row in rows if len(row) != len(columns)]:
        raise ValueError(f"expected {len(columns)} cells, got {list(wrong[0])}")
    rule = ["---" if index < words else "---:" for index in range(len(columns))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, rule, *rows))


def by_machine(
    has: Callable[[Machine], list[dict[str, Any]]],
    show: Callable[[list[dict[str, Any]]], str],
) -> str:
    """Return what is shown of each machine's rows, under its processor's name, the newest first."""
    parts = []
    for machine in machines(has):
        rows = has(machine)
        processor = rows[0].get("machine", rows[0])["processor"]
        parts.append(f"**{processor}.** {show(rows)}")
    return "\n".join(parts) or "Not measured yet in this way.\n"


def measured_ratio(record: Mapping[str, Any] | None) -> str:
    """Return a ratio of speeds as `1.22x ± 0.01`, from an `Estimate` as JSON has it."""
    return ratio_text(estimate_from(record))


def measured_speed(record: Mapping[str, Any]) -> str:
    """Return a speed with the digits that are known of it, from an `Estimate` as JSON has it."""
    return speed_text(estimate_from(record))


def ratio(value: float, digits: int = 2) -> str:
    """Return a factor as `1.22x`."""
    return f"{value:.{digits}f}x"
