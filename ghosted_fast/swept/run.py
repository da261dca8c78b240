"""The way through for a model that stays in its files: what `ghost_model` does for a folder."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ghosted_fast import distributed
from ghosted_fast.checkpoint.model_card import attach_report
from ghosted_fast.checkpoint.save import check_room
from ghosted_fast.errors import ArgumentError, GhostedFastError
from ghosted_fast.fit.sweep.climb import Sweep, SweptText, climb
from ghosted_fast.fit.sweep.plan import Shape, SweepPlan, Work, plan_sweep, resident_bytes
from ghosted_fast.fit.sweep.shelf import FolderShelf, MemoryShelf, Shelf
from ghosted_fast.measure.system import free_memory
from ghosted_fast.models.checked.bos import tell_missing_bos
from ghosted_fast.models.loading import load_model
from ghosted_fast.models.unloaded.opening import Unloaded, open_unloaded
from ghosted_fast.models.unloaded.source import FolderSource
from ghosted_fast.options import Bound, Count, GhostOptions, HowMany, Layers, RunOptions
from ghosted_fast.recovery import RECOVERIES
from ghosted_fast.recovery.collector import Patch
from ghosted_fast.recovery.facts import fitted_facts
from ghosted_fast.recovery.swept import check_swept_recovery, fit_gaps_swept
from ghosted_fast.reports.ghost_report import GhostReport
from ghosted_fast.selection.criteria import CRITERIA
from ghosted_fast.selection.criteria.ghost import TOKENS_FOR_THE_BEST
from ghosted_fast.selection.criteria.request import Selection
from ghosted_fast.selection.select import check_layer_count
from ghosted_fast.selection.swept import check_swept, choose_swept
from ghosted_fast.statistics.sample import Interval
from ghosted_fast.surgery.cut import removed_intervals
from ghosted_fast.surgery.folder import (
    FolderCut,
    check_removable_unloaded,
    cut_folder,
)
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.calibration_text import CalibrationText
from ghosted_fast.text.fingerprints import stored_digest
from ghosted_fast.timing.spans import adding_time, recording

_LOGGER = logging.getLogger(__name__)
# Of what is free, for other programs.
_SHARE = 0.8


@dataclass(frozen=True)
class Asked:
    """What is asked of a sweep.

    Attributes:
        wanted: How many layers go, or which.
        criterion: What chooses them.
        recovery: What takes their place.
        options: How ghosts are fitted.
        run: How much work is done.
    """

    wanted: HowMany
    criterion: str
    recovery: str
    options: GhostOptions
    run: RunOptions

    def check(self) -> None:
        """Raise, before any work, unless a sweep can do it.

        Raises:
            ArgumentError: It cannot; the message says what would do.
        """
        if isinstance(self.wanted, Bound):
            raise ArgumentError(
                f"expected a number of layers or removed for a model that is swept through layer "
                f"by layer, got {self.wanted}, which needs many passes: give more memory"
            )
        if isinstance(self.wanted, Count):
            check_swept(self.criterion)
        check_swept_recovery(self.recovery)
        if self.run.corrections not in ("auto", 0):
            raise ArgumentError(
                "expected no corrections for a model that is swept through layer by layer, got "
                f"corrections={self.run.corrections!r}: they need gradients through all layers. "
                "Give more memory, or correct_ghosts(smaller, model, batches) where both fit"
            )
        if self.run.heal is not None:
            raise ArgumentError(
                "expected heal=None for a model that is swept through layer by layer: healing "
                "needs the smaller model in memory. Save it, and heal it where it fits"
            )

    def work(self, batches: list[Batch], shape: Shape) -> Work:
        """Return how much there is to do, for a text and a model."""
        scored = TOKENS_FOR_THE_BEST * self.run.score_tokens
        chosen, gaps = None, 1
        if isinstance(self.wanted, Count):
            check_layer_count(self.wanted.layers, shape.num_layers)
            chosen = self.wanted.layers if self.criterion == "ghost" else None
            gaps = self._most_gaps(self.wanted.layers, shape.num_layers)
        elif isinstance(self.wanted, Layers):
            gaps = len(removed_intervals(self.wanted.removed, shape.num_layers))
        in_sequence = RECOVERIES[self.recovery].sequential and self.options.sequential
        return Work.of(batches, shape, chosen, scored, gaps, in_sequence)

    def _most_gaps(self, layers: int, num_layers: int) -> int:
        """Return how many gaps so many chosen layers may leave."""
        method = CRITERIA[self.criterion]
        return method.num_statistics(layers, num_layers) if method.published else layers

    def plan(self, unloaded: Unloaded, batches: list[Batch]) -> SweepPlan:
        """Return what the sweep takes.

        Raises:
            CalibrationError: Too little memory is allowed.
        """
        shape = Shape.of(unloaded)
        work = self.work(batches, shape)
        memory = allowed_memory(self.run)
        return plan_sweep(shape, work, self.options, memory, self.run.state is not None)


def allowed_memory(run: RunOptions) -> int:
    """Return the bytes that all of a run may take."""
    return run.memory or int(_SHARE * free_memory(torch.device("cpu")))


def loaded_or_unloaded(model: str | Path | Unloaded, batches: CalibrationText, asked: Asked) -> Any:
    """Return a model in memory if it fits there, else one that stays in its files.

    One that was opened already stays there; one that cannot is loaded.

    Args:
        model: A folder, a hub id, or an opened model.
        batches: Calibration tokens; held as token ids.
        asked: What is asked for.

    Returns:
        A model of transformers, or an `Unloaded`.
    """
    if isinstance(model, Unloaded):
        return model
    unloaded = left_in_files(model, asked.run.memory)
    if unloaded is not None and not fits(unloaded, batches.hold(), asked):
        return unloaded
    del unloaded
    return load_model(model)[0]


def left_in_files(
    spec: str | Path, memory: int | None, dtype: str | None = None
) -> Unloaded | None:
    """Return a model whose weights stay in their files; None for one that can only be loaded.

    Loading it tells what is wrong with it, if anything is.

    Args:
        spec: A local folder, or a hub id.
        memory: `RunOptions.memory`: where it is given, a warning says that it cannot be kept to.
        dtype: As in `load_model`.
    """
    try:
        return open_unloaded(spec, dtype)
    except GhostedFastError as error:
        level = logging.INFO if memory is None else logging.WARNING
        _LOGGER.log(level, "%s is loaded whatever memory it takes: %s", spec, error)
        return None


def fits(unloaded: Unloaded, batches: list[Batch], asked: Asked) -> bool:
    """Return whether a model and its pass fit in the memory that is allowed, and log which it is.

    Args:
        unloaded: The model.
        batches: Calibration tokens; their numbers alone are looked at.
        asked: What is asked for.
    """
    shape = Shape.of(unloaded)
    needed = resident_bytes(shape, asked.work(batches, shape), asked.options)
    memory = allowed_memory(asked.run)
    said = f"{unloaded.spec} takes {needed / 1e9:.1f} GB, of {memory / 1e9:.1f} GB allowed"
    if needed <= memory:
        _LOGGER.info("%s: it is loaded", said)
        return True
    _LOGGER.warning("%s: it is swept through layer by layer", said)
    return False


def ghost_unloaded(
    unloaded: Unloaded, batches: Iterable[Any], asked: Asked
) -> tuple[FolderCut, GhostReport]:
    """Do what `ghost_model` does with a model that stays in its files.

    Args:
        unloaded: The dense model.
        batches: Calibration tokens; held in memory as token ids.
        asked: What is asked for.

    Returns:
        The smaller checkpoint, ready to be saved, and a report.

    Raises:
        ArgumentError: A sweep cannot do what is asked; or see `ghost_model`, as for the others.
    """
    options = asked.options
    if asked.run.corrections == "auto" and asked.recovery == "ghost":
        _LOGGER.warning(
            "ghosts are not corrected: that needs gradients through all layers, which a model that "
            "is swept through does not have in memory"
        )
    seconds = dict.fromkeys(("select", "calibrate", "solve", "correct", "heal"), 0.0)
    text = CalibrationText.of(batches)
    with recording() as spans, _sweep(unloaded, text, asked) as sweep:
        tell_missing_bos(unloaded.model, text.beginning)
        decoder = sweep.source.decoder
        if isinstance(asked.wanted, Layers):
            check_removable_unloaded(unloaded, asked.wanted.removed)
        with adding_time(seconds, "select"):
            selection = _choose(sweep, text, asked)
        if not isinstance(asked.wanted, Layers):
            check_removable_unloaded(unloaded, selection.removed)
        gaps = removed_intervals(selection.removed, decoder.num_layers)
        with adding_time(seconds, "calibrate"):
            patches = _fit(sweep, asked, selection, gaps)
    seconds["solve"] = sum(patch.solve_seconds for patch in patches)
    seconds["calibrate"] -= seconds["solve"]
    report = GhostReport(
        model=decoder.name,
        family=decoder.family.name,
        num_layers=decoder.num_layers,
        removed=selection.removed,
        criterion=None if isinstance(asked.wanted, Layers) else asked.criterion,
        recovery=asked.recovery,
        scores=selection.scores,
        seconds=seconds,
        spans=spans.to_dict(),
    )
    report = replace(report, **fitted_facts(gaps, patches, options, text))
    report = distributed.from_first(report)
    ghosts = [patch.ghost for patch in patches]
    cut = cut_folder(unloaded, selection.removed, ghosts, checked=True)
    attach_report(cut.config, report.to_dict())
    return cut, report


def select_unloaded(unloaded: Unloaded, batches: Iterable[Any], asked: Asked) -> Selection:
    """Do what `select_layers` does with a model that stays in its files.

    Args:
        unloaded: The dense model.
        batches: Calibration tokens; held in memory as token ids.
        asked: How many layers, and the criterion.

    Raises:
        ArgumentError: A sweep cannot do what is asked; or see `select_layers`.
    """
    text = CalibrationText.of(batches)
    with distributed.failing_together(), _sweep(unloaded, text, asked) as sweep:
        return _choose(sweep, text, asked)


@contextmanager
def _sweep(unloaded: Unloaded, text: CalibrationText, asked: Asked) -> Iterator[Sweep]:
    """Yield a sweep of a text through a model, after all ranks were found to ask for the same."""
    asked.check()
    plan = asked.plan(unloaded, text.hold())
    source = FolderSource(unloaded, plan.prefetch)
    checkpoint = stored_digest(unloaded.tensors)
    run = replace(asked.run, progress=False, inplace=False, state=None, memory=None)
    quiet = replace(asked, run=run)
    distributed.check_same({"asked": quiet, "weights of the model": checkpoint})
    distributed.same_text_everywhere(text)
    device, dtype = source.decoder.device, source.decoder.dtype
    with _shelf(asked.run, plan, f"{checkpoint} {text.digest} {dtype} {quiet!r}") as shelf:
        yield Sweep(source, SweptText.of(text.hold(), device), shelf, asked.run.progress)


def _choose(sweep: Sweep, text: CalibrationText, asked: Asked) -> Selection:
    """Return the layers that are asked for, with the states around them on the shelf."""
    wanted = asked.wanted
    if isinstance(wanted, Count):
        return choose_swept(sweep, text, wanted.layers, asked.criterion, asked.options, asked.run)
    assert isinstance(wanted, Layers)
    removed = sorted(wanted.removed)
    if asked.recovery != "none":
        gaps = removed_intervals(removed, sweep.source.decoder.num_layers)
        ends = {boundary for gap in gaps for boundary in gap}
        top = max(ends)
        climb(sweep, top, lambda _: None, last_use=lambda b: top if b in ends else b)
    return Selection(removed, [], asked.criterion)


def _fit(sweep: Sweep, asked: Asked, selection: Selection, gaps: list[Interval]) -> list[Patch]:
    """Return what is put into the gaps."""
    method, known = RECOVERIES[asked.recovery], selection.statistics
    if known is not None and method.of_statistics is not None:
        decoder = sweep.source.decoder
        work = partial(method.of_statistics, decoder, known, asked.options)
        return [distributed.on_first(work, decoder.device)]
    return fit_gaps_swept(sweep, asked.recovery, gaps, asked.options)


@contextmanager
def _shelf(run: RunOptions, plan: SweepPlan, digest: str) -> Iterator[Shelf]:
    """Yield where the states are kept; what was kept is gone once the block has ended well."""
    rank = f"rank{distributed.index()}" if distributed.count() > 1 else ""
    if run.state is not None:
        folder = Path(run.state) / rank
        check_room(folder, plan.disk_bytes)
        shelf = FolderShelf(folder, f"{digest} {distributed.count()}")
        yield shelf
        shelf.clear()
    elif plan.disk_bytes:
        with tempfile.TemporaryDirectory(prefix="ghosted-fast-") as name:
            check_room(Path(name), plan.disk_bytes)
            yield FolderShelf(Path(name) / "states")
    else:
        yield MemoryShelf()
