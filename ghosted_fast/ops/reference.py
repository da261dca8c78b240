"""The operators in fp64, written to be read. The oracle of the tests, and `backend="reference"`.

They run on any device with fp64, and take operands that were checked. Where a device has no
compiled kernel, `gram_update` and `ghost_solve` run these; `ghost_apply` runs
`ghost_apply_expression`, which costs what torch costs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ghosted_fast.ops.operands import (
    DivergenceOperands,
    GhostOperands,
    GramOperands,
    SolveOperands,
)
from ghosted_fast.ops.packing import unpack_weight

_TOKENS_AT_ONCE = 4096
# Logits held at once in a wider dtype where distributions are compared: an outer cache.
_LOGITS_AT_ONCE = 1 << 22
# Below this a pivot of a matrix with unit diagonal is rounding noise, whatever its sign.
SMALLEST_PIVOT = 4 * torch.finfo(torch.float64).eps


def _first_bad_row(rows: Tensor, keep: Tensor) -> int | None:
    bad = ~torch.isfinite(rows).all(dim=1) & keep
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


def mirror_lower(matrix: Tensor) -> Tensor:
    """Return the symmetric matrix [d, d] of which only the lower triangle is given."""
    return matrix.tril().add_(matrix.tril(-1).mT)


def _tokens_to_add(operands: GramOperands) -> Tensor:
    """Return which tokens count, bool [tokens].

    Raises:
        RuntimeError: A token that counts holds NaN or infinity, or a weight is no weight.
    """
    x, y, token_weight, *_ = operands
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
    return keep


def gram_update_reference(operands: GramOperands) -> None:
    """Add the tokens' products to the sums, in fp64. See `ops.gram_update`.

    Raises:
        RuntimeError: A token that counts holds NaN or infinity, or a weight is no weight. The
            sums are as they were.
    """
    x, y, token_weight, norm_eps, delta, gram, cross, moments = operands
    keep = _tokens_to_add(operands)
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


def _plain_weight(operands: GhostOperands) -> Tensor:
    weight = operands.weight
    return unpack_weight(weight, operands.x.shape[-1]) if weight.dim() == 4 else weight


def _rounded(y: Tensor, operands: GhostOperands) -> Tensor:
    """Return y in x's dtype, with the first state in the rows that are marked."""
    y = y.to(operands.x.dtype)
    if operands.first_state is not None and operands.is_first is not None:
        y = torch.where(operands.is_first[..., None], operands.first_state.to(y.dtype), y)
    return y.contiguous()


def ghost_apply_reference(operands: GhostOperands) -> Tensor:
    """Return y = x + f(x) @ weight.T + bias, in fp64 with one rounding at the end."""
    inputs, matrix = operands.x.double(), _plain_weight(operands).double()
    if operands.scale is not None:
        matrix = operands.scale.double()[:, None] * matrix
    features = inputs
    if operands.norm_eps is not None:
        mean_square = inputs.square().mean(-1, keepdim=True)
        features = inputs * torch.rsqrt(mean_square + operands.norm_eps)
    y = inputs + features @ matrix.mT
    if operands.bias is not None:
        y = y + operands.bias.double()
    return _rounded(y, operands)


def ghost_apply_expression(operands: GhostOperands) -> Tensor:
    """Return the same as `ghost_apply_reference` in the matrix product of x's dtype.

    Differentiable; rounds once more than the compiled operator does.
    """
    x = operands.x
    inputs = x.float()
    change = functional.linear(x, _plain_weight(operands).to(x.dtype)).float()
    if operands.scale is not None:
        change = change * operands.scale
    if operands.norm_eps is not None:
        mean_square = inputs.square().mean(-1, keepdim=True)
        change = change * torch.rsqrt(mean_square + operands.norm_eps)
    y = inputs + change
    if operands.bias is not None:
        y = y + operands.bias.float()
    return _rounded(y, operands)


def ghost_apply_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x + x W^T of a plain ghost, as one product that x is added to before it is rounded.

    On CUDA this is a single call of cuBLAS. It is told where to write, which keeps the dtype under
    autocast, as that of the compiled kernels.
    """
    rows = x.reshape(-1, x.shape[-1])
    return torch.addmm(rows, rows, weight.mT, out=torch.empty_like(rows)).view(x.shape)


def ghost_solve_reference(operands: SolveOperands) -> tuple[Tensor, Tensor]:
    """Solve (G + damping I) X = C. Results: see `ops.ghost_solve`.

    Raises:
        RuntimeError: gram or cross holds NaN or infinity.
    """
    gram, cross, damping = operands
    lower = gram.tril()
    for name, values in (("gram", lower), ("cross", cross)):
        if not bool(torch.isfinite(values).all()):
            raise RuntimeError(f"ghost_solve: expected a finite {name}, got NaN or infinity")
    if gram.shape[0] == 0:
        return cross.new_zeros(cross.shape), cross.new_tensor([0.0, 1.0, 0.0])
    matrix = mirror_lower(lower) + damping * torch.eye(len(gram)).to(gram)
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


def divergence_reference(operands: DivergenceOperands) -> tuple[Tensor, Tensor]:
    """Return the divergences of rows and their gradient, in fp64. See `ops.divergence`."""
    return _divergence(operands, torch.float64)


def divergence_expression(operands: DivergenceOperands) -> tuple[Tensor, Tensor]:
    """Return the same as `divergence_reference` in fp32, row sums in fp64."""
    return _divergence(operands, torch.float32)


def _divergence(operands: DivergenceOperands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    smaller, counted, moved = operands.smaller, operands.counted, operands.moved
    size, words = smaller.shape
    sums = smaller.new_zeros(size, operands.num_sums, dtype=torch.float64)
    gradient = torch.zeros_like(smaller if operands.wants_gradient else smaller[:0])
    rows = torch.arange(size, device=smaller.device) if counted is None else counted.nonzero()[:, 0]
    for chosen in rows.split(max(1, _LOGITS_AT_ONCE // words)):
        here, theirs = (logits[chosen].to(dtype) for logits in (smaller, operands.dense))
        log_p, log_q = theirs.log_softmax(-1), here.log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        # Where p is zero the term is, though both logarithms may be minus infinity.
        found = [_row_sums(torch.where(p == 0, 0.0, p * (log_p - log_q)))]
        changes = [
            torch.where(logits[chosen] == smaller[chosen], 0.0, logits[chosen].to(dtype) - here)
            for logits in moved
        ]
        means = [_row_sums(q * change) for change in changes]
        found += [mean - _row_sums(p * change) for mean, change in zip(means, changes, strict=True)]
        for i, change in enumerate(changes):
            centred = q * (change - means[i].to(dtype)[:, None])
            found += [_row_sums(centred * other) for other in changes[: i + 1]]
        sums[chosen] = torch.stack(found, -1)
        if operands.wants_gradient:
            gradient[chosen] = (q - p).to(gradient.dtype)
    return sums, gradient


def _row_sums(values: Tensor) -> Tensor:
    """Return the sums of rows [rows, words] as fp64.

    Along a row torch sums pairwise, which is as exact as is needed and, on a processor, eighty
    times as fast as its sum in fp64.
    """
    return values.sum(-1).double()
