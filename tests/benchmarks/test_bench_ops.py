"""This project's shapes and goals: what is demanded of which row, and what the rows say in docs."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.benchmark_module import load_benchmark

from docs.generate import operators, results
from ghosted_fast.bench_ops.cases import OURS, Setting
from ghosted_fast.bench_ops.runner import Effort, run_plans
from ghosted_fast.timing.estimates import Estimate


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_benchmark("bench_ops", monkeypatch)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ((2.3, 2.2, 2.4), "stretch"),
        ((2.3, 1.9, 2.4), "floor"),
        ((1.9, 1.79, 2.0), "not shown"),
        ((1.7, 1.6, 1.81), "not shown"),
        ((1.62, 1.6, 1.7), "misses by 10%"),
    ],
)
def test_a_goal_holds_by_the_lower_end(
    bench: ModuleType, ends: tuple[float, float, float], said: str
) -> None:
    assert bench.verdict(Estimate(*ends, 20), bench.Goal("roof", 1.8, 2.2)) == said


def test_shapes(bench: ModuleType) -> None:
    counts = {name: len(list(bench.plans(name, False))) for name in (
        "gram_update", "ghost_apply", "ghost_solve")}  # fmt: skip
    assert counts == {"gram_update": 16, "ghost_apply": 17, "ghost_solve": 3}
    assert len(list(bench.plans("ghost_apply", True))) == 4
    keys = [plan.key for name in counts for plan in bench.plans(name, False)]
    assert len(set(keys)) == len(keys)


def test_rows_are_kept_with_goals_and_read_by_the_pages(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "SIZES", (576,))
    setting = Setting(torch.device("cpu"), rotated_bytes=1 << 16, compiled=False)
    for operator in ("gram_update", "ghost_apply", "ghost_solve"):
        plans = list(bench.plans(operator, False))
        chosen = [plan for plan in plans if "plain" in plan.shape or operator != "gram_update"][:1]
        run = run_plans(chosen, setting, Effort(0.5, 0.01))
        target = tmp_path / "new" / f"bench_{operator}.jsonl"
        bench.append_rows(target, run, "2027-01-01T00:00:00+00:00")
        assert bench.append_rows(target, run, "2027-01-02T00:00:00+00:00") == len(list(run.rows))
    monkeypatch.setattr(results, "RESULTS", target.parent)
    results.newest_rows.cache_clear()
    results.operator_rows.cache_clear()
    try:
        rows = results.operator_rows("gram_update")
        ours = rows[0]
        assert (ours["variant"], ours["date"][:10]) == (OURS, "2027-01-02")
        assert [goal["floor"] for goal in ours["goals"]] == [1.9, 7.5, 15, 1.8]
        found = operators.reached(ours, "torch fp32")
        assert found is not None and found.low <= found.value <= found.high
        rivals = [row["variant"] for row in rows if not row["is_ours"]]
        best = operators.reached(ours, "best rival")
        assert best == min((operators.reached(ours, name) for name in rivals), key=float)  # type: ignore[arg-type]
        table = operators.operator_table("gram_update")
        assert "| G, bfloat16 | torch fp64 | 15 |" in table and " ± " in table
        assert "torch" in operators.machine_line()
        assert operators.operator_table("ghost_solve") and operators.against_hooks()
    finally:
        results.newest_rows.cache_clear()
        results.operator_rows.cache_clear()


def test_rows_from_before_intervals_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {
        "backend": OURS,
        "roof_share": 0.5,
        "ratios": {OURS: 1.0, "a": 3.0, "b": 2.0, "best rival": 2.0, "one thread": 1.5},
    }
    row = results._with_intervals(old)
    assert row["variant"] == OURS and row["best_rival"] == "b"
    for against, value in (("roof", 0.5), ("one thread", 1.5), ("best rival", 2.0), ("a", 3.0)):
        found = operators.reached(row, against)
        assert found is not None and found.value == found.low == found.high == value
        assert operators.with_interval(found) == f"{value:.2f}"
    assert operators.reached(row, "absent") is None
    assert json.loads(json.dumps(row)) == row
