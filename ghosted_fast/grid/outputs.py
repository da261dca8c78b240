"""What a grid is written as: JSON for machines, Markdown for a README, a page to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghosted_fast._atomic_files import write_atomically
from ghosted_fast.facts import layers_as_text
from ghosted_fast.grid.summary import Summary, summaries
from ghosted_fast.grid.table import BEST_PUBLISHED, DEFAULT, Grid
from ghosted_fast.reports.page import page_template
from ghosted_fast.timing.estimates import estimate_from, ratio_text, speed_text


def check_outputs() -> None:
    """Raise MissingExtraError, before any work, if the page could not be made."""
    page_template("grid.html")


def write_outputs(folder: Path, grid: Grid) -> None:
    """Write `results.json`, `results.md` and `index.html`, each whole or not at all."""
    data = {**grid.to_dict(), "summaries": [item.to_dict() for item in summaries(grid)]}
    write_atomically(folder / "results.json", json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "results.md", markdown(grid))
    write_atomically(folder / "index.html", page(grid))


def markdown(grid: Grid) -> str:
    """Return the whole table in Markdown."""
    dense = ", ".join(
        f"{found['value']:.2f} on {text}" for text, found in grid.dense["perplexity"].items()
    )
    lines = [
        f"# {grid.about['model']} ({grid.about['dtype']})",
        "",
        (
            f"Dense perplexity: {dense}. Calibrated on {grid.about['calibration_tokens']:,} "
            "tokens. In brackets the 95 % bootstrap interval over passages. Bold: our default; †: "
            "the best published row on the first text."
        ),
    ]
    for count in dict.fromkeys(row["remove"] for row in grid.rows):
        rows = [row for row in grid.rows if row["remove"] == count]
        columns, cells = full_table(grid, rows)
        lines += ["", f"## {count} of {grid.about['num_layers']} layers removed", ""]
        lines.append(_markdown_row(columns))
        lines.append("|" + " --- |" * 3 + " ---: |" * (len(columns) - 3))
        for row, line in zip(rows, cells, strict=True):
            if DEFAULT in row["marks"]:
                line = [f"**{cell}**" if cell else cell for cell in line]
            if BEST_PUBLISHED in row["marks"]:
                line[2] += " †"
            lines.append(_markdown_row(line))
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def full_table(grid: Grid, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the cells, as text, of rows with all that is known of them."""
    tasks = list(dict.fromkeys(task for row in grid.rows for task in row["accuracy"] or {}))
    with_speed = any(row["decode_ratio"] for row in grid.rows)
    with_healing = any(row.get("healing") for row in grid.rows)
    columns = ["layers removed", "criterion", "recovery", "corrections"]
    columns += ["trained"] * with_healing
    columns += [f"perplexity, {text}" for text in grid.texts] + tasks + ["parameters"]
    columns += ["decode tok/s", "to dense"] * with_speed + ["seconds", "peak memory"]
    lines = []
    for row in rows:
        line = [layers_as_text(row["removed"]), row["criterion"], row["recovery"]]
        if row["refused"] is not None:
            line += ["-"] * (1 + with_healing)
            lines.append([*line, f"refused: {row['refused']}"])
            lines[-1] += [""] * (len(columns) - len(lines[-1]))
            continue
        line.append(str(row["corrections"]))
        if with_healing:
            line.append(_trained(row.get("healing")))
        for text in grid.texts:
            found = row["perplexity"][text]
            line.append(f"{_loss(found['value'])} [{_loss(found['low'])}, {_loss(found['high'])}]")
        accuracy = row["accuracy"] or {}
        line += [f"{accuracy[task]:.1%}" if task in accuracy else "-" for task in tasks]
        line.append(f"{row['parameters'] / 1e6:,.1f} M")
        if with_speed:
            line.append(speed_text(estimate_from(row["decode_tokens_per_s"])))
            line.append(ratio_text(estimate_from(row["decode_ratio"])))
        seconds = sum(row["seconds"][part] for part in ("select", "recover"))
        line.append(f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}")
        peak = row["peak_memory"]
        line.append("-" if peak is None else f"{peak / 2**30:.2f} GiB")
        lines.append(line)
    return columns, lines


def _trained(healing: Mapping[str, Any] | None) -> str:
    """Return what was trained of a row's model."""
    if healing is None:
        return "nothing"
    what = f"rank {healing['rank']}" if healing["maps"] else "ghosts alone"
    if not healing["best_tokens"]:
        return f"{what}, no step helped"
    return f"{what}, {healing['tokens']:,} tokens, {healing['seconds']:,.0f} s"


def _loss(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def page(grid: Grid) -> str:
    """Return the HTML page, with all plots in it."""
    from ghosted_fast.grid import plots

    template = page_template("grid.html")
    return template.render(
        grid=grid,
        about=grid.about,
        summaries=[item for item in summaries(grid) if item.to_best_published is not None],
        headline=_headline(grid),
        blocks=[_block(grid, count) for count in dict.fromkeys(r["remove"] for r in grid.rows)],
        columns=full_table(grid, [])[0],
        lines=list(zip(grid.rows, full_table(grid, grid.rows)[1], strict=True)),
        lead_svg=plots.lead_figure(grid),
        pairs_svg=plots.pairs_figure(grid),
        intervals_svg=plots.intervals_figure(grid),
        quality_svg=plots.quality_figure(grid),
        cut_off=plots.CUT_OFF,
        default_mark=DEFAULT,
        best_mark=BEST_PUBLISHED,
    )


def _headline(grid: Grid) -> list[tuple[str, str]]:
    """Return the figures that a reader looks for first."""
    ours: Summary | None = next((item for item in summaries(grid) if item.is_default), None)
    if ours is None:
        return []
    shown = []
    if ours.to_best_published is not None:
        shown.append(
            (f"{ours.to_best_published:.2f} times", "the excess of the best published pairing")
        )
    if ours.to_paper is not None:
        shown.append((f"{ours.to_paper:.2f} times", "the excess of streamline + ghost-paper"))
    return shown


def _block(grid: Grid, count: int) -> dict[str, Any]:
    """Return the matrix of criteria and recoveries for one number of layers."""
    rows = [row for row in grid.rows if row["remove"] == count]
    criteria = list(dict.fromkeys(row["criterion"] for row in rows))
    return {
        "count": count,
        "recoveries": list(dict.fromkeys(row["recovery"] for row in rows)),
        "criteria": [
            {
                "name": criterion,
                "layers": layers_as_text(
                    next(row["removed"] for row in rows if row["criterion"] == criterion)
                ),
                "cells": [
                    {
                        "row": row,
                        "losses": None
                        if row["refused"] is not None
                        else [_loss(row["perplexity"][text]["value"]) for text in grid.texts],
                    }
                    for row in rows
                    if row["criterion"] == criterion
                ],
            }
            for criterion in criteria
        ],
    }
