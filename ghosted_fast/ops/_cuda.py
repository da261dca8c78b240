"""Which kernels serve CUDA tensors: the one place where that is chosen.

    gram_update                        CUDA C++ where it was built in, Triton, torch in fp64
    ghost_apply, ghost_apply_rms_norm  Triton, the torch expression
    ghost_solve                        torch in fp64

Importing this registers the choice with torch. The compiled kernel registers itself and hands on
what it does not serve, through the operator `gram_update_fallback`. triton is imported by the
first call that needs it. On ROCm nothing is registered: the torch expressions run, as on any other
device.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from ghosted_fast import _native
from ghosted_fast.errors import BackendError
from ghosted_fast.ops import reference
from ghosted_fast.ops._checks import (
    check_ghost_apply,
    check_ghost_apply_rms_norm,
    check_gram_update,
)
from ghosted_fast.ops._schemas import NAMESPACE

_VECTOR_BYTES = 16
_COLUMNS = 8


@cache
def _warn_plain(operator: str, reason: str) -> None:
    warnings.warn(
        f"ghosted_fast.{operator} runs on plain torch: {reason}", RuntimeWarning, stacklevel=3
    )


def _apply_refusal(x: Tensor, weight: Tensor) -> str:
    """Return why Triton does not serve `ghost_apply` here; empty if it does."""
    if absence := _native.triton_absence_reason():
        return absence
    from ghosted_fast.kernels import ghost_apply as kernels

    return kernels.refusal(x, weight)


def unserved_by_native(x: Tensor, y: Tensor | None) -> str:
    """Return why the compiled CUDA kernel does not serve these rows; empty if it does.

    It copies 16 bytes at a time. The compiled operator checks the same for itself.
    """
    for name, rows in (("x", x), ("y", y)):
        if rows is None:
            continue
        if rows.shape[1] % _COLUMNS:
            return f"expected {name} with a multiple of {_COLUMNS} columns, got {rows.shape[1]}"
        row_bytes = rows.stride(0) * rows.element_size()
        if rows.data_ptr() % _VECTOR_BYTES or (len(rows) > 1 and row_bytes % _VECTOR_BYTES):
            return f"expected rows of {name} that start at multiples of {_VECTOR_BYTES} bytes"
    return ""


def _gram_refusal(x: Tensor, y: Tensor | None) -> str:
    """Return why Triton does not serve `gram_update` here; empty if it does."""
    if absence := _native.triton_absence_reason():
        return absence
    from ghosted_fast.kernels import gram_update as kernels

    return kernels.refusal(x, y)


def ghost_apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    norm_eps: float | None,
    first_state: Tensor | None,
    is_first: Tensor | None,
    insist: bool = False,
) -> Tensor:
    """Return y by Triton, or by the torch expression unless Triton is insisted on.

    Raises:
        BackendError: `insist`, and Triton does not serve these arguments; says why.
    """
    check_ghost_apply(x, weight, bias, scale, norm_eps, first_state, is_first)
    arguments = (x, weight, bias, scale, norm_eps, first_state, is_first)
    if refusal := _apply_refusal(x, weight):
        _refuse("ghost_apply", refusal, insist)
        return reference.ghost_apply_expression(*arguments)
    from ghosted_fast.kernels import ghost_apply as kernels

    with torch.cuda.device_of(x):
        return kernels.ghost_apply(*arguments)


def ghost_apply_rms_norm(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None,
    scale: Tensor | None,
    norm_eps: float | None,
    first_state: Tensor | None,
    is_first: Tensor | None,
    insist: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (y, normed) by Triton, or by the torch expression unless Triton is insisted on.

    Raises:
        BackendError: `insist`, and Triton does not serve these arguments; says why.
    """
    arguments = (x, weight, norm_weight, eps, bias, scale, norm_eps, first_state, is_first)
    check_ghost_apply_rms_norm(*arguments)
    if refusal := _apply_refusal(x, weight):
        _refuse("ghost_apply_rms_norm", refusal, insist)
        return reference.ghost_apply_rms_norm_expression(*arguments)
    from ghosted_fast.kernels import ghost_apply as kernels

    with torch.cuda.device_of(x):
        return kernels.ghost_apply_rms_norm(*arguments)


def gram_update(
    x: Tensor,
    y: Tensor | None,
    token_weight: Tensor | None,
    norm_eps: float | None,
    delta: bool,
    gram: Tensor | None,
    cross: Tensor | None,
    moments: Tensor | None,
    insist: bool = False,
) -> None:
    """Add to the sums by Triton, or by torch in fp64 unless Triton is insisted on.

    Raises:
        BackendError: `insist`, and Triton does not serve these arguments; says why.
    """
    arguments = (x, y, token_weight, norm_eps, delta, gram, cross, moments)
    check_gram_update(*arguments)
    if refusal := _gram_refusal(x, y):
        _refuse("gram_update", refusal, insist)
        reference.gram_update_reference(*arguments)
        return
    from ghosted_fast.kernels import gram_update as kernels

    with torch.cuda.device_of(x):
        kernels.gram_update(*arguments)


def _refuse(operator: str, reason: str, insist: bool) -> None:
    if insist:
        raise BackendError(f"backend 'triton': {reason}; use backend='auto'")
    _warn_plain(operator, reason)


def registered(device: torch.device) -> bool:
    """Return whether tensors on a device come here, and are warned about here."""
    return device.type == "cuda" and _IS_CUDA


# A fact of the build, so that importing this asks no driver.
_IS_CUDA = torch.version.hip is None and torch.backends.cuda.is_built()
if _IS_CUDA:
    _library = torch.library.Library(NAMESPACE, "IMPL")
    _library.impl("ghost_apply", ghost_apply, "CUDA")
    _library.impl("ghost_apply_rms_norm", ghost_apply_rms_norm, "CUDA")
    _library.impl("gram_update_fallback", gram_update, "CUDA")
    if not _native.serves_cuda():
        _library.impl("gram_update", gram_update, "CUDA")
