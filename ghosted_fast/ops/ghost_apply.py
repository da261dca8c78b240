"""`ghost_apply`: the ghost in a running model."""

from __future__ import annotations

import torch
from torch import Tensor

from ghosted_fast.ops._define import define
from ghosted_fast.ops.backends import insist
from ghosted_fast.ops.crossings import is_left_to_torch
from ghosted_fast.ops.operands import GhostOperands
from ghosted_fast.ops.reference import ghost_apply_expression, ghost_apply_product

_operator = define(
    "ghost_apply",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, float? norm_eps, "
    "Tensor? first_state, Tensor? is_first) -> Tensor",
    GhostOperands,
    fake=lambda operands: operands.x.new_empty(operands.x.shape),
    plain=ghost_apply_expression,
)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def ghost_apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    norm_eps: float | None = None,
    first_state: Tensor | None = None,
    is_first: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return y = x + f(x) @ weight.T (+ bias), accumulated in fp32 and rounded once.

    Args:
        x: Hidden states [..., hidden_size], bf16, fp16 or fp32.
        weight: [hidden_size, hidden_size] as [out, in], in x's dtype, or int8 with
            scale; or what `pack_weight` made of it.
        bias: [hidden_size], any of the three float dtypes.
        scale: [hidden_size] fp32: row i of an int8 weight stands for scale[i] * weight[i].
        norm_eps: None for f(x) = x; a number > 0 for f(x) = x / sqrt(mean(x^2) + norm_eps).
        first_state: [hidden_size], what the rows marked in is_first get instead, cast to x's dtype.
        is_first: bool, shape of x without its last dimension.
        backend: "auto", or "native", "triton" or "reference" to insist on one. Where a gradient is
            needed, "auto" computes a differentiable torch expression.

    Returns:
        [..., hidden_size] in x's dtype, contiguous.

    Raises:
        TypeError: A dtype does not fit.
        ArgumentError: A shape, a device, or the combination does not fit.
        BackendError: The named backend cannot run here.

    Source: Yun et al., arXiv 2605.15491 (the ghost); normed form, first state and kernel are ours.
    """
    differentiable = torch.is_grad_enabled() and _any_requires_grad(
        x, weight, bias, scale, first_state
    )
    if differentiable or backend != "auto":
        operands = GhostOperands(x, weight, bias, scale, norm_eps, first_state, is_first)
        if backend != "auto":
            named: Tensor = insist(backend, "ghost_apply", operands)
            return named
        operands.check()
        return ghost_apply_expression(operands)
    others = (bias, scale, norm_eps, first_state, is_first)
    if not torch.compiler.is_compiling() and is_left_to_torch(x, weight, others):
        GhostOperands(x, weight).check()
        return ghost_apply_product(x, weight)
    try:
        y: Tensor = _operator(x, weight, bias, scale, norm_eps, first_state, is_first)
        return y
    except RuntimeError:
        GhostOperands(x, weight, bias, scale, norm_eps, first_state, is_first).check()
        raise
