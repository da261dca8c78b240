"""The way through for a model that stays in its files: what `ghost_model` does for a folder."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ghosted_fast import distributed
from ghosted_fast.checkpoint.model_card import attach_report
from ghosted_fast.checkpoint.save import check_room
from ghosted_fast.errors import GhostedFastError
from ghosted_fast.facts import Budget, CorrectionFacts
from ghosted_fast.fit.sweep.climb import Sweep, SweptText, climb
from ghosted_fast.fit.sweep.correcting import HEAD_READS, LAYER_READS
from ghosted_fast.fit.sweep.plan import PROGRAM_BYTES, SweepPlan, resident_bytes
from ghosted_fast.fit.sweep.shape import Shape
from ghosted_fast.fit.sweep.shelf import DeviceShelf, FolderShelf, MemoryShelf, Shelf
from ghosted_fast.improve.correction import (
    DEFAULT_HELD_OUT_TOKENS,
    DEFAULT_TOKENS,
    can_be_judged,
    take_steps,
)
from ghosted_fast.improve.swept import SweptComparison, SweptSplit
from ghosted_fast.models.checked.bos import tell_missing_bos
from ghosted_fast.models.gap import Gap
from ghosted_fast.models.loading import load_model
from ghosted_fast.models.unloaded.opening import Unloaded, open_unloaded
from ghosted_fast.models.unloaded.source import FolderSource
from ghosted_fast.models.unloaded.transfers import StateCopies, streams_of
from ghosted_fast.options import Count, Layers, PerplexityBound, RunOptions
from ghosted_fast.recovery import RECOVERIES
from ghosted_fast.recovery.collector import Patch
from ghosted_fast.recovery.facts import fitted_facts
from ghosted_fast.recovery.swept import fit_gaps_swept
from ghosted_fast.reports.ghost_report import GhostReport
from ghosted_fast.selection.criteria.request import Selection
from ghosted_fast.selection.swept import choose_swept
from ghosted_fast.selection.swept_how_many import most_layers_swept
from ghosted_fast.statistics.sample import Interval
from ghosted_fast.surgery.cut import removed_intervals
from ghosted_fast.surgery.folder import (
    FolderCut,
    check_removable_unloaded,
    cut_folder,
)
from ghosted_fast.swept.asked import Asked, allowed_memory, allowed_on_host
from ghosted_fast.text.batches import Batch
from ghosted_fast.text.calibration_text import CalibrationText
from ghosted_fast.text.fingerprints import stored_digest
from ghosted_fast.text.folds import sequences_for
from ghosted_fast.timing.spans import adding_time, recording

_LOGGER = logging.getLogger(__name__)


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
    device = asked.device
    unloaded = left_in_files(model, asked.run.memory)
    if unloaded is not None and not fits(unloaded, batches.hold(), asked):
        return unloaded
    del unloaded
    loaded = load_model(model)[0]
    # Some quantized models refuse to be moved, even to where they are.
    return loaded if device.type == "cpu" else loaded.to(device)


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
    memory, whose = allowed_memory(asked.run), ""
    if asked.device.type != "cpu":
        whose = f" on {asked.device}"
        if needed <= memory:  # it is loaded by the host, which then gives it to the device
            needed, memory = PROGRAM_BYTES + shape.all_bytes, allowed_on_host(asked.run)
            whose = " of the host's memory on the way to the device"
    said = f"{unloaded.spec} takes {needed / 1e9:.1f} GB{whose}, of {memory / 1e9:.1f} GB allowed"
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
    seconds = dict.fromkeys(("select", "calibrate", "solve", "correct", "heal"), 0.0)
    text = CalibrationText.of(batches)
    with recording() as spans, _sweep(unloaded, text, asked) as (sweep, plan):
        tell_missing_bos(unloaded.model, text.beginning)
        decoder = sweep.source.decoder
        split = _split(sweep, text, asked, plan)
        if isinstance(asked.wanted, Layers):
            check_removable_unloaded(unloaded, asked.wanted.removed)
        with adding_time(seconds, "select"):
            selection, budget = _choose(sweep, text, asked, to_top=split is not None)
        if not isinstance(asked.wanted, Layers):
            check_removable_unloaded(unloaded, selection.removed)
        gaps = removed_intervals(selection.removed, decoder.num_layers)
        with adding_time(seconds, "calibrate"):
            patches = _fit(sweep, asked, selection, gaps)
        with adding_time(seconds, "correct"):
            corrected = _correct(sweep, asked, gaps, patches, split, plan)
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
        budget=budget,
        corrections=corrected,
    )
    report = replace(report, **fitted_facts(gaps, patches, asked.options, text))
    report = distributed.from_first(report)
    ghosts = [patch.ghost and patch.ghost.to("cpu") for patch in patches]
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
    with distributed.failing_together(), _sweep(unloaded, text, asked) as (sweep, _):
        return _choose(sweep, text, asked)[0]


@contextmanager
def _sweep(
    unloaded: Unloaded, text: CalibrationText, asked: Asked
) -> Iterator[tuple[Sweep, SweepPlan]]:
    """Yield a sweep of a text through a model, and what it takes.

    All ranks were found to ask for the same by then.
    """
    asked.check()
    plan, streams = asked.plan(unloaded, text.hold()), streams_of(asked.device)
    source = FolderSource(unloaded, plan.prefetch, streams)
    checkpoint = stored_digest(unloaded.tensors)
    kind = asked.device.type  # of which each rank has its own
    run = replace(asked.run, progress=False, inplace=False, state=None, memory=None, device=kind)
    quiet = replace(asked, run=run)
    distributed.check_same({"asked": quiet, "weights of the model": checkpoint})
    distributed.same_text_everywhere(text)
    device, dtype = source.decoder.device, source.decoder.dtype
    with (
        _shelf(asked.run, plan, f"{checkpoint} {text.digest} {dtype} {quiet!r}") as shelf,
        nullcontext() if streams is None else streams.computing(),
    ):
        kept = shelf if streams is None else DeviceShelf(shelf, StateCopies(streams))
        yield Sweep(source, SweptText.of(text.hold(), device), kept, asked.run.progress), plan


def _split(sweep: Sweep, text: CalibrationText, asked: Asked, plan: SweepPlan) -> SweptSplit | None:
    """Return the text that ghosts are corrected by; None where they are not.

    Raises:
        CalibrationError: There is too little text for a number of corrections.
    """
    corrections = asked.run.corrections
    if not asked.corrects:
        return None
    found = SweptSplit.of(sweep, text.hold(), DEFAULT_HELD_OUT_TOKENS)
    train, judges = ([row.batch for row in rows] for rows in (found.train, found.judges))
    if not can_be_judged(corrections, train, judges):
        return None
    if not min(distributed.gather(plan.corrections)):
        _LOGGER.warning(
            "ghosts are not corrected: %.1f GB of memory do not suffice for that, give more",
            allowed_memory(asked.run) / 1e9,
        )
        return None
    return found


def _choose(
    sweep: Sweep, text: CalibrationText, asked: Asked, to_top: bool = False
) -> tuple[Selection, Budget | None]:
    """Return the layers that are asked for, and how a bound led to their number.

    The states around them are on the shelf then.

    Args:
        sweep: Of the text.
        text: Calibration tokens.
        asked: What is asked for.
        to_top: Whether the states behind the last layer are wanted too.
    """
    wanted, how = asked.wanted, (asked.criterion, asked.options, asked.run)
    if isinstance(wanted, Count):
        return choose_swept(sweep, text, wanted.layers, *how), None
    if isinstance(wanted, PerplexityBound):
        return most_layers_swept(sweep, text, wanted, *how)
    assert isinstance(wanted, Layers)
    removed = sorted(wanted.removed)
    if asked.recovery != "none":
        count = sweep.source.decoder.num_layers
        gaps = removed_intervals(removed, count)
        ends = {boundary for gap in gaps for boundary in gap} | ({count} if to_top else set())
        top = max(ends)
        climb(sweep, top, lambda _: None, last_use=lambda b: top if b in ends else b)
    return Selection(removed, [], asked.criterion), None


def _fit(sweep: Sweep, asked: Asked, selection: Selection, gaps: list[Interval]) -> list[Patch]:
    """Return what is put into the gaps."""
    method, known = RECOVERIES[asked.recovery], selection.statistics
    if known is not None and method.of_statistics is not None:
        decoder = sweep.source.decoder
        work = partial(method.of_statistics, decoder, known, asked.options)
        return [distributed.on_first(work, decoder.device)]
    return fit_gaps_swept(sweep, asked.recovery, gaps, asked.options)


def _correct(
    sweep: Sweep,
    asked: Asked,
    gaps: Sequence[Interval],
    patches: Sequence[Patch],
    split: SweptSplit | None,
    plan: SweepPlan,
) -> list[CorrectionFacts]:
    """Correct the ghosts, in place, and return what was done; nothing without text for it."""
    if split is None:
        return []
    filled = [Gap(*gap, patch.ghost) for gap, patch in zip(gaps, patches, strict=True)]
    comparison = SweptComparison(sweep, filled, split)
    _LOGGER.warning(
        "each correction reads some %.1f GB: the layers above the first gap %d times, the head %d "
        "times",
        plan.correction_bytes / 1e9,
        LAYER_READS,
        HEAD_READS,
    )
    sequences = sequences_for(DEFAULT_TOKENS, [row.batch for row in split.train])
    return take_steps(
        comparison, asked.run.corrections, sequences=sequences, progress=asked.run.progress
    )


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
