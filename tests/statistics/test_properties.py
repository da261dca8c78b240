"""Algebra that must hold for any data: hypothesis draws the shapes, splits and scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.gram import GramAccumulator, mirror_lower
from ghosted_fast.statistics.solve import solve_ghost
from ghosted_fast.statistics.token_weights import token_weights
from ghosted_fast.testing import relative_rms

SETTINGS = settings(max_examples=25, deadline=None)


def pair(seed: int, tokens: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, size, generator=generator) * torch.logspace(-2, 2, size)
    return x, x + torch.randn(tokens, size, generator=generator)


@SETTINGS
@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 40), st.booleans())
def test_gram_is_positive_semi_definite(seed: int, tokens: int, size: int, normed: bool) -> None:
    x, y = pair(seed, tokens, size)
    gram = GramAccumulator(size, 1, 1e-6 if normed else None).update(x, y).total().gram
    values = torch.linalg.eigvalsh(mirror_lower(gram))
    assert values.min() >= -1e-6 * values.max()


@SETTINGS
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(1, 90), min_size=1, max_size=6),
    st.permutations(range(6)),
    st.booleans(),
)
def test_any_split_and_order_agree(
    seed: int, sizes: list[int], order: list[int], normed: bool
) -> None:
    x, y = pair(seed, sum(sizes), 16)
    eps = 1e-6 if normed else None
    whole = GramAccumulator(16, 1, eps).update(x, y).total()
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    merged = GramAccumulator(16, 1, eps)
    for index in order:
        if index < len(parts):
            merged.merge(GramAccumulator(16, 1, eps).update(*parts[index]))
    total = merged.total()
    assert relative_rms(total.gram.tril(), whole.gram.tril()) <= 1e-6
    assert relative_rms(total.cross, whole.cross) <= 1e-6
    assert relative_rms(total.feature_sum, whole.feature_sum) <= 1e-6
    assert relative_rms(total.delta_sum, whole.delta_sum) <= 1e-6
    assert total.energy == pytest.approx(whole.energy, rel=1e-6)
    assert total.num_tokens == whole.num_tokens


@SETTINGS
@given(st.integers(0, 10**6), st.integers(1, 12))
def test_a_linear_gap_is_closed_exactly(seed: int, size: int) -> None:
    x, _ = pair(seed, 40 * size, size)
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed + 1))
    gram = GramAccumulator(size, 1).update(x, (x.double() @ matrix.double().mT + x).float())
    solution = solve_ghost(gram, damping=0.0)
    assert relative_rms(solution.weight, matrix) < 1e-3
    assert solution.fit_error < 1e-5


@SETTINGS
@given(st.integers(0, 10**6), st.floats(-9.0, 6.0), st.booleans())
def test_weights_are_powers_of_two_near_the_inverse_energy(
    seed: int, log_scale: float, normed: bool
) -> None:
    x, y = (10.0**log_scale * t for t in pair(seed, 50, 16))
    options = GhostOptions(features="normed" if normed else "raw")
    eps = 1e-12 if normed else None
    weight = token_weights(x, y, options, eps).double()
    ratio = weight * y.double().square().mean(-1)
    assert (ratio <= 2.001).all() and (ratio >= 0.499).all()
    scale = weight.sqrt()
    if normed:
        scale = scale / (x.double().square().mean(-1) + 1e-12).sqrt()
    exponent = scale.log2()
    assert (exponent - exponent.round()).abs().max() < 1e-5
