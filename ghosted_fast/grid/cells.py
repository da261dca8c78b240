"""The cells of a grid: layers removed, a recovery in their place, and what that is worth."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ghosted_fast.errors import GhostedFastError
from ghosted_fast.fit.memory_budget import default_memory_budget, groups_within
from ghosted_fast.grid.judge import Judge
from ghosted_fast.grid.plan import After, Variant
from ghosted_fast.measure.system import peak_memory, reset_peak_memory
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.ghost_linear import GhostLinear
from ghosted_fast.options import GhostOptions, RunOptions
from ghosted_fast.recovery import RECOVERIES, Job, Patch
from ghosted_fast.recovery.patches import fit_gaps, fit_patches, put_patches
from ghosted_fast.statistics.sample import Interval
from ghosted_fast.surgery.cut import removed_intervals
from ghosted_fast.text.calibration_text import CalibrationText

Removed = tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """One set of layers and one variant."""

    removed: Removed
    variant: Variant


@dataclass(frozen=True)
class Fitting:
    """What operators are fitted on, and how.

    Attributes:
        decoder: The dense model.
        text: Tokens to learn from.
        options: How ghosts are fitted.
        run: Memory for statistics, and whether to show progress.
    """

    decoder: Decoder
    text: CalibrationText
    options: GhostOptions
    run: RunOptions

    def gaps(self, cell: Cell) -> list[Interval]:
        """Return the gaps that a cell's removed layers leave."""
        return removed_intervals(cell.removed, self.decoder.num_layers)

    def jobs(self, cell: Cell) -> list[Job]:
        """Return what a cell needs of a pass that it shares with others."""
        gaps, recovery = self.gaps(cell), RECOVERIES[cell.variant.recovery]
        if recovery.sequential and self.options.sequential and len(gaps) > 1:
            return []
        return [(recovery.name, gap) for gap in gaps]

    def num_bytes(self, job: Job) -> int:
        """Return the bytes of what a job gathers."""
        return RECOVERIES[job[0]].num_bytes(self.decoder.hidden_size, self.options)


def run_cells(
    fitting: Fitting,
    cells: Sequence[Cell],
    judge: Judge,
    done: Callable[[Cell, dict[str, Any]], None],
) -> None:
    """Fit and judge cells; all that share statistics share a pass of the dense model.

    Args:
        fitting: What they share.
        cells: The cells, those of one set of layers together.
        judge: Measures their models.
        done: Called with each cell and its record, as soon as that is known. A recovery that
            cannot serve a gap gives a record with the reason under "refused".
    """
    device = fitting.decoder.device
    budget = fitting.run.memory_budget or default_memory_budget(device)
    for group in groups_within(cells, fitting.jobs, fitting.num_bytes, budget):
        reset_peak_memory(device)
        refused: dict[Job, GhostedFastError] = {}
        patches = fit_patches(
            fitting.decoder,
            fitting.text,
            [job for cell in group for job in fitting.jobs(cell)],
            fitting.options,
            budget,
            fitting.run.progress,
            refused,
        )
        peak_of_pass = peak_memory(device)
        for cell in group:
            reset_peak_memory(device)
            try:
                record = _run_cell(fitting, cell, judge, patches, refused)
            except GhostedFastError as error:
                record = {"refused": str(error)}
            peaks = (peak_memory(device), peak_of_pass if fitting.jobs(cell) else None)
            record["peak_memory"] = max((peak for peak in peaks if peak is not None), default=None)
            done(cell, record)


def _run_cell(
    fitting: Fitting,
    cell: Cell,
    judge: Judge,
    patches: Mapping[Job, Patch],
    refused: Mapping[Job, GhostedFastError],
) -> dict[str, Any]:
    began = time.perf_counter()
    dense = fitting.decoder.model
    if jobs := fitting.jobs(cell):
        for job in jobs:
            if job in refused:
                raise refused[job]
        chosen = [patches[job] for job in jobs]
        # Gaps of one pass each count its forward passes.
        recover = max(patch.seconds for patch in chosen)
    else:
        chosen = fit_gaps(
            fitting.decoder,
            fitting.text,
            cell.variant.recovery,
            fitting.gaps(cell),
            options=fitting.options,
            run=fitting.run,
        )
        recover = 0.0
    smaller = put_patches(dense, cell.removed, _own(chosen))
    after = After()
    if cell.variant.after is not None:
        after = cell.variant.after(smaller, dense, fitting.text.hold())
        if not isinstance(after, After):
            raise TypeError(
                f"expected what is done after {cell.variant.name!r} to return an "
                f"After(corrections=...) (ghosted_fast.grid.After), got {after!r}"
            )
    recover += time.perf_counter() - began
    # Healing changes layers below the gap too.
    record = judge(smaller, 0 if after.healing else cell.removed[0])
    record["corrections"] = after.corrections
    record["healing"] = after.healing and asdict(after.healing)
    record["seconds"]["recover"] = recover
    return record


def _own(patches: Iterable[Patch]) -> list[Patch]:
    """Return patches with ghosts of their own, which a variant may change."""
    return [replace(patch, ghost=copy.deepcopy(patch.ghost)) for patch in patches]


def stand_in(decoder: Decoder, removed: Removed, operators: Sequence[str]) -> Any:
    """Return a model that costs what a cell's model costs, to measure its speed.

    Its ghosts are zero: what they hold does not change the time that they take.

    Args:
        decoder: The dense model.
        removed: The removed layers.
        operators: As `operators_of` gives them; one for each gap, or none.
    """
    gaps = removed_intervals(removed, decoder.num_layers)
    kinds: list[str | None] = [*operators] if operators else [None] * len(gaps)
    patches = []
    for _, kind in zip(gaps, kinds, strict=True):
        if kind is None:
            patches.append(Patch())
            continue
        ghost = GhostLinear(
            decoder.hidden_size,
            bias=kind.endswith(" with bias"),
            norm_eps=1e-6 if kind.startswith("normed") else None,
            device=decoder.device,
            dtype=decoder.dtype,
        )
        patches.append(Patch(ghost.requires_grad_(False)))
    return put_patches(decoder.model, removed, patches)
