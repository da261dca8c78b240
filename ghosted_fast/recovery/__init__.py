"""What takes the place of removed layers: every recovery by its name.

A recovery learns one operator for each gap from the dense model's states at its two ends. Its
`Collector` is fed during one pass over text, and one pass feeds any number of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.options import GhostOptions
from ghosted_fast.recovery.collector import Collector, Patch
from ghosted_fast.recovery.ghost import GhostCollector, ghost_patch
from ghosted_fast.recovery.ghost_paper import GhostPaperCollector
from ghosted_fast.recovery.least_squares import plain_bytes
from ghosted_fast.recovery.linearpatch import LinearPatchCollector
from ghosted_fast.recovery.nbl import NBLCollector
from ghosted_fast.recovery.prunecomp import PruneCompCollector
from ghosted_fast.recovery.replaceme import ReplaceMeCollector
from ghosted_fast.recovery.replaceme_cosine import ReplaceMeCosineCollector
from ghosted_fast.statistics.interval import IntervalStatistics, interval_bytes
from ghosted_fast.statistics.sample import Interval

__all__ = ["RECOVERIES", "Collector", "Job", "Patch", "Recovery", "check_recovery"]

MakeCollector = Callable[[Decoder, Interval, GhostOptions], Collector]


@dataclass(frozen=True)
class Recovery:
    """One way to make up for removed layers.

    Attributes:
        name: What it is called.
        collector: Makes the collector of a gap; None where nothing is put into gaps.
        num_bytes: Bytes of a collector, from the hidden size and the options.
        has_operator: Whether its operator stands beside the layers, where corrections can reach
            it.
        improvable: Whether `ghost_model` corrects it; others are put in as they were published.
        sequential: Whether several gaps are fitted one after the other, if the options say so.
        of_statistics: Makes its operator of statistics that a criterion has gathered; None where it
            needs a pass of its own.
        published: Whether it is somebody's published method, or doing nothing.
    """

    name: str
    collector: MakeCollector | None
    num_bytes: Callable[[int, GhostOptions], int]
    has_operator: bool = True
    improvable: bool = False
    sequential: bool = False
    of_statistics: Callable[[Decoder, IntervalStatistics, GhostOptions], Patch] | None = None
    published: bool = True


def _without_options(collector: Callable[[Decoder, Interval], Collector]) -> MakeCollector:
    return lambda decoder, gap, _: collector(decoder, gap)


RECOVERIES: dict[str, Recovery] = {
    recovery.name: recovery
    for recovery in (
        Recovery("none", None, lambda size, _: 0, has_operator=False),
        Recovery(
            "linearpatch-d",
            _without_options(partial(LinearPatchCollector, rotated=False)),
            lambda size, _: 8 * size,
        ),
        Recovery(
            "linearpatch-r",
            _without_options(partial(LinearPatchCollector, rotated=True)),
            lambda size, _: 8 * size * (size + 1),
        ),
        Recovery(
            "replaceme",
            _without_options(ReplaceMeCollector),
            lambda size, _: plain_bytes(size),
            has_operator=False,
        ),
        Recovery(
            "replaceme-cosine",
            _without_options(ReplaceMeCosineCollector),
            # The map, its gradient and Adam's two moments; all tokens' states come on top.
            lambda size, _: 4 * 4 * size * size,
            has_operator=False,
        ),
        Recovery(
            "prunecomp",
            _without_options(PruneCompCollector),
            lambda size, _: 8 * size,
            has_operator=False,
        ),
        Recovery(
            "nbl",
            _without_options(NBLCollector),
            lambda size, _: plain_bytes(size) + 16 * size,
        ),
        Recovery(
            "ghost-paper",
            _without_options(GhostPaperCollector),
            lambda size, _: plain_bytes(size),
        ),
        Recovery(
            "ghost",
            GhostCollector,
            interval_bytes,
            improvable=True,
            sequential=True,
            of_statistics=ghost_patch,
            published=False,
        ),
    )
}
Job = tuple[str, Interval]


def check_recovery(name: str) -> None:
    """Raise ArgumentError unless there is a recovery of the name."""
    if name not in RECOVERIES:
        raise ArgumentError(f"expected a recovery out of {', '.join(RECOVERIES)}, got {name!r}")
