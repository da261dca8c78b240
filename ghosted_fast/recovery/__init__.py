"""What takes the place of removed layers: every recovery by its name.

A recovery learns one operator for each gap from the dense model's states at its two ends. Its
`Collector` is fed during one pass over text, and one pass feeds any number of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ghosted_fast import ranks
from ghosted_fast.batches import iterate_batches
from ghosted_fast.calibration import GhostOptions, interval_bytes
from ghosted_fast.errors import (
    ArgumentError,
    CalibrationError,
    GhostedFastError,
    SolveError,
    UnsupportedModelError,
)
from ghosted_fast.families import hidden_size
from ghosted_fast.memory import default_memory_budget
from ghosted_fast.recovery.collect import collect
from ghosted_fast.recovery.collector import Collector, Patch, Sample
from ghosted_fast.recovery.ghost import GhostCollector
from ghosted_fast.recovery.ghost_paper import GhostPaperCollector
from ghosted_fast.recovery.least_squares import plain_bytes
from ghosted_fast.recovery.linearpatch import LinearPatchCollector
from ghosted_fast.recovery.mlp import map_mlp_output
from ghosted_fast.recovery.replaceme import ReplaceMeCollector
from ghosted_fast.surgery import remove_layers, removed_intervals

__all__ = ["RECOVERIES", "Collector", "Patch", "Recovery", "Sample", "fit_patches", "put_patches"]


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


def fit_patches(
    model: nn.Module,
    batches: Iterable[Any],
    jobs: Iterable[Job],
    options: GhostOptions | None = None,
    memory_budget: int | None = None,
    progress: bool = False,
    refused: dict[Job, GhostedFastError] | None = None,
) -> dict[Job, Patch]:
    """Learn the operators of gaps, several recoveries and gaps in one pass of the dense model.

    In a process group every rank does all of it, and then takes the operators of rank 0.

    Args:
        model: The dense model.
        batches: Calibration tokens, see `iterate_batches`.
        jobs: Pairs of a recovery's name and a gap (start, stop).
        options: How ghosts are fitted (recovery "ghost").
        memory_budget: Bytes for statistics; beyond it there are several passes. Default: half of
            the free memory.
        progress: Whether to show a progress bar on stderr.
        refused: Where the errors of jobs go that cannot be served; None raises the first.

    Returns:
        The operator of each job that was not refused.

    Raises:
        ArgumentError: There is no such recovery, or it cannot serve a gap.
        CalibrationError: There is too little text, or memory for not even one gap.
        NonFiniteError: An activation is NaN or infinite.
    """
    options = options or GhostOptions()
    jobs = sorted(set(jobs), key=lambda job: (job[1], job[0]))
    for name, _ in jobs:
        check_recovery(name)
    patches = {job: Patch() for job in jobs if RECOVERIES[job[0]].collector is None}
    learned = [job for job in jobs if job not in patches]
    budget = memory_budget or default_memory_budget(next(model.parameters()).device)
    groups = _within(learned, hidden_size(model), options, budget)
    if len(groups) > 1:
        batches = list(iterate_batches(batches))
    for group in groups:
        collectors: dict[Job, Collector] = {}
        for job in group:
            with _refusing(job, refused):
                collectors[job] = _collector(model, job, options)
        if not collectors:
            continue
        seconds = collect(model, batches, list(collectors.values()), progress)
        for job, item in collectors.items():
            began = time.perf_counter()
            with _refusing(job, refused):
                patch = item.patch()
                spent = seconds + item.seconds + time.perf_counter() - began
                patches[job] = replace(patch, seconds=spent)
    return ranks.from_first(patches, next(model.parameters()).device)


def _collector(model: nn.Module, job: Job, options: GhostOptions) -> Collector:
    name, (start, stop) = job
    make = RECOVERIES[name].collector
    assert make is not None
    return make(model, start, stop, options)


@contextmanager
def _refusing(job: Job, refused: dict[Job, GhostedFastError] | None) -> Iterator[None]:
    try:
        yield
    except (ArgumentError, UnsupportedModelError, SolveError) as error:
        if refused is None:
            raise
        refused[job] = error


def _within(jobs: Sequence[Job], size: int, options: GhostOptions, budget: int) -> list[list[Job]]:
    """Cut jobs into groups whose collectors fit a budget of bytes."""
    groups: list[list[Job]] = []
    room = 0
    for job in jobs:
        each = RECOVERIES[job[0]].num_bytes(size, options)
        if each > budget:
            raise CalibrationError(
                f"expected a memory budget of at least {each} bytes (one gap of the recovery "
                f"{job[0]!r} at hidden size {size}), got {budget}: raise it"
            )
        if each > room or not groups:
            groups.append([])
            room = budget
        groups[-1].append(job)
        room -= each
    return groups


def put_patches(
    model: Any, removed: Sequence[int], patches: Sequence[Patch], inplace: bool = False
) -> Any:
    """Remove layers from a model and put an operator into each gap.

    Args:
        model: The dense model.
        removed: The layers to remove.
        patches: One for each gap, in the order of `removed_intervals`.
        inplace: Whether to cut the given model. Default: a new one that shares its weights, except
            those that an operator was folded into.

    Returns:
        The smaller model.
    """
    intervals = removed_intervals(removed, model.config.num_hidden_layers)
    smaller = remove_layers(model, removed, [patch.ghost for patch in patches], inplace=inplace)
    dropped = 0
    for (start, stop), patch in zip(intervals, patches, strict=True):
        if patch.mlp_map is not None:
            map_mlp_output(smaller, start - 1 - dropped, patch.mlp_map)
        dropped += stop - start
    return smaller
