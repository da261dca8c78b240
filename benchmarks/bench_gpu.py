"""All operators on a CUDA device: checked, then timed against what a user of torch would call.

Gates as on the processor: the Gram's error to fp64 at most 1e-6, the ghost's at most twice that of
the torch expression plus one rounding. Rivals of the Gram: torch's products in bf16 (error 1e-3),
fp32, and fp64 as published code does it; of the ghost: `x + F.linear`, `torch.addmm`, the former
compiled, and a hook that keeps an fp32 weight. Each backend of the library that serves a shape is
timed under its name. Weights rotate past the L2 cache. Roofs: a copy of 1 GiB and torch's own
square products, in the same run. This script has never run on hardware.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from _cases import Case, Variant
from _harness import main_on_gpu
from _roofline import in_turn
from torch import Tensor
from torch.nn import functional

from ghosted_fast.errors import BackendError
from ghosted_fast.ops import ghost_apply, ghost_solve, gram_update
from ghosted_fast.ops.operands import GramOperands
from ghosted_fast.ops.reference import gram_update_reference
from ghosted_fast.testing import relative_rms

HIDDEN_SIZES = (2048, 4096)
ROWS = (1, 16, 512, 4096)
TOKENS = 8192
BF16 = torch.bfloat16
EPS = 1e-6
# More than the L2 cache of any device so far.
ROTATED_BYTES = 256 << 20
GRAM_BOUND = 1e-6


def backends_that_serve(call: Callable[[str], object], names: tuple[str, ...]) -> list[str]:
    """Return those of the named backends that run a call here."""
    served = []
    for name in names:
        try:
            call(name)
        except BackendError:
            continue
        served.append(name)
    return served


def gram_case(hidden_size: int, num_tokens: int, device: str) -> Case:
    """Return the case of G and C from bf16 activations."""
    x, y = (torch.randn(num_tokens, hidden_size, device=device).to(BF16) for _ in range(2))
    gram, cross, *rival_sums = torch.zeros(
        4, hidden_size, hidden_size, dtype=torch.float64, device=device
    )

    def update(backend: str, _: int = 0) -> None:
        gram_update(x, y, gram=gram, cross=cross, backend=backend)

    def error(backend: str) -> float:
        exact = torch.zeros(2, hidden_size, hidden_size, dtype=torch.float64, device=device)
        gram_update_reference(GramOperands(x, y, gram=exact[0], cross=exact[1]))
        gram.zero_()
        cross.zero_()
        update(backend)
        return max(relative_rms(gram, exact[0]), relative_rms(cross, exact[1])) / GRAM_BOUND

    def rival(dtype: torch.dtype, _: int) -> None:
        a, b = x.to(dtype), y.to(dtype)
        rival_sums[0] += a.mT @ a
        rival_sums[1] += a.mT @ b

    served = backends_that_serve(update, ("native", "triton"))
    variants = [
        Variant(
            f"ghosted_fast {name}",
            functools.partial(update, name),
            functools.partial(error, name),
            is_ours=True,
        )
        for name in served or ["auto"]
    ]
    for name, dtype in (("bf16", BF16), ("fp32", torch.float32), ("fp64", torch.float64)):
        variants.append(Variant(f"torch {name}", functools.partial(rival, dtype)))
    return Case(
        "gram_update",
        f"G+C d={hidden_size} T={num_tokens}",
        "bfloat16",
        num_bytes=float(x.nbytes + y.nbytes + 24 * hidden_size**2),
        flops={"bf16": 3.0 * num_tokens * hidden_size**2},
        variants=variants,
    )


def apply_case(hidden_size: int, rows: int, device: str) -> Case:
    """Return the case of the ghost on `rows` rows, with bf16 and int8 weights."""
    x = torch.randn(rows, hidden_size, device=device).to(BF16)
    base = torch.randn(hidden_size, hidden_size, device=device) / hidden_size**0.5
    weight, scale = base.to(BF16), base.abs().amax(1) / 127
    integer = (base / scale[:, None]).round().to(torch.int8)
    next_weight, next_integer = in_turn(weight, ROTATED_BYTES), in_turn(integer, ROTATED_BYTES)
    next_wide = in_turn(weight.float(), ROTATED_BYTES)
    x64 = x.double()
    exact = x64 + x64 @ weight.double().mT
    exact_int8 = x64 + x64 @ (scale.double()[:, None] * integer.double()).mT
    rounding = torch.finfo(BF16).eps / 2

    def expression(x: Tensor, weight: Tensor) -> Tensor:
        return x + functional.linear(x, weight)

    compiled = torch.compile(expression)
    allowed = 2 * relative_rms(expression(x, weight), exact) + rounding

    def plain(_: int) -> Tensor:
        return ghost_apply(x, next_weight())

    def int8(_: int) -> Tensor:
        return ghost_apply(x, next_integer(), None, scale)

    def hook(_: int) -> Tensor:
        wide = x.float()
        return (wide + functional.linear(wide, next_wide())).to(BF16)

    traffic = 2.0 * x.nbytes
    variants = [
        Variant("ghosted_fast", plain, lambda: relative_rms(plain(0), exact) / allowed, True),
        Variant(
            "ghosted_fast int8",
            int8,
            lambda: relative_rms(int8(0), exact_int8) / allowed,
            is_ours=True,
            num_bytes=traffic + integer.nbytes,
        ),
        Variant("x + F.linear", lambda _: expression(x, next_weight())),
        Variant("torch.addmm", lambda _: torch.addmm(x, x, next_weight().mT)),
        Variant("torch.compile", lambda _: compiled(x, next_weight())),
        Variant("hook, fp32 weight", hook, num_bytes=traffic + 4.0 * weight.numel()),
    ]
    return Case(
        "ghost_apply",
        f"d={hidden_size} rows={rows}",
        "bfloat16",
        num_bytes=traffic + weight.nbytes,
        flops={"bf16": 2.0 * rows * hidden_size**2},
        variants=variants,
    )


def solve_case(size: int, device: str) -> Case:
    """Return the case of the damped solve with as many right-hand sides as unknowns."""
    tokens = torch.randn(2 * size, size, dtype=torch.float64, device=device)
    gram = tokens.mT @ tokens
    cross = gram @ torch.randn(size, size, dtype=torch.float64, device=device)
    damped = gram + EPS * torch.eye(size, dtype=torch.float64, device=device)

    def error() -> float:
        solution, info = ghost_solve(gram, cross, EPS)
        return relative_rms(damped @ solution, cross) / 1e-10 if info[0] == 0 else math.inf

    return Case(
        "ghost_solve",
        f"d={size}",
        "float64",
        num_bytes=3.0 * gram.nbytes,
        flops={"fp64": (1 / 3 + 2) * size**3},
        variants=[
            Variant("ghosted_fast", lambda _: ghost_solve(gram, cross, EPS), error, True),
            Variant("torch LU", lambda _: torch.linalg.solve(damped, cross)),
        ],
    )


def make_cases(quick: bool, device: str = "cuda") -> list[Case]:
    """Return the cases of all operators."""
    sizes = HIDDEN_SIZES[:1] if quick else HIDDEN_SIZES
    cases = [gram_case(size, TOKENS, device) for size in sizes]
    cases += [apply_case(size, rows, device) for size in sizes for rows in ROWS]
    return [*cases, *(solve_case(size, device) for size in sizes)]


if __name__ == "__main__":
    main_on_gpu("gpu", __doc__ or "", make_cases)
