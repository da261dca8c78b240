"""The operators on this project's shapes, and what the library demands of itself.

    python benchmarks/bench_ops.py --threads 1 2     appends rows to results/bench_OPERATOR.jsonl

The measuring is `ghosted-fast bench-ops`. A goal holds where the lower end of an interval does.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ghosted_fast.bench_ops import ghost_apply, ghost_solve, gram_update
from ghosted_fast.bench_ops.cases import OURS, Plan, Setting
from ghosted_fast.bench_ops.report import WORDS, notes, tables
from ghosted_fast.bench_ops.rotation import bytes_past_the_cache
from ghosted_fast.bench_ops.rows import Row, Run
from ghosted_fast.bench_ops.runner import Effort, run_plans
from ghosted_fast.cli._shared.results import Result, TextTable, show
from ghosted_fast.timing.estimates import Estimate

RESULTS = Path(__file__).parent / "results"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES, TOKENS = (576, 2048, 4096), 2048
QUICK_SIZES = (576,)
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
GRAM_GOALS = {
    ("G", "bfloat16"): (
        Goal(gram_update.TORCH_BF16, 1.9, 2.2),
        Goal("torch fp32", 7.5, 8.5),
        Goal("torch fp64", 15, 18),
        THREADS,
    ),
    ("C", "bfloat16"): (Goal(gram_update.TORCH_BF16, 0.95, 1.08), THREADS),
    ("G+C", "bfloat16"): (Goal("torch fp64", 10, 12), THREADS),
    ("G", "float32"): (Goal("torch fp32", 3.7, 4.2), Goal("oneDNN fp32", 1.8, 2.0), THREADS),
}
SOLVE_GOALS = (Goal("torch LU", 1.8, 2.3), THREADS)
DECODE_GOALS = {1: (2.2, 2.5), 4: (1.9, 2.2), 16: (1.5, 2.0)}


def plans(operator: str, quick: bool) -> Iterator[Plan]:
    """Yield the cases of an operator."""
    sizes = QUICK_SIZES if quick else SIZES
    for size in sizes:
        if operator == "gram_update":
            yield from gram_update.plans(size, TOKENS, BF16)
            if size < 4096:
                yield from gram_update.plans(size, TOKENS, FP32, [("G", False)])
                yield from gram_update.plans(size, TOKENS, FP16, [("G", False)])
        elif operator == "ghost_apply":
            for rows in (*DECODE_GOALS, 512):
                yield from ghost_apply.plans(size, rows, BF16)
        else:
            yield from ghost_solve.plans(size)
    if operator == "ghost_apply" and not quick:
        yield from ghost_apply.plans(sizes[0], 1, BF16, cached=True)
        for rows in (*DECODE_GOALS, 512):
            yield from ghost_apply.plans(sizes[0], rows, FP32)


def goals_of(row: Row) -> tuple[Goal, ...]:
    """Return what a row should reach."""
    if row.operator == "ghost_apply":
        return _apply_goals(row)
    if row.variant != OURS:
        return ()
    if row.operator == "ghost_solve":
        return SOLVE_GOALS
    wanted, form, *_ = row.shape.split()
    return GRAM_GOALS.get((wanted, row.dtype), ()) if form == "plain" else ()


def _apply_goals(row: Row) -> tuple[Goal, ...]:
    rows, cached = row.rows, row.shape.endswith("cached")
    if row.dtype != "bfloat16" or rows is None:
        return ()
    if row.variant == f"{OURS} int8":
        return (Goal(OURS, 1.4, 1.7),) if rows == 1 and row.width >= 2048 else ()
    if row.variant != OURS:
        return ()
    if rows > ghost_apply.DECODE_ROWS:
        return (Goal(BEST, 1.0, 1.1), THREADS)
    if cached:
        return (Goal(ghost_apply.LINEAR, 4.0, 6.0), Goal(ghost_apply.HOOK, 2.7, 4.0))
    if row.width < 2048:
        return ()
    roof = (Goal(ROOF, 0.85, 0.95),) if rows == 1 else ()
    return (Goal(BEST, *DECODE_GOALS[rows]), *roof)


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


def goal_table(rows: Sequence[Row]) -> TextTable:
    """Return the table of goals."""
    columns = ["threads", "shape", "dtype", "variant", "against", "reached", "floor", "stretch", ""]
    lines = []
    for row in rows:
        for goal in goals_of(row):
            value = reached(row, goal)
            if value is None:
                continue
            lines.append([str(row.threads), row.shape, row.dtype, row.variant, goal.against])
            lines[-1] += [str(value), f"{goal.floor:g}", f"{goal.stretch:g}", verdict(value, goal)]
    return TextTable(columns, lines, "goals", words=5)


def append_rows(target: Path, run: Run, date: str) -> int:
    """Append the rows of a run to a JSONL file, each with machine, roofs and date."""
    facts = {**run.machine, "date": date, "roof_source": run.roof_source}
    lines = [
        {
            **facts,
            "roofs": {name: value.to_dict() for name, value in case.roofs.items()},
            "pairs": case.pairs,
            "conditions": case.conditions.to_dict(),
            **row.to_dict(),
            "goals": [asdict(goal) for goal in goals_of(row)],
        }
        for case in run.cases
        for row in case.rows
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return len(lines)


def main() -> None:
    """Run the benchmark."""
    operators = ("gram_update", "ghost_apply", "ghost_solve")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operator", choices=operators, nargs="+", default=list(operators))
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="default: 1")
    parser.add_argument("--precision", type=float, default=0.01, help="of ratios (default: 0.01)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a case (default: 20)")
    parser.add_argument("--quick", action="store_true", help="the smallest size; no rows are kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
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
        lines: list[TextTable | str] = [goal_table([row for run in runs for row in run.rows])]
        if not given.quick:
            target = given.results / f"bench_{operator}.jsonl"
            count = sum(append_rows(target, run, date) for run in runs)
            lines.append(f"{count} rows appended to {target}")
        show(Result({}, lines), as_json=False)


if __name__ == "__main__":
    main()
