"""What a benchmark says: tables on the terminal, rows in a file."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _cases import Goal, Row
from _roofline import Roof
from rich.console import Console
from rich.table import Table

from ghosted_fast.measure.system import machine_facts
from ghosted_fast.ops import backend_status

RESULTS = Path(__file__).parent / "results"


def _print_table(console: Console, title: str, rows: list[Row]) -> None:
    table = Table(title=title)
    for heading in ("shape", "dtype", "variant"):
        table.add_column(heading)
    for heading in ("ms", "p20", "p80", "GB/s", "GF/s", "% of roof", "x best rival", "x 1 thread"):
        table.add_column(heading, justify="right")
    shape = ""
    for row in rows:
        if shape and row.shape + row.dtype != shape:
            table.add_section()
        shape = row.shape + row.dtype
        table.add_row(
            row.shape,
            row.dtype,
            row.backend,
            f"{row.ms:.4g}",
            f"{row.ms_p20:.4g}",
            f"{row.ms_p80:.4g}",
            f"{row.gbps:.1f}",
            f"{row.gflops:.0f}",
            f"{100 * row.roof_share:.0f}",
            f"{row.ratio_to_best_rival:.2f}",
            f"{row.ratios['one thread']:.2f}" if "one thread" in row.ratios else "",
        )
    console.print(table)


def reached(row: Row, goal: Goal) -> float | None:
    """Return what a row reached of a goal; None where it was not measured."""
    return row.roof_share if goal.against == "roof" else row.ratios.get(goal.against)


def _print_goals(console: Console, rows: list[Row]) -> None:
    table = Table(title="goals")
    for heading in ("threads", "shape", "dtype", "variant", "against"):
        table.add_column(heading)
    for heading in ("reached", "floor", "stretch"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        for goal in row.goals:
            value = reached(row, goal)
            if value is None:
                continue
            verdict = f"misses by {1 - value / goal.floor:.0%}" if value < goal.floor else ""
            table.add_row(
                str(row.threads),
                row.shape,
                row.dtype,
                row.backend,
                goal.against,
                f"{value:.2f}",
                f"{goal.floor:g}",
                f"{goal.stretch:g}",
                verdict or ("stretch" if value >= goal.stretch else "floor"),
            )
    if table.rows:
        console.print(table)


def report(
    operator: str,
    rows: list[Row],
    roofs: Mapping[int, Roof],
    target: Path | None,
    quick: bool,
) -> None:
    """Print the tables, and append the rows to a file; unless quick, to the results."""
    console = Console(width=150)
    for threads, roof in roofs.items():
        title = f"{operator}, {threads} thread(s); roofs: {roof}"
        _print_table(console, title, [row for row in rows if row.threads == threads])
    _print_goals(console, rows)
    target = target or (None if quick else RESULTS / f"bench_{operator}.jsonl")
    if target is not None:
        append_rows(target, rows, roofs)
        console.print(f"{len(rows)} rows appended to {target}")


def append_rows(target: Path, rows: list[Row], roofs: Mapping[int, Roof]) -> None:
    """Append rows to a JSONL file, each with the machine, the roofs, the versions and the date."""
    native = next(text for name, _, text in backend_status() if name == "native")
    facts: dict[str, Any] = {
        **machine_facts(),
        "native": native,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as file:
        for row in rows:
            roof = roofs[row.threads]
            limits = {"roof_gflops": dict(roof.gflops)}
            file.write(json.dumps({**facts, **limits, **asdict(row)}) + "\n")
