"""The ghost in a running model: decoding (1 to 16 rows) and prefill (512 rows).

Ours has the packed weight that `GhostLinear` keeps; "not packed" has the weight as it lies, as in a
direct call of the operator.

Gate: error against fp64 at most twice the torch expression's, plus one rounding. For decoding the
weights are rotated past the cache, as other layers' weights pass between two uses of a ghost; the
shapes marked "cached" are also measured with one weight that stays there. Rivals: `x + F.linear`
and `torch.addmm` in the model's dtype, the former compiled too, and a forward hook that keeps an
fp32 weight. Bytes: the weight once, x and y.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _cases import Case, Goal, Variant
from _harness import main
from _roofline import bytes_past_the_cache, in_turn
from torch import Tensor
from torch.nn import functional

from ghosted_fast.ops import ghost_apply, pack_weight
from ghosted_fast.testing import relative_rms

HIDDEN_SIZES = (576, 2048, 4096)
ROWS = (1, 4, 16, 512)
BF16, FP32 = torch.bfloat16, torch.float32
EPS = 1e-6
LINEAR, HOOK = "x + F.linear", "hook, fp32 weight"
ROOF = Goal("roof", 0.85, 0.95)
FROM_MEMORY = {1: (2.2, 2.5), 4: (1.9, 2.2), 16: (1.5, 2.0)}


def _goals(hidden_size: int, rows: int, dtype: torch.dtype, cached: bool) -> tuple[Goal, ...]:
    if dtype != BF16:
        return ()
    if rows > 16:
        return (Goal("best rival", 1.0, 1.1), Goal("one thread", 1.8, 2.0))
    if cached:
        return (Goal(LINEAR, 4.0, 6.0), Goal(HOOK, 2.7, 4.0)) if rows == 1 else ()
    if hidden_size < 2048:
        return ()
    return (Goal("best rival", *FROM_MEMORY[rows]), *((ROOF,) if rows == 1 else ()))


def _expression(x: Tensor, weight: Tensor) -> Tensor:
    return x + functional.linear(x, weight)


# One graph for all shapes: a user's model meets prompts of any length.
_compiled = torch.compile(_expression, dynamic=True)


def _case(hidden_size: int, rows: int, dtype: torch.dtype, cached: bool = False) -> Case:
    x = torch.randn(rows, hidden_size).to(dtype)
    base = torch.randn(hidden_size, hidden_size) / hidden_size**0.5
    # Prefill finds its weights in memory or not, that makes no difference to it.
    rotated = bytes_past_the_cache() if rows <= 16 and not cached else 1
    scale = base.abs().amax(1) / 127
    weight, integer = base.to(dtype), (base / scale[:, None]).round().to(torch.int8)
    next_weight, next_wide = in_turn(weight, rotated), in_turn(weight.float(), rotated)
    next_integer, next_packed = in_turn(integer, rotated), in_turn(weight, rotated, pack_weight)
    x64, w64 = x.double(), weight.double()
    exact = x64 + x64 @ w64.mT
    exact_normed = x64 + x64 / (x64.square().mean(1, keepdim=True) + EPS).sqrt() @ w64.mT
    exact_int8 = x64 + x64 @ (scale.double()[:, None] * integer.double()).mT
    rounding = torch.finfo(dtype).eps / (1 if dtype == FP32 else 2)

    def gate(result: Callable[[], Tensor], wanted: Tensor) -> Callable[[], float]:
        allowed = 2 * relative_rms(_expression(x, weight), exact) + rounding
        return lambda: relative_rms(result(), wanted) / allowed

    def packed(_: int) -> Tensor:
        return ghost_apply(x, next_packed())

    def plain(_: int) -> Tensor:
        return ghost_apply(x, next_weight())

    def normed(_: int) -> Tensor:
        return ghost_apply(x, next_packed(), norm_eps=EPS)

    def int8(_: int) -> Tensor:
        return ghost_apply(x, next_integer(), None, scale)

    def hook(_: int) -> Tensor:
        inputs = x.float()
        return (inputs + functional.linear(inputs, next_wide())).to(dtype)

    goals = _goals(hidden_size, rows, dtype, cached)
    int8_goals = (Goal("ghosted_fast", 1.4, 1.7),) if rows == 1 and hidden_size >= 2048 else ()
    int8_bytes = float(integer.nbytes + 2 * x.nbytes)
    variants = [
        Variant("ghosted_fast", packed, gate(lambda: packed(0), exact), True, goals=goals),
        Variant("ghosted_fast not packed", plain, gate(lambda: plain(0), exact), True),
        Variant("ghosted_fast normed", normed, gate(lambda: normed(0), exact_normed), True),
        Variant(
            "ghosted_fast int8",
            int8,
            gate(lambda: int8(0), exact_int8),
            is_ours=True,
            num_bytes=int8_bytes,
            goals=int8_goals,
        ),
        Variant(LINEAR, lambda _: _expression(x, next_weight())),
        Variant("torch.addmm", lambda _: torch.addmm(x, x, next_weight().mT)),
        Variant("torch.compile", lambda _: _compiled(x, next_weight())),
        Variant(HOOK, hook, num_bytes=float(4 * weight.numel() + 2 * x.nbytes)),
    ]
    return Case(
        "ghost_apply",
        f"d={hidden_size} rows={rows}{' cached' if cached else ''}",
        str(dtype).removeprefix("torch."),
        num_bytes=float(weight.nbytes + 2 * x.nbytes),
        flops={"bf16" if dtype == BF16 else "fp32": 2.0 * rows * hidden_size**2},
        variants=variants,
    )


def make_cases(quick: bool) -> list[Case]:
    """Return the cases: decoding and prefill, bf16, and at the smallest size fp32 and cached."""
    sizes = HIDDEN_SIZES[:1] if quick else HIDDEN_SIZES
    cases = [_case(size, rows, BF16) for size in sizes for rows in ROWS]
    if not quick:
        smallest = HIDDEN_SIZES[0]
        cases += [_case(smallest, 1, BF16, cached=True)]
        cases += [_case(smallest, rows, FP32) for rows in ROWS]
    return cases


if __name__ == "__main__":
    main("ghost_apply", __doc__ or "", make_cases)
