"""What a measured speed is worth: one model under two names, measured again and again.

Each run measures as `ghosted-fast bench` does with its defaults, in a process of its own. Both
names are of one object: two copies lie in other pages of memory, and may truly differ in speed.
What is left of that, where in memory each name's cache lies, is drawn anew by each process. So the
true ratio is 1: counted are the intervals that hold it, and how far the mean is from it, so that a
place in the order that is favoured would show.
"""

from __future__ import annotations

import argparse
import datetime
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _results import append_rows, machine_folder
from rich.console import Console

from ghosted_fast.assets.downloads import fetch_demo_assets
from ghosted_fast.measure.speed import compare_throughput
from ghosted_fast.measure.system import machine_facts
from ghosted_fast.models.loading import load_model
from ghosted_fast.timing.estimates import Estimate, ratio_text

NAMES, PHASES = ("one", "the other"), ("prefill", "decode")


def measured(seed: int, dtype: str) -> dict[str, Any]:
    """Return the ratios of a model to itself, as JSON has them, and the seconds they took."""
    model, _ = load_model(fetch_demo_assets().model, dtype=dtype)
    began = time.perf_counter()
    found = compare_throughput(dict.fromkeys(NAMES, model), seed=seed)[NAMES[1]]
    seconds = time.perf_counter() - began
    ratios = found.relative[NAMES[0]]
    return {"seconds": seconds, **{name: ratios[name].to_dict() for name in PHASES}}


def main() -> None:
    """Measure, and append a row for each run to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, default=machine_folder() / "timing.jsonl")
    given = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    facts = {"machine": machine_facts(), "dtype": given.dtype, "date": date}
    spawning = get_context("spawn")
    for run in range(given.runs):
        with ProcessPoolExecutor(1, mp_context=spawning) as process:
            row = process.submit(measured, run, given.dtype).result()
        append_rows(given.output, [{**facts, **row}])
        told = ", ".join(f"{name} {ratio_text(Estimate(**row[name]))}" for name in PHASES)
        console.print(f"run {run + 1}: {told}, {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
