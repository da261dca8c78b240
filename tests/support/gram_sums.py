"""Sums of products for tests: exact ones, and the bounds that every backend is held to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ghosted_fast.ops.operands import GramOperands
from ghosted_fast.ops.reference import gram_update_reference
from ghosted_fast.testing import relative_rms, scaled_rms

FP64 = torch.float64


def make_sums(hidden_size: int, outputs: int) -> dict[str, Tensor]:
    sums = {
        "gram": torch.zeros(hidden_size, hidden_size, dtype=FP64),
        "cross": torch.zeros(hidden_size, outputs, dtype=FP64),
    }
    if outputs == hidden_size:
        sums["moments"] = torch.zeros(3, hidden_size, dtype=FP64)
    return sums


def exact_sums(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    norm_eps: float | None = None,
    delta: bool = False,
) -> dict[str, Tensor]:
    """The sums in fp64, and under "y_gram" those of the targets' products with themselves."""
    sums = make_sums(x.shape[1], y.shape[1])
    gram_update_reference(GramOperands(x, y, weight, norm_eps, delta, **sums))
    keep = slice(None) if weight is None else weight > 0
    target = (y.double() - x.double() if delta else y.double())[keep]
    sums["y_gram"] = target.mT @ (target if weight is None else weight[keep, None] * target)
    return sums


def make_weights(kind: str, num_tokens: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(1)
    if kind == "none":
        return None
    if kind == "power of 4":
        return 4.0 ** torch.randint(-3, 4, (num_tokens,), generator=generator).float()
    weight = torch.rand(num_tokens, generator=generator) + 0.1
    if kind == "padding":
        weight[::3] = 0.0
    return weight


def assert_close(sums: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Hold the sums to the promise: 1e-6 in Frobenius norm, 1e-7 scaled."""
    gram = exact["gram"]
    x_size, y_size = gram.diagonal().sqrt(), exact["y_gram"].diagonal().sqrt()
    scale = x_size[:, None] * y_size[None, :]
    # C may cancel: its error is measured against the products that were added up.
    cross_error = sums["cross"] - exact["cross"]
    errors = {
        "gram, relative (1e-6)": relative_rms(sums["gram"], gram) / 1e-6,
        "gram, scaled (1e-7)": scaled_rms(sums["gram"], gram, gram) / 1e-7,
        "cross, relative (1e-6)": float(cross_error.norm() / scale.norm().clamp_min(1e-300)) / 1e-6,
        "cross, scaled (1e-7)": math.sqrt(
            float((cross_error / scale.clamp_min(1e-300)).square().mean())
        )
        / 1e-7,
    }
    if "moments" in sums:
        errors["moments, relative (1e-7)"] = relative_rms(sums["moments"], exact["moments"]) / 1e-7
    assert all(error <= 1.0 for error in errors.values()), f"in units of the bound: {errors}"
