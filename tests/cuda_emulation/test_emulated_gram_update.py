"""The CUDA kernels of gram_update, compiled for the host under the sanitizers, against fp64.

The emulated tensor cores truncate and every choice of the hardware falls the unlucky way, so the
bounds are those of every other backend; see emulation.h.
"""

from __future__ import annotations

import math

import pytest
import torch
from cuda_emulation.emulator import (
    FINITE_BYTE,
    LATER,
    NAN_BYTE,
    NO_TOKEN,
    emulate,
    unavailable,
)
from support.gram_sums import assert_close, exact_sums, make_sums, make_weights
from torch import Tensor

from ghosted_fast.testing import outlier_activations, relative_rms

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(unavailable()), reason=unavailable()),
]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = {
    "bf16-bf16": (BF16, BF16),
    "fp16-fp16": (FP16, FP16),
    "fp32-fp32": (FP32, FP32),
    "bf16-fp32": (BF16, FP32),
    "fp32-fp16": (FP32, FP16),
    "fp16-bf16": (FP16, BF16),
}
# Tokens, hidden size, outputs: one off a tile (32 tokens, 128 columns) either side, several tiles,
# and tokens on both sides of the 1024 after which the sums go to memory.
SHAPES = [
    (1, 8, 8),
    (31, 40, 136),
    (32, 128, 128),
    (33, 136, 120),
    (65, 264, 8),
    (257, 8, 264),
    (1024, 16, 16),
    (1025, 24, 16),
    (2100, 16, 16),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("weights", ["none", "power of 4", "any", "padding"])
@pytest.mark.parametrize(("norm_eps", "delta"), [(None, False), (None, True), (1e-5, True)])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_values(dtypes: str, norm_eps: float | None, delta: bool, weights: str) -> None:
    num_tokens, size = 70, 40
    x_dtype, y_dtype = DTYPES[dtypes]
    x = outlier_activations(num_tokens, size, x_dtype)
    y = torch.randn(num_tokens, size)
    y = (y if FP16 in (x_dtype, y_dtype) else y + x.float()).to(y_dtype)
    weight, sums = make_weights(weights, num_tokens), make_sums(size, size)
    emulate(x, y, weight, norm_eps=norm_eps, delta=delta, **sums)
    assert_close(sums, exact_sums(x, y, weight, norm_eps, delta))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_tokens, size, outputs = shape
    x, y = torch.randn(num_tokens, size).to(dtype), torch.randn(num_tokens, outputs).to(dtype)
    sums = make_sums(size, outputs)
    emulate(x, y, **sums)
    assert_close(sums, exact_sums(x, y))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_one_token_with_outliers(dtype: torch.dtype) -> None:
    x, y = outlier_activations(1, 128, dtype), outlier_activations(1, 128, dtype, 1)
    sums = make_sums(128, 128)
    emulate(x, y, torch.tensor([0.7]), norm_eps=1e-6, **sums)
    assert_close(sums, exact_sums(x, y, torch.tensor([0.7]), 1e-6))


@pytest.mark.parametrize(("weights", "num_tokens"), [("none", 20_000), ("any", 7_000)])
def test_error_does_not_grow_with_the_tokens(weights: str, num_tokens: int) -> None:
    sums = make_sums(16, 16)
    batches = [outlier_activations(num_tokens, 16, BF16, seed).abs() for seed in range(2)]
    for x in batches:
        emulate(x, x, make_weights(weights, num_tokens), **sums)
    everything, weight = torch.cat(batches), make_weights(weights, num_tokens)
    both = None if weight is None else torch.cat([weight, weight])
    assert_close(sums, exact_sums(everything, everything, both))


def test_differences_keep_all_their_bits() -> None:
    x, y = torch.randn(40, 24).to(BF16), torch.randn(40, 24).to(BF16)
    sums = make_sums(24, 24)
    emulate(x, y, delta=True, **sums)
    assert_close(sums, exact_sums(x, y, delta=True))


@pytest.mark.parametrize("where", ["x", "y", "both"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_one_token_that_owns_the_sums(dtype: torch.dtype, where: str) -> None:
    """As the first of a sequence does in many models: additions after it round at its size."""
    num_tokens, size = 1100, 40
    x, y = torch.randn(num_tokens, size), torch.randn(num_tokens, size)
    for name, rows in (("x", x), ("y", y)):
        if where in (name, "both"):
            rows[0] *= 1000.0
    x, y, sums = x.to(dtype), y.to(dtype), make_sums(size, size)
    emulate(x, y, **sums)
    assert_close(sums, exact_sums(x, y))
    alone = torch.zeros(size, size, dtype=FP64)
    emulate(x, y, cross=alone)
    assert torch.equal(alone, sums["cross"])


def test_sums_of_one_sign() -> None:
    """Where nothing cancels, truncation adds up: the bound on the whole, for ordinary tokens."""
    x = torch.rand(10_000, 16).to(BF16) + 0.5
    sums, exact = make_sums(16, 16), exact_sums(x, x)
    emulate(x, x, **sums)
    assert relative_rms(sums["gram"], exact["gram"]) <= 1e-7
    assert relative_rms(sums["cross"], exact["cross"]) <= 1e-7


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("weights", ["none", "any"])
def test_range_of_fp32_is_no_limit(weights: str, dtype: torch.dtype, exponent: int) -> None:
    x = torch.randn(64, 32).to(dtype) * 2.0**exponent
    weight, sums = make_weights(weights, 64), make_sums(32, 32)
    emulate(x, x, weight, **sums)
    assert_close(sums, exact_sums(x, x, weight))


def test_normed_features_of_huge_rows() -> None:
    x, sums = torch.randn(40, 16) * 1e30, make_sums(16, 16)
    emulate(x, x, norm_eps=1e-5, **sums)
    assert_close(sums, exact_sums(x, x, norm_eps=1e-5))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_adds_to_what_is_there_and_leaves_the_upper_triangle(dtype: torch.dtype) -> None:
    x, y = torch.randn(40, 136).to(dtype), torch.randn(40, 136).to(dtype)
    sums, exact = make_sums(136, 136), exact_sums(x, y)
    for tensor in sums.values():
        tensor.fill_(3.0)
    emulate(x, y, **sums)
    upper = torch.full((136, 136), 3.0, dtype=FP64).triu(1)
    assert torch.equal(sums["gram"].triu(1), upper)
    for name, tensor in sums.items():
        added = tensor - 3.0 if name != "gram" else (tensor - 3.0).tril()
        assert relative_rms(added, exact[name]) <= 1e-6, name


@pytest.mark.parametrize("wanted", ["gram", "cross", "moments"])
@pytest.mark.parametrize(("dtype", "weights"), [(BF16, "none"), (FP16, "any"), (FP32, "any")])
def test_each_output_alone(dtype: torch.dtype, weights: str, wanted: str) -> None:
    x, y = torch.randn(40, 24).to(dtype), torch.randn(40, 24).to(dtype)
    weight, sums, alone = make_weights(weights, 40), make_sums(24, 24), make_sums(24, 24)
    emulate(x, y, weight, delta=True, **sums)
    emulate(x, y, weight, delta=True, **{wanted: alone[wanted]})
    assert torch.equal(alone[wanted], sums[wanted])


def test_moments_without_y_are_the_feature_sums() -> None:
    x, moments = torch.randn(70, 136), torch.zeros(3, 136, dtype=FP64)
    emulate(x, moments=moments)
    assert relative_rms(moments[0], x.double().sum(0)) <= 1e-7
    assert not moments[1:].any()


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_strided_rows(dtype: torch.dtype) -> None:
    wide = torch.full((50, 96), math.nan).to(dtype)
    wide[:, 8:48] = torch.randn(50, 40).to(dtype)
    plain, strided = make_sums(40, 40), make_sums(40, 40)
    x = wide[:, 8:48]
    emulate(x, x, **strided)
    emulate(x.contiguous(), x.contiguous(), **plain)
    assert all(torch.equal(strided[name], plain[name]) for name in plain)


@pytest.mark.parametrize("weights", ["zero or one", "padding"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_rows_of_weight_zero_are_not_looked_at(dtype: torch.dtype, weights: str) -> None:
    x, y = torch.randn(40, 24).to(dtype), torch.randn(40, 24).to(dtype)
    weight = torch.ones(40) if weights == "zero or one" else torch.rand(40) + 0.5
    weight[[0, 7, 33, 39]] = 0.0
    exact = exact_sums(x, y, weight)
    x[weight == 0], y[weight == 0] = math.nan, math.inf
    sums = make_sums(24, 24)
    run = emulate(x, y, weight, **sums)
    assert (run.bad_weight, run.bad_x, run.bad_y) == (NO_TOKEN, NO_TOKEN, NO_TOKEN)
    assert_close(sums, exact)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_several_chunks_of_operands(dtype: torch.dtype) -> None:
    """The driver's workspace holds the operands of 1024 tokens at a time."""
    num_tokens = 2100
    x, y = torch.randn(num_tokens, 40).to(dtype), torch.randn(num_tokens, 40).to(dtype)
    weight = torch.rand(num_tokens) + 0.5
    weight[1000:1030] = weight[-3:] = 0.0
    x[weight == 0] = math.nan
    sums = make_sums(40, 40)
    run = emulate(x, y, weight, norm_eps=1e-5, delta=True, **sums)
    assert run.blocks > 3 * 2
    assert_close(sums, exact_sums(x, y, weight, 1e-5, True))


def test_all_weights_zero_adds_nothing() -> None:
    sums = make_sums(8, 8)
    emulate(torch.full((3, 8), math.nan), torch.ones(3, 8), torch.zeros(3), **sums)
    assert not any(tensor.any() for tensor in sums.values())


@pytest.mark.parametrize(("dtype", "weights"), [(BF16, "none"), (BF16, "any"), (FP32, "none")])
def test_bitwise_repeatable_in_any_order_of_the_warps(dtype: torch.dtype, weights: str) -> None:
    x, y = outlier_activations(300, 136, dtype), outlier_activations(300, 136, FP32, 1)
    weight, results = make_weights(weights, 300), []
    for order in (1, 2, 3):
        sums = make_sums(136, 136)
        emulate(x, y, weight, norm_eps=1e-6, order=order, **sums)
        results.append(sums)
    for again in results[1:]:
        assert all(torch.equal(again[name], results[0][name]) for name in again)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_the_first_bad_token_is_found(dtype: torch.dtype, value: float) -> None:
    x, y = torch.randn(100, 264).to(dtype), torch.randn(100, 264).to(dtype)
    x[77, 255], x[90, 263], y[50, 136], y[60, 0] = value, value, value, value
    weight = torch.ones(100)
    weight[[20, 30]] = -1.0
    sums = make_sums(264, 264)
    run = emulate(x, y, weight, **sums)
    assert (run.bad_weight, run.bad_x, run.bad_y) == (20, 77, 50)
    assert not any(tensor.any() for tensor in sums.values())


def test_under_capture_scales_are_taken_as_inexact_and_nan_goes_on() -> None:
    x, sums = outlier_activations(40, 24, FP32), make_sums(24, 24)
    emulate(x, x, captured=True, **sums)
    assert_close(sums, exact_sums(x, x))
    x[3, 5] = math.nan
    emulate(x, x, captured=True, **sums)
    assert sums["gram"][5, :6].isnan().all() and sums["gram"][:5, :5].isfinite().all()


# What the hardware's arithmetic gives, what the host's gives, and what is in no arithmetic.
NAN_PATTERNS = {"gpu": 0x7FFFFFFF, "host": -0x400000, "quiet": 0x7FC00000, "signalling": 0x7F800001}


@pytest.mark.parametrize(
    ("dtype", "pattern"), [(BF16, "host"), (FP16, "host"), *((FP32, name) for name in NAN_PATTERNS)]
)
@pytest.mark.parametrize(
    ("norm_eps", "delta", "weights"),
    [(None, False, "none"), (None, True, "none"), (1e-5, True, "any"), (None, False, "power of 4")],
)
def test_no_nan_is_lost_under_capture(
    norm_eps: float | None, delta: bool, weights: str, dtype: torch.dtype, pattern: str
) -> None:
    x, y = torch.randn(40, 24).to(dtype), torch.randn(40, 24).to(dtype)
    x[3, 5] = math.nan
    if dtype == FP32:
        x.view(torch.int32)[3, 5] = NAN_PATTERNS[pattern]
    sums = make_sums(24, 24)
    emulate(x, y, make_weights(weights, 40), norm_eps=norm_eps, delta=delta, captured=True, **sums)
    assert sums["gram"][5, :6].isnan().all() and sums["cross"][5].isnan().all()
    assert sums["moments"][0, 5].isnan()


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("garbage", [NAN_BYTE, FINITE_BYTE])
@pytest.mark.parametrize(("dtype", "norm_eps"), [(BF16, None), (FP32, 1e-5)], ids=str)
def test_a_bad_weight_shows_in_the_sums_under_capture(
    dtype: torch.dtype, norm_eps: float | None, garbage: int, value: float
) -> None:
    x, weight, sums = torch.randn(40, 24).to(dtype), torch.ones(40), make_sums(24, 24)
    weight[17] = value
    emulate(x, x, weight, norm_eps=norm_eps, captured=True, garbage=garbage, **sums)
    assert sums["gram"].tril().isnan().sum() == 24 * 25 // 2
    assert sums["cross"].isnan().all() and sums["moments"][0].isnan().all()


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("weights", ["none", "padding"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_nothing_is_read_that_was_not_written(
    dtype: torch.dtype, weights: str, captured: bool
) -> None:
    x, y = torch.randn(70, 40).to(dtype), torch.randn(70, 136).to(dtype)
    results = []
    for garbage in (NAN_BYTE, FINITE_BYTE):
        sums, weight = make_sums(40, 136), make_weights(weights, 70)
        emulate(x, y, weight, norm_eps=1e-5, captured=captured, garbage=garbage, **sums)
        results.append(sums)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("weights", ["none", "any"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_promise_holds_for_adders_of_later_devices(dtype: torch.dtype, weights: str) -> None:
    """A possible one: nothing says how those of sm_90 add. On a GPU the tests of values decide."""
    num_tokens = 1100
    x, y = outlier_activations(num_tokens, 24, dtype), torch.randn(num_tokens, 24).to(dtype)
    weight, sums = make_weights(weights, num_tokens), make_sums(24, 24)
    emulate(x, y, weight, delta=True, adder=LATER, **sums)
    assert_close(sums, exact_sums(x, y, weight, delta=True))


def test_the_longest_blocks_begin_first() -> None:
    x, y = torch.randn(32, 264).to(BF16), torch.randn(32, 264).to(BF16)
    run = emulate(x, y, delta=True, **make_sums(264, 264))
    assert run.first_block == 3 * run.last_block > 0


def multiply_adds(hidden_size: int, weight: Tensor | None = None, **sums: Tensor) -> float:
    """Return the multiply-adds of the tensor cores, in units of one full product."""
    num_tokens = 32
    x = torch.randn(num_tokens, hidden_size).to(BF16)
    run = emulate(x, x, weight, **sums)
    return run.multiply_adds / (num_tokens * hidden_size * hidden_size)


def test_only_lower_tiles_of_gram_are_computed() -> None:
    """Of n x n tiles n (n + 1) / 2: at hidden size 4096 0.516 of a whole product."""
    size, lower = 6 * 128, 21 / 36
    gram, cross = torch.zeros(size, size, dtype=FP64), torch.zeros(size, size, dtype=FP64)
    assert multiply_adds(size, gram=gram) == pytest.approx(lower, rel=1e-12)
    assert multiply_adds(size, gram=gram, cross=cross) == pytest.approx(lower + 1, rel=1e-12)


def test_scales_that_are_powers_of_two_cost_no_more_products() -> None:
    weight = make_weights("power of 4", 32)
    assert multiply_adds(128, weight, **make_sums(128, 128)) == 2.0
    assert multiply_adds(128, make_weights("any", 32), **make_sums(128, 128)) == 6.0


def weights_of_normed_rows(x: Tensor, norm_eps: float) -> Tensor:
    """As `token_weights` makes them on CUDA: powers of four times the rows' mean squares."""
    powers = 4.0 ** torch.randint(-3, 4, (len(x),)).double()
    return (powers * (x.double().square().mean(1) + norm_eps)).float()


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_weights_of_normed_rows_cost_one_product_in_g(dtype: torch.dtype) -> None:
    x, y = torch.randn(32, 128).to(dtype), torch.randn(32, 128).to(dtype)
    weight, sums = weights_of_normed_rows(x, 1e-5), make_sums(128, 128)
    run = emulate(x, y, weight, norm_eps=1e-5, delta=True, **sums)
    assert_close(sums, exact_sums(x, y, weight, 1e-5, True))
    products = {BF16: 1 + 3, FP32: 6 + 6}[dtype]
    assert run.multiply_adds == products * 32 * 128 * 128


@pytest.mark.parametrize("moved", [0.0, 2e-7, 5e-7])
def test_a_weight_is_moved_no_further_than_its_rounding(moved: float) -> None:
    """Of one token all of G is off as its weight is: here the bound of 1e-7 is the tightest."""
    x, sums = torch.randn(1, 16).to(BF16), make_sums(16, 16)
    weight = (weights_of_normed_rows(x, 1e-5).double() * (1.0 + moved)).float()
    emulate(x, x, weight, norm_eps=1e-5, **sums)
    assert_close(sums, exact_sums(x, x, weight, 1e-5))


def test_bytes_are_the_least_that_tiles_of_128_can_do_with() -> None:
    num_tokens, tiles = 1024, 2
    size = 128 * tiles
    x, gram = torch.randn(num_tokens, size).to(BF16), torch.zeros(size, size, dtype=FP64)
    run = emulate(x, gram=gram)
    lower = tiles * (tiles + 1) // 2
    assert run.check_bytes_read == num_tokens * size * 2
    operands = lower * num_tokens * 2 * 128 * 2
    # Half of the pairs on a diagonal tile; the sums counted are those that go in pairs.
    sums = (lower * 128 * 128 - tiles * (128 * 128 // 2)) * 8
    assert run.bytes_read == operands + sums
    assert run.bytes_written == sums


def test_shared_memory_fits_the_smallest_device() -> None:
    run = emulate(torch.randn(32, 8).to(BF16), **make_sums(8, 8), y=torch.randn(32, 8))
    assert run.largest_shared_bytes == 2 * 3 * 32 * 136 * 2 <= 166_912


def test_ldmatrix_has_no_bank_conflicts() -> None:
    sums = make_sums(136, 136)
    run = emulate(torch.randn(40, 136).to(BF16), torch.randn(40, 136).to(BF16), **sums)
    assert run.matrix_rows > 0 and run.conflicting_rows == 0
