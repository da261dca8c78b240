"""The ghost in a running model: decoding (1 to 16 rows) and prefill (512 rows).

On the processor ours has the weight as `GhostLinear` gives it, packed or as it lies, whichever is
the faster; "not packed" or "packed" has the other one.

Gate: error against fp64 at most twice the torch expression's, plus one rounding; rivals are allowed
twice of that. Up to 96 rows the weights are rotated past the cache, as other layers' weights pass
between two uses of a ghost; shapes marked "cached" have one weight that stays there. Rivals:
`x + F.linear` and `torch.addmm` in the model's dtype, the former compiled too, and a forward hook
that keeps an fp32 weight. Bytes: the weight once, x and y.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ghosted_fast.bench_ops.cases import OURS, Case, Plan, Setting, Variant, flops_kind
from ghosted_fast.bench_ops.rotation import InTurn
from ghosted_fast.ops import ghost_apply, pack_weight
from ghosted_fast.ops.backends import BACKENDS, served_by
from ghosted_fast.ops.compiled import extension
from ghosted_fast.ops.crossings import is_faster_packed
from ghosted_fast.ops.operands import GhostOperands
from ghosted_fast.ops.packing import PACKED_DTYPES
from ghosted_fast.testing import relative_rms

OPERATOR = "ghost_apply"
ROWS = (1, 16, 512)
DECODE_ROWS = 16
# Up to so many rows the reading of the weight from memory counts; beyond, products do.
MEMORY_ROWS = 96
LINEAR, HOOK = "x + F.linear", "hook, fp32 weight"
_EPS = 1e-6


def plans(width: int, rows: int, dtype: torch.dtype, cached: bool = False) -> Iterator[Plan]:
    """Yield the case of a hidden size, a number of rows and a dtype."""

    def memory(setting: Setting) -> int:
        copies = setting.rotated_bytes if _from_memory(rows, cached) else 0
        return 4 * copies + 64 * width**2 + 64 * rows * width

    yield Plan(
        OPERATOR,
        f"d={width} rows={rows}{' cached' if cached else ''}",
        width,
        rows,
        dtype,
        make=functools.partial(_case, width, rows, dtype, cached),
        refusal=functools.partial(_refusal, width, dtype),
        memory=memory,
    )


def _from_memory(rows: int, cached: bool) -> bool:
    return rows <= MEMORY_ROWS and not cached


def _may_be_packed(dtype: torch.dtype, setting: Setting) -> bool:
    """Return whether what runs here reads packed weights."""
    return (
        setting.device.type == "cpu"
        and dtype in PACKED_DTYPES
        and setting.backend in ("auto", "native")
        and extension() is not None
    )


def _refusal(width: int, dtype: torch.dtype, setting: Setting) -> str:
    x = torch.empty(1, width, dtype=dtype, device=setting.device)
    weight = torch.empty(width, width, dtype=dtype, device=setting.device)
    return BACKENDS[setting.backend].refusal(OPERATOR, GhostOperands(x, weight))


def _expression(x: Tensor, weight: Tensor) -> Tensor:
    return x + functional.linear(x, weight)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    """Return one graph for all shapes: a user's model meets prompts of any length."""
    return torch.compile(_expression, dynamic=True)


class _Inputs:
    """Rows, and weights in turn."""

    def __init__(self, width: int, rows: int, dtype: torch.dtype, cached: bool, place: Setting):
        self.x = torch.randn(rows, width, device=place.device).to(dtype)
        base = torch.randn(width, width, device=place.device) / width**0.5
        self.scale = base.abs().amax(1) / 127
        self.weight = base.to(dtype)
        self.integer = (base / self.scale[:, None]).round().to(torch.int8)
        rotated = place.rotated_bytes if _from_memory(rows, cached) else 1
        self.plain = InTurn(self.weight, rotated)
        self.wide = InTurn(self.weight.float(), rotated)
        self.small = InTurn(self.integer, rotated)
        if _may_be_packed(dtype, place):
            self.packed = InTurn(self.weight, rotated, pack_weight)

    def exact(self, weight: Tensor, norm_eps: float | None = None) -> Tensor:
        """Return what a ghost of a weight in fp64 gives."""
        x = self.x.double()
        features = x
        if norm_eps is not None:
            features = x / (x.square().mean(1, keepdim=True) + norm_eps).sqrt()
        return x + features @ weight.mT

    def allowed(self) -> float:
        """Return the error that ours may have."""
        dtype = self.x.dtype
        rounding = torch.finfo(dtype).eps / (1 if dtype == torch.float32 else 2)
        expression = _expression(self.x, self.weight)
        return 2 * relative_rms(expression, self.exact(self.weight.double())) + rounding


def _case(width: int, rows: int, dtype: torch.dtype, cached: bool, setting: Setting) -> Case:
    given = _Inputs(width, rows, dtype, cached, setting)
    x, weight = given.x, given.weight
    traffic = 2.0 * x.nbytes
    return Case(
        num_bytes=traffic + weight.nbytes,
        flops={flops_kind(dtype): 2.0 * rows * width**2},
        variants=[*_ours(given, traffic, setting), *_rivals(given, traffic, setting)],
    )


def _ours(given: _Inputs, traffic: float, setting: Setting) -> Iterator[Variant]:
    x, weight, allowed = given.x, given.weight.double(), given.allowed()
    integer = given.scale.double()[:, None] * given.integer.double()

    def variant(
        name: str,
        turn: InTurn,
        exact: Tensor,
        *,
        scale: Tensor | None = None,
        norm_eps: float | None = None,
        num_bytes: float | None = None,
    ) -> Variant:
        def run() -> Tensor:
            return ghost_apply(x, turn(), None, scale, norm_eps=norm_eps, backend=setting.backend)

        operands = GhostOperands(x, turn(), None, scale, norm_eps)
        return Variant(
            name,
            run,
            lambda: relative_rms(run(), exact) / allowed,
            is_ours=True,
            backend=served_by(OPERATOR, operands, setting.backend),
            copies=turn.count,
            num_bytes=num_bytes,
        )

    exact, best = given.exact(weight), given.plain
    others: dict[str, InTurn] = {}
    if _may_be_packed(x.dtype, setting):
        if is_faster_packed(x.dtype, *x.shape[::-1]):
            best, others[f"{OURS} not packed"] = given.packed, given.plain
        else:
            others[f"{OURS} packed"] = given.packed
    for name, turn in {OURS: best, **others}.items():
        yield variant(name, turn, exact)
    if _may_be_packed(x.dtype, setting) and is_faster_packed(x.dtype, x.shape[1], len(x), False):
        best = given.packed
    yield variant(f"{OURS} normed", best, given.exact(weight, _EPS), norm_eps=_EPS)
    num_bytes = traffic + given.integer.nbytes
    exact = given.exact(integer)
    yield variant(f"{OURS} int8", given.small, exact, scale=given.scale, num_bytes=num_bytes)


def _rivals(given: _Inputs, traffic: float, setting: Setting) -> Iterator[Variant]:
    x, plain, wide = given.x, given.plain, given.wide
    exact, allowed = given.exact(given.weight.double()), 2 * given.allowed()

    def variant(
        name: str, run: Callable[[], Tensor], turn: InTurn, num_bytes: float | None = None
    ) -> Variant:
        return Variant(
            name,
            run,
            lambda: relative_rms(run(), exact) / allowed,
            copies=turn.count,
            num_bytes=num_bytes,
        )

    def hook() -> Tensor:
        inputs = x.float()
        return (inputs + functional.linear(inputs, wide())).to(x.dtype)

    yield variant(LINEAR, lambda: _expression(x, plain()), plain)
    yield variant("torch.addmm", lambda: torch.addmm(x, x, plain().mT), plain)
    if setting.compiled:
        yield variant("torch.compile", lambda: _compiled()(x, plain()), plain)
    yield variant(HOOK, hook, wide, traffic + 4.0 * given.weight.numel())
