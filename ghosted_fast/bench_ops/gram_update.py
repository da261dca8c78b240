"""Streaming Gram update: G (lower triangle) and C, from bf16, fp16 and fp32 activations.

Gate: relative Frobenius error 1e-6 against fp64. torch's bf16 product is timed as a rival though
its error is 1000 times larger; rivals are held to what their dtype promises. They compute all of G:
torch has no product for half of it. oneDNN is the expert's way to a faster fp32 product than
torch's own `@`. Flops: T d^2 for G, 2 T d^2 for C; for each product of parts again, where numbers
are cut into parts. Bytes: the activations, and the sums read and written.

On CUDA ours is timed by calls, which wait for the check of the tokens, as calibration makes them;
in a graph it knows less of them and takes the kernels that are right for any.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ghosted_fast.bench_ops.cases import OURS, Case, Plan, Setting, Variant, flops_kind
from ghosted_fast.ops import gram_update
from ghosted_fast.ops.backends import BACKENDS, served_by
from ghosted_fast.ops.compiled import extension
from ghosted_fast.ops.operands import GramOperands
from ghosted_fast.ops.reference import gram_update_reference
from ghosted_fast.options import GhostOptions
from ghosted_fast.statistics.token_weights import token_weights
from ghosted_fast.testing import relative_rms

OPERATOR = "gram_update"
# What is summed, and whether as the default fit does: weighted, from normed rows to differences.
FORMS = (("G", False), ("C", False), ("G+C", False), ("G+C", True))
TOKENS = (2048,)
BOUND = 1e-6
TORCH_BF16 = "torch bf16 (error 1e-3)"
_NORM_EPS = 1e-6
_RIVAL_BOUNDS = {torch.bfloat16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-6}
_SUMS = {"G": ("gram",), "C": ("cross",), "G+C": ("gram", "cross")}
Sums = dict[str, Tensor]


def plans(
    width: int,
    tokens: int,
    dtype: torch.dtype,
    forms: Iterable[tuple[str, bool]] = FORMS,
    wide: bool = True,
) -> Iterator[Plan]:
    """Yield the cases of a hidden size, a number of tokens and a dtype.

    Args:
        width: The hidden size.
        tokens: Tokens of an update.
        dtype: Dtype of the activations.
        forms: As `FORMS`.
        wide: Whether fp64 is among the rivals of 16-bit rows: it is the slowest by far.
    """
    for wanted, normed in forms:
        arguments = (width, tokens, dtype, wanted, normed, wide or dtype == torch.float32)
        sums = len(_SUMS[wanted]) * 8 * width**2
        # Four pairs of sums, their products, and the activations in up to fp64.
        memory = 8 * sums + 40 * tokens * width
        yield Plan(
            OPERATOR,
            f"{wanted} {'normed' if normed else 'plain'} d={width} T={tokens}",
            width,
            tokens,
            dtype,
            make=functools.partial(_case, *arguments),
            refusal=functools.partial(_refusal, width, dtype, wanted),
            memory=lambda setting, memory=memory: memory,  # type: ignore[misc]
        )


def _zeros(width: int, wanted: str, device: torch.device) -> Sums:
    return {
        name: torch.zeros(width, width, dtype=torch.float64, device=device)
        for name in _SUMS[wanted]
    }


def _refusal(width: int, dtype: torch.dtype, wanted: str, setting: Setting) -> str:
    x = torch.empty(1, width, dtype=dtype, device=setting.device)
    sums = _zeros(width, wanted, torch.device("meta"))
    y = x if "cross" in sums else None
    operands = GramOperands(x, y, gram=sums.get("gram"), cross=sums.get("cross"))
    return BACKENDS[setting.backend].refusal(OPERATOR, operands)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a.mT @ b


def _onednn_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a.mT, b.mT, None, "none", [], "")


def _case(
    width: int,
    tokens: int,
    dtype: torch.dtype,
    wanted: str,
    normed: bool,
    wide: bool,
    setting: Setting,
) -> Case:
    device = setting.device
    x, y = (torch.randn(tokens, width, device=device).to(dtype) for _ in range(2))
    norm_eps = _NORM_EPS if normed else None
    weight = token_weights(x, y, GhostOptions(), norm_eps) if normed else None
    outputs = None if wanted == "G" else y
    sums, exact = _zeros(width, wanted, device), _zeros(width, wanted, device)
    gram, cross = exact.get("gram"), exact.get("cross")
    operands = GramOperands(x, outputs, weight, norm_eps, normed, gram, cross)
    gram_update_reference(operands)
    settings: dict[str, Any] = {"norm_eps": norm_eps, "delta": normed, "backend": setting.backend}
    settings["token_weight"] = weight

    def update() -> None:
        gram_update(x, outputs, **settings, **sums)  # type: ignore[arg-type]

    def error(run: Callable[[], object], bound: float) -> float:
        for total in sums.values():
            total.zero_()
        run()
        found = {name: total.tril() if name == "gram" else total for name, total in sums.items()}
        return max(relative_rms(found[name], exact[name]) for name in sums) / bound

    def rival(dtype: torch.dtype, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Do what a torch user writes: products in `dtype`, added to fp64 sums."""
        a, b = x, y
        if norm_eps is not None and weight is not None:
            features, root = x.float(), weight.sqrt()[:, None]
            scale = torch.rsqrt(features.square().mean(1, keepdim=True) + norm_eps)
            a, b = features * (scale * root), (y.float() - features) * root
        a = a.to(dtype)
        if "gram" in sums:
            sums["gram"] += product(a, a)
        if "cross" in sums:
            sums["cross"] += product(a, b.to(dtype))

    right = functools.partial(error, update, BOUND)
    ours = functools.partial(
        Variant,
        run=update,
        error=right,
        is_ours=True,
        backend=served_by(OPERATOR, operands, setting.backend),
    )
    variants = [ours(OURS, by_calls=True)]
    if device.type == "cuda":
        variants.append(ours(f"{OURS} in a graph"))
    for name, kind, product in _rivals(dtype, device, wide):
        run = functools.partial(rival, kind, product)
        gate = functools.partial(error, run, _RIVAL_BOUNDS[kind])
        variants.append(Variant(name, run, gate))
    inputs = x.nbytes * (1 if outputs is None else 2)
    results = sum((8 if name == "gram" else 16) * width**2 for name in sums)
    flops = _flops(width, tokens, dtype, wanted, normed, _products(dtype, normed, device))
    return Case(float(inputs + results), flops, variants)


def _rivals(
    dtype: torch.dtype, device: torch.device, wide: bool
) -> Iterator[tuple[str, torch.dtype, Callable[[Tensor, Tensor], Tensor]]]:
    if dtype == torch.bfloat16:
        yield TORCH_BF16, torch.bfloat16, _product
    yield "torch fp32", torch.float32, _product
    if device.type == "cpu":
        yield "oneDNN fp32", torch.float32, _onednn_product
    if wide:
        yield "torch fp64", torch.float64, _product


def _multiplies_in_tiles() -> bool:
    """Return whether the path in use splits fp32 numbers into three of bf16."""
    module = extension()
    return module is not None and module.cpu_path() == "amx"


def _products(dtype: torch.dtype, normed: bool, device: torch.device) -> int | None:
    """Return how many 16-bit products ours takes for one; None where nothing is cut into parts."""
    if device.type == "cuda":
        if dtype == torch.float32:
            return 6
        return {torch.bfloat16: 3, torch.float16: 5}[dtype] if normed else 1
    if dtype == torch.bfloat16 and _multiplies_in_tiles():
        return 3 if normed else 1
    return None


def _flops(
    width: int, tokens: int, dtype: torch.dtype, wanted: str, normed: bool, products: int | None
) -> dict[str, float]:
    # In the form of the fit C is multiplied in fp32: a difference of bf16 numbers is none. In tiles
    # that takes three products.
    kinds = {"gram": flops_kind(dtype), "cross": "fp32" if normed else flops_kind(dtype)}
    flops: dict[str, float] = {}
    for name in _SUMS[wanted]:
        count = (1.0 if name == "gram" else 2.0) * tokens * width**2
        kind = kinds[name] if products is None else "bf16"
        # The scales of rows of x are powers of two, which cost no parts.
        is_exact = dtype == torch.bfloat16 and name == "gram"
        parts = 1 if products is None or is_exact else products
        flops[kind] = flops.get(kind, 0.0) + count * parts
    return flops
