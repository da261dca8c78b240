"""The damped normal equations with d right-hand sides, in fp64.

Gate: relative residual 1e-10, of rivals 1e-8. Rivals: torch's LU (`linalg.solve`), as published
code calls it, and its Cholesky; neither scales, estimates the condition or reports a residual.
Flops: d^3 / 3 + 2 d^3; bytes: G, C and X.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ghosted_fast.bench_ops.cases import OURS, Case, Plan, Setting, Variant
from ghosted_fast.ops import ghost_solve
from ghosted_fast.ops.backends import BACKENDS, served_by
from ghosted_fast.ops.operands import SolveOperands
from ghosted_fast.testing import relative_rms

OPERATOR = "ghost_solve"
_DAMPING = 1e-6
_BOUND, _RIVAL_BOUND = 1e-10, 1e-8


def plans(width: int) -> Iterator[Plan]:
    """Yield the case of a hidden size."""
    yield Plan(
        OPERATOR,
        f"d={width}",
        width,
        None,
        torch.float64,
        make=functools.partial(_case, width),
        refusal=functools.partial(_refusal, width),
        memory=lambda setting: 10 * 8 * width**2,
    )


def _refusal(width: int, setting: Setting) -> str:
    gram = torch.empty(1, 1, dtype=torch.float64, device=setting.device)
    return BACKENDS[setting.backend].refusal(OPERATOR, SolveOperands(gram, gram, _DAMPING))


def _case(width: int, setting: Setting) -> Case:
    exact = {"dtype": torch.float64, "device": setting.device}
    tokens = torch.randn(2 * width, width, **exact)  # type: ignore[call-overload]
    gram = tokens.mT @ tokens
    cross = gram @ torch.randn(width, width, **exact)  # type: ignore[call-overload]
    damped = gram + _DAMPING * torch.eye(width, **exact)  # type: ignore[call-overload]

    def residual(solution: Tensor) -> float:
        return relative_rms(damped @ solution, cross)

    def ours() -> tuple[Tensor, Tensor]:
        return ghost_solve(gram, cross, _DAMPING, backend=setting.backend)

    def error() -> float:
        solution, info = ours()
        return residual(solution) / _BOUND if info[0] == 0 else math.inf

    def rival(name: str, solve: Callable[[], Tensor]) -> Variant:
        return Variant(name, solve, lambda: residual(solve()) / _RIVAL_BOUND)

    backend = served_by(OPERATOR, SolveOperands(gram, cross, _DAMPING), setting.backend)
    return Case(
        num_bytes=3.0 * gram.nbytes,
        flops={"fp64": (1 / 3 + 2) * width**3},
        variants=[
            Variant(OURS, ours, error, is_ours=True, backend=backend),
            rival("torch LU", lambda: torch.linalg.solve(damped, cross)),
            rival(
                "torch Cholesky",
                lambda: torch.cholesky_solve(cross, torch.linalg.cholesky(damped)),
            ),
        ],
    )
