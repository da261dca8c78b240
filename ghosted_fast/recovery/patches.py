"""From text to operators: fit the patches of gaps, and put them into a model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from ghosted_fast import distributed
from ghosted_fast.errors import (
    ArgumentError,
    CalibrationError,
    GhostedFastError,
    SolveError,
    UnsupportedModelError,
)
from ghosted_fast.fit.memory_budget import default_memory_budget
from ghosted_fast.models.families import hidden_size
from ghosted_fast.options import GhostOptions
from ghosted_fast.recovery import RECOVERIES, Job, check_recovery
from ghosted_fast.recovery.collect import collect
from ghosted_fast.recovery.collector import Collector, Patch
from ghosted_fast.recovery.mlp import map_mlp_output
from ghosted_fast.surgery.cut import remove_layers, removed_intervals
from ghosted_fast.text.batches import iterate_batches


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
    return distributed.from_first(patches, next(model.parameters()).device)


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
