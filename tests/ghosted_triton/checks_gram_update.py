"""gram_update's Triton kernels on the CPU, against fp64. Run by test_interpreter, test_semantics.

The name keeps these out of the ordinary collection: they need an emulated GPU.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from ops.test_gram_update import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    FP64,
    assert_close,
    exact_sums,
    make_sums,
    make_weights,
)
from torch import Tensor

from ghosted_fast.kernels._tuning import GramConfig
from ghosted_fast.kernels.gram_update import gram_update
from ghosted_fast.testing import outlier_activations, relative_rms

# One tile for all of test_values: in an interpreter the number of steps is what costs.
CONFIG = GramConfig(128, 128, 64, 4, 2, slices=4, inspect_rows=64)
SMALL = GramConfig(32, 16, 16, 4, 2, slices=2, promote_tokens=64, inspect_rows=16)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def update(
    x: Tensor,
    y: Tensor | None,
    sums: dict[str, Tensor],
    weight: Tensor | None = None,
    norm_eps: float | None = None,
    delta: bool = False,
    config: GramConfig = CONFIG,
) -> None:
    outputs = (sums.get("gram"), sums.get("cross"), sums.get("moments"))
    gram_update(x, y, weight, norm_eps, delta, *outputs, config=config)


FORMS = [(None, False), (None, True), (1e-5, True)]


def check_values(
    num_tokens: int,
    size: int,
    config: GramConfig,
    dtypes: tuple[torch.dtype, torch.dtype],
    norm_eps: float | None,
    delta: bool,
    weights: str,
) -> None:
    x = outlier_activations(num_tokens, size, dtypes[0])
    y = torch.randn(num_tokens, size)
    y = (y if FP16 in dtypes else y + x.float()).to(dtypes[1])
    weight, sums = make_weights(weights, num_tokens), make_sums(size, size)
    update(x, y, sums, weight, norm_eps, delta, config)
    assert_close(sums, exact_sums(x, y, weight, norm_eps, delta))


@pytest.mark.interpreter
@pytest.mark.parametrize("weights", ["none", "power of 4", "padding"])
@pytest.mark.parametrize(("norm_eps", "delta"), FORMS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values(
    dtypes: tuple[torch.dtype, torch.dtype], norm_eps: float | None, delta: bool, weights: str
) -> None:
    check_values(270, 112, CONFIG, dtypes, norm_eps, delta, weights)


@pytest.mark.parametrize("weights", ["none", "power of 4", "padding"])
@pytest.mark.parametrize(("norm_eps", "delta"), FORMS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values_of_few_tokens(
    dtypes: tuple[torch.dtype, torch.dtype], norm_eps: float | None, delta: bool, weights: str
) -> None:
    check_values(21, 48, SMALL, dtypes, norm_eps, delta, weights)


# Tokens, hidden size, outputs: one tile; two, three (odd and even triangles); tails; one token.
SHAPES = [(64, 32, 32), (1, 64, 32), (65, 96, 48), (15, 112, 16), (129, 80, 144)]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_tokens, size, outputs = shape
    x, y = torch.randn(num_tokens, size).to(dtype), torch.randn(num_tokens, outputs).to(dtype)
    sums = make_sums(size, outputs)
    update(x, y, sums, config=SMALL)
    assert_close(sums, exact_sums(x, y))


def test_none_and_one_token() -> None:
    sums = make_sums(32, 32)
    update(torch.zeros(0, 32), torch.zeros(0, 32), sums)
    assert not any(tensor.any() for tensor in sums.values())


@pytest.mark.interpreter
def test_error_does_not_grow_with_the_tokens() -> None:
    """Sums of one sign: in fp32 alone the error would grow with the number of tokens."""
    x = outlier_activations(3000, 16, BF16).abs()
    sums = make_sums(16, 16)
    update(x, x, sums, config=replace(SMALL, promote_tokens=256, block_tokens=64))
    assert_close(sums, exact_sums(x, x))


def test_promotes_after_256_tokens() -> None:
    """2^24 + 1 is not in fp32: what comes after 256 tokens must not meet what came before."""
    x = torch.zeros(512, 16, dtype=BF16)
    x[:256], x[256:] = 256.0, 0.5
    gram = torch.zeros(16, 16, dtype=FP64)
    update(x, None, {"gram": gram})
    assert float(gram[0, 0]) == 256 * 256.0**2 + 256 * 0.25
    # Within 256 tokens fp32 would have kept neither of these alone.
    one = torch.zeros(257, 16, dtype=BF16)
    one[0], one[256] = 2.0**12, 0.5
    gram.zero_()
    update(one, None, {"gram": gram})
    assert float(gram[0, 0]) == 2.0**24 + 0.25


def test_adds_to_what_is_there_and_leaves_the_upper_triangle() -> None:
    x, y = torch.randn(40, 48), torch.randn(40, 48)
    sums, exact = make_sums(48, 48), exact_sums(x, y)
    for tensor in sums.values():
        tensor.fill_(3.0)
    update(x, y, sums, config=SMALL)
    assert torch.equal(sums["gram"].triu(1), torch.full((48, 48), 3.0, dtype=FP64).triu(1))
    for name, tensor in sums.items():
        added = tensor - 3.0 if name != "gram" else (tensor - 3.0).tril()
        assert relative_rms(added, exact[name]) <= 1e-6, name


def test_the_upper_triangle_may_hold_anything() -> None:
    gram = torch.full((48, 48), math.nan, dtype=FP64)
    gram.masked_fill_(torch.ones(48, 48).tril().bool(), 0.0)
    x = torch.randn(10, 48).to(BF16)
    update(x, None, {"gram": gram}, config=SMALL)
    assert bool(gram.tril().isfinite().all()) and bool(gram[0, 1:].isnan().all())


@pytest.mark.parametrize("wanted", ["gram", "cross", "moments"])
def test_each_output_alone(wanted: str) -> None:
    x, y = torch.randn(30, 48).to(BF16), torch.randn(30, 48).to(BF16)
    sums, alone = make_sums(48, 48), make_sums(48, 48)
    update(x, y, sums, config=SMALL)
    update(x, y, {wanted: alone[wanted]}, config=SMALL)
    assert torch.equal(alone[wanted], sums[wanted])


def test_moments_without_y_are_the_feature_sums() -> None:
    x, moments = torch.randn(70, 48), torch.zeros(3, 48, dtype=FP64)
    update(x, None, {"moments": moments}, norm_eps=1e-5)
    features = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt()
    assert relative_rms(moments[0], features.sum(0)) <= 1e-7
    assert not moments[1:].any()


@pytest.mark.parametrize("exponent", [-60, 60])
def test_range_of_fp32_is_no_limit(exponent: int) -> None:
    x = torch.randn(64, 32).to(BF16) * 2.0**exponent
    sums, exact = make_sums(32, 32), exact_sums(x, x)
    update(x, x, sums, config=SMALL)
    assert relative_rms(sums["gram"], exact["gram"]) <= 1e-6
    assert relative_rms(sums["cross"], exact["cross"]) <= 1e-6


def test_strided_rows() -> None:
    wide = torch.randn(50, 80).to(BF16)
    for x in (wide[:, 16:64], wide[::2, :48]):
        plain, strided = make_sums(48, 48), make_sums(48, 48)
        update(x, x, strided, config=SMALL)
        update(x.contiguous(), x.contiguous(), plain, config=SMALL)
        assert torch.equal(strided["gram"], plain["gram"])
        assert torch.equal(strided["cross"], plain["cross"])


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_rows_of_weight_zero_are_not_looked_at(norm_eps: float | None) -> None:
    for dtype in (BF16, FP32):
        x, y = torch.randn(30, 32).to(dtype), torch.randn(30, 32).to(dtype)
        weight = 4.0 ** torch.randint(-2, 3, (30,)).float()
        weight[[0, 7, 29]] = 0.0
        clean, poisoned = make_sums(32, 32), make_sums(32, 32)
        keep = weight > 0
        update(x[keep], y[keep], clean, weight[keep], norm_eps, True, config=SMALL)
        x[~keep], y[~keep] = math.nan, math.inf
        update(x, y, poisoned, weight, norm_eps, True, config=SMALL)
        for name in clean:
            assert relative_rms(poisoned[name], clean[name]) <= 1e-6, name


def test_bitwise_repeatable() -> None:
    x, y = outlier_activations(300, 48, BF16), outlier_activations(300, 48, FP32, 1)
    results = []
    for _ in range(2):
        results.append(make_sums(48, 48))
        update(x, y, results[-1], make_weights("any", 300), 1e-6, True, config=SMALL)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_non_finite_names_the_token_and_adds_nothing(
    dtype: torch.dtype, name: str, value: float
) -> None:
    rows = {"x": torch.randn(50, 32).to(dtype), "y": torch.randn(50, 32).to(dtype)}
    rows[name][37, 31] = value
    rows[name][41, 0] = value
    sums = make_sums(32, 32)
    with pytest.raises(RuntimeError, match=f"NaN or infinity in {name} at token 37"):
        update(rows["x"], rows["y"], sums, config=SMALL)
    assert not any(tensor.any() for tensor in sums.values())


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_weight_names_the_token(value: float) -> None:
    weight, sums = torch.ones(10), make_sums(32, 32)
    weight[4] = value
    with pytest.raises(RuntimeError, match=r"finite token weights >= 0, got .* at token 4"):
        update(torch.randn(10, 32), torch.randn(10, 32), sums, weight, config=SMALL)
    assert not any(tensor.any() for tensor in sums.values())


@pytest.mark.parametrize("problem", ["x", "y", "weight"])
def test_nothing_is_added_where_the_host_reads_nothing_back(
    problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under graph capture: the kernels find the bad token themselves."""
    from ghosted_fast.kernels import gram_update as module

    monkeypatch.setattr(module, "_reads_back", lambda x: False)
    x, y, weight = torch.randn(20, 32).to(BF16), torch.randn(20, 32).to(BF16), torch.ones(20)
    {"x": x[3:4, 9], "y": y[3:4, 9], "weight": weight[3:4]}[problem].fill_(math.nan)
    sums = make_sums(32, 32)
    update(x, y, sums, weight, config=SMALL)
    assert not any(tensor.any() for tensor in sums.values())
    weight.fill_(0.7)
    sums, good = make_sums(32, 32), torch.randn(20, 32).to(BF16)
    update(good, good, sums, weight, config=SMALL)
    assert_close(sums, exact_sums(good, good, weight))
