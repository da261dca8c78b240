"""`gram_update`: streaming sums of products of activations."""

from __future__ import annotations

from torch import Tensor

from ghosted_fast.ops._define import define
from ghosted_fast.ops.backends import insist
from ghosted_fast.ops.operands import GramOperands
from ghosted_fast.ops.reference import gram_update_reference

_operator = define(
    "gram_update",
    "(Tensor x, Tensor? y, Tensor? token_weight, float? norm_eps, bool delta, "
    "Tensor(a!)? gram, Tensor(b!)? cross, Tensor(c!)? moments) -> ()",
    GramOperands,
    fake=lambda operands: None,
    plain=gram_update_reference,
)


def _plain_rows(rows: Tensor | None) -> Tensor | None:
    """Return rows outside autograd, with neighbouring elements side by side."""
    if rows is None:
        return None
    rows = rows.detach()
    return rows if rows.dim() != 2 or rows.stride(1) == 1 else rows.contiguous()


def gram_update(
    x: Tensor,
    y: Tensor | None = None,
    token_weight: Tensor | None = None,
    *,
    norm_eps: float | None = None,
    delta: bool = False,
    gram: Tensor | None = None,
    cross: Tensor | None = None,
    moments: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Add a batch of tokens to sums of products, in place.

    With `f = x`, or `f = x / sqrt(mean(x^2) + norm_eps)`:

        gram    += sum w f f^T       cross   += sum w f t^T, t = y, or y - x if delta
        moments += [sum w f, sum w (y - x), sum w (y - x)^2]

    Products are accumulated in fp32 over at most 2048 tokens and then added to the fp64 sums: the
    relative error is below 1e-6 for any number of tokens. The result is the same, bit for bit, for
    the same arguments, whatever the number of threads. On CUDA tensors the kernels wait once for
    the stream, to report NaN and infinity. While a CUDA graph is captured they cannot: on replay
    the compiled kernel lets them into the sums, where `solve_ghost` refuses them, and Triton's adds
    nothing of such a batch.

    Args:
        x: Activations [tokens, hidden_size], bf16, fp16 or fp32. Rows may be strided.
        y: Second activations [tokens, outputs], any of the three dtypes; outputs = hidden_size
            when delta or moments is asked for.
        token_weight: [tokens] fp32, >= 0; None for ones. Rows of weight 0 are not looked at.
        norm_eps: None for f = x; a number > 0 for normed features.
        delta: Whether cross takes y - x (computed in fp32) instead of y.
        gram: [hidden_size, hidden_size] fp64; the lower triangle is updated, the rest untouched.
        cross: [hidden_size, outputs] fp64.
        moments: [3, hidden_size] fp64; rows 1 and 2 are updated only if y is given.
        backend: "auto", or "native", "triton" or "reference" to insist on one.

    Raises:
        TypeError: A dtype does not fit.
        ArgumentError: A shape, a device, or the combination does not fit.
        BackendError: The named backend cannot run here.
        RuntimeError: A token with a weight above 0 holds NaN or infinity, or a weight is negative
            or not finite; names the token. The sums are as they were.

    Source: ours; the formula is the normal equations of Yun et al., arXiv 2605.15491.
    """
    x, y = _plain_rows(x), _plain_rows(y)  # type: ignore[assignment]
    operands = GramOperands(x, y, token_weight, norm_eps, delta, gram, cross, moments)
    if backend != "auto":
        insist(backend, "gram_update", operands)
        return
    try:
        _operator(*operands)
    except RuntimeError:
        operands.check()
        raise
