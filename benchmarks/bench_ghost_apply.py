"""The ghost in a running model: decoding (1 to 16 rows) and prefill (512 rows).

Gate: error against fp64 at most twice the torch expression's, plus one rounding. For decoding the
weights are rotated past the cache, as other layers' weights pass between two uses of a ghost.
Rivals: `x + F.linear` in the model's dtype, and a forward hook that keeps an fp32 weight. Bytes:
the weight once, x and y.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from _harness import Case, Variant, main
from _roofline import bytes_past_the_cache
from torch import Tensor
from torch.nn import functional

from ghosted_fast.ops import ghost_apply
from ghosted_fast.testing import relative_rms

HIDDEN_SIZES = (576, 2048)
ROWS = (1, 4, 16, 512)


def _copies(weight: Tensor, limit: int) -> list[Tensor]:
    return [
        weight.clone() for _ in range(min(limit, math.ceil(bytes_past_the_cache() / weight.nbytes)))
    ]


def _case(hidden_size: int, rows: int, dtype: torch.dtype) -> Case:
    x = torch.randn(rows, hidden_size).to(dtype)
    base = torch.randn(hidden_size, hidden_size) / hidden_size**0.5
    limit = 4 if rows > 16 else 1 << 16
    weights = _copies(base.to(dtype), limit)
    wide = _copies(base.to(dtype).float(), limit)
    scale = base.abs().amax(1) / 127
    integers = _copies((base / scale[:, None]).round().to(torch.int8), limit)
    exact = x.double() + x.double() @ weights[0].double().mT
    exact_normed = (
        x.double()
        + (x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt())
        @ weights[0].double().mT
    )
    exact_int8 = x.double() + x.double() @ (scale.double()[:, None] * integers[0].double()).mT
    rounding = torch.finfo(dtype).eps / (1 if dtype == torch.float32 else 2)

    def gate(result: Callable[[], Tensor], wanted: Tensor) -> Callable[[], float]:
        rival = x + functional.linear(x, weights[0])
        allowed = 2 * relative_rms(rival, exact) + rounding
        return lambda: relative_rms(result(), wanted) / allowed

    def weight_of(variant: int, i: int) -> Tensor:
        """One that no other variant has just brought into the cache."""
        return weights[(i + variant * len(weights) // 3) % len(weights)]

    def plain(i: int) -> Tensor:
        return ghost_apply(x, weight_of(0, i))

    def normed(i: int) -> Tensor:
        return ghost_apply(x, weight_of(1, i), norm_eps=1e-6)

    def linear(i: int) -> Tensor:
        return x + functional.linear(x, weight_of(2, i))

    def int8(i: int) -> Tensor:
        return ghost_apply(x, integers[i % len(integers)], None, scale)

    def hook(i: int) -> Tensor:
        inputs = x.float()
        return (inputs + functional.linear(inputs, wide[i % len(wide)])).to(dtype)

    name = str(dtype).removeprefix("torch.")
    return Case(
        "ghost_apply",
        f"d={hidden_size} rows={rows}",
        name,
        num_bytes=float(weights[0].nbytes + 2 * x.nbytes),
        flops=2.0 * rows * hidden_size**2,
        variants=[
            Variant("ghosted_fast", plain, gate(lambda: plain(0), exact), is_ours=True),
            Variant("ghosted_fast normed", normed, gate(lambda: normed(0), exact_normed), True),
            Variant(
                "ghosted_fast int8",
                int8,
                gate(lambda: int8(0), exact_int8),
                is_ours=True,
                num_bytes=float(integers[0].nbytes + 2 * x.nbytes),
            ),
            Variant(f"x + F.linear {name}", linear),
            Variant("hook, fp32 weight", hook, num_bytes=float(wide[0].nbytes + 2 * x.nbytes)),
        ],
    )


def make_cases(quick: bool) -> list[Case]:
    """Return the cases: two hidden sizes, decoding and prefill, bf16 and (576) fp32."""
    sizes = HIDDEN_SIZES[:1] if quick else HIDDEN_SIZES
    cases = [_case(d, rows, torch.bfloat16) for d in sizes for rows in ROWS]
    if not quick:
        cases += [_case(576, rows, torch.float32) for rows in ROWS]
    return cases


if __name__ == "__main__":
    main("ghost_apply", __doc__ or "", make_cases)
