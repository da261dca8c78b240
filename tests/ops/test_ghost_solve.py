"""ghost_solve against fp64, on every backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError, BackendError
from ghosted_fast.ops import ghost_solve
from ghosted_fast.testing import relative_rms

FP64 = torch.float64

# Size and outputs: one, below a tile (8 x 24), one off a tile, a block (128) or a strip.
SHAPES = [(1, 1), (3, 2), (7, 25), (8, 24), (9, 23), (65, 65), (127, 127), (129, 130), (260, 49)]


def make_system(size: int, outputs: int, condition: float = 1e4) -> tuple[Tensor, Tensor]:
    """A Gram matrix with badly scaled channels, and C = G X for an X of ordinary size."""
    generator = torch.Generator().manual_seed(size)
    random = torch.randn(size, size, generator=generator, dtype=FP64)
    basis = torch.linalg.qr(random).Q
    eigenvalues = torch.logspace(0, -math.log10(condition), size, dtype=FP64)
    gram = (basis * eigenvalues) @ basis.mT
    scale = torch.logspace(-3, 3, size, dtype=FP64)
    gram = scale[:, None] * (gram + gram.mT) / 2 * scale
    solution = torch.randn(size, outputs, generator=generator, dtype=FP64)
    return gram, gram @ solution


def residual_of(gram: Tensor, cross: Tensor, damping: float, solution: Tensor) -> float:
    matrix = gram + damping * torch.eye(len(gram), dtype=FP64)
    return relative_rms(matrix @ solution, cross)


@pytest.mark.parametrize("condition", [1e2, 1e8, 1e10])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual(backend: str, shape: tuple[int, int], condition: float) -> None:
    gram, cross = make_system(*shape, condition)
    solution, info = ghost_solve(gram, cross, 1e-9, backend=backend)
    assert info[0] == 0
    residual = residual_of(gram, cross, 1e-9, solution)
    assert residual <= 1e-10, f"residual {residual:.2e}"
    assert float(info[2]) <= 1e-10


def test_values_and_condition(backend: str) -> None:
    gram, cross = make_system(90, 40, 1e3)
    solution, info = ghost_solve(gram, cross, 0.0, backend=backend)
    scale = gram.diagonal().rsqrt()[:, None]
    scaled = scale * gram * scale.mT
    exact_solution = torch.linalg.solve(scaled, scale * cross)
    error = relative_rms(solution / scale, exact_solution)
    assert error <= 1e-11, f"error {error:.2e}"
    exact = float(torch.linalg.cond(scaled, 1))
    assert exact / 3 <= float(info[1]) <= exact * 1.001


def test_residual_estimate(backend: str) -> None:
    """C that no X of ordinary size gives leaves a residual that can be told from rounding."""
    gram, _ = make_system(60, 1, 1e8)
    cross = torch.randn(60, 200, dtype=FP64)
    solution, info = ghost_solve(gram, cross, 0.0, backend=backend)
    residual = residual_of(gram, cross, 0.0, solution)
    assert residual / 5 <= float(info[2]) <= residual * 5


def test_damping_is_absolute(backend: str) -> None:
    solution, _ = ghost_solve(
        torch.diag(torch.tensor([1.0, 4.0], dtype=FP64)),
        torch.ones(2, 1, dtype=FP64),
        1.0,
        backend=backend,
    )
    assert torch.allclose(solution[:, 0], torch.tensor([0.5, 0.2], dtype=FP64), rtol=1e-14, atol=0)


def test_only_the_lower_triangle_is_read(backend: str) -> None:
    gram, cross = make_system(40, 10)
    poisoned = gram.tril() + torch.full_like(gram, math.nan).triu(1)
    plain, poisoned_solution = (
        ghost_solve(matrix, cross, 0.1, backend=backend)[0] for matrix in (gram, poisoned)
    )
    assert torch.equal(plain, poisoned_solution)


def test_failure_names_the_pivot(backend: str, poisoned_memory: None) -> None:
    singular = torch.eye(12, dtype=FP64)
    singular[5, 3] = singular[3, 5] = 1.0
    negative = torch.eye(150, dtype=FP64)
    negative[140, 140] = -1.0
    for gram, pivot in (
        (singular, 6.0),
        (negative, 141.0),
        (torch.zeros(3, 3, dtype=FP64), 1.0),
    ):
        solution, info = ghost_solve(
            gram, torch.ones(len(gram), 2, dtype=FP64), 0.0, backend=backend
        )
        assert info.tolist() == [pivot, math.inf, 1.0]
        assert not solution.any()


def test_overflow_is_a_failure(backend: str) -> None:
    gram = torch.eye(4, dtype=FP64) * 1e-300
    solution, info = ghost_solve(gram, torch.full((4, 2), 1e200, dtype=FP64), 0.0, backend=backend)
    assert info[0] > 0 and not solution.any()


def test_dead_channel_is_solved_with_damping(backend: str) -> None:
    gram, cross = make_system(20, 20)
    gram[7] = gram[:, 7] = cross[7] = 0.0
    solution, info = ghost_solve(gram, cross, 1e-6, backend=backend)
    assert info[0] == 0 and not solution[7].any()


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (4, 0)], ids=str)
def test_empty(backend: str, shape: tuple[int, int]) -> None:
    gram, cross = torch.eye(shape[0], dtype=FP64), torch.ones(*shape, dtype=FP64)
    solution, info = ghost_solve(gram, cross, 0.5, backend=backend)
    assert solution.shape == shape and info[0] == 0 and info[2] == 0


@pytest.mark.slow
def test_bitwise_repeatable_on_any_number_of_threads(backend: str, two_threads: None) -> None:
    gram, cross = make_system(300, 300)
    results = []
    for threads in (2, 2, 1, 3):
        torch.set_num_threads(threads)
        results.append(ghost_solve(gram, cross, 1e-6, backend=backend))
    if backend == "reference":
        results = results[:2]
    for solution, info in results[1:]:
        assert torch.equal(solution, results[0][0]) and torch.equal(info, results[0][1])


def test_strided_arguments(backend: str) -> None:
    gram, cross = make_system(30, 30)
    plain, _ = ghost_solve(gram, cross, 0.1, backend=backend)
    strided, _ = ghost_solve(gram.clone().t(), cross.t().contiguous().t(), 0.1, backend=backend)
    assert relative_rms(strided, plain) <= 1e-9 and strided.is_contiguous()


@pytest.mark.parametrize("name", ["gram", "cross"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_is_refused(backend: str, name: str, value: float) -> None:
    tensors = dict(zip(("gram", "cross"), make_system(20, 5), strict=True))
    tensors[name][12, 3] = value
    with pytest.raises(RuntimeError, match=f"expected a finite {name}, got NaN or infinity"):
        ghost_solve(**tensors, damping=0.1, backend=backend)


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"gram": torch.eye(4)}, TypeError, "expected gram in torch.float64"),
    ({"cross": torch.ones(4, 2)}, TypeError, "expected cross in torch.float64"),
    ({"gram": torch.ones(4, 3, dtype=FP64)}, ArgumentError, r"a square gram, got shape \[4, 3\]"),
    ({"cross": torch.ones(3, 2, dtype=FP64)}, ArgumentError, r"cross of shape \[4, outputs\]"),
    ({"damping": -1.0}, ArgumentError, "expected a finite damping >= 0, got -1"),
    ({"damping": math.nan}, ArgumentError, "expected a finite damping >= 0, got nan"),
    ({"damping": math.inf}, ArgumentError, "expected a finite damping >= 0, got inf"),
    ({"backend": "triton"}, BackendError, "backend 'triton'"),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS]
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    usual = {
        "gram": torch.eye(4, dtype=FP64),
        "cross": torch.ones(4, 2, dtype=FP64),
        "damping": 0.1,
    }
    with pytest.raises(error, match=message):
        ghost_solve(**{**usual, **changes})


def test_opcheck() -> None:
    gram, cross = make_system(12, 5)
    torch.library.opcheck(torch.ops.ghosted_fast.ghost_solve.default, (gram, cross, 0.1))


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    def step(gram: Tensor, cross: Tensor) -> Tensor:
        return ghost_solve(gram * 2, cross, 0.1)[0] + 1

    gram, cross = make_system(12, 5)
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(gram, cross), step(gram, cross))
