"""`ghost_solve`: the damped normal equations, once."""

from __future__ import annotations

import torch
from torch import Tensor

from ghosted_fast import _native
from ghosted_fast.ops import _schemas as _schemas  # defines the operator
from ghosted_fast.ops._checks import check_ghost_solve
from ghosted_fast.ops.reference import ghost_solve_reference

_HAS_EXTENSION = _native.extension() is not None
_operator = torch.ops.ghosted_fast.ghost_solve.default


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
    gram, cross = gram.detach(), cross.detach()
    if backend != "auto":
        _native.require_backend(backend, gram.device)
        if backend == "reference":
            return ghost_solve_reference(gram, cross, damping)
    elif not (_HAS_EXTENSION and gram.is_cpu) and not torch.compiler.is_compiling():
        _native.warn_fallback(gram.device.type)
    try:
        solution, info = _operator(gram, cross, damping)
    except RuntimeError:
        check_ghost_solve(gram, cross, damping)
        raise
    return solution, info
