"""The plots of a grid's page: ours in the accent, the strongest rivals in ink, the rest grey."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.ticker import StrMethodFormatter as Format

from ghosted_fast.grid.summary import PAPER_PAIR
from ghosted_fast.grid.table import BEST_PUBLISHED, DEFAULT, Grid, marked
from ghosted_fast.recovery import RECOVERIES
from ghosted_fast.reports.plots import ACCENT, FAINT, INK, SECOND, STYLE, svg_of

# Perplexities above this many times the dense one leave the plots at the top.
CUT_OFF = 16
# Labels at the ends of lines stay apart by this share of the axis.
_LABEL_GAP = 0.062
_PAIR_COLUMNS = 2
# Intervals stand beside their points, in layers, so that those of two lines are told apart.
_INTERVAL_SHIFT = 0.05
Row = Mapping[str, Any]
Line = tuple[str, Sequence[Row], str]


def lead_figure(grid: Grid) -> str:
    """Draw perplexity against layers removed: our default and what it has to beat, on each text."""
    best, ours = marked(grid.rows, BEST_PUBLISHED), marked(grid.rows, DEFAULT)
    criterion, recovery = PAPER_PAIR
    lines: list[Line] = []
    paper = [r for r in grid.rows if (r["criterion"], r["recovery"]) == PAPER_PAIR]
    if paper:
        lines.append((f"{criterion} + {recovery}", paper, SECOND))
    if best:
        lines.append(("best published", list(best.values()), INK))
    if ours:
        lines.append(("our default", list(ours.values()), ACCENT))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.1 * len(grid.texts) + 0.4, 3.4), layout="constrained")
        panels = figure.subplots(1, len(grid.texts), squeeze=False)[0]
        for axes, text in zip(panels, grid.texts, strict=True):
            _losses(axes, grid, text, lines, intervals=True)
            axes.set_title(text, loc="left", fontsize=10, fontweight="bold")
            axes.set_xlabel("layers removed")
        panels[0].set_ylabel("perplexity")
        return svg_of(figure, "lead")


def pairs_figure(grid: Grid) -> str:
    """Draw perplexity against layers removed on the first text, one panel for each criterion."""
    criteria = list(dict.fromkeys(row["criterion"] for row in grid.rows))
    recoveries = list(dict.fromkeys(row["recovery"] for row in grid.rows))
    count = math.ceil(len(criteria) / _PAIR_COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 2.9 * count + 0.3), layout="constrained")
        panels = figure.subplots(count, _PAIR_COLUMNS, squeeze=False).flat
        for axes, criterion in zip(panels, criteria, strict=False):
            lines: list[Line] = []
            for recovery in recoveries:
                rows = [
                    row
                    for row in grid.rows
                    if (row["criterion"], row["recovery"]) == (criterion, recovery)
                ]
                lines.append((recovery, rows, _colour(recovery)))
            _losses(axes, grid, grid.texts[0], lines)
            axes.set_title(criterion, loc="left", fontsize=10, fontweight="bold")
        for axes in list(panels)[len(criteria) :]:
            axes.set_axis_off()
        figure.supxlabel("layers removed", fontsize=10)
        figure.supylabel(f"perplexity, {grid.texts[0]}", fontsize=10)
        return svg_of(figure, "pairs")


def intervals_figure(grid: Grid) -> str | None:
    """Draw the held-out loss of every interval with its ghost, a line for each length.

    Returns:
        SVG, or None where the criterion `ghost` was not run.
    """
    chosen = [item for item in grid.selections if item["criterion"] == "ghost"]
    if not chosen:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        labels = []
        for item in chosen:
            scores = sorted(item["scores"], key=lambda score: score["start"])
            starts = [score["start"] for score in scores]
            losses = [score["score"] for score in scores]
            axes.plot(starts, losses, color=SECOND, linewidth=1.6)
            best = min(range(len(losses)), key=losses.__getitem__)
            axes.plot(starts[best], losses[best], "o", color=ACCENT, markersize=6, zorder=3)
            labels.append((starts[-1], losses[-1], f"{item['remove']} removed", INK))
        axes.set_xlabel("first of the removed layers")
        axes.set_ylabel("held-out loss, nats/token")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.margins(x=0.05)
        for x, y, name, colour in labels:
            axes.annotate(
                name, (x, y), (6, 0), textcoords="offset points", va="center", color=colour,
                fontsize=8.5,
            )  # fmt: skip
        return svg_of(figure, "intervals")


def quality_figure(grid: Grid) -> str | None:
    """Draw quality against decoding speed, or against size where no speed was measured.

    Returns:
        SVG, or None where there is no row to draw.
    """
    rows = [row for row in grid.rows if row["refused"] is None]
    if not rows:
        return None
    with_speed = any(row["decode_ratio"] for row in rows)
    text = grid.texts[0]
    dense = grid.dense["perplexity"][text]["value"]

    def place(row: Row) -> tuple[float, float]:
        saved = 100 * (1 - row["parameters"] / grid.dense["parameters"])
        return row["decode_ratio"]["value"] if with_speed else saved, row["perplexity"][text][
            "value"
        ]

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        points = [place(row) for row in rows if place(row)[1] < CUT_OFF * dense]
        axes.scatter([x for x, _ in points], [y for _, y in points], s=14, color=SECOND)
        labels = []
        best, ours = marked(rows, BEST_PUBLISHED), marked(rows, DEFAULT)
        for line, other, colour, name in (
            (best, ours, INK, "best published"),
            (ours, best, ACCENT, "our default"),
        ):
            if not line:
                continue
            places = [place(row) for row in line.values()]
            axes.plot([x for x, _ in places], [y for _, y in places], "o-", color=colour)
            for count, (x, y) in zip(line, places, strict=True):
                rival = place(other[count])[1] if count in other else y
                above = y > rival or (y == rival and colour == INK)
                axes.annotate(
                    f"{count}", (x, y), (0, 7 if above else -14), textcoords="offset points",
                    color=colour, fontsize=8, ha="center",
                )  # fmt: skip
            labels.append((*places[-1], name, colour))
        _log_losses(axes, dense, [y for _, y in points])
        axes.axhline(dense, color=FAINT, linewidth=1.0, zorder=0)
        axes.set_xlabel(
            "decoding speed, relative to dense" if with_speed else "parameters saved, %"
        )
        axes.set_ylabel(f"perplexity, {text}")
        axes.grid(axis="y")
        _label_ends(axes, labels)
        return svg_of(figure, "quality")


def _colour(recovery: str) -> str:
    known = RECOVERIES.get(recovery)
    if known is None or not known.published:
        return ACCENT
    return INK if recovery == PAPER_PAIR[1] else SECOND


def _losses(
    axes: Axes, grid: Grid, text: str, lines: Sequence[Line], intervals: bool = False
) -> None:
    """Draw lines of perplexity against layers removed, each with its name at its end."""
    dense = grid.dense["perplexity"][text]["value"]
    seen: list[float] = []
    labels = []
    for name, rows, colour in lines:
        usable = [row for row in rows if row["refused"] is None]
        if not usable:
            continue
        counts = [row["remove"] for row in usable]
        found = [row["perplexity"][text] for row in usable]
        values = [item["value"] for item in found]
        wide = 2.2 if colour == ACCENT else 1.4
        order = 3 if colour == ACCENT else 2
        axes.plot(counts, values, "o-", color=colour, linewidth=wide, markersize=3.5, zorder=order)
        if intervals and colour != SECOND:
            ends = [[item[end] for item in found] for end in ("low", "high")]
            shift = _INTERVAL_SHIFT if colour == ACCENT else -_INTERVAL_SHIFT
            axes.vlines([count + shift for count in counts], *ends, color=colour, linewidth=1.0)
            seen += [*ends[0], *ends[1]]
        seen += values
        labels.append((counts[-1], min(values[-1], CUT_OFF * dense), name, colour))
    _log_losses(axes, dense, seen)
    axes.axhline(dense, color=FAINT, linewidth=1.0, zorder=0)
    labels.append((max(row["remove"] for row in grid.rows), dense, "dense", SECOND))
    axes.xaxis.set_major_locator(FixedLocator(sorted({r["remove"] for r in grid.rows})))
    axes.grid(axis="y")
    _label_ends(axes, labels)


def _log_losses(axes: Axes, dense: float, values: Sequence[float]) -> None:
    """Give an axis of perplexities its scale: to the lowest value, and to the highest or so."""
    top = min(max([*values, 1.2 * dense]), CUT_OFF * dense)
    bottom = min([*values, dense])
    axes.set_yscale("log")
    axes.set_ylim(bottom / 1.04, top * 1.06)
    ratio = top / bottom
    subs = (1.0, 2.0, 5.0) if ratio > 8 else (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(Format("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _label_ends(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names to the right of the axes, at the height of their lines' ends but apart."""
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"

    def share(value: float) -> float:
        if log:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    heights = sorted((min(share(y), 1.0), name, colour) for _, y, name, colour in labels)
    placed: list[float] = []
    for height, _, _ in heights:
        placed.append(max(height, placed[-1] + _LABEL_GAP) if placed else height)
    excess = placed[-1] - 1.0 if placed else 0.0
    if excess > 0:
        placed[-1] = 1.0
        for index in range(len(placed) - 2, -1, -1):
            placed[index] = min(placed[index], placed[index + 1] - _LABEL_GAP)
    for (_, name, colour), height in zip(heights, placed, strict=True):
        axes.annotate(
            name,
            (1.0, height),
            (4, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK if colour == SECOND else colour,
            fontweight="bold" if colour == ACCENT else "normal",
        )
