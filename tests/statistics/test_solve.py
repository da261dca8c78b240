"""solve_ghost: agreement with a direct solve, damping, escalation, bias."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from ghosted_fast.errors import ArgumentError, CalibrationError
from ghosted_fast.statistics import solve
from ghosted_fast.statistics.gram import GramAccumulator, mirror_lower
from ghosted_fast.statistics.solve import DAMPING_PATH, mean_diagonal, solve_ghost
from ghosted_fast.testing import relative_rms

D = 20


def data(tokens: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=generator) * torch.logspace(-1, 1, D)
    m = 0.3 * torch.randn(D, D, generator=torch.Generator().manual_seed(99)) / math.sqrt(D)
    y = x + x @ m.mT + 0.5 + noise * torch.randn(tokens, D, generator=generator)
    return x, y


def accumulate(x: torch.Tensor, y: torch.Tensor, norm_eps: float | None = None) -> GramAccumulator:
    gram = GramAccumulator(D, 4, norm_eps)
    for k in range(4):
        gram.update(x[k::4], y[k::4], fold=k)
    return gram


@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_agrees_with_a_direct_solve(norm_eps: float | None) -> None:
    x, y = data(2000, 0.1)
    solution = solve_ghost(accumulate(x, y, norm_eps), damping=1e-6)
    x64, y64 = x.double(), y.double()
    f = x64
    if norm_eps is not None:
        f = x64 / (x64.square().mean(-1, keepdim=True) + norm_eps).sqrt()
    gram = f.mT @ f + 1e-6 * torch.eye(D, dtype=torch.float64)
    expected = torch.linalg.solve(gram, f.mT @ (y64 - x64)).mT
    assert relative_rms(solution.weight, expected) <= 1e-5
    assert solution.damping == 1e-6
    assert solution.residual <= 1e-10
    assert solution.num_tokens == 2000
    error = float((y64 - x64 - f @ expected.mT).square().sum() / (y64 - x64).square().sum())
    assert solution.fit_error == pytest.approx(error, rel=1e-4)


def test_bias_takes_up_the_offset() -> None:
    x, y = data(2000, 0.0)
    plain = solve_ghost(accumulate(x, y), damping=0.0)
    biased = solve_ghost(accumulate(x, y), damping=0.0, bias=True)
    assert biased.bias is not None and plain.bias is None
    torch.testing.assert_close(biased.bias, torch.full((D,), 0.5).double(), atol=1e-3, rtol=0)
    assert biased.fit_error < 1e-6 < plain.fit_error


def test_auto_damping_generalises_better() -> None:
    x, y = data(40, 2.0)
    gram = accumulate(x, y)
    auto = solve_ghost(gram)
    bare = solve_ghost(gram, damping=0.0)
    assert auto.held_out_error is not None and bare.held_out_error is not None
    assert auto.held_out_error < bare.held_out_error
    assert auto.damping in [r * mean_diagonal(gram.total()) for r in DAMPING_PATH]
    fresh_x, fresh_y = data(5000, 2.0, seed=5)
    fresh = GramAccumulator(D).update(fresh_x, fresh_y).total()
    assert fresh.error(auto.weight.mT) < fresh.error(bare.weight.mT)


def wide(tokens: int, size: int) -> GramAccumulator:
    """Statistics of more outputs than the choice of the damping looks at one by one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, size, generator=generator) * torch.logspace(-2, 1, size)
    m = torch.randn(size, size, generator=generator) / size**0.5
    y = x + x @ m.mT + 3.0 * torch.randn(tokens, size, generator=generator)
    gram = GramAccumulator(size, 4)
    for k in range(4):
        gram.update(x[k::4], y[k::4], fold=k)
    return gram


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [500, 2000])
def test_damping_chosen_on_mixtures_is_as_good_as_the_best(tokens: int, bias: bool) -> None:
    gram = wide(tokens, 250)
    unit = mean_diagonal(gram.total())
    errors = [solve_ghost(gram, r * unit, bias).held_out_error for r in DAMPING_PATH]
    assert None not in errors
    chosen = solve_ghost(gram, "auto", bias)
    assert chosen.held_out_error == pytest.approx(
        errors[[r * unit for r in DAMPING_PATH].index(chosen.damping)], rel=1e-9
    )
    assert chosen.held_out_error <= 1.002 * min(errors)
    assert max(errors) > 1.05 * min(errors)  # or any choice would pass


@pytest.mark.parametrize("lowest", range(len(DAMPING_PATH)))
def test_the_path_is_looked_at_where_the_error_falls(lowest: int) -> None:
    looked_at: list[float] = []

    def changes(dampings: Sequence[float]) -> list[float]:
        looked_at.extend(dampings)
        return [abs(DAMPING_PATH.index(item) - lowest) - 10.0 for item in dampings]

    assert solve._lowest(changes) == DAMPING_PATH[lowest]
    assert len(looked_at) == len(set(looked_at)) <= 3 + abs(lowest - solve._LIKELY)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_path_that_tells_nothing_ends_the_search(value: float) -> None:
    assert solve._lowest(lambda dampings: [value] * len(dampings)) in DAMPING_PATH


def test_a_split_of_the_folds_serves_several_dampings(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, made = wide(2000, 150), []
    original = solve._splits

    def counted(*arguments: Any) -> Iterator[Any]:
        for split in original(*arguments):
            made.append(split)
            yield split

    monkeypatch.setattr(solve, "_splits", counted)
    chosen = DAMPING_PATH.index(solve._choose_damping(gram, gram.total(), False))
    # Once around the likely value, and once for each step beyond that on the way down.
    assert len(made) == 4 * (1 + max(0, solve._LIKELY - chosen))


def test_all_folds_decide_together(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, favourites = wide(400, 20), iter([6, 4, 4, 4] * 9)

    def one_folds(*asked: Any) -> list[float]:
        favourite = next(favourites)
        return [float(abs(DAMPING_PATH.index(item) - favourite)) for item in asked[-1]]

    monkeypatch.setattr(solve, "_changes", one_folds)
    assert solve._choose_damping(gram, gram.total(), False) == DAMPING_PATH[4]


def test_a_sketch_keeps_the_change_of_error_on_average() -> None:
    total = wide(600, 150).total()
    solution = torch.linalg.solve(mirror_lower(total.gram) + torch.eye(150), total.cross)
    exact = total.error_change(solution)
    generator = torch.Generator().manual_seed(1)
    estimates = []
    for _ in range(40):
        signs = 2.0 * torch.randint(0, 2, (150, 16), generator=generator).double() - 1.0
        mixed = signs / 4.0
        estimates.append(total.sketch(signs).error_change(solution @ mixed))
    mean = sum(estimates) / len(estimates)
    assert mean == pytest.approx(exact, rel=0.05)


def test_held_out_error_is_that_of_each_fold_left_out() -> None:
    x, y = data(400, 0.5)
    damping = 1e-3
    solution = solve_ghost(accumulate(x, y), damping=damping)
    error = energy = 0.0
    for k in range(4):
        train = torch.arange(400) % 4 != k
        xt, yt, xv, yv = (t.double() for t in (x[train], y[train], x[~train], y[~train]))
        share = float(xt.square().sum() / x.double().square().sum())
        gram = xt.mT @ xt + damping * share * torch.eye(D, dtype=torch.float64)
        m = torch.linalg.solve(gram, xt.mT @ (yt - xt))
        error += float((yv - xv - xv @ m).square().sum())
        energy += float((yv - xv).square().sum())
    assert solution.held_out_error == pytest.approx(error / energy, rel=1e-5)


def test_singular_statistics_are_damped_and_reported() -> None:
    x, y = data(300, 0.1)
    x[:, 1] = x[:, 0]  # two equal channels: G is singular
    x[:, 2] = 0.0
    solution = solve_ghost(accumulate(x, y), damping=0.0)
    assert torch.isfinite(solution.weight).all()
    assert solution.damping >= 0.0
    assert solution.fit_error < 1.0


def test_identity_data_gives_no_ghost() -> None:
    x, _ = data(300, 0.0)
    solution = solve_ghost(accumulate(x, x.clone()))
    assert solution.weight.abs().max() < 1e-6
    assert solution.fit_error == 0.0


def test_one_fold_has_no_held_out_error() -> None:
    x, y = data(300, 0.1)
    solution = solve_ghost(GramAccumulator(D, 1).update(x, y))
    assert solution.held_out_error is None
    assert solution.fit_error < 0.5


def test_refusals() -> None:
    with pytest.raises(CalibrationError, match="at least one token"):
        solve_ghost(GramAccumulator(D))
    x, y = data(300, 0.1)
    for damping in (-1.0, float("nan"), "large"):
        with pytest.raises(ArgumentError, match="damping >= 0"):
            solve_ghost(accumulate(x, y), damping=damping)  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("damping", [1e-3, 50.0])
def test_outputs_at_a_few_rows_are_those_of_the_whole_map(bias: bool, damping: float) -> None:
    x, y = data(300, 0.1)
    equations = accumulate(x, y).total()
    weight, offset, _ = solve.solve_equations(equations, damping, bias)
    rows = data(5, 0.0, seed=3)[0].double()
    expected = rows @ weight if offset is None else rows @ weight + offset
    found = solve.outputs_at(equations, damping, bias, rows)
    assert found.shape == (5, D)
    assert relative_rms(found, expected) <= 1e-11
    assert (offset is None) != bias


def test_outputs_are_those_of_a_damping_that_had_to_be_raised() -> None:
    x, y = data(300, 0.1)
    x[:, 3] = x[:, 4]
    equations = accumulate(x, y).total()
    weight, _, facts = solve.solve_equations(equations, 0.0, bias=False)
    assert facts["damping"] > 0.0
    rows = data(4, 0.0, seed=3)[0].double()
    rows[:, 3] = rows[:, 4]
    found = solve.outputs_at(equations, 0.0, False, rows)
    assert relative_rms(found, rows @ weight) <= 1e-6
