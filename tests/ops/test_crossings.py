"""The table of crossings: one entry for every call, and torch where it says so."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from ops.test_ghost_apply import assert_accurate, exact_fp64, make_weight, torch_expression
from support.cpu_paths import TABLES
from torch import Tensor

from ghosted_fast.errors import ArgumentError
from ghosted_fast.ops import compiled, crossings, ghost_apply, pack_weight
from ghosted_fast.ops.backends import served_by
from ghosted_fast.ops.crossings import (
    CROSSINGS,
    DTYPES,
    LYING,
    PACKED,
    PACKED_OR_TORCH,
    TORCH,
    Crossings,
)
from ghosted_fast.ops.operands import GhostOperands
from ghosted_fast.ops.packing import PACKED_DTYPES

BF16, _, FP32 = DTYPES
CHOICES = {PACKED, LYING, PACKED_OR_TORCH, TORCH}
SIZES = (1, 16, 64, 575, 576, 577, 1024, 2047, 2048, 2049, 4096, 8192)
ROWS = range(1, 8193)
needs_extension = pytest.mark.skipif(
    compiled.extension() is None, reason=f"the extension is absent: {compiled.absence_reason()}"
)


def holds(named: str, number: int) -> bool:
    """Return whether a range, as people read it, holds a number."""
    if named == "any":
        return True
    if named.endswith(" or more"):
        return number >= int(named.removesuffix(" or more"))
    first, _, last = named.partition("-")
    return int(first) <= number <= int(last or first)


def entries(cells: Sequence[tuple[str, str, object]]) -> Callable[[int, int], list[object]]:
    """Return what finds the cells that hold so many rows of a hidden size."""
    by_size = {size: [cell for cell in cells if holds(cell[0], size)] for size in SIZES}
    return lambda rows, size: [choice for _, counts, choice in by_size[size] if holds(counts, rows)]


def distinct() -> dict[int, Crossings]:
    found = [crossings.crossings_of(path, dtype) for path in TABLES for dtype in DTYPES]
    return {id(item): item for item in found}


def test_every_call_has_exactly_one_entry() -> None:
    for item in distinct().values():
        find = entries(list(item.cells()))
        for size in SIZES:
            for rows in ROWS:
                assert find(rows, size) == [item.at(rows, size)], (rows, size)


def test_what_is_named_is_a_path_and_a_dtype_and_a_choice() -> None:
    for (path, dtype), item in CROSSINGS.items():
        assert path in TABLES and dtype in DTYPES
        assert list(item.rows) == sorted(set(item.rows)) and min(item.rows, default=1) > 0
        assert list(item.sizes) == sorted(set(item.sizes)) and min(item.sizes, default=2) > 1
        assert len(item.choices) == len(item.sizes) + 1
        assert {len(line) for line in item.choices} == {len(item.rows) + 1}
    for path in TABLES:
        for dtype in DTYPES:
            lines = crossings.crossings_of(path, dtype).choices
            chosen = {choice for line in lines for choice in line}
            assert chosen <= CHOICES
            assert dtype in PACKED_DTYPES or chosen <= {LYING, TORCH}


def test_other_paths_than_the_measured_ones_are_left_to_the_compiled_kernels() -> None:
    for path in set(TABLES) - {path for path, _ in CROSSINGS}:
        for dtype in DTYPES:
            expected = PACKED if dtype in PACKED_DTYPES else LYING
            assert crossings.crossings_of(path, dtype).choices == ((expected,),)


SIZE, FEW = 96, 3


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Have torch serve more than 3 rows of every dtype, and return the rows that it was given."""
    if compiled.extension() is None:
        pytest.skip(f"the extension is absent: {compiled.absence_reason()}")
    module, given = sys.modules["ghosted_fast.ops.ghost_apply"], list[Tensor]()
    product = module.ghost_apply_product  # type: ignore[attr-defined]

    def noted(x: Tensor, weight: Tensor) -> Tensor:
        given.append(x)
        return product(x, weight)  # type: ignore[no-any-return]

    path = compiled.extension().cpu_path()  # type: ignore[union-attr]
    few = Crossings(((LYING, TORCH),), rows=(FEW,))
    monkeypatch.setattr(crossings, "CROSSINGS", {(path, dtype): few for dtype in DTYPES})
    monkeypatch.setattr(module, "ghost_apply_product", noted)
    forget()
    yield given
    monkeypatch.undo()
    forget()


def forget() -> None:
    crossings._crossings_here.cache_clear()
    crossings._is_handed_over.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_serves_where_the_table_says_so(products: list[Tensor], dtype: torch.dtype) -> None:
    weight, _ = make_weight(SIZE, dtype)
    for shape, by in (((FEW, SIZE), "native"), ((2, 5, SIZE), "torch"), ((0, SIZE), "native")):
        x = torch.randn(*shape).to(dtype)
        products.clear()
        y = ghost_apply(x, weight)
        assert len(products) == (by == "torch")
        assert served_by("ghost_apply", GhostOperands(x, weight)) == by
        assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
        exact, rival = exact_fp64(x, weight), torch_expression(x, weight, None, None, None)
        assert_accurate(y, exact, rival)
        assert torch.equal(y, ghost_apply(x, weight))
        assert_accurate(ghost_apply(x, weight, backend="native"), exact, rival)
        assert served_by("ghost_apply", GhostOperands(x, weight), "native") == "native"
    x = torch.randn(7, 5, SIZE).to(dtype).transpose(0, 1)
    assert torch.equal(ghost_apply(x, weight), ghost_apply(x.contiguous(), weight))


EXTRAS: list[dict[str, Any]] = [
    {"bias": torch.ones(SIZE)},
    {"norm_eps": 1e-5},
    {"first_state": torch.ones(SIZE), "is_first": torch.zeros(8, dtype=torch.bool)},
]


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_what_is_no_plain_ghost_is_compiled(products: list[Tensor], extra: dict[str, Any]) -> None:
    x, (weight, _) = torch.randn(8, SIZE), make_weight(SIZE, FP32)
    assert torch.equal(
        ghost_apply(x, weight, **extra), ghost_apply(x, weight, **extra, backend="native")
    )
    assert not products and served_by("ghost_apply", GhostOperands(x, weight, **extra)) == "native"


def test_other_forms_of_a_weight_and_a_named_backend_are_compiled(products: list[Tensor]) -> None:
    x, (weight, _) = torch.randn(8, SIZE), make_weight(SIZE, FP32)
    integer, scale = make_weight(SIZE, torch.int8)
    ghost_apply(x, pack_weight(weight))
    ghost_apply(x, integer, None, scale)
    ghost_apply(x, weight, backend="native")
    assert not products
    run = torch.compile(lambda x: ghost_apply(x, weight), fullgraph=True, backend="eager")
    assert torch.equal(run(x), ghost_apply(x, weight, backend="native")) and not products


def test_wrong_operands_are_refused_before_torch_sees_them(products: list[Tensor]) -> None:
    x = torch.randn(8, SIZE)
    with pytest.raises(ArgumentError, match=r"weight of shape \[96, 96\], got \[95, 96\]"):
        ghost_apply(x, torch.randn(SIZE - 1, SIZE))
    with pytest.raises(ArgumentError, match="got is_first alone"):
        ghost_apply(x, torch.randn(SIZE, SIZE), is_first=torch.zeros(8, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"expected weight in torch\.float32"):
        ghost_apply(x, torch.randn(SIZE, SIZE).to(BF16))
    assert not products


def test_autocast_leaves_the_dtype_alone(products: list[Tensor]) -> None:
    x, (weight, _) = torch.randn(8, SIZE), make_weight(SIZE, FP32)
    with torch.autocast("cpu", dtype=BF16):
        y = ghost_apply(x, weight)
    assert len(products) == 1 and y.dtype == FP32
    assert_accurate(y, exact_fp64(x, weight), torch_expression(x, weight, None, None, None))


@pytest.fixture
def told_precision() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.usefixtures("told_precision")
def test_fp32_that_torch_would_multiply_in_less_is_compiled(products: list[Tensor]) -> None:
    x, (weight, _) = torch.randn(8, SIZE), make_weight(SIZE, FP32)
    for told, count in (("bf16", 0), ("tf32", 0), ("ieee", 1)):
        torch.backends.mkldnn.matmul.fp32_precision = told
        ghost_apply(x, weight)
        assert len(products) == count
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    ghost_apply(x.to(BF16), weight.to(BF16))
    assert len(products) == 2


def test_gradients_do_not_go_by_the_table(products: list[Tensor]) -> None:
    x, (weight, _) = torch.randn(8, SIZE, requires_grad=True), make_weight(SIZE, FP32)
    ghost_apply(x, weight).sum().backward()
    assert x.grad is not None and not products


@needs_extension
def test_what_runs_an_operator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = GhostOperands(torch.randn(2, 8), torch.randn(8, 8))
    assert served_by("ghost_apply", operands, "reference") == "reference"
    assert served_by("ghost_apply", operands) == "native"
    meta = GhostOperands(*(tensor.to("meta") for tensor in operands[:2]))
    assert served_by("ghost_apply", meta) == "torch"
    monkeypatch.setattr(compiled, "absence_reason", lambda: "not built")
    assert served_by("ghost_apply", operands) == "torch"
