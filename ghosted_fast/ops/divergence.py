"""`divergence`: how far two rows of logits are apart, with the gradient or a local model of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ghosted_fast.errors import ArgumentError
from ghosted_fast.ops._define import define
from ghosted_fast.ops.backends import insist
from ghosted_fast.ops.operands import DivergenceOperands
from ghosted_fast.ops.reference import divergence_expression, mirror_lower

MOST_MOVED = 3


def _fake(operands: DivergenceOperands) -> tuple[Tensor, Tensor]:
    smaller = operands.smaller
    sums = smaller.new_empty(len(smaller), operands.num_sums, dtype=torch.float64)
    return sums, smaller.new_empty(len(smaller) if operands.wants_gradient else 0, smaller.shape[1])


_operator = define(
    "divergence",
    "(Tensor dense, Tensor smaller, Tensor? counted, bool wants_gradient, "
    "Tensor? first, Tensor? second, Tensor? third) -> (Tensor, Tensor)",
    DivergenceOperands,
    fake=_fake,
    plain=divergence_expression,
)


def divergence(
    dense: Tensor,
    smaller: Tensor,
    counted: Tensor | None = None,
    *,
    gradient: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return KL(softmax(dense) || softmax(smaller)) of each row, and its gradient.

    Logits are read as they are, without a copy in fp32. A row's result has the same bits whatever
    the number of threads.

    Args:
        dense: Logits [rows, words] in bf16, fp16 or fp32.
        smaller: Logits of the same shape and dtype.
        counted: bool [rows]; the other rows, whose logits may be anything, have no divergence.
        gradient: Whether the gradient by `smaller` is wanted: softmax(smaller) - softmax(dense).
        backend: "auto", or "native" or "reference" to insist on one.

    Returns:
        The divergences [rows] in fp64, nats, and the gradient like `smaller`, or None.

    Raises:
        TypeError: A dtype does not fit.
        ArgumentError: A shape or a device does not fit.
        BackendError: The named backend cannot run here.
    """
    operands = DivergenceOperands(dense.detach(), smaller.detach(), counted, gradient)
    sums, found = _run(operands, backend)
    return sums[:, 0], found if gradient else None


def local_divergence(
    dense: Tensor,
    smaller: Tensor,
    moved: Sequence[Tensor],
    counted: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divergence summed over rows, and how it bends along the ways to other logits.

    With q the softmax of `smaller`, p that of `dense` and d_i = moved_i - smaller the slope is
    E_q[d_i] - E_p[d_i], and the curvature, Gauss and Newton's, the covariance of d_i and d_j
    under q.

    Args:
        dense: As in `divergence`, as the others.
        smaller: Likewise.
        moved: At most three tensors of logits like `smaller`.
        counted: As in `divergence`.
        backend: Likewise.

    Returns:
        The sum over rows of the divergence [], the slope [k] and the curvature [k, k], fp64.

    Raises:
        TypeError: A dtype does not fit.
        ArgumentError: A shape or a device does not fit, or more than three are moved.
        BackendError: The named backend cannot run here.
    """
    if len(moved) > MOST_MOVED:
        raise ArgumentError(f"divergence: expected at most {MOST_MOVED} moved, got {len(moved)}")
    ways = [item.detach() for item in moved]
    operands = DivergenceOperands(dense.detach(), smaller.detach(), counted, False, *ways)
    sums, _ = _run(operands, backend)
    count, total = len(moved), sums.sum(0)
    lower = torch.zeros(count, count, dtype=torch.float64, device=total.device)
    places = torch.tril_indices(count, count)
    lower[places[0], places[1]] = total[1 + count :]
    return total[0], total[1 : 1 + count], mirror_lower(lower)


def _run(operands: DivergenceOperands, backend: str) -> tuple[Tensor, Tensor]:
    try:
        found = (
            _operator(*operands) if backend == "auto" else insist(backend, "divergence", operands)
        )
    except RuntimeError:
        operands.check()
        raise
    sums, gradient = found
    return sums, gradient
