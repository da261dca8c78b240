"""Streaming Gram update: G (lower triangle) and C, from bf16 and fp32 activations.

Gate: relative Frobenius error 1e-6 against fp64. torch's bf16 product is timed as a rival though
its error is 1000 times larger. Rivals compute all of G: torch has no product for half of it.
Flops: T d^2 for G, 2 T d^2 for C. Bytes: the activations, and the sums read and written.
"""

from __future__ import annotations

import functools

import torch
from _harness import Case, Variant, main
from torch import Tensor

from ghosted_fast.ops import gram_update
from ghosted_fast.ops.reference import gram_update_reference
from ghosted_fast.testing import relative_rms

SHAPES = [(576, 2048), (1024, 2048), (2048, 2048)]
QUICK_SHAPES = [(576, 512)]
BOUND = 1e-6


def _sums(hidden_size: int, wanted: str) -> dict[str, Tensor]:
    names = ("gram",) if wanted == "G" else ("gram", "cross")
    return {name: torch.zeros(hidden_size, hidden_size, dtype=torch.float64) for name in names}


def _products(x: Tensor, y: Tensor, wanted: str, dtype: torch.dtype, sums: list[Tensor]) -> None:
    """What a torch user writes: products in `dtype`, added to fp64 sums."""
    a = x.to(dtype)
    sums[0] += a.mT @ a
    if wanted == "G+C":
        sums[1] += a.mT @ y.to(dtype)


def _case(hidden_size: int, num_tokens: int, dtype: torch.dtype, wanted: str, form: str) -> Case:
    x, y = (torch.randn(num_tokens, hidden_size).to(dtype) for _ in range(2))
    norm_eps = 1e-6 if form == "normed" else None
    sums = _sums(hidden_size, wanted)
    rival_sums = list(_sums(hidden_size, "G+C").values())
    outputs = None if wanted == "G" else y

    def update(_: int) -> None:
        gram_update(
            x,
            outputs,
            norm_eps=norm_eps,
            delta=form == "normed",
            gram=sums["gram"],
            cross=sums.get("cross"),
        )

    def error() -> float:
        exact = _sums(hidden_size, wanted)
        for tensor in sums.values():
            tensor.zero_()
        update(0)
        gram_update_reference(
            x, outputs, None, norm_eps, form == "normed", exact["gram"], exact.get("cross"), None
        )
        return max(relative_rms(sums[name], exact[name]) for name in sums) / BOUND

    def rival(dtype: torch.dtype, _: int) -> None:
        a, b = x, y
        if norm_eps is not None:
            features = x.float()
            a = features * torch.rsqrt(features.square().mean(1, keepdim=True) + norm_eps)
            b = y.float() - x.float()
        _products(a, b, wanted, dtype, rival_sums)

    products = 1 if wanted == "G" else 3
    rivals = [("torch fp32", torch.float32), ("torch fp64", torch.float64)]
    if dtype == torch.bfloat16 and norm_eps is None:
        rivals.insert(0, ("torch bf16 (error 1e-3)", torch.bfloat16))
    return Case(
        "gram_update",
        f"{wanted} {form} d={hidden_size} T={num_tokens}",
        str(dtype).removeprefix("torch."),
        num_bytes=float(
            x.nbytes * (1 if wanted == "G" else 2) + hidden_size**2 * (8 if wanted == "G" else 24)
        ),
        flops=float(products * num_tokens * hidden_size**2),
        variants=[
            Variant("ghosted_fast", update, error, is_ours=True),
            *(Variant(name, functools.partial(rival, kind)) for name, kind in rivals),
        ],
    )


def make_cases(quick: bool) -> list[Case]:
    """Return the cases: G alone, G and C, and the normed form that calibration uses."""
    cases = []
    for hidden_size, num_tokens in QUICK_SHAPES if quick else SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            cases.append(_case(hidden_size, num_tokens, dtype, "G", "plain"))
            cases.append(_case(hidden_size, num_tokens, dtype, "G+C", "plain"))
        cases.append(_case(hidden_size, num_tokens, torch.bfloat16, "G+C", "normed"))
    return cases


if __name__ == "__main__":
    main("gram_update", __doc__ or "", make_cases)
