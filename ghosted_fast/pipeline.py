"""The one way through: choose layers, fit what takes their place, cut, improve, and report."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ghosted_fast import distributed
from ghosted_fast.checkpoint.model_card import attach_report
from ghosted_fast.errors import ArgumentError, UnsupportedModelError, renamed
from ghosted_fast.improve.correction import correct_ghosts
from ghosted_fast.improve.gradients import check_gradients
from ghosted_fast.improve.healing import check_healable, heal
from ghosted_fast.models.checked.bos import tell_missing_bos
from ghosted_fast.models.decoder import Decoder
from ghosted_fast.models.quantized.loading import quantization_of
from ghosted_fast.models.structure import share_copy
from ghosted_fast.models.unloaded.offloaded import in_files_if_offloaded
from ghosted_fast.models.unloaded.opening import Unloaded
from ghosted_fast.options import (
    Bound,
    Count,
    GhostOptions,
    Layers,
    PerplexityBound,
    RunOptions,
    SpeedBound,
    how_many,
)
from ghosted_fast.recovery import RECOVERIES, Patch, check_recovery
from ghosted_fast.recovery.facts import fitted_facts
from ghosted_fast.recovery.patches import fit_gaps, put_patches
from ghosted_fast.reports.ghost_report import GhostReport
from ghosted_fast.selection.criteria import CRITERIA, check_criterion
from ghosted_fast.selection.how_many import choose_layers, remeasured
from ghosted_fast.selection.select import check_layer_count
from ghosted_fast.statistics.interval import interval_bytes
from ghosted_fast.surgery.cut import remove_layers, removed_intervals
from ghosted_fast.surgery.removable import check_removable
from ghosted_fast.swept.asked import Asked
from ghosted_fast.swept.run import ghost_unloaded, loaded_or_unloaded
from ghosted_fast.text.calibration_text import CalibrationText
from ghosted_fast.timing.spans import adding_time, recording

_LOGGER = logging.getLogger(__name__)
_OPTIONS, _RUN = "a field of options=GhostOptions(...)", "a field of run=RunOptions(...)"


@renamed(
    num_layers="remove",
    max_perplexity_increase="remove=PerplexityBound(...)",
    min_decode_speedup="remove=SpeedBound(...)",
    input="features, a field of options=GhostOptions(...)",
    **dict.fromkeys(("token_weight", "first_state", "bias", "damping", "sequential"), _OPTIONS),
    **dict.fromkeys(("corrections", "heal", "heal_state", "score_tokens"), _RUN),
    **dict.fromkeys(("refine", "refine_state"), "heal, a field of run=RunOptions(...),"),
    **dict.fromkeys(("memory_budget", "beam", "inplace", "progress"), _RUN),
)
@distributed.failing_together()
def ghost_model(
    model: Any,
    batches: Iterable[Any],
    remove: int | Bound | None = None,
    *,
    removed: Sequence[int] | None = None,
    criterion: str = "ghost",
    recovery: str = "ghost",
    options: GhostOptions | None = None,
    run: RunOptions | None = None,
) -> tuple[Any, GhostReport]:
    """Remove layers from a model and put a ghost in the place of each removed run.

    In a process group of torch.distributed the ranks share the text: every rank calls this with the
    same model, arguments and whole text, and all get the same ghosts, to the bit.

    Args:
        model: A transformers causal language model of a known family; or a folder or hub id. Of
            that a model is loaded, onto `RunOptions.device`, if `RunOptions.memory` suffices, else
            it stays in its files and is swept through layer by layer, as is one of
            `open_unloaded`.
        batches: Calibration tokens: dicts of `input_ids` [batch, length] and `attention_mask`, or
            token tensors. Read once where `removed` is given, nothing is corrected or healed and
            there are no other ranks, else held in memory as token ids.
        remove: How many layers to remove; the criterion chooses them. Or a bound that their number
            follows from: `PerplexityBound(0.1)` for as many as 10% more perplexity allows,
            `SpeedBound(1.3)` for as few as make decoding 1.3 times as fast; bounds are for the
            recovery "ghost". Give this or `removed`.
        removed: The layers to remove.
        criterion: "ghost", "ghost-search", or a published one: "streamline", "shortgpt", "sleb",
            "taylor", "angular", "lorp", "prunecomp"; see `select_layers`.
        recovery: What takes the place of each removed run: "ghost" or a published rival: "none",
            "linearpatch-d", "linearpatch-r", "replaceme", "replaceme-cosine", "prunecomp", "nbl",
            "ghost-paper"; see `ghosted_fast.recovery`. The options of ghosts do not concern the
            rivals.
        options: How ghosts are fitted.
        run: How much work is done: corrections, healing, tokens to score on, memory; whether the
            given model is cut in place; whether to show progress.

    Returns:
        The smaller model, in the dtype and on the device of the given one, and a report. Of a model
        that was swept through it is a `FolderCut`, to be saved.

    Raises:
        ArgumentError: An option has no such value, or the layers cannot be removed.
        CalibrationError: There is too little text, or too little memory for the statistics.
        NonFiniteError: An activation is NaN or infinite; the message names boundary and batch.
        BudgetError: The bound cannot be kept; the message holds the best that was reached.
        UnknownFamilyError: The model's layers cannot be found.
        UnsupportedModelError: Its layers depend on one another in ways that a cut breaks, or a cut
            model could not be saved and loaded.
        RankError: Another rank failed, or is gone.

    Source: Yun et al., arXiv 2605.15491; selection, weights, normed input and first state are ours.
    """
    options, run = options or GhostOptions(), run or RunOptions()
    request = Asked(how_many(remove, removed), criterion, recovery, options, run)
    _check(request)
    with recording() as spans:
        smaller, report = _ghost_model(in_files_if_offloaded(model), batches, request)
    return smaller, replace(report, spans=report.spans or spans.to_dict())


def _ghost_model(model: Any, batches: Iterable[Any], request: Asked) -> tuple[Any, GhostReport]:
    """Do the work of `ghost_model`."""
    wanted, criterion, recovery = request.wanted, request.criterion, request.recovery
    options, run = request.options, request.run
    if isinstance(model, str | Path | Unloaded):
        batches = CalibrationText.of(batches)
        model = loaded_or_unloaded(model, batches, request)
        if isinstance(model, Unloaded):
            return ghost_unloaded(model, batches, request)
    method = RECOVERIES[recovery]
    decoder = Decoder.of(model)
    which = list(wanted.removed) if isinstance(wanted, Layers) else None
    count = wanted.layers if isinstance(wanted, Count) else wanted
    asked: dict[str, Any] = {"remove": count} if which is None else {"removed": which}
    asked |= {"criterion": criterion, "recovery": recovery}
    if which is not None:
        check_removable(model, which)
    here = replace(run, progress=False, inplace=False, heal_state=None, device="cpu")
    distributed.check_same({**asked, "options": options, "run": here}, model)
    text = distributed.same_text_everywhere(batches)
    if run.heal is not None:
        check_healable(decoder.model, run.heal)
    corrects = method.improvable and run.corrections != 0
    if corrects and not _passes_gradients(decoder.model, run):
        corrects = False
    if corrects or run.heal or not method.improvable or not isinstance(wanted, Layers):
        text.hold()
    tell_missing_bos(model, text.beginning)
    compared = isinstance(wanted, SpeedBound) or run.heal is not None
    dense = share_copy(model) if run.inplace and compared else model
    seconds = dict.fromkeys(("select", "calibrate", "solve", "correct", "heal"), 0.0)
    with adding_time(seconds, "select"):
        selection, budget = choose_layers(decoder, text, wanted, criterion, options, run)
    if which is None:
        check_removable(model, selection.removed)
    gaps = removed_intervals(selection.removed, decoder.num_layers)
    report = GhostReport(
        model=decoder.name,
        family=decoder.family.name,
        num_layers=decoder.num_layers,
        removed=selection.removed,
        criterion=None if isinstance(wanted, Layers) else criterion,
        recovery=recovery,
        scores=selection.scores,
        seconds=seconds,
        calibrated_in=quantization_of(model.config),
    )
    with adding_time(seconds, "calibrate"):
        patches = fit_gaps(
            decoder, text, recovery, gaps, options=options, run=run, known=selection.statistics
        )
    seconds["solve"] = sum(patch.solve_seconds for patch in patches)
    seconds["calibrate"] -= seconds["solve"]
    report = replace(report, **fitted_facts(gaps, patches, options, text))
    if corrects:
        report = _correct(decoder, text, report, patches, run)
    smaller = put_patches(model, selection.removed, patches, run.inplace)
    if budget is not None and isinstance(wanted, SpeedBound):
        budget = remeasured(budget, dense, smaller)
    if run.heal is not None:
        report = _heal(smaller, dense, text, report, run)
    report = distributed.from_first(replace(report, budget=budget))
    attach_report(smaller.config, report.to_dict())
    return smaller, report


def _check(asked: Asked) -> None:
    """Raise unless the arguments of `ghost_model` go together."""
    wanted, recovery = asked.wanted, asked.recovery
    check_criterion(asked.criterion)
    check_recovery(recovery)
    if RECOVERIES[recovery].improvable:
        return
    if asked.run.corrections not in ("auto", 0):
        raise ArgumentError(
            f"expected no corrections with recovery {recovery!r}, which is put in as it was "
            "published: use correct_ghosts(smaller, model, batches) on what it gives"
        )
    if isinstance(wanted, Bound):
        raise ArgumentError(
            f"expected a number of layers or removed with recovery {recovery!r}, got {wanted}: "
            "its number is found with ghosts in place"
        )


def _passes_gradients(model: Any, run: RunOptions) -> bool:
    """Return whether ghosts of a model can be corrected; warn if not and nobody asked for it.

    Raises:
        UnsupportedModelError: They cannot, and a number of corrections was asked for.
    """
    try:
        check_gradients(model)
    except UnsupportedModelError as error:
        if run.corrections != "auto":
            raise
        _LOGGER.warning("ghosts are not corrected: %s", error)
        return False
    return True


def _correct(
    decoder: Decoder,
    text: CalibrationText,
    report: GhostReport,
    patches: Sequence[Patch],
    run: RunOptions,
) -> GhostReport:
    """Correct the ghosts, in place, and return the report with what was done."""
    trial = remove_layers(decoder.model, report.removed, [patch.ghost for patch in patches])
    with adding_time(report.seconds, "correct"):
        corrected = correct_ghosts(
            trial, decoder.model, text, run.corrections, progress=run.progress
        )
    return replace(report, corrections=corrected)


def _heal(
    smaller: Any, dense: Any, text: CalibrationText, report: GhostReport, run: RunOptions
) -> GhostReport:
    """Heal the smaller model, in place, and return the report with what was done."""
    with adding_time(report.seconds, "heal"):
        healed = heal(smaller, dense, text, run.heal, state=run.heal_state, progress=run.progress)
    return replace(report, healing=healed)


def statistics_bytes_needed(
    model: Any,
    how_many: Count | Layers | PerplexityBound,
    criterion: str = "ghost",
    options: GhostOptions | None = None,
) -> int:
    """Return the bytes of statistics that `ghost_model` would hold at once, in a single pass.

    Args:
        model: The dense model.
        how_many: How many layers would be removed, or which; of a bound the most that any number
            takes.
        criterion: As in `ghost_model`.
        options: How the ghosts would be fitted.

    Raises:
        ArgumentError: The layers cannot be removed, or there is no such criterion.
    """
    decoder = Decoder.of(model)
    if isinstance(how_many, Layers):
        count = len(removed_intervals(how_many.removed, decoder.num_layers))
    else:
        check_criterion(criterion)
        numbers: Iterable[int] = range(1, decoder.num_layers)
        if isinstance(how_many, Count):
            check_layer_count(how_many.layers, decoder.num_layers)
            numbers = [how_many.layers]
        held = CRITERIA[criterion].num_statistics
        count = max(held(number, decoder.num_layers) for number in numbers)
    return count * interval_bytes(decoder.hidden_size, options or GhostOptions())
