"""What a measured speed is worth: one model under two names, measured again and again.

Each run measures as `ghosted-fast bench` does with its defaults. Both names are of one object: two
copies lie in other pages of memory, and may truly differ in speed. So the true ratio is 1: counted
are the intervals that hold it, and how far the mean is from it, so that a place in the order that
is favoured would show.
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path

from _results import append_rows, machine_folder
from rich.console import Console

from ghosted_fast.assets.downloads import fetch_demo_assets
from ghosted_fast.measure.speed import compare_throughput
from ghosted_fast.measure.system import machine_facts
from ghosted_fast.models.loading import load_model
from ghosted_fast.timing.estimates import ratio_text

PHASES = ("prefill", "decode")


def main() -> None:
    """Measure, and append a row for each run to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, default=machine_folder() / "timing.jsonl")
    given = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    model, _ = load_model(fetch_demo_assets().model, dtype=given.dtype)
    models = dict.fromkeys(("one", "the other"), model)
    facts = {"machine": machine_facts(), "dtype": given.dtype}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for run in range(given.runs):
        began = time.perf_counter()
        found = compare_throughput(models, seed=run)["the other"]
        ratios = found.relative["one"]
        seconds = time.perf_counter() - began
        row = {name: ratios[name].to_dict() for name in PHASES}
        append_rows(given.output, [{**facts, "date": date, "seconds": seconds, **row}])
        told = ", ".join(f"{name} {ratio_text(ratios[name])}" for name in PHASES)
        console.print(f"run {run + 1}: {told}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
