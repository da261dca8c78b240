"""The operators' schemas, their fake implementations, and the fallback on devices without kernels.

The compiled extension registers its kernels under these schemas when it is loaded, for the CPU and
where it was built so for CUDA; the fallback then serves only other devices. A CUDA kernel hands
what it does not serve to `gram_update_fallback`; see `_cuda`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghosted_fast.ops import reference
from ghosted_fast.ops._checks import (
    check_ghost_apply,
    check_ghost_apply_rms_norm,
    check_ghost_solve,
    check_gram_update,
)

NAMESPACE = "ghosted_fast"
_GRAM_UPDATE_ARGUMENTS = (
    "(Tensor x, Tensor? y, Tensor? token_weight, float? norm_eps, bool delta, "
    "Tensor(a!)? gram, Tensor(b!)? cross, Tensor(c!)? moments) -> ()"
)
SCHEMAS = (
    f"gram_update{_GRAM_UPDATE_ARGUMENTS}",
    f"gram_update_fallback{_GRAM_UPDATE_ARGUMENTS}",
    "ghost_apply(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, float? norm_eps, "
    "Tensor? first_state, Tensor? is_first) -> Tensor",
    "ghost_apply_rms_norm(Tensor x, Tensor weight, Tensor norm_weight, float eps, Tensor? bias, "
    "Tensor? scale, float? norm_eps, Tensor? first_state, Tensor? is_first) -> (Tensor, Tensor)",
    "ghost_solve(Tensor gram, Tensor cross, float damping) -> (Tensor, Tensor)",
)

_library = torch.library.Library(NAMESPACE, "DEF")


def _fake_gram_update(
    x: Tensor,
    y: Tensor | None,
    token_weight: Tensor | None,
    norm_eps: float | None,
    delta: bool,
    gram: Tensor | None,
    cross: Tensor | None,
    moments: Tensor | None,
) -> None:
    check_gram_update(x, y, token_weight, norm_eps, delta, gram, cross, moments)


def _fake_ghost_apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    norm_eps: float | None,
    first_state: Tensor | None,
    is_first: Tensor | None,
) -> Tensor:
    check_ghost_apply(x, weight, bias, scale, norm_eps, first_state, is_first)
    return x.new_empty(x.shape)


def _fake_ghost_apply_rms_norm(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None,
    scale: Tensor | None,
    norm_eps: float | None,
    first_state: Tensor | None,
    is_first: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_ghost_apply_rms_norm(
        x, weight, norm_weight, eps, bias, scale, norm_eps, first_state, is_first
    )
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_ghost_solve(gram: Tensor, cross: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    check_ghost_solve(gram, cross, damping)
    return cross.new_empty(cross.shape), cross.new_empty(3)


for _schema in SCHEMAS:
    _library.define(_schema)
for _name, _fake, _fallback in (
    ("gram_update", _fake_gram_update, reference.gram_update_reference),
    ("gram_update_fallback", _fake_gram_update, reference.gram_update_reference),
    ("ghost_apply", _fake_ghost_apply, reference.ghost_apply_expression),
    (
        "ghost_apply_rms_norm",
        _fake_ghost_apply_rms_norm,
        reference.ghost_apply_rms_norm_expression,
    ),
    ("ghost_solve", _fake_ghost_solve, reference.ghost_solve_reference),
):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)
    _library.impl(_name, _fallback, "CompositeExplicitAutograd")
