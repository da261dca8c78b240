"""Orthonormal Hadamard matrices, of the sizes that hidden states have."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError


@lru_cache(maxsize=2)
def hadamard(size: int) -> Tensor:
    """Return an orthonormal Hadamard matrix [size, size], fp64: entries +-1 / sqrt(size).

    It is kept for the next caller: do not write into it.

    It is the Kronecker product of Sylvester's matrix of the largest power of two that leaves a size
    of 1 or one that Paley's constructions give: 576 = 16 x 36, 640 = 32 x 20.

    Raises:
        ArgumentError: The constructions do not give this size.

    Source: Sylvester (1867); Paley, "On orthogonal matrices" (1933), I and II for prime q.
    """
    twos = (size & -size).bit_length() - 1 if size > 0 else -1
    for power in range(twos, -1, -1):
        core = _core(size >> power)
        if core is not None:
            matrix = torch.kron(_sylvester(power), core)
            return matrix / math.sqrt(size)
    raise ArgumentError(
        f"expected a size with a Hadamard matrix by Sylvester's and Paley's constructions (2^k, "
        f"2^k (q + 1) for a prime q = 3 mod 4, 2^k (2q + 2) for a prime q = 1 mod 4), got {size}: "
        'use recovery="linearpatch-d", which needs none'
    )


def _sylvester(power: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(power):
        matrix = torch.kron(matrix, pair)
    return matrix


def _core(size: int) -> Tensor | None:
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(size - 1) and size % 4 == 0:
        return torch.eye(size, dtype=torch.float64) + _bordered(size - 1, -1.0)
    half = size // 2
    if size % 4 == 0 and _is_prime(half - 1) and half % 4 == 2:
        conference = _bordered(half - 1, 1.0)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, plus) + torch.kron(
            torch.eye(half, dtype=torch.float64), minus
        )
    return None


def _bordered(q: int, sign: float) -> Tensor:
    """Return the matrix [q + 1, q + 1] of the quadratic residues modulo q, with its border."""
    residues = {value * value % q for value in range(1, q)}
    character = torch.tensor(
        [0.0, *(1.0 if value in residues else -1.0 for value in range(1, q))], dtype=torch.float64
    )
    indices = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, sign
    matrix[1:, 1:] = character[(indices[:, None] - indices[None, :]) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % k for k in range(2, math.isqrt(number) + 1))
