"""The operators on this project's shapes, and what the library demands of itself.

    python benchmarks/bench_ops.py --threads 1 2     appends to results/MACHINE/OPERATOR.jsonl

The measuring is `ghosted-fast bench-ops`. A goal holds where the lower end of an interval does.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _results import append_rows, machine_folder

from ghosted_fast.bench_ops import divergence, ghost_apply, ghost_solve, gram_update
from ghosted_fast.bench_ops.cases import OURS, Plan, Setting
from ghosted_fast.bench_ops.report import WORDS, notes, tables
from ghosted_fast.bench_ops.rotation import bytes_past_the_cache
from ghosted_fast.bench_ops.rows import Row, Run
from ghosted_fast.bench_ops.runner import Effort, run_plans
from ghosted_fast.cli._shared.results import Result, TextTable, show
from ghosted_fast.timing.estimates import Estimate

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES, TOKENS = (576, 2048, 4096), 2048
QUICK_SIZES = (576,)
VOCABULARIES = (49152, 262144)
BEST, ROOF, ONE_THREAD = "best rival", "roof", "one thread"


@dataclass(frozen=True)
class Goal:
    """What a variant should reach.

    Attributes:
        against: Name of the variant that it is compared with; "best rival"; "roof" for a share of
            the roof; "one thread" for its own time on one thread.
        floor: The ratio that it must reach.
        stretch: The ratio that would be excellent.
    """

    against: str
    floor: float
    stretch: float


THREADS = Goal(ONE_THREAD, 1.8, 2.0)
GRAM_FP32_GOALS = (Goal("torch fp32", 3.7, 4.2), Goal("oneDNN fp32", 1.8, 2.0), THREADS)
# G and C against torch's bf16 product, by hidden size, in tiles.
TILES = {576: (2.2, 2.5), 2048: (3.2, 4.0), 4096: (4.0, 5.0)}
TILES_CROSS = {576: (1.5, 2.0), 2048: (2.2, 2.6), 4096: (2.5, 3.0)}
DECODE_ROWS = (1, 4, 16)
PREFILL_ROWS = (48, 96, 512)


def in_tiles(run: Mapping[str, Any]) -> bool:
    """Return whether a machine's bf16 products are made in tiles, where others are demanded."""
    return "path amx" in run["native"]


def gram_goals(row: Row, tiles: bool) -> tuple[Goal, ...]:
    """Return what the Gram of bf16 or fp32 rows should reach."""
    wanted, form, *_ = row.shape.split()
    bf16 = gram_update.TORCH_BF16
    if (wanted, row.dtype, form) == ("G", "float32", "plain"):
        return GRAM_FP32_GOALS
    if row.dtype != "bfloat16":
        return ()
    if (wanted, form) == ("G+C", "normed"):
        return (Goal(bf16, 1.3, 2.0 if tiles else 1.5), THREADS)
    if form == "normed":
        return ()
    if tiles and row.width in TILES:
        return {
            "G": (Goal(bf16, *TILES[row.width]), THREADS),
            "C": (Goal(bf16, *TILES_CROSS[row.width]), Goal(ROOF, 0.45, 0.6), THREADS),
        }.get(wanted, (Goal("torch fp64", 10, 20), THREADS))
    fp32, fp64 = Goal("torch fp32", 7.5, 8.5), Goal("torch fp64", 15, 18)
    return {
        "G": (Goal(bf16, 1.9, 2.2), fp32, fp64, THREADS),
        "C": (Goal(bf16, 1.0, 1.1), Goal(ROOF, 0.85, 0.9), THREADS),
    }.get(wanted, (Goal("torch fp64", 10, 12), THREADS))


def plans(operator: str, quick: bool) -> Iterator[Plan]:
    """Yield the cases of an operator."""
    sizes = QUICK_SIZES if quick else SIZES
    for size in sizes:
        if operator == "gram_update":
            yield from gram_update.plans(size, TOKENS, BF16, wide=size < 4096)
            if size < 4096:
                yield from gram_update.plans(size, TOKENS, FP32, [("G", False)])
                yield from gram_update.plans(size, TOKENS, FP16, [("G", False)])
        elif operator == "ghost_apply":
            for rows in (*DECODE_ROWS, *PREFILL_ROWS):
                yield from ghost_apply.plans(size, rows, BF16)
        elif operator == "ghost_solve":
            yield from ghost_solve.plans(size)
    if operator == "divergence":
        for words in VOCABULARIES[: 1 if quick else None]:
            yield from divergence.plans(words, *divergence.ROWS, BF16)
    if operator == "ghost_apply" and not quick:
        yield from ghost_apply.plans(sizes[0], 1, BF16, cached=True)
        for rows in (*DECODE_ROWS, *PREFILL_ROWS):
            yield from ghost_apply.plans(sizes[0], rows, FP32)


def goals_of(row: Row, tiles: bool) -> tuple[Goal, ...]:
    """Return what a row should reach, on a processor that multiplies in tiles or on another."""
    if row.operator == "ghost_apply":
        return _apply_goals(row, tiles)
    if row.variant != OURS:
        return ()
    if row.operator == "divergence":
        return (Goal(BEST, 2.0, 4.0), THREADS)
    if row.operator == "ghost_solve":
        return (Goal("torch LU", *((1.3, 1.8) if tiles else (1.8, 2.3))), THREADS)
    return gram_goals(row, tiles)


def _apply_goals(row: Row, tiles: bool) -> tuple[Goal, ...]:
    rows, cached = row.rows, row.shape.endswith("cached")
    if row.dtype != "bfloat16" or rows is None:
        return ()
    roof = Goal(ROOF, 0.9 if tiles else 0.85, 0.95)
    if row.variant == f"{OURS} int8":
        goals = (Goal(OURS, 1.7 if tiles else 1.6, 1.8), Goal(ROOF, 0.85, 0.9))
        return goals if rows == 1 and row.width >= 2048 else ()
    if row.variant != OURS:
        return ()
    if rows > ghost_apply.DECODE_ROWS:
        return (Goal(BEST, 1.1 if tiles else 1.0, 1.3 if tiles else 1.1), THREADS)
    if cached:
        return (Goal(ghost_apply.LINEAR, 4.0, 6.0), Goal(ghost_apply.HOOK, 2.7, 4.0))
    if row.width < 2048:
        return ()
    floors = {1: 1.4, 4: 1.5, 16: 1.5} if tiles else {1: 2.2, 4: 1.9, 16: 1.5}
    best = Goal(BEST, floors[rows], floors[rows] + 0.4)
    return (best, roof) if rows == 1 else (best,)


def reached(row: Row, goal: Goal) -> Estimate | None:
    """Return what a row reached of a goal; None where it was not measured."""
    named = {ROOF: row.roof_share, ONE_THREAD: row.one_thread, BEST: row.to_best_rival}
    return named[goal.against] if goal.against in named else row.ratios.get(goal.against)


def verdict(value: Estimate, goal: Goal) -> str:
    """Return whether a goal holds: by the lower end of the interval."""
    if value.low >= goal.floor:
        return "stretch" if value.low >= goal.stretch else "floor"
    if value.high < goal.floor:
        return f"misses by {1 - value.value / goal.floor:.0%}"
    return "not shown"


def goal_table(runs: Sequence[Run]) -> TextTable:
    """Return the table of goals."""
    columns = ["threads", "shape", "dtype", "variant", "against", "reached", "floor", "stretch", ""]
    lines = []
    for row, tiles in ((row, in_tiles(run.machine)) for run in runs for row in run.rows):
        for goal in goals_of(row, tiles):
            value = reached(row, goal)
            if value is None:
                continue
            lines.append([str(row.threads), row.shape, row.dtype, row.variant, goal.against])
            lines[-1] += [str(value), f"{goal.floor:g}", f"{goal.stretch:g}", verdict(value, goal)]
    return TextTable(columns, lines, "goals", words=5)


def records(run: Run, date: str) -> list[dict[str, Any]]:
    """Return the rows of a run as files have them, each with machine, roofs and date."""
    facts = {**run.machine, "date": date, "roof_source": run.roof_source}
    return [
        {
            **facts,
            "roofs": {name: value.to_dict() for name, value in case.roofs.items()},
            "pairs": case.pairs,
            "conditions": case.conditions.to_dict(),
            **row.to_dict(),
            "goals": [asdict(goal) for goal in goals_of(row, in_tiles(run.machine))],
        }
        for case in run.cases
        for row in case.rows
    ]


def main() -> None:
    """Run the benchmark."""
    operators = ("gram_update", "ghost_apply", "ghost_solve", "divergence")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operator", choices=operators, nargs="+", default=list(operators))
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="default: 1")
    parser.add_argument("--precision", type=float, default=0.01, help="of ratios (default: 0.01)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a case (default: 20)")
    parser.add_argument("--quick", action="store_true", help="the smallest size; no rows are kept")
    parser.add_argument("--results", type=Path, default=machine_folder(), help="folder of the rows")
    given = parser.parse_args()
    cpu = torch.device("cpu")
    setting = Setting(cpu, rotated_bytes=bytes_past_the_cache(cpu))
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for operator in given.operator:
        chosen = list(plans(operator, given.quick))
        runs = []
        for threads in sorted(set(given.threads)):
            torch.set_num_threads(threads)
            run = run_plans(chosen, setting, Effort(given.precision, given.seconds), progress=True)
            runs.append(run)
            shown = [
                TextTable(columns, rows, title, words=WORDS) for title, columns, rows in tables(run)
            ]
            show(Result({}, [*shown, *notes(run)]), as_json=False)
            if not run.complete:
                raise SystemExit(130)
        lines: list[TextTable | str] = [goal_table(runs)]
        if not given.quick:
            target = given.results / f"{operator}.jsonl"
            count = sum(append_rows(target, records(run, date)) for run in runs)
            lines.append(f"{count} rows appended to {target}")
        show(Result({}, lines), as_json=False)


if __name__ == "__main__":
    main()
