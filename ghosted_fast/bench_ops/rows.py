"""What was measured: rows of variants, in cases, in a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ghosted_fast.timing.conditions import Conditions
from ghosted_fast.timing.estimates import Estimate, estimate_from

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """What was measured of one variant of one case.

    Attributes:
        backend: What ran it: "native", "triton", "reference" or "torch". Ours, too, is torch's
            where torch is known to be faster.
        error: Its error to fp64, in units of what is allowed.
        ms: Milliseconds of a call.
        num_bytes: Bytes that it must move at least.
        flops: Flops that it must do at least, by kind.
        roof_share: The least time that the machine allows over this one's, in the same rounds.
        roof_limit: Which limit that is.
        ratios: How many times as fast as each other variant it is.
        best_rival: The rival of the lowest time; None where there is none.
        one_thread: How many times as fast as on one thread it is; None where that was not measured.
        note: What is to be said of how it was timed; mostly nothing.
    """

    operator: str
    shape: str
    width: int
    rows: int | None
    dtype: str
    variant: str
    is_ours: bool
    backend: str
    threads: int
    error: float
    ms: Estimate
    num_bytes: float
    flops: Mapping[str, float]
    roof_share: Estimate
    roof_limit: str
    ratios: Mapping[str, Estimate]
    best_rival: str | None
    one_thread: Estimate | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells it from the other rows of a run."""
        return self.operator, self.shape, self.dtype, self.variant

    @property
    def gbps(self) -> Estimate:
        """Bytes that it must move over the time, GB/s."""
        return self.ms.inverse.times(self.num_bytes / 1e6)

    @property
    def gflops(self) -> Estimate:
        """Flops that it must do over the time, GF/s."""
        return self.ms.inverse.times(sum(self.flops.values()) / 1e6)

    @property
    def to_best_rival(self) -> Estimate | None:
        """How many times as fast as the best rival it is; None of that one itself."""
        if self.best_rival is None or self.variant == self.best_rival:
            return None
        return self.ratios[self.best_rival]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return {**asdict(self), "gbps": self.gbps.to_dict(), "gflops": self.gflops.to_dict()}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Row:
        """Return the row that JSON has kept."""
        known = {item.name for item in fields(cls)}
        found = {name: value for name, value in record.items() if name in known}
        for name in ("ms", "roof_share", "one_thread"):
            found[name] = estimate_from(found[name])
        found["ratios"] = {name: Estimate(**ratio) for name, ratio in found["ratios"].items()}
        return cls(**found)


@dataclass(frozen=True)
class Measured:
    """What was measured of one case.

    Attributes:
        rows: A row for each variant.
        roofs: What each limit gave: `MEMORY` in GB/s, multiply-adds in GF/s.
        left_out: Rivals that do not run here, with the reason.
        pairs: Pairs of rounds.
        settled: Whether the ratios became as precise as asked.
        conditions: What else the machine did.
    """

    rows: Sequence[Row]
    roofs: Mapping[str, Estimate]
    left_out: Mapping[str, str]
    pairs: int
    settled: bool
    conditions: Conditions

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**asdict(self), "rows": [row.to_dict() for row in self.rows]}


@dataclass
class Run:
    """What was measured of all cases.

    Attributes:
        machine: Processor, threads, versions, device; as `machine_facts` says.
        settings: What was asked for.
        date: When it began.
        roof_source: What measured the roofs.
        cases: The cases, as far as they were measured.
        complete: Whether all of them were.
        conditions: What else the machine did.
    """

    machine: Mapping[str, str]
    settings: Mapping[str, Any]
    date: str
    roof_source: str
    cases: list[Measured] = field(default_factory=list)
    complete: bool = False
    conditions: Conditions | None = None

    @property
    def rows(self) -> Iterator[Row]:
        """The rows of all cases."""
        return (row for case in self.cases for row in case.rows)

    @property
    def roofs(self) -> dict[str, list[float]]:
        """What each limit gave, case by case; see `Measured`."""
        found: dict[str, list[float]] = {}
        for case in self.cases:
            for kind, value in case.roofs.items():
                found.setdefault(kind, []).append(float(value))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        cases = [case.to_dict() for case in self.cases]
        return {"format": FORMAT, **asdict(self), "cases": cases}
