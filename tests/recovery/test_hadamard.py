"""Hadamard matrices: orthonormal, of entries of one size."""

from __future__ import annotations

import pytest
import torch

from ghosted_fast.errors import ArgumentError
from ghosted_fast.recovery.hadamard import hadamard


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 32, 40, 576, 640, 896, 1152, 2880])
def test_orthonormal_with_entries_of_one_size(size: int) -> None:
    matrix = hadamard(size)
    assert matrix.shape == (size, size)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))
    unit = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.mT, unit, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [0, 3, 6, 25, 92, 100 * 23 + 2])
def test_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ArgumentError, match=f"got {size}.*linearpatch-d"):
        hadamard(size)
