"""gram_update against fp64, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.gram_sums import assert_close, exact_sums, make_sums, make_weights
from torch import Tensor

from ghosted_fast.errors import ArgumentError, BackendError
from ghosted_fast.ops import gram_update
from ghosted_fast.testing import outlier_activations, relative_rms

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# tokens, hidden size, outputs: aligned, one off a tile (8 x 48), a slab (128, 256 tokens) and a
# block (192 columns) either side, one token, none, several chunks.
SHAPES = [
    (256, 96, 96),
    (0, 16, 16),
    (1, 48, 48),
    (1, 1, 1),
    (7, 47, 49),
    (9, 49, 47),
    (127, 15, 15),
    (129, 17, 200),
    (255, 191, 191),
    (257, 193, 193),
    (513, 33, 33),
    (4200, 24, 24),
]
DTYPES = [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32), (FP32, FP16)]


@pytest.mark.parametrize("weights", ["none", "power of 4", "any", "padding"])
@pytest.mark.parametrize(("norm_eps", "delta"), [(None, False), (None, True), (1e-5, True)])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values(
    backend: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    norm_eps: float | None,
    delta: bool,
    weights: str,
) -> None:
    num_tokens, size = 300, 100
    x = outlier_activations(num_tokens, size, dtypes[0])
    y = torch.randn(num_tokens, size)
    y = (y if FP16 in dtypes else y + x.float()).to(dtypes[1])
    weight = make_weights(weights, num_tokens)
    sums = make_sums(size, size)
    gram_update(x, y, weight, norm_eps=norm_eps, delta=delta, backend=backend, **sums)
    assert_close(sums, exact_sums(x, y, weight, norm_eps, delta))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("where", ["first", "middle", "last", "two", "only in y"])
def test_one_token_that_owns_the_sums(
    backend: str, where: str, dtype: torch.dtype, delta: bool
) -> None:
    """Wherever it comes, it must not round away the last bits of the others' products."""
    num_tokens, size = 300, 64
    x, y = torch.randn(num_tokens, size).to(dtype), torch.randn(num_tokens, size).to(dtype)
    places = {"first": [0], "middle": [130], "last": [299], "two": [0, 128], "only in y": [0]}
    for place in places[where]:
        y[place] *= 1024.0
        if where != "only in y":
            x[place] *= 1024.0
    sums = make_sums(size, size)
    gram_update(x, y, delta=delta, backend=backend, **sums)
    assert_close(sums, exact_sums(x, y, delta=delta))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(backend: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    num_tokens, size, outputs = shape
    x = torch.randn(num_tokens, size).to(dtype)
    y = torch.randn(num_tokens, outputs).to(dtype)
    sums = make_sums(size, outputs)
    gram_update(x, y, backend=backend, **sums)
    assert_close(sums, exact_sums(x, y))


def test_error_does_not_grow_with_the_tokens(backend: str) -> None:
    sums = make_sums(16, 16)
    batches = [outlier_activations(20_000, 16, BF16, seed).abs() for seed in range(3)]
    for x in batches:
        gram_update(x, x, backend=backend, **sums)
    everything = torch.cat(batches)
    assert_close(sums, exact_sums(everything, everything))


@pytest.mark.parametrize("exponent", [-60, 60])
def test_range_of_fp32_is_no_limit(backend: str, exponent: int) -> None:
    x = torch.randn(64, 32).to(BF16) * 2.0**exponent
    sums, exact = make_sums(32, 32), exact_sums(x, x)
    gram_update(x, x, backend=backend, **sums)
    assert relative_rms(sums["gram"], exact["gram"]) <= 1e-6
    assert relative_rms(sums["cross"], exact["cross"]) <= 1e-6


def test_adds_to_what_is_there_and_leaves_the_upper_triangle(backend: str) -> None:
    x, y = torch.randn(40, 20), torch.randn(40, 20)
    sums, exact = make_sums(20, 20), exact_sums(x, y)
    for tensor in sums.values():
        tensor.fill_(3.0)
    gram_update(x, y, backend=backend, **sums)
    assert torch.equal(sums["gram"].triu(1), torch.full((20, 20), 3.0, dtype=FP64).triu(1))
    for name, tensor in sums.items():
        added = tensor - 3.0 if name != "gram" else (tensor - 3.0).tril()
        assert relative_rms(added, exact[name]) <= 1e-6, name


@pytest.mark.parametrize("wanted", ["gram", "cross", "moments"])
def test_each_output_alone(backend: str, wanted: str) -> None:
    x, y = torch.randn(30, 20).to(BF16), torch.randn(30, 20).to(BF16)
    sums, alone = make_sums(20, 20), make_sums(20, 20)
    gram_update(x, y, backend=backend, **sums)
    gram_update(x, y, backend=backend, **{wanted: alone[wanted]})
    assert torch.equal(alone[wanted], sums[wanted])


def weights_of_normed_rows(x: Tensor, powers: Tensor) -> Tensor:
    """As `token_weights` makes them: powers of four times the rows' mean squares."""
    return (powers.double() * (x.double().square().mean(1) + 1e-5)).float()


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_usual_weights_of_normed_rows_leave_bf16_as_it_is(backend: str, dtype: torch.dtype) -> None:
    """G has the bits of plain rows that are multiplied with the powers of two themselves."""
    x = torch.randn(600, 100).to(dtype)
    x[:, 7] *= 500.0  # holds most of the mean square: its bits decide about those of the others
    y, powers = torch.randn(600, 100).to(dtype), 4.0 ** torch.randint(-3, 4, (600,)).float()
    weight, sums = weights_of_normed_rows(x, powers), make_sums(100, 100)
    gram_update(x, y, weight, norm_eps=1e-5, delta=True, backend=backend, **sums)
    assert_close(sums, exact_sums(x, y, weight, 1e-5, True))
    if backend != "reference":  # which takes the weights as they are
        normed, plain = torch.zeros(2, 100, 100, dtype=FP64)
        gram_update(x, None, weight, norm_eps=1e-5, backend=backend, gram=normed)
        gram_update(x, None, powers, backend=backend, gram=plain)
        assert torch.equal(normed, plain)


@pytest.mark.parametrize("moved", [0.0, 2e-7, 5e-7])
def test_a_weight_is_moved_no_further_than_its_rounding(backend: str, moved: float) -> None:
    """Of one token all of G is off as its weight is: here the bound of 1e-7 is the tightest."""
    x, sums = torch.randn(1, 16).to(BF16), make_sums(16, 16)
    usual = weights_of_normed_rows(x, torch.ones(1)).double()
    weight = (usual * (1.0 + moved)).float()
    gram_update(x, x, weight, norm_eps=1e-5, backend=backend, **sums)
    assert_close(sums, exact_sums(x, x, weight, 1e-5))


def test_moments_without_y_are_the_feature_sums(backend: str) -> None:
    x = torch.randn(30, 20)
    moments = torch.zeros(3, 20, dtype=FP64)
    gram_update(x, moments=moments, backend=backend)
    assert relative_rms(moments[0], x.double().sum(0)) <= 1e-7
    assert not moments[1:].any()


def test_strided_and_transposed_rows(backend: str) -> None:
    wide = torch.randn(50, 70).to(BF16)
    for x in (wide[:, 3:40], wide[::2], wide[:, ::2], wide.t()[:40]):
        plain, strided = make_sums(x.shape[1], x.shape[1]), make_sums(x.shape[1], x.shape[1])
        gram_update(x, x, backend=backend, **strided)
        gram_update(x.contiguous(), x.contiguous(), backend=backend, **plain)
        assert torch.equal(strided["gram"], plain["gram"])
        assert torch.equal(strided["cross"], plain["cross"])


def test_rows_of_weight_zero_are_not_looked_at(backend: str) -> None:
    x, y = torch.randn(30, 20), torch.randn(30, 20)
    weight = torch.rand(30) + 0.5
    weight[[0, 7, 29]] = 0.0
    clean, poisoned = make_sums(20, 20), make_sums(20, 20)
    keep = weight > 0
    gram_update(x[keep], y[keep], weight[keep], backend=backend, **clean)
    x[~keep], y[~keep] = math.nan, math.inf
    gram_update(x, y, weight, backend=backend, **poisoned)
    for name in clean:
        assert relative_rms(poisoned[name], clean[name]) <= 1e-12, name


def test_all_weights_zero_adds_nothing(backend: str) -> None:
    sums = make_sums(8, 8)
    gram_update(torch.full((3, 8), math.nan), torch.ones(3, 8), torch.zeros(3), **sums)
    assert not any(tensor.any() for tensor in sums.values())


def test_bitwise_repeatable_on_any_number_of_threads(backend: str, two_threads: None) -> None:
    x, y = outlier_activations(700, 250, BF16), outlier_activations(700, 250, FP32, 1)
    results = []
    for threads in (2, 2, 1, 3):
        torch.set_num_threads(threads)
        sums = make_sums(250, 250)
        gram_update(x, y, norm_eps=1e-6, delta=True, backend=backend, **sums)
        results.append(sums)
    if backend == "reference":  # torch's own sums depend on the threads
        results = results[:2]
    for again in results[1:]:
        assert all(torch.equal(again[name], results[0][name]) for name in again)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_non_finite_names_the_token_and_adds_nothing(
    backend: str, dtype: torch.dtype, name: str, value: float
) -> None:
    rows = {"x": torch.randn(3000, 24).to(dtype), "y": torch.randn(3000, 24).to(dtype)}
    rows[name][2777, 23] = value
    rows[name][2900, 0] = value
    sums = make_sums(24, 24)
    with pytest.raises(RuntimeError, match=f"NaN or infinity in {name} at token 2777"):
        gram_update(**rows, backend=backend, **sums)
    assert not any(tensor.any() for tensor in sums.values())


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_bad_weight_names_the_token(backend: str, value: float) -> None:
    weight = torch.ones(10)
    weight[4] = value
    sums = make_sums(8, 8)
    with pytest.raises(RuntimeError, match=r"finite token weights >= 0, got .* at token 4"):
        gram_update(torch.randn(10, 8), torch.randn(10, 8), weight, backend=backend, **sums)
    assert not any(tensor.any() for tensor in sums.values())


def arguments(**changes: Any) -> dict[str, Any]:
    usual = {"x": torch.randn(5, 8), "y": torch.randn(5, 8), **make_sums(8, 8)}
    return {**usual, **changes}


ERRORS = [
    ({"x": torch.randn(5, 8).double()}, TypeError, "expected x in bfloat16, float16 or float32"),
    ({"y": torch.zeros(5, 8, dtype=torch.int64)}, TypeError, "expected y in bfloat16"),
    ({"x": torch.randn(2, 5, 8)}, ArgumentError, r"expected x of shape \[tokens, hidden_size\]"),
    ({"y": torch.randn(4, 8)}, ArgumentError, r"expected y of shape \[5, outputs\], got \[4, 8\]"),
    ({"y": torch.randn(5, 9), "cross": None}, ArgumentError, "for delta or moments"),
    ({"y": None}, ArgumentError, "expected y for cross or delta, got None"),
    ({"norm_eps": 0.0}, ArgumentError, "expected norm_eps > 0 or None, got 0"),
    ({"token_weight": torch.ones(5).double()}, TypeError, "expected token_weight in torch.float32"),
    ({"token_weight": torch.ones(4)}, ArgumentError, r"token_weight of shape \[5\], got \[4\]"),
    ({"gram": torch.zeros(8, 8)}, TypeError, "expected gram in torch.float64"),
    ({"gram": torch.zeros(8, 9).double()}, ArgumentError, r"gram of shape \[8, 8\], got \[8, 9\]"),
    ({"cross": torch.zeros(9, 8).double()}, ArgumentError, r"cross of shape \[8, 8\]"),
    ({"moments": torch.zeros(2, 8).double()}, ArgumentError, r"moments of shape \[3, 8\]"),
    ({"cross": torch.zeros(8, 16).double()[:, ::2]}, ArgumentError, "expected a contiguous cross"),
    ({"backend": "triton"}, BackendError, "backend 'triton': .*; use backend='auto'"),
    ({"backend": "gpu"}, BackendError, "expected a backend of auto, native, reference, triton"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS]
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gram_update(**arguments(**changes))


def test_reference_refuses_the_same() -> None:
    for changes, error, message in ERRORS[:-2]:
        with pytest.raises(error, match=message):
            gram_update(**arguments(**changes), backend="reference")


@pytest.mark.parametrize("norm_eps", [None, 1e-5])
def test_opcheck(norm_eps: float | None) -> None:
    sums = make_sums(16, 16)
    x, y = torch.randn(6, 16).to(BF16), torch.randn(6, 16)
    operator = torch.ops.ghosted_fast.gram_update.default
    torch.library.opcheck(operator, (x, y, torch.rand(6), norm_eps, True, *sums.values()))
    torch.library.opcheck(operator, (x, None, None, norm_eps, False, sums["gram"], None, None))


def test_compiles_without_a_graph_break() -> None:
    def step(x: Tensor, y: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
        gram_update(x * 2, y, gram=gram, cross=cross)
        return gram.diagonal().sum()

    x, y = torch.randn(9, 16), torch.randn(9, 16)
    plain, compiled = make_sums(16, 16), make_sums(16, 16)
    expected = step(x, y, plain["gram"], plain["cross"])
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(x, y, compiled["gram"], compiled["cross"]), expected)
    assert torch.equal(compiled["cross"], plain["cross"])


def test_inputs_that_require_gradients() -> None:
    x = torch.randn(9, 16, requires_grad=True)
    gram = torch.zeros(16, 16, dtype=FP64)
    gram_update(x, gram=gram)
    assert not gram.requires_grad
