"""What the CUDA kernels of gram_update do once per token: checks, largest magnitudes, moments."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_emulation.emulator import emulate, unavailable
from support.gram_sums import assert_close, exact_sums, make_sums

from ghosted_fast.testing import relative_rms

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TOKENS_OF_A_BLOCK = 8


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_tokens_that_are_alike_meet_in_memory_once_per_block() -> None:
    """Three largest exponents and two buckets; a token by itself would take five each."""
    blocks = 8
    x = torch.ones(blocks * TOKENS_OF_A_BLOCK, 16).to(BF16)
    run = emulate(x, x, **make_sums(16, 16))
    assert run.check_atomics == blocks * 5


@pytest.mark.parametrize("num_tokens", [1, 8, 9, 70])
def test_every_token_that_counts_has_its_size(num_tokens: int) -> None:
    x = torch.randn(num_tokens, 16) * 4.0 ** torch.randint(-3, 4, (num_tokens, 1))
    weight = torch.ones(num_tokens)
    weight[1::3] = 0.0
    run = emulate(x, x, weight, **make_sums(16, 16))
    assert run.gram_counted == run.cross_counted == int((weight > 0).sum())


@pytest.mark.parametrize("token", [0, 5, 7, 39])
def test_the_largest_row_is_found_wherever_it_is(token: int) -> None:
    """Lost, its products are infinite in fp32: nothing moves them into its range."""
    x, sums = torch.randn(40, 16).to(BF16), make_sums(16, 16)
    x[token] *= 2.0**80
    emulate(x, x, **sums)
    assert_close(sums, exact_sums(x, x))


@pytest.mark.parametrize("token", [0, 5, 7, 39])
def test_the_largest_weighted_row_is_found_wherever_it_is(token: int) -> None:
    """Lost, the row times its weight is infinite in fp32, in G and in C."""
    x, weight, sums = torch.randn(40, 16).to(BF16), torch.ones(40), make_sums(16, 16)
    x[token] *= 2.0**60
    weight[token] = 2.0**80
    emulate(x, x, weight, **sums)
    assert_close(sums, exact_sums(x, x, weight))


@pytest.mark.parametrize("token", [0, 5, 39])
def test_one_scale_that_is_not_exact_is_found_wherever_it_is(token: int) -> None:
    x, weight, sums = torch.randn(40, 16).to(BF16), torch.ones(40), make_sums(16, 16)
    weight[token] = 0.7
    emulate(x, x, weight, **sums)
    assert_close(sums, exact_sums(x, x, weight))


# Tokens that a thread of `add_moments` takes: none, one, one turn of four, and the next turns.
@pytest.mark.parametrize("num_tokens", [1, 64, 65, 256, 257, 600])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP32), (FP32, FP16)], ids=str)
def test_moments_of_any_number_of_tokens(
    dtypes: tuple[torch.dtype, torch.dtype], num_tokens: int
) -> None:
    x, y = (torch.randn(num_tokens, 40).to(dtype) for dtype in dtypes)
    weight, moments = torch.rand(num_tokens) + 0.5, torch.zeros(3, 40, dtype=FP64)
    weight[3::7] = 0.0
    x[weight == 0], y[weight == 0] = math.nan, math.inf
    emulate(x, y, weight, norm_eps=1e-5, moments=moments)
    exact = exact_sums(x[weight > 0], y[weight > 0], weight[weight > 0], 1e-5)["moments"]
    for ours, theirs in zip(moments, exact, strict=True):
        assert relative_rms(ours, theirs) <= 1e-7


def test_a_block_of_moments_is_narrow() -> None:
    """Half a line of memory of 16-bit rows, so that small models have blocks enough."""
    x, moments = torch.randn(9, 576).to(BF16), torch.zeros(3, 576, dtype=FP64)
    assert emulate(x, x, moments=moments).blocks == 576 // 32
