"""The report's plots: matplotlib SVG whose colours follow the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from ghosted_fast.timing.estimates import Estimate

# Colours that stand for the page's CSS variables; no other colour may be drawn.
INK, FAINT, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {INK: "--ink", FAINT: "--faint", ACCENT: "--accent", SECOND: "--second"}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ghosted_fast",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
}
# Beyond this ratio of the largest to the smallest score the small ones would all look alike.
_LOG_RATIO = 3.0


def selection_figure(
    scores: Sequence[Mapping[str, Any]], removed: Sequence[int], criterion: str | None
) -> str | None:
    """Draw the score of every candidate interval, the selected one marked.

    A loss (`ghost`, `ghost-search`, `sleb`) is shown as perplexity too, on the right.

    Args:
        scores: `IntervalScore` dicts: start, stop, score.
        removed: The removed layers.
        criterion: Whose scores they are.

    Returns:
        SVG, or None where there are no two candidates.
    """
    if len(scores) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for marked in (False, True):
            part = [
                item
                for item in scores
                if set(range(item["start"], item["stop"])).issubset(removed) is marked
            ]
            axes.scatter(
                [item["start"] for item in part],
                [item["score"] for item in part],
                s=64 if marked else 26,
                color=ACCENT if marked else SECOND,
                label="selected" if marked else "candidate",
                zorder=3,
            )
        values = [item["score"] for item in scores]
        if min(values) > 0 and max(values) > _LOG_RATIO * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 4.0, 6.0)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        lengths = {item["stop"] - item["start"] for item in scores}
        width = f"{lengths.pop()} " if len(lengths) == 1 else ""
        axes.set_xlabel(f"first of the {width}removed layers")
        is_loss = criterion in ("ghost", "ghost-search", "sleb")
        axes.set_ylabel("held-out loss, nats/token" if is_loss else f"{criterion} score")
        if is_loss:
            perplexity = axes.secondary_yaxis("right", functions=(_exp, _log))
            perplexity.set_ylabel("held-out perplexity")
            perplexity.yaxis.set_major_locator(MaxNLocator(5))
            perplexity.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        figure.legend(loc="outside upper right", ncols=2)
        return svg_of(figure, "selection")


# While matplotlib sets an axis up, it tries values far beyond any loss.
def _exp(values: Any) -> Any:
    return np.exp(np.minimum(values, 700.0))


def _log(values: Any) -> Any:
    return np.log(np.maximum(values, np.finfo(np.float64).tiny))


def speed_figure(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Draw the tokens per second of prefill and of decoding, with their intervals.

    Args:
        rows: `ModelRow` dicts.

    Returns:
        SVG, or None where no speed was measured.
    """
    rows = [row for row in rows if row.get("throughput")][::-1]
    if not rows:
        return None
    labels = [f"{row['name']}, {row['dtype']}" for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 0.75 + 0.36 * len(rows)), layout="constrained")
        for index, phase in enumerate(("prefill", "decode")):
            axes = figure.add_subplot(1, 2, index + 1)
            speeds = [row["throughput"] for row in rows]
            found = [Estimate(**speed[f"{phase}_tokens_per_s"]) for speed in speeds]
            middle = [speed.value for speed in found]
            ends = [
                [speed.value - speed.low for speed in found],
                [min(speed.high - speed.value, speed.value) for speed in found],
            ]
            axes.barh(
                range(len(rows)),
                middle,
                xerr=ends,
                color=[ACCENT if "ghost" in row["name"] else SECOND for row in rows],
                ecolor=INK,
                error_kw={"elinewidth": 1.0},
                height=0.66,
            )
            axes.set_yticks(range(len(rows)), labels if index == 0 else [""] * len(rows))
            axes.tick_params(axis="y", length=0)
            axes.set_xlabel(f"{phase}, tokens per second")
            axes.grid(axis="x")
            axes.set_axisbelow(True)
        return svg_of(figure, "speed")


def healing_figure(healing: Mapping[str, Any] | None) -> str | None:
    """Draw the held-out divergence over the tokens that were learned from, the kept state marked.

    Args:
        healing: `HealingFacts` as a dict.

    Returns:
        SVG, or None where nothing was healed.
    """
    if healing is None or len(healing["curve"]) < 2:
        return None
    tokens = [point["tokens"] for point in healing["curve"]]
    values = [point["divergence"] for point in healing["curve"]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(tokens, values, color=SECOND, marker="o", markersize=4, label="judged")
        axes.scatter(
            [healing["best_tokens"]], [healing["after"]], s=64, color=ACCENT, label="kept", zorder=3
        )
        axes.set_xlabel("tokens learned from")
        axes.set_ylabel("held-out divergence, nats/token")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.grid(axis="y")
        figure.legend(loc="outside upper right", ncols=2)
        return svg_of(figure, "healing")


def svg_of(figure: Figure, name: str) -> str:
    """Return the figure as an `<svg>` element that can stand in a page beside others.

    Args:
        figure: Drawn with `STYLE` and in no other colours than those above.
        name: Unlike that of any other figure of the page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
