"""GramAccumulator: values, folds, merging, state, and refusals."""

from __future__ import annotations

import pytest
import torch
from support.waits import Waits

from ghosted_fast.errors import ArgumentError, NonFiniteError
from ghosted_fast.statistics.gram import (
    GramAccumulator,
    NormalEquations,
    mean_square,
    mirror_lower,
    statistics_bytes,
)
from ghosted_fast.testing import outlier_activations, relative_rms, scaled_rms

D, T = 24, 700


def exact(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, norm_eps: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y, weight = x.double(), y.double(), weight.double()
    f = x if norm_eps is None else x / (x.square().mean(-1, keepdim=True) + norm_eps).sqrt()
    delta = y - x
    moments = torch.stack(
        [
            (weight[:, None] * f).sum(0),
            (weight[:, None] * delta).sum(0),
            (weight[:, None] * delta.square()).sum(0),
        ]
    )
    return f.mT @ (weight[:, None] * f), f.mT @ (weight[:, None] * delta), moments


def activations(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = outlier_activations(T, D, dtype, seed)
    y = (x.float() + 0.1 * outlier_activations(T, D, dtype, seed + 1).float()).to(dtype)
    return x, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
@pytest.mark.parametrize("weighted", [False, True])
def test_values(dtype: torch.dtype, norm_eps: float | None, weighted: bool) -> None:
    x, y = activations(dtype)
    weight = torch.rand(T, generator=torch.Generator().manual_seed(2)) if weighted else None
    gram = GramAccumulator(D, 3, norm_eps)
    for begin in range(0, T, 100):
        rows = slice(begin, begin + 100)
        part = None if weight is None else weight[rows]
        gram.update(x[rows], y[rows], part, fold=(begin // 100) % 3)
    total = gram.total()
    g, c, moments = exact(x, y, torch.ones(T) if weight is None else weight, norm_eps)
    assert relative_rms(mirror_lower(total.gram), g) <= 1e-6
    assert scaled_rms(mirror_lower(total.gram), g, g) <= 1e-7
    assert relative_rms(total.feature_sum, moments[0]) <= 1e-6
    assert relative_rms(total.delta_sum, moments[1]) <= 1e-6
    assert total.num_tokens == gram.num_tokens == T
    scale = (g.diagonal()[:, None] * moments[2][None, :]).sqrt()
    assert ((total.cross - c).abs() / scale).square().mean().sqrt() <= 1e-7
    assert total.energy == pytest.approx(float(moments[2].sum()), rel=1e-6)


def test_padding_is_not_looked_at() -> None:
    x, y = activations(torch.float32)
    mask = torch.ones(T)
    mask[::3] = 0
    poisoned = x.clone()
    poisoned[::3] = float("nan")
    a = GramAccumulator(D).update(poisoned, y, mask).total()
    b = GramAccumulator(D).update(x[mask > 0], y[mask > 0]).total()
    assert a.num_tokens == b.num_tokens == int(mask.sum())
    assert relative_rms(a.gram.tril(), b.gram.tril()) < 1e-6
    assert relative_rms(a.cross, b.cross) < 1e-6


@pytest.mark.parametrize("place", ["x", "y"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_leaves_the_sums_alone(place: str, bad: float) -> None:
    x, y = activations(torch.bfloat16)
    gram = GramAccumulator(D).update(x, y)
    before = {k: v.clone() for k, v in gram.state_dict().items() if isinstance(v, torch.Tensor)}
    (x if place == "x" else y)[500, 3] = bad
    with pytest.raises(NonFiniteError, match="500"):
        gram.update(x, y)
    for name, value in before.items():
        assert torch.equal(gram.state_dict()[name], value), name


def test_merge_and_state() -> None:
    x, y = activations(torch.float32)
    whole = GramAccumulator(D, 2).update(x[:300], y[:300], fold=0).update(x[300:], y[300:], fold=1)
    first = GramAccumulator(D, 2).update(x[:300], y[:300], fold=0)
    second = GramAccumulator(D, 2).update(x[300:], y[300:], fold=1)
    copy = GramAccumulator(D, 2)
    copy.load_state_dict(second.state_dict())
    merged = first.merge(copy)
    for k in range(2):
        assert relative_rms(merged.fold(k).gram.tril(), whole.fold(k).gram.tril()) < 1e-12
        assert relative_rms(merged.fold(k).cross, whole.fold(k).cross) < 1e-10
    assert merged.num_tokens == T
    assert (whole.total() - whole.fold(0)).num_tokens == 400


def test_memory_is_known_beforehand() -> None:
    gram = GramAccumulator(D, 5)
    assert gram.nbytes == statistics_bytes(D, 5)
    x, y = activations(torch.float32)
    gram.update(x, y)
    assert gram.nbytes == statistics_bytes(D, 5)


def test_closed_form_error() -> None:
    x, y = (t.double() for t in activations(torch.float32))
    total = GramAccumulator(D).update(x.float(), y.float()).total()
    generator = torch.Generator().manual_seed(3)
    solution = torch.randn(D, D, generator=generator, dtype=torch.float64)
    bias = torch.randn(D, generator=generator, dtype=torch.float64)
    direct = float((y - x - x @ solution - bias).square().sum())
    assert total.error(solution, bias) == pytest.approx(direct, rel=1e-6)
    assert total.error(torch.zeros_like(solution)) == pytest.approx(total.energy)


def test_massive_tokens_do_not_drown_the_others() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1024, D, generator=generator)
    x[::128] = 3000.0 * torch.randn(D, generator=generator)
    y = x + torch.randn(1024, D, generator=generator)
    total = GramAccumulator(D).update(x, y).total()
    g, c, _ = exact(x, y, torch.ones(1024), None)
    direct = torch.linalg.solve(g, c)
    solved = torch.linalg.solve(mirror_lower(total.gram), total.cross)
    assert relative_rms(solved, direct) <= 1e-6
    x[128] = float("nan")
    with pytest.raises(NonFiniteError, match="128"):
        GramAccumulator(D).update(x, y)
    x[128] = x[0]
    y[128] = float("inf")
    with pytest.raises(NonFiniteError, match="128"):
        GramAccumulator(D).update(x, y)


def test_hidden_states_in_batches() -> None:
    x, y = activations(torch.float32)
    flat = GramAccumulator(D).update(x, y).total()
    shaped = GramAccumulator(D).update(x.view(7, 100, D), y.view(7, 100, D)).total()
    assert torch.equal(flat.gram, shaped.gram)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GramAccumulator(0), "hidden_size >= 1"),
        (lambda: GramAccumulator(4, folds=0), "folds >= 1"),
        (lambda: GramAccumulator(4).update(torch.ones(2, 4), torch.ones(2, 4), fold=4), "0..3"),
        (lambda: GramAccumulator(4).update(torch.ones(2, 5), torch.ones(2, 5)), "one shape"),
        (lambda: GramAccumulator(4).update(torch.ones(2, 4), torch.ones(3, 4)), "one shape"),
        (
            lambda: GramAccumulator(4).update(torch.ones(2, 4), torch.ones(2, 4), torch.ones(3)),
            "token_weight of shape",
        ),
        (lambda: GramAccumulator(4).merge(GramAccumulator(5)), "one kind"),
        (lambda: GramAccumulator(4).load_state_dict(GramAccumulator(5).state_dict()), "size = 4"),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()  # type: ignore[operator]


def test_equations_add_and_subtract() -> None:
    x, y = activations(torch.float32)
    gram = GramAccumulator(D, 2).update(x[:100], y[:100]).update(x[100:], y[100:], fold=1)
    total = gram.fold(0) + gram.fold(1)
    assert isinstance(total, NormalEquations)
    assert relative_rms(total.cross, gram.total().cross) < 1e-12
    assert (total - gram.fold(1)).weight_sum == pytest.approx(100.0)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_is_waited_for_once(monkeypatch: pytest.MonkeyPatch, weighted: bool) -> None:
    """Beside the operator's own wait, which reports NaN."""
    x, y = torch.randn(2, T, D)
    gram, waits = GramAccumulator(D), Waits(monkeypatch)
    with waits:
        gram.update(x, y, torch.ones(T) if weighted else None)
    assert waits.count == 1
    assert gram.num_tokens == T and float(gram.total().weight_sum) == T


@pytest.mark.parametrize("shape", [(70, 4096), (2, 35, 64), (0, 8), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mean_squares_are_exact_but_for_their_rounding(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact_squares = rows.double().square().mean(-1)
    found, wide = mean_square(rows), mean_square(rows.requires_grad_(), torch.float64)
    assert found.dtype == torch.float32 and wide.dtype == torch.float64
    assert torch.allclose(found.double(), exact_squares, rtol=2**-24, atol=0.0)
    assert torch.allclose(wide, exact_squares, rtol=1e-14, atol=0.0)
    assert not wide.requires_grad


def test_the_mean_square_of_a_row_that_is_not_finite_is_not_finite() -> None:
    rows = torch.ones(3, 8)
    rows[1, 2], rows[2, 5] = torch.inf, torch.nan
    assert mean_square(rows).isfinite().tolist() == [True, False, False]
