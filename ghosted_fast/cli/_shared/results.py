"""What a verb found out, and how it is shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import typer
from rich.console import Console
from rich.table import Table

# Of lines that go to a file or a pipe, where nobody wants a table folded at 80 columns.
_PLAIN_WIDTH = 160


@dataclass(frozen=True)
class TextTable:
    """A table to print.

    Attributes:
        columns: Headings.
        rows: Cells, as text.
        title: What stands above it.
        numeric: Whether all columns but the first hold numbers, which are aligned right.
        words: Of such a table, how many columns from the left hold words.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str | None = None
    numeric: bool = True
    words: int = 1


@dataclass(frozen=True)
class Result:
    """What a verb found out.

    Attributes:
        data: The result for `--json`.
        shown: The result for people: tables, and lines of text.
        passed: Whether the verb's own checks held; if not, it ends with status 1.
        interrupted: Whether Ctrl-C ended the work, and this is what was known; status 130.
    """

    data: dict[str, Any]
    shown: Sequence[TextTable | str] = field(default_factory=tuple)
    passed: bool = True
    interrupted: bool = False


def show(result: Result, as_json: bool) -> None:
    """Print a result on stdout."""
    if as_json:
        typer.echo(json.dumps(result.data, indent=2, ensure_ascii=False))
        return
    terminal = sys.stdout.isatty()
    console = Console(width=None if terminal else _PLAIN_WIDTH, highlight=False, markup=False)
    for item in result.shown:
        if isinstance(item, str):
            console.print(item, soft_wrap=True)
        else:
            console.print(_rich_table(item, terminal))


def _rich_table(item: TextTable, terminal: bool) -> Table:
    from rich import box

    table = Table(
        title=item.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD if terminal else None,
        pad_edge=terminal,
    )
    for index, column in enumerate(item.columns):
        is_number = item.numeric and index >= item.words
        justify: Literal["left", "right"] = "right" if is_number else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for row in item.rows:
        table.add_row(*row)
    return table
