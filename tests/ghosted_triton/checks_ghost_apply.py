"""ghost_apply's Triton kernels on the CPU, against fp64. Run by test_interpreter, test_semantics.

The name keeps these out of the ordinary collection: they need an emulated GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ops.test_ghost_apply import BF16, FP16, INT8, assert_accurate, exact_fp64, torch_expression
from torch import Tensor

from ghosted_fast.kernels._tuning import ApplyConfig
from ghosted_fast.kernels.ghost_apply import ghost_apply
from ghosted_fast.ops.operands import GhostOperands
from ghosted_fast.ops.reference import ghost_apply_reference

SPLIT = ApplyConfig(16, 64, 64, 4, 2, splits=3)
NARROW = ApplyConfig(16, 16, 64, 4, 2)
BLOCKED = ApplyConfig(32, 128, 64, 4, 2, group=2)
# Hidden sizes: one tile, one and a half (BLOCKED), a last split that is shorter (SPLIT).
CASES = [
    (SPLIT, 1, 64),
    (SPLIT, 15, 192),
    pytest.param(SPLIT, 16, 320, marks=pytest.mark.interpreter),
    pytest.param(NARROW, 1, 64, marks=pytest.mark.interpreter),
    pytest.param(NARROW, 16, 192, marks=pytest.mark.interpreter),
    (BLOCKED, 1, 64),
    pytest.param(BLOCKED, 31, 192, marks=pytest.mark.interpreter),
    (BLOCKED, 33, 192),
    pytest.param(BLOCKED, 97, 320, marks=pytest.mark.interpreter),
]
TYPES = [(x, w) for x in (BF16, FP16) for w in (x, INT8)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Scratch memory and results hold NaN until they are written."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def make_weight(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if dtype == INT8:
        weight = torch.randint(-128, 128, (size, size), dtype=INT8)
        return weight, torch.rand(size) / (64 * size**0.5)
    return (torch.randn(size, size) / size**0.5).to(dtype), None


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize(("config", "rows", "size"), CASES, ids=str)
def test_values(
    config: ApplyConfig,
    rows: int,
    size: int,
    types: tuple[torch.dtype, torch.dtype],
    norm_eps: float | None,
) -> None:
    x = (3 * torch.randn(rows, size)).to(types[0])
    weight, scale = make_weight(size, types[1])
    bias = torch.randn(size)
    y = ghost_apply(x, weight, bias, scale, norm_eps, config=config)
    assert y.dtype == x.dtype and y.shape == x.shape
    exact = exact_fp64(x, weight, scale, norm_eps, bias)
    assert_accurate(y, exact, torch_expression(x, weight, scale, norm_eps, bias))


@pytest.mark.parametrize("config", [SPLIT, NARROW, BLOCKED], ids=str)
def test_one_rounding_and_the_residual(config: ApplyConfig) -> None:
    """Half an ulp, and what fp32 loses where y cancels; the residual never passes through bf16."""
    x, (weight, _) = torch.randn(16, 128).to(BF16), make_weight(128, BF16)
    exact = exact_fp64(x, weight)
    error = (ghost_apply(x, weight, config=config).double() - exact).abs()
    assert bool((error <= exact.abs() * 2.0**-8 + 1e-5).all())
    zero = torch.zeros(128, 128, dtype=BF16)
    assert torch.equal(ghost_apply(x, zero, config=config), x)


@pytest.mark.parametrize("dtypes", [(BF16, FP16), (FP16, torch.float32)], ids=str)
@pytest.mark.parametrize("config", [SPLIT, BLOCKED], ids=str)
def test_first_state(config: ApplyConfig, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x = torch.randn(2, 7, 192).to(dtypes[0])
    weight, _ = make_weight(192, dtypes[0])
    state, bias = 100 * torch.randn(192).to(dtypes[1]), torch.randn(192).to(dtypes[1])
    is_first = torch.zeros(2, 7, dtype=torch.bool)
    is_first[0, 2], is_first[1, 0] = True, True
    plain = ghost_apply(x, weight, bias, config=config)
    y = ghost_apply(x, weight, bias, None, None, state, is_first, config=config)
    assert torch.equal(y[~is_first], plain[~is_first])
    assert torch.equal(y[is_first], state.to(dtypes[0]).expand(2, -1))


@pytest.mark.parametrize("config", [SPLIT, BLOCKED], ids=str)
def test_nan_stays_in_its_row(config: ApplyConfig) -> None:
    x, (weight, _) = torch.randn(3, 128).to(BF16), make_weight(128, BF16)
    x[1, 5] = float("nan")
    bad = ghost_apply(x, weight, norm_eps=1e-5, config=config).isnan().all(-1)
    assert bad.tolist() == [False, True, False]


@pytest.mark.parametrize("config", [SPLIT, BLOCKED], ids=str)
def test_bitwise_repeatable(config: ApplyConfig) -> None:
    x, (weight, _) = torch.randn(9, 192).to(BF16), make_weight(192, BF16)
    first, again = (ghost_apply(x, weight, norm_eps=1e-5, config=config) for _ in range(2))
    assert torch.equal(first, again)


def test_any_leading_shape_and_strides() -> None:
    weight, _ = make_weight(64, BF16)
    base = torch.randn(3, 2, 80).to(BF16)
    for x in (base[0, 0, :64], base[:, :, :64], base[:, :, 16:].transpose(0, 1), base[:0, :, :64]):
        y = ghost_apply(x, weight, config=BLOCKED)
        assert y.shape == x.shape and y.is_contiguous()
        if x.numel():
            assert_accurate(y, exact_fp64(x, weight), torch_expression(x, weight, None, None, None))
    assert ghost_apply(base[:0, 0, :64], weight).shape == (0, 64)  # before any configuration


def test_agrees_with_the_reference_on_all_arguments_at_once() -> None:
    x, (weight, scale) = torch.randn(20, 192).to(BF16), make_weight(192, INT8)
    is_first = torch.arange(20) % 7 == 0
    rest = (torch.randn(192), scale, 1e-5, torch.randn(192).to(BF16), is_first)
    y = ghost_apply(x, weight, *rest, config=BLOCKED)
    expected = ghost_apply_reference(GhostOperands(x, weight, *rest))
    ulps = (y.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert int(ulps.max()) <= 1 and int((ulps > 0).sum()) <= 8


def test_a_config_that_does_not_fit_is_refused() -> None:
    weight, _ = make_weight(192, BF16)
    for rows, config in ((17, SPLIT), (1, ApplyConfig(16, 64, 128, 4, 2))):
        with pytest.raises(ValueError, match=r"expected a config that fits x of shape"):
            ghost_apply(torch.randn(rows, 192).to(BF16), weight, config=config)
