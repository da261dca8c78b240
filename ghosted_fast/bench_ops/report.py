"""What a run says: tables and lines for people, CSV for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from ghosted_fast.bench_ops.roofs import MEMORY
from ghosted_fast.bench_ops.rows import Row, Run
from ghosted_fast.timing.estimates import Estimate, ratio_text, speed_text

COLUMNS = [
    "shape",
    "dtype",
    "variant",
    "run by",
    "ms",
    "GB/s",
    "GF/s",
    "% of roof",
    "to best rival",
]
ONE_THREAD = "to one thread"
# Columns, from the left, that hold words.
WORDS = 4
# Half of an interval, on a logarithmic scale, from which on its ends are shown, and from which on
# it says nothing: factors of 1.6 and of 100 between the ends.
_WIDE, _UNKNOWN = 0.25, 2.3
Table = tuple[str, list[str], list[list[str]]]


def tables(run: Run) -> Iterator[Table]:
    """Yield the table of each operator: its title, its headings, and its cells as text."""
    rows = list(run.rows)
    for operator in dict.fromkeys(row.operator for row in rows):
        found = [row for row in rows if row.operator == operator]
        with_threads = any(row.one_thread for row in found)
        columns = [*COLUMNS, *[ONE_THREAD] * with_threads]
        threads = found[0].threads
        where = run.machine["device"]
        if where == "cpu":
            where = f"{threads} thread{'s' * (threads > 1)}"
        lines = [_cells(row)[: len(columns)] for row in found]
        for before, row, line in zip(found, found[1:], lines[1:], strict=False):
            if (row.shape, row.dtype) == (before.shape, before.dtype):
                line[:2] = ["", ""]
        yield f"{operator}, {where}", columns, lines


def _cells(row: Row) -> list[str]:
    return [
        row.shape,
        row.dtype,
        row.variant + (" *" if row.note else ""),
        row.backend,
        figure_text(row.ms),
        _known(row.gbps),
        _known(row.gflops),
        figure_text(row.roof_share.times(100.0)),
        _ratio(row.to_best_rival),
        _ratio(row.one_thread) if row.one_thread else "",
    ]


def figure_text(estimate: Estimate) -> str:
    """Return a figure with its interval; a wide one by its ends."""
    if estimate.half_width <= _WIDE:
        return str(estimate)
    if estimate.half_width > _UNKNOWN:
        return "not known"
    return " to ".join(
        f"{end:,.0f}" if end >= 100 else f"{end:.2g}" for end in (estimate.low, estimate.high)
    )


def _known(speed: Estimate) -> str:
    return speed_text(speed) if speed.half_width <= _UNKNOWN else "not known"


def _ratio(ratio: Estimate | None) -> str:
    if ratio is None or ratio.half_width <= _WIDE:
        return ratio_text(ratio)
    if ratio.holds_one:
        return "not told apart"
    return figure_text(ratio) + " x" * (ratio.half_width <= _UNKNOWN)


def notes(run: Run) -> list[str]:
    """Return what is to be known beside the tables, a line each."""
    lines = [f"{_roof_line(run)}; ± half of the 95 % interval"] if run.cases else []
    if open_cases := sum(not case.settled for case in run.cases):
        lines.append(
            f"{open_cases} of {len(run.cases)} cases ended by the time before each ratio was known "
            f"to ± {run.settings['precision']:.2g}"
        )
    for note in dict.fromkeys(row.note for row in run.rows if row.note):
        named = dict.fromkeys(row.variant for row in run.rows if row.note == note)
        lines.append(f"* {', '.join(named)}: {note}")
    left_out = {name: reason for case in run.cases for name, reason in case.left_out.items()}
    lines += [f"left out: {name}, {reason}" for name, reason in left_out.items()]
    if not run.complete:
        lines.append(f"interrupted: {len(run.cases)} cases were measured by then")
    if run.conditions is not None:
        lines += [f"warning: {text}" for text in run.conditions.warnings()]
    return lines


def _roof_line(run: Run) -> str:
    parts = []
    for kind, values in run.roofs.items():
        unit = "GB/s" if kind == MEMORY else "GF/s"
        low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
        parts.append(f"{kind} {low if low == high else f'{low} to {high}'} {unit}")
    return f"roofs ({run.roof_source}): {', '.join(parts)}"


def csv_text(run: Run) -> str:
    """Return a line for each row, with the ends of each interval in columns of their own."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    names = ("ms", "gbps", "gflops", "roof_share", "to_best_rival", "one_thread")
    plain = (
        *("operator", "shape", "width", "rows", "dtype", "variant", "is_ours", "backend"),
        *("threads", "error", "num_bytes", "roof_limit", "best_rival", "note"),
    )
    ends = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    writer.writerow(["device", *plain, "flops", *ends])
    for row in run.rows:
        values = [getattr(row, name) for name in plain]
        figures = [part for name in names for part in _ends(getattr(row, name))]
        writer.writerow([run.machine["device"], *values, sum(row.flops.values()), *figures])
    return target.getvalue()


def _ends(estimate: Estimate | None) -> Sequence[float | str]:
    return ("", "", "") if estimate is None else (estimate.value, estimate.low, estimate.high)
