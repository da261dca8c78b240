"""What is measured: variants of a case, and cases that are planned but not made yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

OURS = "ghosted_fast"


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        name: What the table calls it.
        run: Computes it once; weights that come from memory in real use change from call to call.
        error: Computes it once, and returns its error to fp64 in units of what is allowed.
        is_ours: Whether it is this library's; the others are rivals.
        backend: What computes it: a backend of ours, or "torch".
        copies: After how many calls the same weight comes again.
        num_bytes: Bytes that it must move at least, where that differs from the case's.
        by_calls: Whether it is timed by calls also where a CUDA graph of them could be made, in
            which it would do something else.
    """

    name: str
    run: Callable[[], object]
    error: Callable[[], float]
    is_ours: bool = False
    backend: str = "torch"
    copies: int = 1
    num_bytes: float | None = None
    by_calls: bool = False


@dataclass(frozen=True)
class Case:
    """One shape of one operator, with all its variants.

    Attributes:
        num_bytes: Bytes that must be moved at least.
        flops: Flops that must be done at least, by kind: bf16, fp32, fp64.
        variants: The ways to compute it; the first is ours, and the others are compared with it.
    """

    num_bytes: float
    flops: Mapping[str, float]
    variants: list[Variant]


@dataclass(frozen=True)
class Setting:
    """Where and by what cases are computed.

    Attributes:
        device: Where.
        backend: What runs our operators: "auto", or one that is insisted on.
        rotated_bytes: How much memory the weights take together that pass before the same comes
            again, in cases whose weights come from memory.
        compiled: Whether torch.compile is a rival; its compiler takes a while.
    """

    device: torch.device
    backend: str = "auto"
    rotated_bytes: int = 256 << 20
    compiled: bool = True


@dataclass(frozen=True)
class Plan:
    """A case to be.

    Attributes:
        operator: Name of the operator.
        shape: What the table calls the shape.
        width: Hidden size.
        rows: Tokens in a call; None where an operator has none.
        dtype: Dtype of the activations.
        make: Makes the case.
        refusal: Returns why the backend of a setting does not serve it; empty if it does.
        memory: Returns about how many bytes the case takes.
    """

    operator: str
    shape: str
    width: int
    rows: int | None
    dtype: torch.dtype
    make: Callable[[Setting], Case]
    refusal: Callable[[Setting], str]
    memory: Callable[[Setting], int]

    @property
    def dtype_name(self) -> str:
        """The dtype as tables have it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from the other cases."""
        return self.operator, self.shape, self.dtype_name

    def __str__(self) -> str:
        return " ".join(self.key)


def flops_kind(dtype: torch.dtype) -> str:
    """Return which multiply-adds products of a dtype are held against."""
    kinds = {torch.bfloat16: "bf16", torch.float64: "fp64"}
    return kinds.get(dtype, "fp32")
