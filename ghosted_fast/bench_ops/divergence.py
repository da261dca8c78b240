"""KL of rows of logits, its gradient, and its local model towards three other tensors of logits.

Gate: 2e-6 of the divergence, one rounding of the gradient, 2e-5 of the local model; rivals are
allowed ten times as much, in rows of more than 49152 words as many times more as they are longer.
Rivals: the same as expressions of torch in fp32, compiled too, and `F.kl_div`, whose gradient
autograd gives; they add up rows in fp32, to an error that grows with the row, and their sums in
fp64. Bytes: the logits once, and the gradient. Flops: 24 for each exponential, two to a pair of
logits, as a polynomial of degree 7 takes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ghosted_fast.bench_ops.cases import OURS, Case, Plan, Setting, Variant
from ghosted_fast.ops import divergence, local_divergence
from ghosted_fast.ops.backends import BACKENDS, served_by
from ghosted_fast.ops.operands import DivergenceOperands
from ghosted_fast.ops.reference import divergence_reference
from ghosted_fast.testing import relative_rms

OPERATOR = "divergence"
ROWS = (256,)
WORDS = (49152,)
FORMS = ("KL", "KL+gradient", "local model")
_MOVED = 3
_KL_BOUND, _LOCAL_BOUND, _LEAST_ROUNDING = 2e-6, 2e-5, 1e-6
_RIVAL = 10.0
_EXPONENTIAL = 24.0
Found = tuple[Tensor, ...]


def plans(words: int, rows: int, dtype: torch.dtype) -> Iterator[Plan]:
    """Yield the cases of a vocabulary, a number of rows and a dtype."""
    for form in FORMS:
        yield Plan(
            OPERATOR,
            f"{form} words={words} rows={rows}",
            words,
            rows,
            dtype,
            make=functools.partial(_case, form, words, rows, dtype),
            refusal=functools.partial(_refusal, dtype),
            # Of the local model: its logits in fp32, in up to 4 bytes, and in fp64 for the gate.
            memory=lambda setting: 96 * words * rows,
        )


def _refusal(dtype: torch.dtype, setting: Setting) -> str:
    rows = torch.empty(1, 1, dtype=dtype, device=setting.device)
    return BACKENDS[setting.backend].refusal(OPERATOR, DivergenceOperands(rows, rows))


def _bounds(form: str, dtype: torch.dtype) -> tuple[float, ...]:
    """Return how far each result of a form may be off."""
    if form == "local model":
        return (_LOCAL_BOUND,)
    rounding = max(torch.finfo(dtype).eps / 2, _LEAST_ROUNDING)
    return (_KL_BOUND, rounding) if form == "KL+gradient" else (_KL_BOUND,)


def _added(rows: Tensor) -> Tensor:
    """Return the sum of all: of rows in fp32, and of their sums in fp64, as a careful user adds."""
    return rows.sum(-1).sum(dtype=torch.float64)


def _expression(dense: Tensor, smaller: Tensor, moved: list[Tensor]) -> Found:
    """Return the sums of divergences, slopes and covariances, as a torch user writes them."""
    log_p, log_q = dense.float().log_softmax(-1), smaller.float().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    found = [_added(p * (log_p - log_q))]
    changes = [rows.float() - smaller.float() for rows in moved]
    found += [_added((q - p) * change) for change in changes]
    centred = [change - (q * change).sum(-1, keepdim=True) for change in changes]
    found += [_added(q * a * b) for i, a in enumerate(centred) for b in changes[: i + 1]]
    return (torch.stack(found),)


def _gradient_expression(dense: Tensor, smaller: Tensor, moved: list[Tensor]) -> Found:
    log_p, log_q = dense.float().log_softmax(-1), smaller.float().log_softmax(-1)
    p = log_p.exp()
    return _added(p * (log_p - log_q)), (log_q.exp() - p).to(smaller.dtype)


def _kl_div(dense: Tensor, smaller: Tensor, moved: list[Tensor], gradient: bool) -> Found:
    """Do what training code does: `F.kl_div`, and autograd."""
    smaller = smaller.detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        log_p, log_q = dense.float().log_softmax(-1), smaller.float().log_softmax(-1)
        found = _added(functional.kl_div(log_q, log_p, reduction="none", log_target=True))
    value = found.detach()
    return (value, *torch.autograd.grad(found, smaller)) if gradient else (value[None],)


def _exact(form: str, dense: Tensor, smaller: Tensor, moved: list[Tensor]) -> Found:
    """Return the same in fp64."""
    wants, wide = form == "KL+gradient", [rows.double() for rows in moved]
    sums, gradient = divergence_reference(
        DivergenceOperands(dense.double(), smaller.double(), None, wants, *wide)
    )
    total = sums.sum(0)
    return (total[0], gradient) if wants else (total,)


@functools.cache
def _compiled(form: str) -> Callable[..., Found]:
    return torch.compile(_gradient_expression if form == "KL+gradient" else _expression)


def _case(form: str, words: int, rows: int, dtype: torch.dtype, setting: Setting) -> Case:
    count = 2 + (_MOVED if form == "local model" else 0)
    made = [4 * torch.randn(rows, words, device=setting.device) for _ in range(count)]
    dense, smaller, *moved = (logits.to(dtype) for logits in made)

    def ours() -> Found:
        if form == "local model":
            value, slope, curvature = local_divergence(
                dense, smaller, moved, backend=setting.backend
            )
            lower = torch.tril_indices(_MOVED, _MOVED)
            return (torch.cat([value[None], slope, curvature[lower[0], lower[1]]]),)
        wants = form == "KL+gradient"
        found, gradient = divergence(dense, smaller, gradient=wants, backend=setting.backend)
        return (found.sum()[None],) if gradient is None else (found.sum(), gradient)

    exact, bounds = _exact(form, dense, smaller, moved), _bounds(form, dtype)

    def error(run: Callable[[], Found], allowed: float) -> float:
        triples = zip(run(), exact, bounds, strict=True)
        return (
            max(relative_rms(found, wanted) / bound for found, wanted, bound in triples) / allowed
        )

    backend = served_by(OPERATOR, DivergenceOperands(dense, smaller), setting.backend)
    variants = [Variant(OURS, ours, lambda: error(ours, 1.0), is_ours=True, backend=backend)]
    allowed = _RIVAL * max(1.0, words / WORDS[0])
    for name, run in _rivals(form, setting):
        rival = functools.partial(run, dense, smaller, moved)
        variants.append(Variant(name, rival, functools.partial(error, rival, allowed)))
    passed = (count + (form == "KL+gradient")) * dense.nbytes
    return Case(float(passed), {"fp32": 2 * _EXPONENTIAL * rows * words}, variants)


def _rivals(form: str, setting: Setting) -> Iterator[tuple[str, Callable[..., Found]]]:
    wants = form == "KL+gradient"
    yield "torch expression", _gradient_expression if wants else _expression
    if form != "local model":
        yield "F.kl_div", functools.partial(_kl_div, gradient=wants)
    if setting.compiled:
        yield "torch.compile", _compiled(form)
