"""The weights of tokens: what scale they give a row of the Gram."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.token_weights import token_weights

EPS = 1e-6


def distance_to_powers_of_four(x: Tensor, weight: Tensor) -> float:
    """Return how far w / rms^2 is from powers of four at most, as a share."""
    exact = weight.double() / (x.double().square().mean(-1) + EPS)
    return float((exact / 4.0 ** (exact.log2() / 2).round() - 1.0).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scales_are_powers_of_two_but_for_the_rounding_of_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(300, 4096).to(dtype), torch.randn(300, 4096).to(dtype)
    weight = token_weights(x, y, GhostOptions(), EPS)
    assert weight.dtype == torch.float32
    assert distance_to_powers_of_four(x, weight) <= 1.01 * 2**-24


def test_raw_weights_are_powers_of_four() -> None:
    y = torch.randn(50, 64)
    weight = token_weights(y, y, GhostOptions(), None)
    assert torch.equal(weight, 4.0 ** (weight.log2() / 2).round())


def test_rows_that_are_not_finite_keep_a_plain_weight() -> None:
    x, y = torch.randn(2, 5, 64)
    x[1, 3], y[2, 4] = torch.inf, torch.nan
    weight = token_weights(x, y, GhostOptions(), EPS)
    assert weight[1] == weight[2] == 1.0 and bool(weight.isfinite().all())
