"""The cells of a grid: layers removed, a recovery in their place, and what that is worth."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ghosted_fast.errors import GhostedFastError
from ghosted_fast.fit.ghosts import fit_in_sequence
from ghosted_fast.fit.memory_budget import default_memory_budget
from ghosted_fast.grid.judging import Judge
from ghosted_fast.grid.plan import Variant
from ghosted_fast.measure.system import peak_memory, reset_peak_memory
from ghosted_fast.models.families import decoder_layers, hidden_size
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.options import GhostOptions
from ghosted_fast.recovery import RECOVERIES, Job, Patch
from ghosted_fast.recovery.patches import fit_patches, put_patches
from ghosted_fast.surgery.cut import removed_intervals
from ghosted_fast.text.batches import Batch

Removed = tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """One set of layers and one variant."""

    removed: Removed
    variant: Variant


@dataclass(frozen=True)
class Fitting:
    """How operators are fitted.

    Attributes:
        calibration: Tokens to learn from.
        options: How ghosts are fitted.
        sequential: Whether several ghosts are fitted one after the other; see `fit_in_sequence`.
        memory_budget: Bytes for statistics; None for half of the free memory.
        progress: Whether to show progress bars on stderr.
    """

    calibration: Sequence[Batch]
    options: GhostOptions
    sequential: bool
    memory_budget: int | None
    progress: bool


def run_cells(
    model: Any,
    cells: Sequence[Cell],
    texts: Fitting,
    judge: Judge,
    done: Callable[[Cell, dict[str, Any]], None],
) -> None:
    """Fit and judge cells; all that share statistics share a pass of the dense model.

    Args:
        model: The dense model.
        cells: The cells, those of one set of layers together.
        texts: What they share.
        judge: Measures their models.
        done: Called with each cell and its record, as soon as that is known. A recovery that
            cannot serve a gap gives a record with the reason under "refused".
    """
    device = next(model.parameters()).device
    budget = texts.memory_budget or default_memory_budget(device)
    for group in _groups(cells, hidden_size(model), texts.options, budget):
        reset_peak_memory(device)
        refused: dict[Job, GhostedFastError] = {}
        jobs = [job for cell in group for job in _jobs(model, cell, texts)]
        patches = fit_patches(
            model, texts.calibration, jobs, texts.options, budget, texts.progress, refused
        )
        peak_of_pass = peak_memory(device)
        for cell in group:
            reset_peak_memory(device)
            try:
                record = _run_cell(model, cell, texts, judge, patches, refused)
            except GhostedFastError as error:
                record = {"refused": str(error)}
            peaks = (peak_memory(device), peak_of_pass if _jobs(model, cell, texts) else None)
            record["peak_memory"] = max((peak for peak in peaks if peak is not None), default=None)
            done(cell, record)


def _groups(
    cells: Sequence[Cell], size: int, options: GhostOptions, budget: int
) -> list[list[Cell]]:
    """Cut the cells into groups whose statistics fit a budget together; one may exceed it."""
    groups: list[list[Cell]] = []
    jobs: set[tuple[str, Removed]] = set()
    for cell in cells:
        grown = jobs | {(cell.variant.recovery, cell.removed)}
        each = [RECOVERIES[name].num_bytes(size, options) * len(gone) for name, gone in grown]
        if groups and sum(each) <= budget:
            jobs = grown
        else:
            groups.append([])
            jobs = {(cell.variant.recovery, cell.removed)}
        groups[-1].append(cell)
    return groups


def _gaps(model: Any, cell: Cell) -> list[tuple[int, int]]:
    return removed_intervals(cell.removed, len(decoder_layers(model)))


def _in_sequence(model: Any, cell: Cell, texts: Fitting) -> bool:
    return texts.sequential and cell.variant.recovery == "ghost" and len(_gaps(model, cell)) > 1


def _jobs(model: Any, cell: Cell, texts: Fitting) -> list[Job]:
    """Return what a cell needs of a pass that it shares with others."""
    if _in_sequence(model, cell, texts):
        return []
    return [(cell.variant.recovery, gap) for gap in _gaps(model, cell)]


def _run_cell(
    model: Any,
    cell: Cell,
    texts: Fitting,
    judge: Judge,
    patches: Mapping[Job, Patch],
    refused: Mapping[Job, GhostedFastError],
) -> dict[str, Any]:
    began = time.perf_counter()
    if _in_sequence(model, cell, texts):
        chosen = _fit_in_sequence(model, _gaps(model, cell), texts)
        recover = 0.0
    else:
        jobs = _jobs(model, cell, texts)
        for job in jobs:
            if job in refused:
                raise refused[job]
        chosen = [patches[job] for job in jobs]
        # Gaps of one pass each count its forward passes.
        recover = max(patch.seconds for patch in chosen)
    smaller = put_patches(model, cell.removed, _own(chosen))
    corrections = 0
    if cell.variant.after is not None:
        corrections = cell.variant.after(smaller, model, texts.calibration)
    recover += time.perf_counter() - began
    record = judge(smaller, cell.removed[0])
    record["corrections"] = corrections
    record["seconds"]["recover"] = recover
    return record


def _own(patches: Iterable[Patch]) -> list[Patch]:
    """Return patches with ghosts of their own, which a variant may change."""
    return [replace(patch, ghost=copy.deepcopy(patch.ghost)) for patch in patches]


def _fit_in_sequence(model: Any, gaps: Sequence[tuple[int, int]], texts: Fitting) -> list[Patch]:
    parameter = next(model.parameters())
    fits = fit_in_sequence(model, texts.calibration, gaps, texts.options, texts.progress)
    return [
        Patch(fitted.to_module(parameter.dtype, parameter.device), solution=solution)
        for fitted, solution in fits
    ]


def stand_in(model: Any, removed: Removed, operators: Sequence[str]) -> Any:
    """Return a model that costs what a cell's model costs, to measure its speed.

    Its ghosts are zero: what they hold does not change the time that they take.

    Args:
        model: The dense model.
        removed: The removed layers.
        operators: As `operators_of` gives them; one for each gap, or none.
    """
    parameter = next(model.parameters())
    gaps = removed_intervals(removed, len(decoder_layers(model)))
    kinds: list[str | None] = [*operators] if operators else [None] * len(gaps)
    patches = []
    for _, kind in zip(gaps, kinds, strict=True):
        if kind is None:
            patches.append(Patch())
            continue
        eps = 1e-6 if kind == "normed" else None
        ghost = GhostLinear(
            hidden_size(model), norm_eps=eps, device=parameter.device, dtype=parameter.dtype
        )
        patches.append(Patch(ghost.requires_grad_(False)))
    return put_patches(model, removed, patches)
