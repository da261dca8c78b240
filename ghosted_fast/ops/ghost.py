"""`ghost_apply` and `ghost_apply_rms_norm`: the ghost in a running model."""

from __future__ import annotations

import torch
from torch import Tensor

from ghosted_fast import _native
from ghosted_fast.errors import BackendError
from ghosted_fast.ops import _cuda
from ghosted_fast.ops import _schemas as _schemas  # defines the operators
from ghosted_fast.ops._checks import check_ghost_apply, check_ghost_apply_rms_norm
from ghosted_fast.ops.reference import (
    ghost_apply_expression,
    ghost_apply_reference,
    ghost_apply_rms_norm_expression,
    ghost_apply_rms_norm_reference,
)

_HAS_EXTENSION = _native.extension() is not None
_apply = torch.ops.ghosted_fast.ghost_apply.default
_apply_rms_norm = torch.ops.ghosted_fast.ghost_apply_rms_norm.default


def _runs_at_once(x: Tensor, weight: Tensor) -> bool:
    return _HAS_EXTENSION and x.is_cpu and weight.dtype != torch.float8_e4m3fn


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _require_backend(backend: str, x: Tensor, weight: Tensor, differentiable: bool) -> None:
    _native.require_backend(backend, x.device)
    if backend in ("native", "triton") and differentiable:
        raise BackendError(
            f"backend {backend!r}: expected inputs without gradients, got one that requires them; "
            "use torch.no_grad(), or backend='auto'"
        )
    if backend == "native" and weight.dtype == torch.float8_e4m3fn:
        raise BackendError(
            "backend 'native': expected a weight in x's dtype or int8, got float8_e4m3fn; "
            "use backend='auto'"
        )


def _needs_expression(x: Tensor, weight: Tensor, backend: str, differentiable: bool) -> bool:
    """Check a named backend, warn where plain torch runs, and return whether it must be called.

    Raises:
        BackendError: The named backend cannot run here.
    """
    # The kernels of the processor know no fp8.
    narrow = x.is_cpu and weight.dtype == torch.float8_e4m3fn
    if backend != "auto":
        _require_backend(backend, x, weight, differentiable)
    elif not (differentiable or narrow or _cuda.registered(x.device)):
        if not torch.compiler.is_compiling():
            _native.warn_fallback(x.device.type)
    return differentiable or narrow


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
        weight: [hidden_size, hidden_size] as [out, in], in x's dtype, or int8 or
            float8_e4m3fn with scale; or what `pack_weight` made of it.
        bias: [hidden_size], any of the three float dtypes.
        scale: [hidden_size] fp32: row i of an int8 or fp8 weight stands for scale[i] * weight[i].
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
    if differentiable or backend != "auto" or not _runs_at_once(x, weight):
        plain = _needs_expression(x, weight, backend, differentiable)
        if backend == "reference":
            return ghost_apply_reference(x, weight, bias, scale, norm_eps, first_state, is_first)
        if backend == "triton":
            return _cuda.ghost_apply(
                x, weight, bias, scale, norm_eps, first_state, is_first, insist=True
            )
        if plain:
            return ghost_apply_expression(x, weight, bias, scale, norm_eps, first_state, is_first)
    try:
        return _apply(x, weight, bias, scale, norm_eps, first_state, is_first)
    except RuntimeError:
        check_ghost_apply(x, weight, bias, scale, norm_eps, first_state, is_first)
        raise


def ghost_apply_rms_norm(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    norm_eps: float | None = None,
    first_state: Tensor | None = None,
    is_first: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return y of `ghost_apply` and the next layer's RMS norm of it.

    `normed = norm_weight * (y * rsqrt(mean(y^2) + eps)).to(dtype)`, computed in fp32 from the
    *rounded* y, as an unfused Llama layer does.

    Args:
        x: Hidden states [..., hidden_size], bf16, fp16 or fp32.
        weight: See `ghost_apply`.
        norm_weight: [hidden_size] in x's dtype.
        eps: Added to the mean square of y.
        bias: See `ghost_apply`, as the rest.
        scale: Likewise.
        norm_eps: Likewise.
        first_state: Likewise.
        is_first: Likewise.
        backend: Likewise.

    Returns:
        (y, normed), both [..., hidden_size] in x's dtype, contiguous.

    Raises:
        TypeError: A dtype does not fit.
        ArgumentError: A shape, a device, or the combination does not fit.
        BackendError: The named backend cannot run here.

    Source: ours.
    """
    differentiable = torch.is_grad_enabled() and _any_requires_grad(
        x, weight, norm_weight, bias, scale, first_state
    )
    if differentiable or backend != "auto" or not _runs_at_once(x, weight):
        plain = _needs_expression(x, weight, backend, differentiable)
        if backend == "reference":
            return ghost_apply_rms_norm_reference(
                x, weight, norm_weight, eps, bias, scale, norm_eps, first_state, is_first
            )
        if backend == "triton":
            return _cuda.ghost_apply_rms_norm(
                x, weight, norm_weight, eps, bias, scale, norm_eps, first_state, is_first, True
            )
        if plain:
            return ghost_apply_rms_norm_expression(
                x, weight, norm_weight, eps, bias, scale, norm_eps, first_state, is_first
            )
    try:
        return _apply_rms_norm(
            x, weight, norm_weight, eps, bias, scale, norm_eps, first_state, is_first
        )
    except RuntimeError:
        check_ghost_apply_rms_norm(
            x, weight, norm_weight, eps, bias, scale, norm_eps, first_state, is_first
        )
        raise
