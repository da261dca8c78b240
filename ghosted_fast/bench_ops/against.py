"""A run compared with an earlier one of the same machine, to guard one's own builds.

Times are compared as shares of the roof, which was timed in the same rounds: where the machine as a
whole is slower, so is its roof. Where the roofs were measured in other ways, times are compared as
they are. Two rows differ where their intervals do not overlap and the change is more than the
precision that either run was asked for: what lies below it is not told from noise. Of many rows
one or the other still does so by chance, or by where its memory happens to lie; so a case with a
loss is to be made and measured once more, and what both times show is a loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ghosted_fast.bench_ops.cases import Plan
from ghosted_fast.bench_ops.report import figure_text
from ghosted_fast.bench_ops.rows import FORMAT, Row, Run
from ghosted_fast.errors import ArgumentError
from ghosted_fast.timing.estimates import Estimate

# From which loss on, as a logarithm, it is said that smaller ones are not seen.
_BLIND = 0.1
_SAME = ("processor", "accelerator", "device", "threads", "torch")
Verdict = Literal["loss", "gain", "no change seen"]


@dataclass(frozen=True)
class Earlier:
    """An earlier run.

    Attributes:
        path: Its file.
        machine: What it was measured on.
        roof_source: What measured its roofs.
        precision: What it was asked for.
        rows: Its rows by what tells them apart.
    """

    path: Path
    machine: Mapping[str, str]
    roof_source: str
    precision: float
    rows: Mapping[tuple[str, str, str, str], Row]

    def check(self, machine: Mapping[str, str], plans: Iterable[Plan]) -> None:
        """Raise, before any work, unless this machine is that one and a case is of both.

        Args:
            machine: This machine, with the keys of a run's.
            plans: The cases that are to be measured.

        Raises:
            ArgumentError: Another machine, or no case in common; says what differs.
        """
        differs = [
            f"{name} {self.machine.get(name, 'none')} there and {machine.get(name, 'none')} here"
            for name in _SAME
            if self.machine.get(name) != machine.get(name)
        ]
        if differs:
            raise ArgumentError(
                f"{self.path}: expected results of this machine, got {', '.join(differs)}: measure "
                "the earlier build here too"
            )
        known = {key[:3] for key in self.rows}
        asked = {plan.key for plan in plans}
        if not known & asked:
            raise ArgumentError(
                f"{self.path}: expected one of its cases among those asked for, got none: it has "
                f"{', '.join(' '.join(case) for case in sorted(known)[:4])}, ..."
            )


@dataclass(frozen=True)
class Change:
    """One row, then and now.

    Attributes:
        of: What is compared: "share of the roof", or "speed", in calls per second.
        before: It then.
        now: It now; higher is faster, as then.
        verdict: What that says.
    """

    operator: str
    shape: str
    dtype: str
    variant: str
    is_ours: bool
    of: str
    before: Estimate
    now: Estimate
    verdict: Verdict

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells it from the others."""
        return self.operator, self.shape, self.dtype, self.variant

    @property
    def is_loss(self) -> bool:
        """Whether one of ours became slower."""
        return self.is_ours and self.verdict == "loss"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


def read_earlier(path: Path) -> Earlier:
    """Return an earlier run.

    Raises:
        ArgumentError: The file is absent, or none that this benchmark wrote.
    """
    expected = f"{path}: expected a file that bench-ops wrote as JSON"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{expected}, got {type(error).__name__}: {error}") from error
    if not isinstance(found, dict) or "cases" not in found:
        raise ArgumentError(f"{expected}, got other JSON")
    if found.get("format") != FORMAT:
        raise ArgumentError(
            f"{expected} in format {FORMAT}, got format {found.get('format')}: measure that build "
            "with this version"
        )
    try:
        rows = [Row.of(record) for case in found["cases"] for record in case["rows"]]
        return Earlier(
            path,
            found["machine"],
            found["roof_source"],
            float(found["settings"]["precision"]),
            {row.key: row for row in rows},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError(f"{expected}, got an incomplete one: {error!r} is missing") from error


def changes(earlier: Earlier, run: Run) -> list[Change]:
    """Return how each row that both runs have has changed, in the order of the later run."""
    same_roofs = earlier.roof_source == run.roof_source
    precision = max(earlier.precision, float(run.settings["precision"]))
    found = []
    for row in run.rows:
        before = earlier.rows.get(row.key)
        if before is None:
            continue
        by_roof = same_roofs and before.roof_limit == row.roof_limit
        old, new = (
            item.roof_share if by_roof else item.ms.inverse.times(1e3) for item in (before, row)
        )
        found.append(
            Change(
                *row.key,
                is_ours=row.is_ours,
                of="share of the roof" if by_roof else "speed",
                before=old,
                now=new,
                verdict=_verdict(old, new, precision),
            )
        )
    return found


def suspects(found: Iterable[Change]) -> set[tuple[str, str, str]]:
    """Return the cases that hold a loss of ours: operator, shape and dtype."""
    return {(item.operator, item.shape, item.dtype) for item in found if item.is_loss}


def confirmed(found: Iterable[Change], again: Iterable[Change]) -> list[Change]:
    """Return the changes, with the second measurement of a loss in its place if that has none.

    Args:
        found: The changes.
        again: Those of the cases that were measured once more.
    """
    second = {item.key: item for item in again}
    return [
        second[item.key]
        if item.verdict == "loss" and item.key in second and second[item.key].verdict != "loss"
        else item
        for item in found
    ]


def _verdict(before: Estimate, now: Estimate, precision: float) -> Verdict:
    if now.high < before.low and now.value < before.value * (1.0 - precision):
        return "loss"
    if now.low > before.high and now.value > before.value * (1.0 + precision):
        return "gain"
    return "no change seen"


def change_table(found: Sequence[Change]) -> tuple[list[str], list[list[str]]]:
    """Return the table of changes: its headings, and its cells as text."""
    columns = ["operator", "shape", "dtype", "variant", "of", "before", "now", "change", ""]
    lines = []
    for item in found:
        scale = 100.0 if item.of == "share of the roof" else 1.0
        lines.append(
            [
                item.operator,
                item.shape,
                item.dtype,
                item.variant,
                "% of roof" if scale > 1 else "calls/s",
                figure_text(item.before.times(scale)),
                figure_text(item.now.times(scale)),
                f"{item.now.value / item.before.value - 1.0:+.1%}",
                item.verdict if item.is_ours else f"{item.verdict} (rival)",
            ]
        )
    return columns, lines


def change_lines(found: Sequence[Change]) -> list[str]:
    """Return what the changes come to: how many losses there are, and which would not be seen."""
    ours = [item for item in found if item.is_ours]
    lost = sum(item.is_loss for item in ours)
    lines = [f"{lost} of {len(ours)} rows of ours lost speed beyond noise"]
    if ours:
        # Two intervals just do not overlap at a distance of half of each.
        blind = median(item.before.half_width + item.now.half_width for item in ours)
        if blind > _BLIND:
            lines.append(
                f"in half of the rows a loss below {1.0 - math.exp(-blind):.0%} could not be seen: "
                "measure both builds on a quieter machine, or with more --seconds"
            )
    return lines
