"""What takes the place of removed layers: every recovery by its name.

A recovery learns one operator for each gap from the dense model's states at its two ends. Its
`Collector` is fed during one pass over text, and one pass feeds any number of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ghosted_fast.errors import ArgumentError
from ghosted_fast.options import GhostOptions
from ghosted_fast.recovery.collector import Collector, Patch, Sample
from ghosted_fast.recovery.ghost import GhostCollector
from ghosted_fast.recovery.ghost_paper import GhostPaperCollector
from ghosted_fast.recovery.least_squares import plain_bytes
from ghosted_fast.recovery.linearpatch import LinearPatchCollector
from ghosted_fast.recovery.replaceme import ReplaceMeCollector
from ghosted_fast.statistics.interval import interval_bytes

__all__ = ["RECOVERIES", "Collector", "Patch", "Recovery", "Sample"]


@dataclass(frozen=True)
class Recovery:
    """One way to make up for removed layers.

    Attributes:
        name: What it is called.
        collector: Makes the collector of a gap (model, start, stop, options); None where nothing
            is put into gaps.
        num_bytes: Bytes of a collector, from the hidden size and the options.
        published: Whether it is somebody's published method, or doing nothing.
    """

    name: str
    collector: Callable[[nn.Module, int, int, GhostOptions], Collector] | None
    num_bytes: Callable[[int, GhostOptions], int]
    published: bool = True


RECOVERIES: dict[str, Recovery] = {
    recovery.name: recovery
    for recovery in (
        Recovery("none", None, lambda size, _: 0),
        Recovery(
            "linearpatch-d",
            lambda model, start, stop, _: LinearPatchCollector(model, start, stop, rotated=False),
            lambda size, _: 8 * size,
        ),
        Recovery(
            "linearpatch-r",
            lambda model, start, stop, _: LinearPatchCollector(model, start, stop, rotated=True),
            lambda size, _: 8 * size * (size + 1),
        ),
        Recovery(
            "replaceme",
            lambda model, start, stop, _: ReplaceMeCollector(model, start, stop),
            lambda size, _: plain_bytes(size),
        ),
        Recovery(
            "ghost-paper",
            lambda model, start, stop, _: GhostPaperCollector(model, start, stop),
            lambda size, _: plain_bytes(size),
        ),
        Recovery("ghost", GhostCollector, interval_bytes, published=False),
    )
}
Job = tuple[str, tuple[int, int]]


def check_recovery(name: str) -> None:
    """Raise ArgumentError unless there is a recovery of the name."""
    if name not in RECOVERIES:
        raise ArgumentError(f"expected a recovery out of {', '.join(RECOVERIES)}, got {name!r}")
