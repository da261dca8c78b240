"""The roofline: flops per second of each variant over its flops per byte, under the roofs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from statistics import median
from typing import Any

from ghosted_fast.bench_ops.roofs import MEMORY
from ghosted_fast.bench_ops.rows import Run
from ghosted_fast.errors import MissingExtraError

_MARKERS = {"gram_update": "s", "ghost_apply": "o", "ghost_solve": "^", "divergence": "D"}
_OURS, _RIVAL, _INK = "#d1242f", "#0969da", "#59636e"
_STYLE = {
    "svg.hashsalt": "ghosted_fast",
    "svg.fonttype": "path",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def check_plot() -> None:
    """Raise, before any work, unless plots can be drawn.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"a plot needs matplotlib: pip install 'ghosted_fast[report]' ({error})"
        ) from error


def roofline_svg(run: Run) -> str:
    """Return the picture as SVG.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    check_plot()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.5, 5.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        roofs = {kind: median(values) for kind, values in run.roofs.items()}
        intensities = [_intensity(row) for row in run.rows]
        _draw_roofs(axes, roofs, min(intensities) / 2, 2 * max(intensities))
        shown: set[str] = set()
        for row in run.rows:
            label = f"{row.operator}, {'ours' if row.is_ours else 'rivals'}"
            speed = row.gflops
            axes.errorbar(
                [_intensity(row)],
                [speed.value],
                yerr=[[speed.value - speed.low], [speed.high - speed.value]],
                marker=_MARKERS.get(row.operator, "o"),
                markersize=5,
                linestyle="none",
                elinewidth=1,
                color=_OURS if row.is_ours else _RIVAL,
                markerfacecolor=_OURS if row.is_ours else "none",
                label=None if label in shown else label,
                zorder=3 if row.is_ours else 2,
            )
            shown.add(label)
        axes.set_xlabel("flops per byte")
        axes.set_ylabel("GF/s")
        threads = next(row.threads for row in run.rows)
        axes.set_title(f"{run.machine['processor']}, {run.machine['device']}, {threads} thr.")
        axes.grid(which="major", linewidth=0.4)
        figure.legend(loc="outside lower center", ncols=3)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata={"Date": None})
    return target.getvalue()


def _intensity(row: Any) -> float:
    return float(sum(row.flops.values()) / row.num_bytes)


def _draw_roofs(axes: Any, roofs: Mapping[str, float], low: float, high: float) -> None:
    gbps = roofs[MEMORY]
    peaks = {kind: peak for kind, peak in roofs.items() if kind != MEMORY}
    for kind, peak in peaks.items():
        ridge = peak / gbps
        xs = [low, min(max(ridge, low), high), high]
        axes.plot(xs, [min(peak, gbps * x) for x in xs], color=_INK, linewidth=1.2, zorder=1)
        axes.annotate(
            f"{kind} {peak:,.0f} GF/s",
            (high, min(peak, gbps * high)),
            ha="right",
            va="bottom",
            color=_INK,
            fontsize=8,
        )
    axes.annotate(
        f"memory {gbps:,.0f} GB/s", (low, gbps * low), va="bottom", color=_INK, fontsize=8
    )
