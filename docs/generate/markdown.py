"""Tables and numbers as Markdown has them."""

from __future__ import annotations

from collections.abc import Sequence


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


def layers_as_text(layers: Sequence[int]) -> str:
    """Return layers as `13-15, 17`, both ends of a run included."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def ratio(value: float, digits: int = 2) -> str:
    """Return a factor as `1.22x`."""
    return f"{value:.{digits}f}x"
