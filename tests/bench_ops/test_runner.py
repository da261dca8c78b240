"""Rounds: roofs and variants in the same ones, ratios within them, one thread, and interrupts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from bench_ops.simulated import FLOPS, SETTING, Machine, machine

from ghosted_fast.bench_ops import runner
from ghosted_fast.bench_ops.cases import OURS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_roofs_run_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = Machine(machine())
    found = simulated.measure(monkeypatch)
    size = len(simulated.seconds)
    rounds = [simulated.ran[i : i + size] for i in range(0, len(simulated.ran), size)]
    assert len(rounds) == 2 * found.pairs
    assert all(sorted(part) == sorted(simulated.seconds) for part in rounds)


def test_shares_and_ratios_hold_while_the_machine_changes_its_speed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is thrice as slow for half of the time, roofs and all: no ratio may notice."""
    simulated = Machine(machine(), slower=lambda clock: 3.0 if int(clock / 0.5) % 2 else 1.0)
    found = simulated.measure(monkeypatch)
    rows = {row.variant: row for row in found.rows}
    ours = rows[OURS]
    # 4 MB of 20 MB in 10 ms are 2 ms; the flops take 0.08 ms: 2 of 5 ms.
    assert float(ours.roof_share) == pytest.approx(0.4, rel=0.02)
    assert ours.roof_limit == "memory"
    assert ours.best_rival == "torch"
    assert float(ours.to_best_rival) == pytest.approx(2.0, rel=0.02)  # type: ignore[arg-type]
    assert float(ours.ratios["other"]) == pytest.approx(4.0, rel=0.02)
    assert rows["torch"].to_best_rival is None
    assert float(rows["other"].to_best_rival) == pytest.approx(0.5, rel=0.02)  # type: ignore[arg-type]
    assert all(row.one_thread is None for row in found.rows)


def test_the_slower_limit_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Machine(machine(fp32=1000.0)).measure(monkeypatch)
    # 2e6 of 1e8 flops in 4 s are 80 ms, for a call of 5 ms.
    assert found.rows[0].roof_limit == "fp32"
    assert float(found.rows[0].roof_share) == pytest.approx(16.0)
    assert float(found.roofs["memory"]) == pytest.approx(2.0)
    assert float(found.roofs["fp32"]) == pytest.approx(0.025)


def test_figures_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Machine(machine()).measure(monkeypatch).rows[0]
    assert float(row.ms) == pytest.approx(5.0)
    assert float(row.gbps) == pytest.approx(0.8)
    assert float(row.gflops) == pytest.approx(FLOPS / 5e-3 / 1e9)
    assert (row.error, row.backend, row.threads) == (0.25, "native", 1)


def test_ours_is_timed_on_one_thread_in_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = Machine(machine())
    threads: list[tuple[str, int]] = []
    run = simulated.run

    def noted(name: str) -> float:
        threads.append((name, torch.get_num_threads()))
        return run(name) * (1.8 if torch.get_num_threads() == 1 else 1.0)

    simulated.run = noted  # type: ignore[method-assign]
    torch.set_num_threads(2)
    found = simulated.measure(monkeypatch)
    assert torch.get_num_threads() == 2
    first, *others = found.rows
    assert float(first.one_thread) == pytest.approx(1.8)  # type: ignore[arg-type]
    assert first.threads == 2 and all(row.one_thread is None for row in others)
    assert {name for name, count in threads if count == 1} == {OURS}
    assert Counter(threads)[OURS, 1] == Counter(threads)[OURS, 2] == 2 * found.pairs


def test_rounds_end_when_ratios_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = Machine(machine(), noise=0.05)
    found = noisy.measure(monkeypatch, runner.Effort(0.02, 1e9))
    assert found.settled
    assert max(row.ratios[OURS].half_width for row in found.rows[1:]) <= 0.02
    noisy = Machine(machine(), noise=0.05)
    found = noisy.measure(monkeypatch, runner.Effort(0.001, 2.0))
    assert not found.settled and noisy.clock >= 2.0


def test_the_bar_is_told_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated, told = Machine(machine(), noise=0.02), list[float]()
    simulated.measure(monkeypatch)
    runner.measure(
        simulated.plan(),
        SETTING,
        runner.Effort(0.01, 60.0),
        simulated.roofs(),
        simulated.timer,
        told.append,
    )
    assert told[-1] == 1.0 and all(0 <= share <= 1 for share in told)


def run_of(simulated: Machine, monkeypatch: pytest.MonkeyPatch, count: int) -> runner.Run:
    monkeypatch.setattr(runner, "roofs_of", lambda device: simulated.roofs())
    monkeypatch.setattr(runner, "timer_for", lambda device: simulated.timer)
    plans = [simulated.plan(f"d=8 rows={index}") for index in range(count)]
    return runner.run_plans(plans, SETTING, runner.Effort(0.01, 1.0))


def test_a_run_holds_all_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(Machine(machine()), monkeypatch, 3)
    assert run.complete and len(run.cases) == 3 and run.roof_source == "simulated"
    assert run.conditions is not None
    assert len({row.key for row in run.rows}) == 3 * 4
    assert run.machine["device"] == "cpu" and "native" in run.machine


def test_an_interrupt_leaves_the_cases_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = Machine(machine())
    measured, measure = [], runner.measure

    def interrupted(plan: runner.Plan, *arguments: object) -> runner.Measured:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(plan)
        return measure(plan, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "measure", interrupted)
    run = run_of(simulated, monkeypatch, 4)
    assert not run.complete and len(run.cases) == 2 and run.conditions is not None


def test_the_real_timer_and_roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One case of each operator, as briefly as can be: figures come out, whatever they are."""
    from ghosted_fast.bench_ops import ghost_apply, ghost_solve, gram_update, roofs

    monkeypatch.setattr(roofs, "_STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(roofs, "_STEPS", 1000)
    monkeypatch.setattr(gram_update, "_multiplies_in_tiles", lambda: False)  # two roofs of flops
    setting = runner.Setting(torch.device("cpu"), rotated_bytes=1 << 16, compiled=False)
    plans = [
        *gram_update.plans(16, 8, torch.bfloat16, [("G+C", True)]),
        *ghost_apply.plans(16, 1, torch.bfloat16),
        *ghost_solve.plans(16),
    ]
    run = runner.run_plans(plans, setting, runner.Effort(0.5, 0.01))
    assert run.complete
    assert {row.operator for row in run.rows} == {"gram_update", "ghost_apply", "ghost_solve"}
    assert all(float(row.ms) > 0 and float(row.roof_share) > 0 for row in run.rows)
    assert set(run.cases[0].roofs) == {"memory", "bf16", "fp32"}
