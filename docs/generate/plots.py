"""The pictures of README and docs, as SVG, each for a light and for a dark page."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from docs.generate import healing
from docs.generate.operators import case_label, reached
from docs.generate.recovery import relative
from docs.generate.results import (
    OUR_CRITERION,
    OUR_RECOVERY,
    Study,
    engine_rows,
    newest_rows,
    studies,
)
from ghosted_fast.timing.estimates import Estimate

_OPERATORS = ("gram_update", "ghost_apply", "ghost_solve")


@dataclass(frozen=True)
class Theme:
    """Colours: text and axes, grid lines, what is poor, the rivals, ours."""

    ink: str
    grid: str
    nothing: str
    rival: str
    ours: str


THEMES = {
    "light": Theme("#1f2328", "#d1d9e0", "#818b98", "#0969da", "#d1242f"),
    "dark": Theme("#e6edf3", "#3d444d", "#9198a1", "#58a6ff", "#ff7b72"),
}


def pictures() -> dict[str, bytes]:
    """Return every picture by the name of its file."""
    draw: dict[str, Callable[[Theme], Any]] = {
        "perplexity": perplexity,
        "engines": engines,
        "operators": operators,
        "healing": healing_curve,
    }
    return {
        f"{name}-{mode}.svg": _svg(function, theme)
        for name, function in draw.items()
        for mode, theme in THEMES.items()
    }


def _svg(draw: Callable[[Theme], Any], theme: Theme) -> bytes:
    """Return a figure as SVG that has no date and the same names in each run."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    settings = {
        "svg.hashsalt": "ghosted_fast",
        "svg.fonttype": "path",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": theme.ink,
        "axes.edgecolor": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "grid.color": theme.grid,
        "legend.frameon": False,
    }
    mpl.use("svg")
    with mpl.rc_context(settings):
        figure = draw(theme)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    # Lines of paths end with blanks; no tool of a repository likes that.
    lines = file.getvalue().decode().splitlines()
    return ("\n".join(line.rstrip() for line in lines) + "\n").encode()


def perplexity(theme: Theme) -> Any:
    """Draw perplexity against the number of removed layers, for both models."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for place, study in zip(axes, studies(), strict=True):
        _perplexity_of(place, study, theme)
    axes[0].set_ylabel("perplexity / dense, Wikipedia")
    axes[0].legend(loc="upper left")
    return figure


def _perplexity_of(axes: Any, study: Study, theme: Theme) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    text, counts = study.texts[0], study.counts
    lines = (
        (
            "nothing in their place",
            theme.nothing,
            [study.row(count, "streamline", "none") for count in counts],
        ),
        (
            "best published method",
            theme.rival,
            [study.best_published(count) for count in counts],
        ),
        (
            "ghosted_fast",
            theme.ours,
            [study.row(count, OUR_CRITERION, OUR_RECOVERY) for count in counts],
        ),
    )
    for label, colour, rows in lines:
        values = [relative(row, study, text) for row in rows]
        axes.plot(counts, values, marker="o", color=colour, label=label, linewidth=2)
        axes.annotate(
            f"{values[-1]:.2f}" if values[-1] < 100 else f"{values[-1]:.0f}",
            (counts[-1], values[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    highest = axes.get_ylim()[1]
    wide = highest > 20
    ticks = (1, 3, 10, 30, 100, 300) if wide else (1, 1.5, 2, 3, 5, 7)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.95)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks(counts)
    axes.margins(x=0.12)
    axes.grid(axis="y")
    axes.set_xlabel(f"layers removed, of {study.layer_count}")
    axes.set_title(study.name, fontsize=11)


def _to_dense(row: dict[str, Any], name: str) -> Estimate:
    """Return a model's speed of decoding over the dense one's."""
    return Estimate(**row[name]["relative"]["dense"]["decode"])


def engines(theme: Theme) -> Any:
    """Draw the speed of decoding over dense, pruned beside ghosted, in each engine."""
    import matplotlib.pyplot as plt

    rows = engine_rows()[::-1]
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.34 * len(rows)), layout="constrained")
    for name, colour, marker in (("pruned", theme.nothing, "o"), ("ghosted", theme.ours, "D")):
        found = [_to_dense(row, name) for row in rows]
        values = [ratio.value for ratio in found]
        ends = [[r.value - r.low for r in found], [r.high - r.value for r in found]]
        axes.errorbar(
            values, range(len(rows)), xerr=ends, fmt=marker, color=colour, label=name,
            markersize=8, alpha=0.9,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [f"{row['engine']} {row['precision']}" for row in rows])
    axes.axvline(1.0, color=theme.ink, linewidth=1)
    axes.set_xlim(left=0.98)
    axes.grid()
    axes.set_axisbelow(True)
    axes.set_xlabel("speed of decoding / dense (one layer in six removed)")
    figure.suptitle(rows[0]["machine"]["processor"], x=0.02, ha="left", fontsize=11)
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def operators(theme: Theme) -> Any:
    """Draw each operator's ratio to its strongest rival and its share of the machine's roof."""
    import matplotlib.pyplot as plt

    rows = [
        row
        for name in _OPERATORS
        for row in newest_rows(name)
        if row["variant"] == "ghosted_fast" and row["threads"] == 1
    ][::-1]
    colours = [
        (theme.ours, theme.rival, theme.nothing)[_OPERATORS.index(row["operator"])] for row in rows
    ]
    figure, (ratio, roof) = plt.subplots(
        1, 2, sharey=True, figsize=(10, 1.0 + 0.24 * len(rows)), layout="constrained"
    )
    figure.suptitle(rows[0]["processor"], fontsize=11)
    places = range(len(rows))
    against_rivals = [reached(row, "best rival") for row in rows]
    _bars(ratio, against_rivals, 1.0, colours, theme)
    ratio.set_yticks(places, [case_label(row) for row in rows], fontsize=8)
    ratio.set_xlabel("times as fast as the best rival, one thread")
    # What comes out of the cache is not held by the roof of memory.
    shares = [None if "cached" in row["shape"] else reached(row, "roof") for row in rows]
    _bars(roof, shares, 100.0, colours, theme)
    roof.set_xlabel("% of the machine's roof, one thread")
    for axes, line in ((ratio, 1.0), (roof, 100.0)):
        axes.axvline(line, color=theme.ink, linewidth=1)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.set_ylim(-1, len(rows))
    return figure


def _bars(
    axes: Any, values: Sequence[Estimate | None], scale: float, colours: list[str], theme: Theme
) -> None:
    """Draw a bar for each value, with its interval where it has one."""
    lengths = [scale * float(value) if value else 0 for value in values]
    ends = [
        [scale * (value.value - value.low) if value else 0.0 for value in values],
        [scale * (value.high - value.value) if value else 0.0 for value in values],
    ]
    intervals = ends if any(map(any, ends)) else None
    axes.barh(range(len(values)), lengths, xerr=intervals, color=colours, ecolor=theme.ink)


def healing_curve(theme: Theme) -> Any:
    """Draw the mean perplexity against the tokens of healing, by what it starts from."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    colours = (theme.nothing, theme.rival, theme.ours)
    for start, colour in zip(healing.STARTS, colours, strict=True):
        found = healing.points(start)
        tokens = [item["learned"] / 1e3 if item["tokens"] else 0.0 for item in found]
        values = [healing.geometric_mean(item) for item in found]
        axes.plot(tokens, values, marker="o", color=colour, label=f"from {start}", linewidth=2)
    axes.set_xlabel("thousand tokens of healing")
    axes.set_ylabel("perplexity / dense, three texts")
    axes.grid(axis="y")
    axes.legend()
    return figure
