"""Draw one picture of the operators' newest results: ratio to the strongest rival, % of the roof.

Reads the last run of each operator from `benchmarks/results/*.jsonl`. A bar per shape, dtype and
number of threads; a bar left of the line is a shape that loses. Needs matplotlib (extra `report`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
OPERATORS = ("gram_update", "ghost_apply", "ghost_solve")
OURS = "ghosted_fast"


def newest_rows(operator: str) -> list[dict[str, Any]]:
    """Return the library's own rows of the last run of an operator's benchmark; [] if none."""
    path = RESULTS / f"bench_{operator}.jsonl"
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["date"] == rows[-1]["date"] and row["backend"] == OURS]


def draw(target: Path) -> None:
    """Write the picture as PNG.

    Raises:
        SystemExit: There are no results.
    """
    rows = [row for operator in OPERATORS for row in newest_rows(operator)]
    if not rows:
        raise SystemExit(f"no results in {RESULTS}: run the benchmarks first (make bench)")
    labels = [
        f"{row['operator']}  {row['shape']}  {row['dtype']}  {row['threads']} thr." for row in rows
    ]
    places = range(len(rows), 0, -1)
    figure, (ratio, roof) = plt.subplots(
        1, 2, sharey=True, figsize=(12, 1.2 + 0.2 * len(rows)), layout="constrained"
    )
    colours = [f"C{OPERATORS.index(row['operator'])}" for row in rows]
    ratio.barh(places, [row["ratio_to_best_rival"] for row in rows], color=colours)
    ratio.axvline(1.0, color="black", linewidth=1)
    ratio.set_xlabel("times as fast as the strongest rival")
    ratio.set_yticks(places, labels, fontsize=7)
    ratio.set_ylim(0, len(rows) + 1)
    roof.barh(places, [100 * row["roof_share"] for row in rows], color=colours)
    roof.axvline(100.0, color="black", linewidth=1)
    roof.set_xlabel("% of the machine's roof, measured in the same run")
    figure.suptitle(f"{rows[0]['processor']}, torch {rows[0]['torch']}, {rows[0]['date'][:10]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=110)
    partial.replace(target)


def main() -> None:
    """Draw the picture from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "operators.png")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
