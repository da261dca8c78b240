"""Which layers to remove: every criterion by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ghosted_fast.errors import ArgumentError
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.selection.criteria.angular import by_angular
from ghosted_fast.selection.criteria.ghost import by_ghost
from ghosted_fast.selection.criteria.lorp import by_lorp, check_lorp
from ghosted_fast.selection.criteria.prunecomp import by_prunecomp, check_prunecomp
from ghosted_fast.selection.criteria.request import Request, Selection, candidate_intervals
from ghosted_fast.selection.criteria.search import by_ghost_search
from ghosted_fast.selection.criteria.shortgpt import by_shortgpt
from ghosted_fast.selection.criteria.sleb import by_sleb
from ghosted_fast.selection.criteria.streamline import by_streamline
from ghosted_fast.selection.criteria.taylor import by_taylor


def _one(remove: int, num_layers: int) -> int:
    return 1


def _one_per_layer(remove: int, num_layers: int) -> int:
    return remove


def _one_per_interval(remove: int, num_layers: int) -> int:
    return len(candidate_intervals(remove, num_layers))


def _one_per_interval_of_each_length(remove: int, num_layers: int) -> int:
    return sum(_one_per_interval(length, num_layers) for length in range(1, remove + 1))


def _any(decoder: Decoder, remove: int) -> None:
    """Take any model and number."""


@dataclass(frozen=True)
class Criterion:
    """One way to choose layers.

    Attributes:
        name: What it is called.
        choose: Chooses them.
        num_statistics: How many intervals' statistics are held at once, by the number of layers to
            remove and of those that the model has: those of the candidates, or of the gaps that the
            chosen layers may leave.
        published: Whether it is somebody's published method.
        keeps: How many layers it leaves at least.
        check: Raises unless it can choose so many layers of a model.
    """

    name: str
    choose: Callable[[Request], Selection]
    num_statistics: Callable[[int, int], int]
    published: bool = True
    keeps: int = 1
    check: Callable[[Decoder, int], None] = _any


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("ghost", by_ghost, _one_per_interval, published=False),
        Criterion(
            "ghost-search", by_ghost_search, _one_per_interval_of_each_length, published=False
        ),
        Criterion("streamline", by_streamline, _one),
        Criterion("shortgpt", by_shortgpt, _one_per_layer),
        Criterion("sleb", by_sleb, _one_per_layer),
        Criterion("taylor", by_taylor, _one_per_layer),
        Criterion("angular", by_angular, _one),
        Criterion("lorp", by_lorp, _one_per_layer, keeps=2, check=check_lorp),
        Criterion("prunecomp", by_prunecomp, _one_per_layer, check=check_prunecomp),
    )
}


def check_criterion(name: str) -> None:
    """Raise ArgumentError unless there is a criterion of the name."""
    if name not in CRITERIA:
        raise ArgumentError(f"expected a criterion out of {', '.join(CRITERIA)}, got {name!r}")
