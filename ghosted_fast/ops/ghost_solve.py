"""`ghost_solve`: the damped normal equations, once."""

from __future__ import annotations

from torch import Tensor

from ghosted_fast.ops._define import define
from ghosted_fast.ops.backends import insist
from ghosted_fast.ops.operands import SolveOperands
from ghosted_fast.ops.reference import ghost_solve_reference


def _fake(operands: SolveOperands) -> tuple[Tensor, Tensor]:
    return operands.cross.new_empty(operands.cross.shape), operands.cross.new_empty(3)


_operator = define(
    "ghost_solve",
    "(Tensor gram, Tensor cross, float damping) -> (Tensor, Tensor)",
    SolveOperands,
    fake=_fake,
    plain=ghost_solve_reference,
)


def ghost_solve(
    gram: Tensor, cross: Tensor, damping: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Solve (G + damping I) X = C by a Cholesky factor of the matrix scaled to unit diagonal.

    Does not raise where the matrix is singular to working precision: the caller escalates the
    damping.

    Args:
        gram: G [d, d] fp64, symmetric; only the lower triangle is read.
        cross: C [d, m] fp64.
        damping: Finite, >= 0.
        backend: "auto", or "native" or "reference" to insist on one.

    Returns:
        solution: X [d, m] fp64; zeros if the factorisation failed, never NaN.
        info: [3] fp64. 0 for success, else the 1-based index of the failing pivot; an estimate of
            the scaled matrix's condition in the 1-norm (infinity on failure); the relative residual
            |(G + damping I) X - C| / |C| in Frobenius norms (1 on failure).

    Raises:
        TypeError: A dtype does not fit.
        ArgumentError: A shape, a device or the damping does not fit.
        BackendError: The named backend cannot run here.
        RuntimeError: gram (its lower triangle) or cross holds NaN or infinity.

    Source: ours; scaling after van der Sluis (1969), condition estimate after Hager (1984) and
        Higham and Tisseur (2000).
    """
    operands = SolveOperands(gram.detach(), cross.detach(), damping)
    try:
        if backend != "auto":
            solution, info = insist(backend, "ghost_solve", operands)
        else:
            solution, info = _operator(*operands)
    except RuntimeError:
        operands.check()
        raise
    return solution, info
