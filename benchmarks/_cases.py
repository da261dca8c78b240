"""What is measured: variants of cases, what they should reach, and the rows that come of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


class GateError(RuntimeError):
    """A result is wrong; nothing may be reported."""


@dataclass(frozen=True)
class Goal:
    """What a variant should reach.

    Attributes:
        against: Name of the variant that it is compared with; "best rival"; "roof" for a share of
            the roof; "one thread" for its own time on one thread.
        floor: The ratio that it must reach.
        stretch: The ratio that would be excellent.
    """

    against: str
    floor: float
    stretch: float


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        name: What the table calls it.
        run: Computes it once; the i-th call gets i, to rotate inputs.
        error: Returns the error of its result, in units of what is allowed; None: not gated (a
            rival that promises less).
        is_ours: Whether it is this library's; the others are rivals.
        num_bytes: Bytes that it must move at least, where that differs from the case's.
        flops: Flops that it must do at least, by kind, where that differs from the case's.
        goals: What it should reach.
    """

    name: str
    run: Callable[[int], object]
    error: Callable[[], float] | None = None
    is_ours: bool = False
    num_bytes: float | None = None
    flops: Mapping[str, float] | None = None
    goals: tuple[Goal, ...] = ()


@dataclass(frozen=True)
class Case:
    """One shape of one operator, with all its variants.

    Attributes:
        operator: Name of the operator.
        shape: What the table calls the shape.
        dtype: Dtype of the activations.
        num_bytes: Bytes that must be moved at least.
        flops: Flops that must be done at least, by kind: bf16, fp32, fp64.
        variants: The ways to compute it.
    """

    operator: str
    shape: str
    dtype: str
    num_bytes: float
    flops: Mapping[str, float]
    variants: list[Variant] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """What was measured of one variant of one case. Times in milliseconds.

    Attributes:
        ratios: Time of each rival over this one's; with more threads, under "one thread" the time
            on one thread over this one's.
        roof_share: The least time that the machine allows over this one's.
        roof_gbps: What memory gave before or after the case, GB/s.
    """

    operator: str
    shape: str
    dtype: str
    backend: str
    is_ours: bool
    threads: int
    ms: float
    ms_p20: float
    ms_p80: float
    num_bytes: float
    flops: dict[str, float]
    gbps: float
    gflops: float
    roof_share: float
    roof_gbps: float
    ratio_to_best_rival: float
    ratios: dict[str, float]
    goals: tuple[Goal, ...]
