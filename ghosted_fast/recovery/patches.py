"""From text to operators: fit the patches of gaps, and put them into a model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from ghosted_fast import distributed
from ghosted_fast.errors import (
    ArgumentError,
    CalibrationError,
    GhostedFastError,
    SolveError,
    UnsupportedModelError,
)
from ghosted_fast.fit.below import Below
from ghosted_fast.fit.memory_budget import default_memory_budget, groups_within
from ghosted_fast.fit.walk import walk
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.families import num_layers
from ghosted_fast.models.gap import Gap
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.recovery import RECOVERIES, Job, check_recovery
from ghosted_fast.recovery.collector import Collector, Patch
from ghosted_fast.recovery.mlp import map_mlp_output
from ghosted_fast.statistics.interval import IntervalStatistics
from ghosted_fast.statistics.sample import Interval
from ghosted_fast.surgery.cut import remove_layers, removed_intervals
from ghosted_fast.surgery.scaling import divide_branches
from ghosted_fast.text.calibration_text import CalibrationText


def fit_gaps(
    model: Any,
    batches: Iterable[Any],
    recovery: str,
    gaps: Sequence[Interval],
    *,
    options: GhostOptions | None = None,
    run: RunOptions | None = None,
    known: IntervalStatistics | None = None,
) -> list[Patch]:
    """Learn what one recovery puts into the gaps of one model.

    Args:
        model: The dense model.
        batches: Calibration tokens, see `iterate_batches`.
        recovery: One of `RECOVERIES`.
        gaps: The removed layers (start, stop), ascending, at least one layer apart.
        options: How ghosts are fitted.
        run: Memory for statistics, and whether to show progress.
        known: Statistics of the only gap, where a criterion has them; they are used up.

    Returns:
        The operators, in the order of the gaps.

    Raises:
        ArgumentError: There is no such recovery, or it cannot serve a gap.
        CalibrationError: There is too little text, or memory for not even one gap.
        NonFiniteError: An activation is NaN or infinite.
    """
    options, run = options or GhostOptions(), run or RunOptions()
    check_recovery(recovery)
    decoder, method = Decoder.of(model), RECOVERIES[recovery]
    if known is not None and method.of_statistics is not None:
        began = time.perf_counter()
        work = partial(method.of_statistics, decoder, known, options)
        patch = distributed.on_first(work, decoder.device)
        spent = time.perf_counter() - began
        return [replace(patch, seconds=spent, solve_seconds=spent)]
    if not (method.sequential and options.sequential and len(gaps) > 1):
        jobs = [(recovery, gap) for gap in gaps]
        found = fit_patches(decoder, batches, jobs, options, run.memory_budget, run.progress)
        return [found[job] for job in jobs]
    text = CalibrationText.of(batches)
    text.hold()
    patches: list[Patch] = []
    below = Below(decoder, len(gaps))
    for gap in gaps:
        job = (recovery, gap)
        found = fit_patches(
            decoder, text, [job], options, run.memory_budget, run.progress, below=below
        )
        patches.append(found[job])
        below.fill(Gap(*gap, found[job].ghost))
    return patches


def fit_patches(
    model: Any,
    batches: Iterable[Any],
    jobs: Iterable[Job],
    options: GhostOptions | None = None,
    memory_budget: int | None = None,
    progress: bool = False,
    refused: dict[Job, GhostedFastError] | None = None,
    below: Below | None = None,
) -> dict[Job, Patch]:
    """Learn the operators of gaps, several recoveries and gaps in one pass of the dense model.

    In a process group the ranks share the text and the solves.

    Args:
        model: The dense model.
        batches: Calibration tokens, see `iterate_batches`.
        jobs: Pairs of a recovery's name and a gap (start, stop).
        options: How ghosts are fitted (recovery "ghost").
        memory_budget: Bytes for statistics; beyond it there are several passes. Default: half of
            the free memory.
        progress: Whether to show a progress bar on stderr.
        refused: Where the errors of jobs go that cannot be served; None raises the first.
        below: Gaps below the gap, of which there is one then; see `walk`.

    Returns:
        The operator of each job that was not refused.

    Raises:
        ArgumentError: There is no such recovery, or it cannot serve a gap.
        CalibrationError: There is too little text, or memory for not even one gap.
        NonFiniteError: An activation is NaN or infinite.
    """
    options = options or GhostOptions()
    decoder = Decoder.of(model)
    jobs = sorted(set(jobs), key=lambda job: (job[1], job[0]))
    for name, _ in jobs:
        check_recovery(name)
    patches = {job: Patch() for job in jobs if RECOVERIES[job[0]].collector is None}
    learned = [job for job in jobs if job not in patches]
    budget = memory_budget or default_memory_budget(decoder.device)
    groups = _within(learned, decoder.hidden_size, options, budget)
    text = CalibrationText.of(batches)
    if len(groups) > 1:
        text.hold()
    for group in groups:
        collectors: dict[Job, Collector] = {}
        for job in group:
            with _refusing(job, refused):
                collectors[job] = _collector(decoder, job, options)
        if not collectors:
            continue
        seconds = walk(decoder, text, list(collectors.values()), below=below, progress=progress)
        solved = distributed.one_item_per_rank(list(collectors.values()), solve, decoder.device)
        for (job, item), found in zip(collectors.items(), solved, strict=True):
            with _refusing(job, refused):
                if isinstance(found, GhostedFastError):
                    raise found
                spent = seconds + item.seconds + found.solve_seconds
                patches[job] = replace(found, seconds=spent)
    return patches


def _collector(decoder: Decoder, job: Job, options: GhostOptions) -> Collector:
    name, gap = job
    make = RECOVERIES[name].collector
    assert make is not None
    collector = make(decoder, gap, options)
    if collector.needs_mlp_output:
        decoder.mlp_output(gap[0] - 1)  # refused before the pass
    return collector


def solve(collector: Collector) -> Patch | GhostedFastError:
    """Return a collector's operator, or why there is none."""
    began = time.perf_counter()
    try:
        patch = collector.patch()
    except SolveError as error:
        return error
    return replace(patch, solve_seconds=time.perf_counter() - began)


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

    def num_bytes(job: Job) -> int:
        return RECOVERIES[job[0]].num_bytes(size, options)

    for job in jobs:
        if num_bytes(job) > budget:
            raise CalibrationError(
                f"expected a memory budget of at least {num_bytes(job)} bytes (one gap of the "
                f"recovery {job[0]!r} at hidden size {size}), got {budget}: raise it"
            )
    return groups_within(jobs, lambda job: [job], num_bytes, budget)


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
    layers = num_layers(model)
    intervals = removed_intervals(removed, layers)
    smaller = remove_layers(model, removed, [patch.ghost for patch in patches], inplace=inplace)
    dropped = 0
    divisors = [1.0] * layers
    for (start, stop), patch in zip(intervals, patches, strict=True):
        if patch.mlp_map is not None:
            map_mlp_output(smaller, start - 1 - dropped, patch.mlp_map)
        dropped += stop - start
        if patch.scale is not None:
            divisors[stop:] = [divisor * patch.scale for divisor in divisors[stop:]]
    if any(patch.scale is not None for patch in patches):
        gone = {layer for start, stop in intervals for layer in range(start, stop)}
        divide_branches(smaller, [divisors[layer] for layer in range(layers) if layer not in gone])
    return smaller
