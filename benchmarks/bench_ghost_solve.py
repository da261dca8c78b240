"""The damped normal equations with d right-hand sides, in fp64.

Gate: relative residual 1e-10. Rivals: torch's LU (`linalg.solve`), as published code calls it, and
its Cholesky; neither scales, estimates the condition or reports a residual. Flops: d^3 / 3 + 2 d^3;
bytes: G, C and X.
"""

from __future__ import annotations

import torch
from _cases import Case, Goal, Variant
from _harness import main

from ghosted_fast.ops import ghost_solve
from ghosted_fast.testing import relative_rms

SIZES = (576, 2048, 4096)
QUICK_SIZES = (256,)
DAMPING = 1e-6
GOALS = (Goal("torch LU", 1.8, 2.3), Goal("one thread", 1.8, 2.0))


def _case(size: int) -> Case:
    tokens = torch.randn(2 * size, size, dtype=torch.float64)
    gram = tokens.mT @ tokens
    cross = gram @ torch.randn(size, size, dtype=torch.float64)
    damped = gram + DAMPING * torch.eye(size, dtype=torch.float64)

    def error() -> float:
        solution, info = ghost_solve(gram, cross, DAMPING)
        if info[0] != 0:
            return float("inf")
        return relative_rms(damped @ solution, cross) / 1e-10

    def ours(_: int) -> torch.Tensor:
        return ghost_solve(gram, cross, DAMPING)[0]

    def cholesky(_: int) -> torch.Tensor:
        return torch.cholesky_solve(cross, torch.linalg.cholesky(damped))

    return Case(
        "ghost_solve",
        f"d={size}",
        "float64",
        num_bytes=3.0 * gram.nbytes,
        flops={"fp64": (1 / 3 + 2) * size**3},
        variants=[
            Variant("ghosted_fast", ours, error, is_ours=True, goals=GOALS),
            Variant("torch LU", lambda _: torch.linalg.solve(damped, cross)),
            Variant("torch Cholesky", cholesky),
        ],
    )


def make_cases(quick: bool) -> list[Case]:
    """Return one case per size."""
    return [_case(size) for size in (QUICK_SIZES if quick else SIZES)]


if __name__ == "__main__":
    main("ghost_solve", __doc__ or "", make_cases)
