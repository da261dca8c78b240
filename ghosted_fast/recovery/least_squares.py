"""Least squares in fp64 as published code has them: plain sums, plain LU, none of our kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ghosted_fast.errors import SolveError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.ghost_linear import GhostLinear

_BYTES_PER_DOUBLE = 8


def plain_bytes(size: int) -> int:
    """Return the bytes of one `PlainEquations`."""
    return 2 * _BYTES_PER_DOUBLE * size * size


def plain_ghost(decoder: Decoder, weight: Tensor, bias: Tensor | None = None) -> GhostLinear:
    """Return the ghost y = x + M x (+ b) of a model.

    Args:
        decoder: Gives it its dtype and device.
        weight: M [d, d] fp64, [out, in].
        bias: b [d] fp64.
    """
    has_bias = bias is not None
    ghost = GhostLinear(len(weight), bias=has_bias, device=decoder.device, dtype=decoder.dtype)
    with torch.no_grad():
        ghost.weight.copy_(weight)
        if bias is not None and ghost.bias is not None:
            ghost.bias.copy_(bias)
    return ghost.requires_grad_(False)


class PlainEquations:
    """Sums of f f^T and f t^T over rows f and targets t [n, d], each taken in fp64.

    Args:
        size: Width d.
        device: Of the sums.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._cross = torch.zeros(size, size, dtype=torch.float64, device=device)

    @property
    def sums(self) -> list[Tensor]:
        """The sums, which add up over texts."""
        return [self._gram, self._cross]

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add rows [n, d], fp64."""
        self._gram += features.mT @ features
        self._cross += features.mT @ targets

    def solve(self, damping: float) -> Tensor:
        """Return M [d, d], [out, in], with (sum f f^T + damping I) M^T = sum f t^T.

        Raises:
            SolveError: The system is singular.
        """
        return solve_plain(self._gram, self._cross, damping)


def solve_plain(gram: Tensor, cross: Tensor, damping: float = 0.0) -> Tensor:
    """Return M [d, d], [out, in], with (gram + damping I) M^T = cross, by one LU solve.

    Args:
        gram: [d, d] fp64.
        cross: [d, d] fp64.
        damping: Absolute.

    Raises:
        SolveError: The system is singular.
    """
    damped = gram + damping * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    solution, info = torch.linalg.solve_ex(damped, cross)
    if int(info) or not bool(torch.isfinite(solution).all()):
        raise SolveError(
            f"expected features that span all {len(damped)} channels, got singular equations: "
            "give more text, or use the recovery 'ghost', whose damping adapts"
        )
    return solution.mT.contiguous()
