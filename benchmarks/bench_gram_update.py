"""Streaming Gram update: G (lower triangle) and C, from bf16, fp16 and fp32 activations.

Gate: relative Frobenius error 1e-6 against fp64. torch's bf16 product is timed as a rival though
its error is 1000 times larger. Rivals compute all of G: torch has no product for half of it. oneDNN
is the expert's way to a faster fp32 product than torch's own `@`. Flops: T d^2 for G, 2 T d^2 for
C. Bytes: the activations, and the sums read and written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from _cases import Case, Goal, Variant
from _harness import main
from torch import Tensor

from ghosted_fast.ops import gram_update
from ghosted_fast.ops.operands import GramOperands
from ghosted_fast.ops.reference import gram_update_reference
from ghosted_fast.testing import relative_rms

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(576, 2048), (2048, 2048), (4096, 2048)]
QUICK_SHAPES = [(576, 512)]
BOUND = 1e-6
TORCH_BF16 = "torch bf16 (error 1e-3)"
THREADS = Goal("one thread", 1.8, 2.0)
GOALS: dict[tuple[str, str, torch.dtype], tuple[Goal, ...]] = {
    ("G", "plain", BF16): (
        Goal(TORCH_BF16, 1.9, 2.2),
        Goal("torch fp32", 7.5, 8.5),
        Goal("torch fp64", 15, 18),
        THREADS,
    ),
    ("C", "plain", BF16): (Goal(TORCH_BF16, 0.95, 1.08), THREADS),
    ("G+C", "plain", BF16): (Goal("torch fp64", 10, 12), THREADS),
    ("G", "plain", FP32): (Goal("torch fp32", 3.7, 4.2), Goal("oneDNN fp32", 1.8, 2.0), THREADS),
}


def _sums(hidden_size: int, wanted: str) -> dict[str, Tensor]:
    names = {"G": ["gram"], "C": ["cross"], "G+C": ["gram", "cross"]}[wanted]
    return {name: torch.zeros(hidden_size, hidden_size, dtype=torch.float64) for name in names}


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a.mT @ b


def _onednn_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a.mT, b.mT, None, "none", [], "")


def _add_products(
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    sums: dict[str, Tensor],
    product: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """What a torch user writes: products in `dtype`, added to fp64 sums."""
    a = x.to(dtype)
    if "gram" in sums:
        sums["gram"] += product(a, a)
    if "cross" in sums:
        sums["cross"] += product(a, y.to(dtype))


def _case(hidden_size: int, num_tokens: int, dtype: torch.dtype, wanted: str, form: str) -> Case:
    x, y = (torch.randn(num_tokens, hidden_size).to(dtype) for _ in range(2))
    normed = form == "normed"
    norm_eps = 1e-6 if normed else None
    sums, rival_sums = _sums(hidden_size, wanted), _sums(hidden_size, wanted)
    outputs = None if wanted == "G" else y
    settings = {"norm_eps": norm_eps, "delta": normed}

    def update(_: int) -> None:
        gram_update(x, outputs, **settings, **sums)  # type: ignore[arg-type]

    def error() -> float:
        exact = _sums(hidden_size, wanted)
        for tensor in sums.values():
            tensor.zero_()
        update(0)
        gram, cross = exact.get("gram"), exact.get("cross")
        operands = GramOperands(x, outputs, None, norm_eps, normed, gram, cross)
        gram_update_reference(operands)
        return max(relative_rms(sums[name], exact[name]) for name in sums) / BOUND

    def rival(dtype: torch.dtype, product: Callable[[Tensor, Tensor], Tensor], _: int) -> None:
        a, b = x, y
        if norm_eps is not None:
            features = x.float()
            a = features * torch.rsqrt(features.square().mean(1, keepdim=True) + norm_eps)
            b = y.float() - x.float()
        _add_products(a, b, dtype, rival_sums, product)

    rivals = [
        ("torch fp32", FP32, _product),
        ("oneDNN fp32", FP32, _onednn_product),
        ("torch fp64", torch.float64, _product),
    ]
    if dtype == BF16 and not normed:
        rivals.insert(0, (TORCH_BF16, BF16, _product))
    # The normed form multiplies C in fp32: y times a row's weight is no bf16 number.
    kinds = {"gram": "bf16" if dtype == BF16 else "fp32"}
    kinds["cross"] = "bf16" if dtype == BF16 and not normed else "fp32"
    flops: dict[str, float] = {}
    for name in sums:
        count = (1.0 if name == "gram" else 2.0) * num_tokens * hidden_size**2
        flops[kinds[name]] = flops.get(kinds[name], 0.0) + count
    inputs = x.nbytes * (1 if outputs is None else 2)
    results = sum((8 if name == "gram" else 16) * hidden_size**2 for name in sums)
    ours = Variant(
        "ghosted_fast", update, error, is_ours=True, goals=GOALS.get((wanted, form, dtype), ())
    )
    return Case(
        "gram_update",
        f"{wanted} {form} d={hidden_size} T={num_tokens}",
        str(dtype).removeprefix("torch."),
        num_bytes=float(inputs + results),
        flops=flops,
        variants=[
            ours,
            *(
                Variant(name, functools.partial(rival, kind, product))
                for name, kind, product in rivals
            ),
        ],
    )


def make_cases(quick: bool) -> list[Case]:
    """Return the cases: G, C and both, and the normed form that calibration uses."""
    cases = []
    for hidden_size, num_tokens in QUICK_SHAPES if quick else SHAPES:
        for wanted, form, dtype in (
            ("G", "plain", BF16),
            ("C", "plain", BF16),
            ("G+C", "plain", BF16),
            ("G+C", "normed", BF16),
            ("G", "plain", FP32),
            ("G", "plain", FP16),
        ):
            if hidden_size < 4096 or dtype == BF16:
                cases.append(_case(hidden_size, num_tokens, dtype, wanted, form))
    return cases


if __name__ == "__main__":
    main("gram_update", __doc__ or "", make_cases)
