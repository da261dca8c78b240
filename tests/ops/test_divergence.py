"""divergence against fp64, on every backend: values, gradient, local model, masks, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError
from ghosted_fast.ops import divergence, local_divergence
from ghosted_fast.testing import relative_rms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Words: one, fewer than a vector, off a vector, off a block of sixteen vectors.
WORDS = [1, 3, 16, 37, 256, 4099]
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def logits(rows: int, words: int, dtype: torch.dtype, scale: float = 4.0) -> Tensor:
    return (scale * torch.randn(rows, words)).to(dtype)


def exact(dense: Tensor, smaller: Tensor) -> tuple[Tensor, Tensor]:
    """KL and its gradient, by autograd in fp64."""
    q = smaller.double().requires_grad_()
    log_p, log_q = dense.double().log_softmax(-1), q.log_softmax(-1)
    found = (log_p.exp() * (log_p - log_q)).sum(-1)
    (gradient,) = torch.autograd.grad(found.sum(), q)
    return found.detach(), gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("words", WORDS)
def test_values_and_gradient(backend: str, words: int, dtype: torch.dtype) -> None:
    dense, smaller = logits(5, words, dtype), logits(5, words, dtype)
    found, gradient = divergence(dense, smaller, gradient=True, backend=backend)
    wanted, slope = exact(dense, smaller)
    assert found.dtype == torch.float64 and gradient is not None and gradient.dtype == dtype
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-7)
    assert float((gradient.double() - slope).abs().max()) <= EPSILON[dtype]
    assert words == 1 or relative_rms(gradient, slope) <= EPSILON[dtype]
    alone, nothing = divergence(dense, smaller, backend=backend)
    assert nothing is None and torch.equal(alone, found)


def test_close_distributions(backend: str) -> None:
    dense = logits(4, 5000, torch.float32)
    smaller = dense + 1e-2 * torch.randn(4, 5000)
    found, _ = divergence(dense, smaller, backend=backend)
    torch.testing.assert_close(found, exact(dense, smaller)[0], rtol=1e-2, atol=3e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_local_model(backend: str, count: int, dtype: torch.dtype) -> None:
    dense, smaller = logits(6, 1003, dtype), logits(6, 1003, dtype)
    moved = [(smaller + 0.3 + 0.2 * torch.randn(6, 1003)).to(dtype) for _ in range(count)]
    counted = torch.tensor([True, False, True, True, False, True])
    value, slope, curvature = local_divergence(dense, smaller, moved, counted, backend=backend)
    p, q = (rows[counted].double().softmax(-1) for rows in (dense, smaller))
    changes = [(rows.double() - smaller.double())[counted] for rows in moved]
    torch.testing.assert_close(value, exact(dense, smaller)[0][counted].sum(), rtol=2e-6, atol=0)
    assert slope.shape == (count,) and curvature.shape == (count, count)
    for i, change in enumerate(changes):
        wanted = ((q - p) * change).sum()
        torch.testing.assert_close(slope[i], wanted, rtol=1e-5, atol=1e-6)
        for j, other in enumerate(changes):
            mean = (q * change).sum(-1) * (q * other).sum(-1)
            covariance = ((q * change * other).sum(-1) - mean).sum()
            torch.testing.assert_close(curvature[i, j], covariance, rtol=2e-5, atol=1e-6)


def test_the_curvature_foretells_a_small_step() -> None:
    dense, smaller = logits(3, 400, torch.float32), logits(3, 400, torch.float32)
    way = torch.randn(3, 400)
    value, slope, curvature = local_divergence(dense, smaller, [smaller + way])
    for step in (0.01, -0.02):
        there = exact(dense, smaller + step * way)[0].sum()
        model = value + step * slope[0] + 0.5 * step**2 * curvature[0, 0]
        assert float(there - value) == pytest.approx(float(model - value), rel=1e-2)


def test_rows_that_do_not_count_may_be_anything(backend: str) -> None:
    dense, smaller = logits(4, 70, torch.float32), logits(4, 70, torch.float32)
    wanted, slope = exact(dense, smaller)
    counted = torch.tensor([True, False, False, True])
    dense[1], smaller[2] = math.nan, math.inf
    found, gradient = divergence(dense, smaller, counted, gradient=True, backend=backend)
    assert gradient is not None and not gradient[1:3].any() and not found[1:3].any()
    torch.testing.assert_close(found[[0, 3]], wanted[[0, 3]], rtol=2e-6, atol=0)
    assert relative_rms(gradient[[0, 3]], slope[[0, 3]]) <= 1e-6


def test_masked_words(backend: str) -> None:
    """A word that neither can say is no NaN; one that the smaller alone cannot is infinite."""
    dense, smaller = logits(2, 50, torch.float32), logits(2, 50, torch.float32)
    dense[:, 40:] = smaller[:, 40:] = -math.inf
    found, gradient = divergence(dense, smaller, gradient=True, backend=backend)
    wanted, slope = exact(dense[:, :40], smaller[:, :40])
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)
    assert gradient is not None and not gradient[:, 40:].any()
    assert relative_rms(gradient[:, :40], slope) <= 1e-6
    moved = smaller + 1.0
    _, slopes, curvature = local_divergence(dense, smaller, [moved], backend=backend)
    assert abs(float(slopes)) < 1e-5 and abs(float(curvature)) < 1e-5, "a constant moves nothing"
    smaller[0, 3] = -math.inf
    assert divergence(dense, smaller, backend=backend)[0][0] == math.inf


@pytest.mark.parametrize("words", WORDS)
def test_a_shift_of_all_logits_changes_nothing(backend: str, words: int) -> None:
    """Also far below zero, where words that are not there would have the largest logits."""
    dense, smaller = (torch.randint(-32, 33, (3, words)) / 8 for _ in range(2))
    found, gradient = divergence(dense - 512, smaller - 1024, gradient=True, backend=backend)
    wanted, slope = exact(dense, smaller)
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-7)
    assert gradient is not None and float((gradient - slope).abs().max()) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_words_of_equal_logits(backend: str, dtype: torch.dtype) -> None:
    """Added up in fp32 to the end, the sums would err to the same side with every word."""
    even = torch.arange(100_000) % 2 == 0
    dense = torch.where(even, 0.0, -1.125).to(dtype)[None]
    smaller = torch.where(even, -1.375, 0.0).to(dtype)[None]
    found, _ = divergence(dense, smaller, backend=backend)
    torch.testing.assert_close(found, exact(dense, smaller)[0], rtol=2e-6, atol=0)


def test_every_result_is_written(backend: str, poisoned_memory: None) -> None:
    rows = [logits(3, 37, torch.float32) for _ in range(3)]
    counted = torch.tensor([True, False, True])
    found, gradient = divergence(*rows[:2], counted, gradient=True, backend=backend)
    assert found.isfinite().all() and gradient is not None and gradient.isfinite().all()
    assert all(
        part.isfinite().all()
        for part in local_divergence(*rows[:2], rows[2:], counted, backend=backend)
    )


def test_large_logits_and_nan(backend: str) -> None:
    dense = torch.tensor([[3e38, 0.0, -3e38], [200.0, 0.0, -200.0], [1.0, math.nan, 0.0]])
    smaller = torch.tensor([[3e38, 0.0, -3e38], [100.0, 0.0, -200.0], [0.0, 0.0, 0.0]])
    found, gradient = divergence(dense, smaller, gradient=True, backend=backend)
    assert gradient is not None
    assert found[0] == 0.0 and abs(float(found[1])) < 1e-30 and math.isnan(float(found[2]))
    assert not gradient[0].any() and gradient[2].isnan().any()


def test_strides_and_empty(backend: str) -> None:
    dense, smaller = logits(33, 7, torch.float32).mT, logits(7, 66, torch.float32)[:, ::2]
    found, _ = divergence(dense, smaller, backend=backend)
    torch.testing.assert_close(found, exact(dense, smaller)[0], rtol=2e-6, atol=1e-7)
    counted = torch.tensor([True, False, False, True] * 4)[:14:2]
    several = local_divergence(dense, smaller, [smaller, dense], counted, backend=backend)
    copies = [rows.contiguous() for rows in (dense, smaller, counted)]
    alike = local_divergence(*copies[:2], copies[1::-1], copies[2], backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(several, alike, strict=True))
    none, gradient = divergence(dense[:0], smaller[:0], gradient=True, backend=backend)
    assert none.shape == (0,) and gradient is not None and gradient.shape == (0, 33)


def test_any_number_of_threads_gives_the_same_bits(two_threads: None) -> None:
    dense, smaller = logits(64, 999, torch.bfloat16), logits(64, 999, torch.bfloat16)
    two = divergence(dense, smaller, gradient=True)
    torch.set_num_threads(1)
    one = divergence(dense, smaller, gradient=True)
    assert all(torch.equal(a, b) for a, b in zip(two, one, strict=True))  # type: ignore[arg-type]


def test_refusals() -> None:
    rows = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"expected dense in torch\.float32, got torch\.bfloat16"):
        divergence(rows.bfloat16(), rows)
    with pytest.raises(TypeError, match="expected smaller in bfloat16, float16 or float32"):
        divergence(rows.double(), rows.double())
    with pytest.raises(ArgumentError, match=r"expected dense of shape \[2, 3\], got \[2, 4\]"):
        divergence(torch.zeros(2, 4), rows)
    with pytest.raises(ArgumentError, match=r"expected smaller of shape \[rows, words\]"):
        divergence(rows[None], rows[None])
    with pytest.raises(ArgumentError, match=r"expected counted of shape \[2\]"):
        divergence(rows, rows, torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"expected counted in torch\.bool"):
        divergence(rows, rows, torch.ones(2))
    with pytest.raises(ArgumentError, match="at most 3 moved, got 4"):
        local_divergence(rows, rows, [rows] * 4)
    with pytest.raises(ArgumentError, match=r"expected moved\[1\] of shape"):
        local_divergence(rows, rows, [rows, rows[:1]])
    with pytest.raises(ArgumentError, match="expected dense on cpu, got meta"):
        divergence(rows.to("meta"), rows)


def test_opcheck() -> None:
    dense, smaller, *moved = (logits(3, 5, torch.float32) for _ in range(4))
    operator, counted = torch.ops.ghosted_fast.divergence.default, torch.tensor([True, False, True])
    torch.library.opcheck(operator, (dense, smaller, None, True, None, None, None))
    torch.library.opcheck(operator, (dense, smaller, counted, False, *moved, None))


def test_shapes_without_values() -> None:
    rows = torch.zeros(4, 9, device="meta", dtype=torch.bfloat16)
    sums, gradient = torch.ops.ghosted_fast.divergence(rows, rows, None, True, rows, rows, None)
    assert sums.shape == (4, 6) and sums.dtype == torch.float64
    assert gradient.shape == (4, 9) and gradient.dtype == torch.bfloat16
