"""ghost_apply against fp64, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ghosted_fast.errors import ArgumentError, BackendError
from ghosted_fast.ops import ghost_apply, pack_weight
from ghosted_fast.ops.packing import unpack_weight
from ghosted_fast.testing import outlier_activations, relative_rms

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INT8 = torch.int8

# Rows: none, one, the dot tiles (1, 2, 4 tokens) and their rests, either side of the switch to the
# blocked product (16) and of its tiles (8 rows, 256 tokens).
ROWS = [0, 1, 2, 3, 4, 5, 16, 17, 24, 257]
# Hidden sizes: below one tile, one off a vector, a pair, a strip (96) and a group (64) either side.
SIZES = [1, 15, 16, 17, 33, 64, 95, 97, 256]
TYPES = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, INT8), (FP16, INT8), (FP32, INT8)]


def make_weight(size: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    if dtype == INT8:
        weight = torch.randint(-127, 128, (size, size), generator=generator, dtype=INT8)
        return weight, torch.rand(size, generator=generator) / (64 * size**0.5)
    return (torch.randn(size, size, generator=generator) / size**0.5).to(dtype), None


def torch_expression(
    x: Tensor, weight: Tensor, scale: Tensor | None, norm_eps: float | None, bias: Tensor | None
) -> Tensor:
    """What one writes in torch, in x's dtype."""
    if scale is not None:
        weight = (scale[:, None] * weight.float()).to(x.dtype)
    features = x
    if norm_eps is not None:
        variance = x.float().square().mean(-1, keepdim=True)
        features = (x.float() * torch.rsqrt(variance + norm_eps)).to(x.dtype)
    return x + functional.linear(features, weight, None if bias is None else bias.to(x.dtype))


def assert_accurate(y: Tensor, exact: Tensor, rival: Tensor) -> None:
    """Error at most twice the torch expression's, plus one rounding of y (fp32: an ulp)."""
    floor = torch.finfo(y.dtype).eps / (1 if y.dtype == FP32 else 2)
    error, allowed = relative_rms(y, exact), 2 * relative_rms(rival, exact) + floor
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def poison(like: Tensor) -> None:
    """Leave NaN in the memory that the next tensors of this size will most likely get."""
    blocks = [torch.full_like(like, float("nan")) for _ in range(4)]
    del blocks


def exact_fp64(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    norm_eps: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y in fp64, not rounded."""
    inputs, matrix = x.double(), weight.double()
    if scale is not None:
        matrix = scale.double()[:, None] * matrix
    features = inputs
    if norm_eps is not None:
        features = inputs / (inputs.square().mean(-1, keepdim=True) + norm_eps).sqrt()
    y = inputs + features @ matrix.mT
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_values(
    backend: str,
    rows: int,
    types: tuple[torch.dtype, torch.dtype],
    norm_eps: float | None,
) -> None:
    for size in SIZES:
        x = torch.randn(rows, size).to(types[0])
        weight, scale = make_weight(size, types[1])
        bias = torch.randn(size)
        poison(x)
        y = ghost_apply(x, weight, bias, scale, norm_eps=norm_eps, backend=backend)
        assert y.dtype == x.dtype and y.shape == x.shape
        exact = exact_fp64(x, weight, bias=bias, scale=scale, norm_eps=norm_eps)
        assert_accurate(y, exact, torch_expression(x, weight, scale, norm_eps, bias))


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("rows", [*ROWS, 8, 9, 12, 13])
def test_packed_values(backend: str, rows: int, dtype: torch.dtype, norm_eps: float | None) -> None:
    for size in SIZES:
        x = torch.randn(rows, size).to(dtype)
        weight, _ = make_weight(size, dtype)
        bias = torch.randn(size)
        packed = pack_weight(weight)
        poison(x)
        y = ghost_apply(x, packed, bias, norm_eps=norm_eps, backend=backend)
        assert y.dtype == x.dtype and y.shape == x.shape
        exact = exact_fp64(x, weight, bias=bias, norm_eps=norm_eps)
        assert_accurate(y, exact, torch_expression(x, weight, None, norm_eps, bias))


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_values_of_long_rows(
    backend: str, rows: int, types: tuple[torch.dtype, torch.dtype]
) -> None:
    size = 2083  # of int8 too longer than what is read as one stream, and odd
    x, (weight, scale) = torch.randn(rows, size).to(types[0]), make_weight(size, types[1])
    poison(x)
    y = ghost_apply(x, weight, None, scale, backend=backend)
    exact = exact_fp64(x, weight, scale=scale)
    assert_accurate(y, exact, torch_expression(x, weight, scale, None, None))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_only_a_large_packed_weight_takes_pages_of_its_own(dtype: torch.dtype) -> None:
    """Of 2 MiB each, of which thousands of small ghosts would take gigabytes."""
    small, large = (pack_weight(make_weight(size, dtype)[0]) for size in (64, 512))
    assert small.untyped_storage().nbytes() == 64 * 64 * dtype.itemsize
    assert large.nbytes >= 256 << 10 and large.data_ptr() % (2 << 20) == 0
    assert large.untyped_storage().nbytes() >= 2 << 20


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_packing_is_an_order(dtype: torch.dtype) -> None:
    """Output 16 p + i meets input n k + j at [p, k, i, j], and what is beyond the weight is 0."""
    numbers = 4 // dtype.itemsize
    for size in SIZES:
        weight, _ = make_weight(size, dtype)
        packed = pack_weight(weight)
        assert packed.dtype == dtype and packed.is_contiguous() and packed.data_ptr() % 64 == 0
        for out, column in ((0, 0), (size - 1, size - 1), (size // 2, size // 3)):
            place = (out // 16, column // numbers, out % 16, column % numbers)
            assert packed[place] == weight[out, column]
        assert torch.equal(unpack_weight(packed, size), weight)
        assert packed.count_nonzero() == weight.count_nonzero()
        assert torch.equal(pack_weight(weight.t()), pack_weight(weight.t().contiguous()))


def test_what_cannot_be_packed() -> None:
    for weight, message in (
        (torch.randn(8, 9), r"expected a square weight, got \[8, 9\]"),
        (torch.randn(8, 8).half(), "bfloat16 or float32 weight on cpu, got torch.float16"),
        (torch.randn(8, 8, device="meta"), "got torch.float32 on meta"),
    ):
        with pytest.raises(ArgumentError, match=message):
            pack_weight(weight)


@pytest.mark.parametrize("types", TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_outliers(backend: str, rows: int, types: tuple[torch.dtype, torch.dtype]) -> None:
    x = outlier_activations(rows, 192, types[0])
    weight, scale = make_weight(192, types[1])
    y = ghost_apply(x, weight, None, scale, backend=backend)
    exact = exact_fp64(x, weight, scale=scale)
    assert_accurate(y, exact, torch_expression(x, weight, scale, None, None))
    # Row by row, so that large tokens do not hide the others.
    rival = torch_expression(x, weight, scale, None, None)
    for row in range(rows):
        assert_accurate(y[row], exact[row], rival[row])


def test_one_rounding(backend: str) -> None:
    """The fp32 sum is rounded once: half an ulp, and what fp32 loses where y cancels."""
    for rows in (4, 64):
        x, (weight, _) = torch.randn(rows, 128).to(BF16), make_weight(128, BF16)
        exact = exact_fp64(x, weight)
        error = (ghost_apply(x, weight, backend=backend).double() - exact).abs()
        assert bool((error <= exact.abs() * 2.0**-8 + 1e-5).all())


def test_zero_weight_is_the_identity(backend: str) -> None:
    x = outlier_activations(20, 48, BF16)
    assert torch.equal(ghost_apply(x, torch.zeros(48, 48, dtype=BF16), backend=backend), x)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_first_state(backend: str, dtype: torch.dtype) -> None:
    for size, shape in ((24, (2, 9)), (10, (2, 9)), (64, (3, 11)), (100, (1, 1))):
        x = torch.randn(*shape, size).to(dtype)
        weight, _ = make_weight(size, dtype)
        first_state = 1000 * torch.randn(size)
        is_first = torch.zeros(shape, dtype=torch.bool)
        is_first[:, 0] = True
        plain = ghost_apply(x, weight, backend=backend)
        y = ghost_apply(x, weight, first_state=first_state, is_first=is_first, backend=backend)
        assert torch.equal(y[~is_first], plain[~is_first])
        assert torch.equal(y[is_first], first_state.to(dtype).expand(shape[0], -1))


def test_any_leading_shape_and_strides(backend: str) -> None:
    weight, _ = make_weight(32, BF16)
    base = torch.randn(6, 5, 40).to(BF16)
    for x in (base[0, 0, :32], base[:, :, :32], base[:, :, 8:].transpose(0, 1), base[:0, :, :32]):
        y = ghost_apply(x, weight, backend=backend)
        assert y.shape == x.shape and y.is_contiguous()
        assert torch.equal(y, ghost_apply(x.contiguous(), weight, backend=backend))
    transposed = ghost_apply(base[..., :32], weight.t(), backend=backend)
    assert torch.equal(
        transposed, ghost_apply(base[..., :32], weight.t().contiguous(), backend=backend)
    )


@pytest.mark.parametrize("rows", [1, 16, 300])
def test_bitwise_repeatable_on_any_number_of_threads(
    backend: str, two_threads: None, rows: int
) -> None:
    x, (weight, _) = torch.randn(rows, 512).to(BF16), make_weight(512, BF16)
    for form in (weight, pack_weight(weight)):
        results = []
        for threads in (2, 2, 1, 3):
            torch.set_num_threads(threads)
            results.append(ghost_apply(x, form, norm_eps=1e-6, backend=backend))
        if backend == "reference":
            results = results[:2]
        assert all(torch.equal(again, results[0]) for again in results[1:])


def test_nan_stays_in_its_row(backend: str) -> None:
    for rows in (3, 40):
        x, (weight, _) = torch.randn(rows, 64), make_weight(64, FP32)
        x[1, 5] = float("nan")
        for form in (weight, pack_weight(weight)):
            bad = ghost_apply(x, form, backend=backend).isnan().all(-1)
            assert bad.tolist() == [row == 1 for row in range(rows)]


def test_gradients_are_those_of_the_expression() -> None:
    x = torch.randn(4, 12, requires_grad=True)
    weight = torch.randn(12, 12, requires_grad=True)
    bias = torch.randn(12, requires_grad=True)
    y = ghost_apply(x, weight, bias, norm_eps=1e-5)
    expected = torch_expression(x, weight, None, 1e-5, bias)
    grads = torch.autograd.grad(y.square().sum(), [x, weight, bias])
    for grad, wanted in zip(
        grads, torch.autograd.grad(expected.square().sum(), [x, weight, bias]), strict=True
    ):
        assert relative_rms(grad, wanted) <= 1e-5
    with torch.no_grad():
        assert not ghost_apply(x, weight, bias).requires_grad


def arguments(**changes: Any) -> dict[str, Any]:
    return {"x": torch.randn(5, 8), "weight": torch.randn(8, 8), **changes}


INT8_WEIGHT = torch.zeros(8, 8, dtype=INT8)
ERRORS = [
    ({"x": torch.randn(5, 8).double()}, TypeError, "expected x in bfloat16, float16 or float32"),
    ({"x": torch.tensor(1.0)}, ArgumentError, r"expected x of shape \[..., hidden_size\]"),
    ({"weight": torch.randn(8, 9)}, ArgumentError, r"weight of shape \[8, 8\], got \[8, 9\]"),
    ({"weight": torch.randn(8, 8).to(BF16)}, TypeError, "expected weight in torch.float32"),
    ({"weight": INT8_WEIGHT}, ArgumentError, "expected scale with an int8 weight, got None"),
    (
        {"weight": INT8_WEIGHT.to(torch.float8_e4m3fn), "scale": torch.ones(8)},
        TypeError,
        "expected weight in torch.float32, got torch.float8_e4m3fn",
    ),
    ({"scale": torch.ones(8)}, ArgumentError, "expected no scale with a weight in torch.float32"),
    (
        {"weight": INT8_WEIGHT, "scale": torch.ones(8).double()},
        TypeError,
        "expected scale in torch.float32",
    ),
    ({"weight": INT8_WEIGHT, "scale": torch.ones(7)}, ArgumentError, r"scale of shape \[8\]"),
    ({"bias": torch.ones(7)}, ArgumentError, r"expected bias of shape \[8\], got \[7\]"),
    ({"bias": torch.ones(8).int()}, TypeError, "expected bias in bfloat16"),
    ({"norm_eps": -1.0}, ArgumentError, "expected norm_eps > 0 or None, got -1"),
    ({"first_state": torch.ones(8)}, ArgumentError, "got first_state alone; pass is_first"),
    ({"is_first": torch.ones(5).bool()}, ArgumentError, "got is_first alone; pass first_state"),
    (
        {"first_state": torch.ones(8), "is_first": torch.ones(5)},
        TypeError,
        "expected is_first in torch.bool",
    ),
    (
        {"first_state": torch.ones(8), "is_first": torch.ones(4).bool()},
        ArgumentError,
        r"is_first of shape \[5\], got \[4\]",
    ),
    (
        {"weight": torch.zeros(2, 8, 16, 1)},
        ArgumentError,
        r"packed weight of shape \[1, 8, 16, 1\], got \[2, 8, 16, 1\]",
    ),
    (
        {"x": torch.zeros(5, 8).half(), "weight": torch.zeros(1, 4, 16, 2).half()},
        ArgumentError,
        "a packed weight in bfloat16 or float32 on cpu, got torch.float16",
    ),
    ({"weight": torch.zeros(1, 4, 16, 2).to(BF16)}, TypeError, "expected weight in torch.float32"),
    ({"backend": "triton"}, BackendError, "backend 'triton': .*; use backend='auto'"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS]
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ghost_apply(**arguments(**changes))


@pytest.mark.parametrize("types", [(BF16, BF16), (FP32, INT8)], ids=str)
def test_opcheck(types: tuple[torch.dtype, torch.dtype]) -> None:
    x = torch.randn(2, 3, 16).to(types[0])
    weight, scale = make_weight(16, types[1])
    is_first = torch.zeros(2, 3, dtype=torch.bool)
    rest = (torch.ones(16), scale, 1e-6, torch.ones(16), is_first)
    torch.library.opcheck(torch.ops.ghosted_fast.ghost_apply.default, (x, weight, *rest))


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    def step(x: Tensor, weight: Tensor) -> Tensor:
        y = ghost_apply(x * 2, weight, weight[0])
        return ghost_apply(y, weight, norm_eps=1e-6) + 1

    x, (weight, _) = torch.randn(4, 16).to(BF16), make_weight(16, BF16)
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(x, weight), step(x, weight))
    weight.requires_grad_()
    assert torch.compile(step, fullgraph=True, backend="aot_eager")(x, weight).requires_grad
