"""The operators in fp64, written to be read. The oracle of the tests, and `backend="reference"`.

They run on any device with fp64. Where a device has no compiled kernel, `gram_update` and
`ghost_solve` run these; `ghost_apply` runs `ghost_apply_expression`, which costs what torch costs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ghosted_fast.ops._checks import (
    check_ghost_apply,
    check_ghost_apply_rms_norm,
    check_ghost_solve,
    check_gram_update,
)
from ghosted_fast.ops.packing import unpack_weight

_TOKENS_AT_ONCE = 4096
# Below this a pivot of a matrix with unit diagonal is rounding noise, whatever its sign.
SMALLEST_PIVOT = 4 * torch.finfo(torch.float64).eps


def _first_bad_row(rows: Tensor, keep: Tensor) -> int | None:
    bad = ~torch.isfinite(rows).all(dim=1) & keep
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def gram_update_reference(
    x: Tensor,
    y: Tensor | None,
    token_weight: Tensor | None,
    norm_eps: float | None,
    delta: bool,
    gram: Tensor | None,
    cross: Tensor | None,
    moments: Tensor | None,
) -> None:
    """Add the tokens' products to the sums, in fp64. Arguments: see `ops.gram.gram_update`.

    Raises:
        TypeError, ArgumentError: An argument does not fit.
        RuntimeError: A token that counts holds NaN or infinity, or a weight is no weight. The
            sums are as they were.
    """
    check_gram_update(x, y, token_weight, norm_eps, delta, gram, cross, moments)
    keep = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if token_weight is not None:
        bad = ~(torch.isfinite(token_weight) & (token_weight >= 0))
        if bool(bad.any()):
            token = int(bad.nonzero()[0])
            raise RuntimeError(
                "gram_update: expected finite token weights >= 0, got "
                f"{float(token_weight[token])} at token {token}"
            )
        keep = token_weight > 0
    for name, rows in (("x", x), ("y", y)):
        bad_row = None if rows is None else _first_bad_row(rows, keep)
        if bad_row is not None:
            raise RuntimeError(
                f"gram_update: expected finite activations, got NaN or infinity in {name} at "
                f"token {bad_row}; nothing was added"
            )
    for start in range(0, len(x), _TOKENS_AT_ONCE):
        chunk = slice(start, start + _TOKENS_AT_ONCE)
        kept = keep[chunk]
        inputs = x[chunk][kept].double()
        features = inputs
        if norm_eps is not None:
            features = inputs * torch.rsqrt(inputs.square().mean(1, keepdim=True) + norm_eps)
        weighted = features
        if token_weight is not None:
            weight = token_weight[chunk][kept].double()[:, None]
            weighted = weight * features
        if gram is not None:
            gram += (weighted.mT @ features).tril()
        if moments is not None:
            moments[0] += weighted.sum(0)
        if y is None:
            continue
        outputs = y[chunk][kept].double()
        if cross is not None:
            cross += weighted.mT @ (outputs - inputs if delta else outputs)
        if moments is not None:
            change = outputs - inputs
            weighted_change = change if token_weight is None else weight * change
            moments[1] += weighted_change.sum(0)
            moments[2] += (weighted_change * change).sum(0)


def _plain(weight: Tensor, x: Tensor) -> Tensor:
    return unpack_weight(weight, x.shape[-1]) if weight.dim() == 4 else weight


def ghost_apply_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    norm_eps: float | None = None,
    first_state: Tensor | None = None,
    is_first: Tensor | None = None,
) -> Tensor:
    """Return y = x + f(x) @ weight.T + bias, in fp64 with one rounding at the end.

    Raises:
        TypeError, ArgumentError: An argument does not fit.
    """
    check_ghost_apply(x, weight, bias, scale, norm_eps, first_state, is_first)
    inputs, matrix = x.double(), _plain(weight, x).double()
    if scale is not None:
        matrix = scale.double()[:, None] * matrix
    features = inputs
    if norm_eps is not None:
        features = inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + norm_eps)
    y = inputs + features @ matrix.mT
    if bias is not None:
        y = y + bias.double()
    y = y.to(x.dtype)
    if first_state is not None and is_first is not None:
        y = torch.where(is_first[..., None], first_state.to(x.dtype), y)
    return y.contiguous()


def ghost_apply_expression(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    norm_eps: float | None = None,
    first_state: Tensor | None = None,
    is_first: Tensor | None = None,
) -> Tensor:
    """Return the same as `ghost_apply_reference` in the matrix product of x's dtype.

    Differentiable; rounds once more than the compiled operator does.

    Raises:
        TypeError, ArgumentError: An argument does not fit.
    """
    check_ghost_apply(x, weight, bias, scale, norm_eps, first_state, is_first)
    inputs = x.float()
    change = functional.linear(x, _plain(weight, x).to(x.dtype)).float()
    if scale is not None:
        change = change * scale
    if norm_eps is not None:
        change = change * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + norm_eps)
    y = inputs + change
    if bias is not None:
        y = y + bias.float()
    y = y.to(x.dtype)
    if first_state is not None and is_first is not None:
        y = torch.where(is_first[..., None], first_state.to(x.dtype), y)
    return y.contiguous()


def rms_norm_reference(y: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """Return norm_weight * (y / rms(y)) with the roundings of a Llama model's RMS norm."""
    rounded = y.float()
    rounded = rounded * torch.rsqrt(rounded.square().mean(-1, keepdim=True) + eps)
    return norm_weight * rounded.to(y.dtype)


def ghost_apply_rms_norm_reference(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    norm_eps: float | None = None,
    first_state: Tensor | None = None,
    is_first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, normed) with y of `ghost_apply_reference`.

    Raises:
        TypeError, ArgumentError: An argument does not fit.
    """
    check_ghost_apply_rms_norm(
        x, weight, norm_weight, eps, bias, scale, norm_eps, first_state, is_first
    )
    y = ghost_apply_reference(x, weight, bias, scale, norm_eps, first_state, is_first)
    return y, rms_norm_reference(y, norm_weight, eps)


def ghost_apply_rms_norm_expression(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    norm_eps: float | None = None,
    first_state: Tensor | None = None,
    is_first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (y, normed) with y of `ghost_apply_expression`.

    Raises:
        TypeError, ArgumentError: An argument does not fit.
    """
    check_ghost_apply_rms_norm(
        x, weight, norm_weight, eps, bias, scale, norm_eps, first_state, is_first
    )
    y = ghost_apply_expression(x, weight, bias, scale, norm_eps, first_state, is_first)
    return y, rms_norm_reference(y, norm_weight, eps)


def ghost_solve_reference(gram: Tensor, cross: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Solve (G + damping I) X = C. Arguments and results: see `ops.solve.ghost_solve`.

    Raises:
        TypeError, ArgumentError: An argument does not fit.
        RuntimeError: gram or cross holds NaN or infinity.
    """
    check_ghost_solve(gram, cross, damping)
    lower = gram.tril()
    for name, values in (("gram", lower), ("cross", cross)):
        if not bool(torch.isfinite(values).all()):
            raise RuntimeError(f"ghost_solve: expected a finite {name}, got NaN or infinity")
    if gram.shape[0] == 0:
        return cross.new_zeros(cross.shape), cross.new_tensor([0.0, 1.0, 0.0])
    matrix = lower + lower.tril(-1).mT + damping * torch.eye(len(gram)).to(gram)
    diagonal = matrix.diagonal()
    scale = torch.where(diagonal > 0, diagonal.clamp_min(torch.finfo(gram.dtype).tiny).rsqrt(), 1.0)
    scaled = scale[:, None] * matrix * scale
    factor, info = torch.linalg.cholesky_ex(scaled)
    if int(info):
        return cross.new_zeros(cross.shape), cross.new_tensor([float(info), math.inf, 1.0])
    pivots = factor.diagonal().square()
    condition = float(
        torch.linalg.matrix_norm(scaled, 1)
        * torch.linalg.matrix_norm(torch.cholesky_inverse(factor), 1)
    )
    right = scale[:, None] * cross
    scaled_solution = torch.cholesky_solve(right, factor)
    scaled_solution += torch.cholesky_solve(right - scaled @ scaled_solution, factor)
    solution = (scale[:, None] * scaled_solution).contiguous()
    too_small = pivots <= SMALLEST_PIVOT
    if bool(too_small.any()) or not bool(torch.isfinite(solution).all()):
        failing = int(too_small.nonzero()[0]) if bool(too_small.any()) else int(pivots.argmin())
        return cross.new_zeros(cross.shape), cross.new_tensor([failing + 1.0, math.inf, 1.0])
    size = float(cross.norm())
    residual = float((matrix @ solution - cross).norm()) / size if size else 0.0
    return solution, cross.new_tensor([0.0, condition, residual])
