"""This project's shapes and goals: what is demanded of which row, and what the rows say in docs."""

from __future__ import annotations

import dataclasses
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
        "gram_update", "ghost_apply", "ghost_solve", "divergence")}  # fmt: skip
    assert counts == {"gram_update": 16, "ghost_apply": 25, "ghost_solve": 3, "divergence": 6}
    assert len(list(bench.plans("ghost_apply", True))) == 6
    keys = [plan.key for name in counts for plan in bench.plans(name, False)]
    assert len(set(keys)) == len(keys)


def test_rows_are_kept_with_goals_and_read_by_the_pages(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "SIZES", (576,))
    monkeypatch.setattr(bench, "VOCABULARIES", (200,))
    setting = Setting(torch.device("cpu"), rotated_bytes=1 << 16, compiled=False)
    for operator in ("divergence", "ghost_apply", "ghost_solve", "gram_update"):
        plans = list(bench.plans(operator, False))
        chosen = [plan for plan in plans if "plain" in plan.shape or operator != "gram_update"][:1]
        run = run_plans(chosen, setting, Effort(0.5, 0.01))
        target = tmp_path / "a-machine" / f"{operator}.jsonl"
        dates = [f"2027-01-0{day}T00:00:00+00:00" for day in (1, 2)]
        written = [bench.append_rows(target, bench.records(run, date)) for date in dates]
        assert written == 2 * [len(list(run.rows))]
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    rows = results.newest_rows("gram_update")
    ours = rows[0]
    assert (ours["variant"], ours["date"][:10]) == (OURS, "2027-01-02")
    floors = [goal["floor"] for goal in ours["goals"]]
    assert floors == [goal.floor for goal in bench.goals_of(next(run.rows), bench.in_tiles(ours))]
    found = operators.reached(ours, "torch fp32")
    assert found is not None and found.low <= found.value <= found.high
    rivals = [row["variant"] for row in rows if not row["is_ours"]]
    best = operators.reached(ours, "best rival")
    assert best == min((operators.reached(ours, name) for name in rivals), key=float)  # type: ignore[arg-type]
    table = operators.operator_table("gram_update")
    assert "| G, bfloat16 | torch bf16 (error 1e-3) |" in table
    assert table.count(f"**{ours['processor']}.** Path `") == 1
    # Those of another machine stand below, since they are older.
    other = [{**row, "processor": "another", "date": "2026-01-01"} for row in rows]
    bench.append_rows(tmp_path / "b-machine" / "gram_update.jsonl", other)
    both = operators.operator_table("gram_update")
    assert both.startswith(table) and "**another.** Path `" in both
    assert operators.operator_table("ghost_solve") and operators.against_hooks()
    assert "| KL words=200 rows=256 |" in operators.divergence_table()
    monkeypatch.setattr(results, "RESULTS", tmp_path / "a-machine")
    assert operators.divergence_table() == "Not measured yet in this way.\n"


@pytest.mark.parametrize(
    ("tiles", "said"),
    [(True, [3.2, 1.8]), (False, [1.9, 7.5, 15, 1.8])],
)
def test_more_is_demanded_of_the_processor_that_can_do_more(
    bench: ModuleType, tiles: bool, said: list[float]
) -> None:
    setting = Setting(torch.device("cpu"), rotated_bytes=1 << 16, compiled=False)
    plan = next(bench.gram_update.plans(64, 32, torch.bfloat16))
    [row, *_] = run_plans([plan], setting, Effort(0.5, 0.01)).rows
    row = dataclasses.replace(row, shape="G plain d=2048 T=2048", width=2048)
    assert [goal.floor for goal in bench.goals_of(row, tiles)] == said
    normed = dataclasses.replace(row, shape="G+C normed d=2048 T=2048")
    assert [goal.floor for goal in bench.goals_of(normed, tiles)] == [1.3, 1.8]
    assert not bench.goals_of(dataclasses.replace(row, variant="torch fp64"), tiles)


def test_a_machine_without_results_is_no_machine_of_a_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "recovery").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "engines.json").write_text('[{"date": "2026-01-01"}]')
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    [machine] = results.machines(lambda machine: machine.engines)
    assert machine.folder.name == "a" and machine.newest("generate") == []
